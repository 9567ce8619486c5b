package policyd

import (
	"context"
	"time"
)

// pause waits before the attempt'th try again: 100 ms, doubled up to 2 s.
func pause(ctx context.Context, attempt int) error {
	t := time.NewTimer(min(100*time.Millisecond<<min(attempt, 5), 2*time.Second))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Package backoff is how long to wait before trying again: longer each time,
// never the same as everybody else, and not at all once there is no point. What
// to try, and whether an error is worth another attempt, is the caller's.
package backoff

import (
	"context"
	"math/rand/v2"
	"time"
)

// Backoff counts failed attempts and waits between them. The zero value is
// ready: 100 ms, doubled each time, 1 s at most. It is for one goroutine.
type Backoff struct {
	// First is the mean wait after the first failure; 0: 100 ms.
	First time.Duration
	// Max bounds every wait; 0: 1 s.
	Max time.Duration

	attempt int
}

// Next returns the next wait: half of the doubled value for sure, the other half
// by chance, so that many who lost the same peer do not come back at once.
func (b *Backoff) Next() time.Duration {
	first, limit := b.First, b.Max
	if first <= 0 {
		first = 100 * time.Millisecond
	}
	if limit <= 0 {
		limit = time.Second
	}
	wait := limit
	// Shifted further, the product would be above any limit, or overflow.
	if b.attempt < 30 {
		if w := first << b.attempt; w > 0 && w < limit {
			wait = w
		}
	}
	b.attempt++
	return wait/2 + rand.N(wait/2+1)
}

// Wait sleeps for the next wait. It returns ctx's error at once when ctx ends.
func (b *Backoff) Wait(ctx context.Context) error {
	timer := time.NewTimer(b.Next())
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return ctx.Err()
	}
}

// Attempt returns the number of waits since the start or the last Reset.
func (b *Backoff) Attempt() int { return b.attempt }

// Reset starts again with First: the last attempt succeeded.
func (b *Backoff) Reset() { b.attempt = 0 }

// Keep runs run again and again until ctx ends, and returns ctx's error. When
// run returns, it waits; a run that lasted longer than the longest wait was a
// success and starts the waits anew. failed, if not nil, is told each run's
// error and the number of failures in a row.
func (b *Backoff) Keep(ctx context.Context, run func(context.Context) error, failed func(err error, attempt int)) error {
	for ctx.Err() == nil {
		start := time.Now()
		err := run(ctx)
		if ctx.Err() != nil {
			break
		}
		if time.Since(start) > max(b.Max, time.Second) {
			b.Reset()
		}
		if failed != nil {
			failed(err, b.attempt+1)
		}
		if err := b.Wait(ctx); err != nil {
			return err
		}
	}
	return ctx.Err()
}

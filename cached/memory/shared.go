package memory

import (
	"context"
	"time"

	"sallyport/cached"
)

// Shared is a store as one of several servers sees it.
type Shared struct {
	*Store
	wake chan struct{} // room for one: somebody wrote
}

var _ cached.Shared = (*Shared)(nil)

// NewShared returns another view of the store, for one more server.
func NewShared(s *Store) *Shared {
	v := &Shared{Store: s, wake: make(chan struct{}, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.views = append(s.views, v.wake)
	return v
}

// Wait implements cached.Shared.
func (v *Shared) Wait(ctx context.Context, max time.Duration) error {
	timer := time.NewTimer(max)
	defer timer.Stop()
	select {
	case <-v.wake:
	case <-timer.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// Confirm implements cached.Shared: there is but one map.
func (v *Shared) Confirm(ctx context.Context) error { return ctx.Err() }

package cached

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sallyport"
)

const (
	minLease = time.Second
	maxLease = time.Hour

	// leaseLook is how often a holder compares its lease with the wall clock: before
	// that has told the next one (clock.earlier, sweepEvery).
	leaseLook = 500 * time.Millisecond
)

// errLeaseLost is the cause of the end of a holder's context.
var errLeaseLost = errors.New("lease is lost")

// holder is the payload of a lease record.
type holder struct {
	Token string `json:"token"`
}

// Lease implements sallyport.Records. The lease is a record that ends by itself
// after ttl and is written anew each third of it, always on condition that
// nobody else wrote it: a holder that was away too long can neither prolong nor
// give back what another holds by now. The holder's context ends no later than
// the lease itself could pass on, whatever becomes of the wall clock meanwhile: the
// holder goes by the clock that ends the lease first, and the next one waits for
// the clock that ends it last.
func (s *Server) Lease(ctx context.Context, name string, ttl time.Duration, hold func(context.Context) error) error {
	if ttl < minLease || ttl > maxLease {
		return refuse("a lease lasts %v to %v, not %v", minLease, maxLease, ttl)
	}
	l := &lease{server: s, name: name, ttl: ttl, token: sallyport.NewID("h")}
	if err := l.renew(ctx, sallyport.Condition{Absent: true}); err != nil {
		if errors.Is(err, sallyport.ErrConflict) {
			err = sallyport.ErrLeaseHeld
		}
		return fmt.Errorf("lease %s: %w", name, err)
	}
	held, lose := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		lose(l.keep(held))
	}()
	err := hold(held)
	lose(nil)
	<-done
	l.release(context.WithoutCancel(ctx))
	return err
}

type lease struct {
	server   *Server
	name     string
	ttl      time.Duration
	token    string
	revision sallyport.Revision // of our record; 0: we have none
	until    reading            // when another may take it, by either clock
}

// renew writes the lease for another ttl. The end counts from before the write,
// so that the store never ends it earlier than the holder believes.
func (l *lease) renew(ctx context.Context, cond sallyport.Condition) error {
	start := l.server.clock.read()
	op := sallyport.Put(sallyport.KindLease, l.name, holder{l.token})
	op.If = cond
	if err := checkOp(&op); err != nil {
		return err
	}
	rev, err := l.server.submit(ctx, &job{plan: func(v *view) ([]sallyport.Op, error) {
		op.Expires = l.server.clock.now().Add(l.ttl)
		return v.admit([]sallyport.Op{op})
	}, touches: []Key{{op.Kind, op.ID}}})
	if err != nil {
		return err
	}
	l.revision, l.until = rev, reading{wall: start.wall.Add(l.ttl), steady: start.steady.Add(l.ttl)}
	return nil
}

// keep renews the lease until ctx ends (nil) or the lease is lost (why).
func (l *lease) keep(ctx context.Context) error {
	tick := time.NewTicker(l.ttl / 3)
	defer tick.Stop()
	look := time.NewTicker(leaseLook)
	defer look.Stop()
	for {
		end := time.NewTimer(time.Until(l.until.steady))
		select {
		case <-ctx.Done():
			end.Stop()
			return nil
		case <-l.server.ended:
			end.Stop()
			return fmt.Errorf("%w: %w", errLeaseLost, l.server.alive())
		case <-end.C:
			return errLeaseLost
		case <-look.C:
			end.Stop()
			if next := l.server.clock.read().wall.Add(leaseLook); !next.Before(l.until.wall) {
				return errLeaseLost // maybe the clock was set, or the machine was suspended
			}
			continue
		case <-tick.C:
			end.Stop()
		}
		renewal, cancel := context.WithDeadline(ctx, l.until.steady)
		err := l.renew(renewal, sallyport.Condition{Revision: l.revision})
		cancel()
		if errors.Is(err, sallyport.ErrConflict) {
			return errLeaseLost
		}
		if err != nil && ctx.Err() == nil {
			l.server.log.Warn("lease is not renewed", "lease", l.name, "error", err)
		}
	}
}

// release gives the lease back, if it is still ours.
func (l *lease) release(ctx context.Context) {
	op := sallyport.Op{
		Kind: sallyport.KindLease, ID: l.name, Delete: true,
		If: sallyport.Condition{Revision: l.revision},
	}
	_, err := l.server.submit(ctx, admitting([]sallyport.Op{op}))
	if err != nil && !errors.Is(err, sallyport.ErrConflict) {
		l.server.log.Debug("lease is not released, it ends by itself", "lease", l.name, "error", err)
	}
}

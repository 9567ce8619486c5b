package tunnel

import (
	"context"
	"errors"
	"time"
)

// HeadStart is how long QUIC may take before a lane is tried beside it.
const HeadStart = 250 * time.Millisecond

// DialFunc reaches a gateway over one carrier.
type DialFunc func(ctx context.Context) (Carrier, error)

// Race dials in order, each head after the one before it, or at once when that
// one has failed, and returns the first carrier that stands. The others are
// cancelled, and closed if they made it all the same; Race returns after they
// have. If all fail, the error of the first is returned, joined with the others'.
func Race(ctx context.Context, head time.Duration, dials ...DialFunc) (Carrier, error) {
	if len(dials) == 0 {
		return nil, errors.New("race: nothing to dial")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type arrival struct {
		carrier Carrier
		err     error
		lane    int
	}
	arrivals := make(chan arrival)
	started, finished := 0, 0
	start := func() {
		i := started
		started++
		go func() {
			c, err := dials[i](ctx)
			arrivals <- arrival{c, err, i}
		}()
	}
	var winner Carrier
	errs := make([]error, len(dials))
	start()
	timer := time.NewTimer(head)
	defer timer.Stop()
	for finished < started {
		select {
		case <-timer.C:
			if winner == nil && started < len(dials) && ctx.Err() == nil {
				start()
				timer.Reset(head)
			}
		case a := <-arrivals:
			finished++
			errs[a.lane] = a.err
			switch {
			case a.err == nil && winner == nil:
				winner = a.carrier
				cancel()
			case a.err == nil:
				a.carrier.Close()
			case winner == nil && started < len(dials) && ctx.Err() == nil:
				start()
				timer.Reset(head)
			}
		}
	}
	if winner != nil {
		return winner, nil
	}
	return nil, errors.Join(errs...)
}

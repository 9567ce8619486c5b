package tunnel

import (
	"context"
	"errors"
	"io"
	"time"

	"sallyport"
	"sallyport/proto/connect"
)

// HeadStart is how long QUIC may take before a lane is tried beside it.
const HeadStart = 250 * time.Millisecond

// lastChance is how long the other carriers may take once one of them met somebody
// who refuses or is not to be trusted: a box that opens TLS may let QUIC through.
const lastChance = 2 * time.Second

// DialFunc reaches a gateway, over one carrier for example.
type DialFunc[C io.Closer] func(ctx context.Context) (C, error)

// Race dials in order, each head after the one before it, or at once when that
// one has failed, and returns the first that stands. The others are
// cancelled, and closed if they made it all the same; Race returns after they
// have. If all fail, the error is that of the first which met somebody (a gateway
// that refuses, a certificate not to be trusted), who after lastChance ends the
// race; when nobody answered, it is the error of the first, joined with the others'.
func Race[C io.Closer](ctx context.Context, head time.Duration, dials ...DialFunc[C]) (C, error) {
	var winner, none C
	if len(dials) == 0 {
		return none, errors.New("race: nothing to dial")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type arrival struct {
		made C
		err  error
		lane int
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
	won := false
	var met error // of the first dial that met somebody
	errs := make([]error, len(dials))
	start()
	timer := time.NewTimer(head)
	defer timer.Stop()
	for finished < started {
		select {
		case <-timer.C:
			if !won && started < len(dials) && ctx.Err() == nil {
				start()
				timer.Reset(head)
			}
		case a := <-arrivals:
			finished++
			errs[a.lane] = a.err
			if met == nil && metSomebody(a.err) {
				met = a.err
				defer time.AfterFunc(lastChance, cancel).Stop()
			}
			switch {
			case a.err == nil && !won:
				winner, won = a.made, true
				cancel()
			case a.err == nil:
				a.made.Close()
			case !won && started < len(dials) && ctx.Err() == nil:
				start()
				timer.Reset(head)
			}
		}
	}
	if won {
		return winner, nil
	}
	if met != nil {
		return none, met
	}
	return none, errors.Join(errs...)
}

// metSomebody reports whether a dial failed by what the other side is or said, and
// not because nobody could be reached.
func metSomebody(err error) bool {
	var known *sallyport.Error
	return errors.As(err, &known) && known.Code != connect.ProblemGatewayDown
}

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"time"

	"sallyport"
	"sallyport/agent/login"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

// Which gateway is used, and when it is left for another one. A gateway that was
// killed answers with silence (QUIC) as does one that is frozen or behind a broken
// network; only a person's patience tells silence from slowness, so the agent asks
// for a sign of life as soon as an answer takes long, and tries elsewhere without
// it. Flows that are open stay on the old carrier: should it come back, so do they.
const (
	// gatewayHeadStart is how long a gateway may take before the next one is tried
	// beside it.
	gatewayHeadStart = 750 * time.Millisecond
	// answerSoon is after how long without an answer the gateway is asked whether it
	// is there, and signOfLife how long it may take to say so.
	answerSoon = 500 * time.Millisecond
	signOfLife = time.Second
)

// eventsSoon is how long a new carrier waits for the gateway's events.
const eventsSoon = 1500 * time.Millisecond

// errNoSign ends a wait for a gateway that gives no sign of life.
var errNoSign = errors.New("the gateway gives no sign of life")

// dial gets a session and races its gateways, each with a head start before the
// next.
func (a *Agent) dial(ctx context.Context, force bool) (*link, error) {
	s, err := a.liveSession(ctx, force)
	if err != nil {
		return nil, err
	}
	var dials []tunnel.DialFunc[*link]
	for _, g := range a.inOrder(s.Gateways) {
		dials = append(dials, func(dialCtx context.Context) (*link, error) { return a.dialGateway(ctx, dialCtx, g, s) })
	}
	l, err := inRounds(ctx, dials)
	if err != nil {
		return nil, err
	}
	// Before the first question, so that it is answered from what is true now.
	reportCtx, done := context.WithTimeout(ctx, firstReport)
	defer done()
	if err := a.reportFirst(reportCtx, l); sallyport.OutcomeOf(err) == sallyport.OutcomeLogin {
		l.Close()
		return nil, err
	}
	a.adopt(ctx, l)
	return l, nil
}

// dialRounds are how long all gateways together may take, round after round. QUIC
// asks a silent gateway more and more rarely: a dial that began long before the
// gateway is back would be the last to notice.
var dialRounds = [...]time.Duration{2500 * time.Millisecond, 2500 * time.Millisecond, 5 * time.Second}

// inRounds races the dials, and again while nobody answers in time.
func inRounds(ctx context.Context, dials []tunnel.DialFunc[*link]) (l *link, err error) {
	for _, limit := range dialRounds {
		round, cancel := context.WithTimeout(ctx, limit)
		l, err = tunnel.Race(round, gatewayHeadStart, dials...)
		late := round.Err() != nil
		cancel()
		if err == nil || !late || ctx.Err() != nil || !Unreached(err) {
			break
		}
	}
	return l, err
}

// inOrder returns the gateways as they are to be tried: the one that worked last
// first, and the one that was given up last at the end.
func (a *Agent) inOrder(gateways []sallyport.GatewayInfo) []sallyport.GatewayInfo {
	a.mu.Lock()
	good, bad := a.goodGateway, a.badGateway
	a.mu.Unlock()
	rank := func(g sallyport.GatewayInfo) int {
		switch g.URL {
		case bad:
			return 2
		case good:
			return 0
		}
		return 1
	}
	return slices.SortedStableFunc(slices.Values(gateways), func(x, y sallyport.GatewayInfo) int { return rank(x) - rank(y) })
}

// dialGateway makes a carrier to one gateway; it stands once the gateway's events
// are heard, so that a flow that is cut at once is not cut without a reason.
// dialCtx bounds that, life what goes on with the carrier.
func (a *Agent) dialGateway(life, dialCtx context.Context, g sallyport.GatewayInfo, s *login.Session) (*link, error) {
	u, err := url.Parse(g.URL)
	if err != nil {
		return nil, fmt.Errorf("gateway %s: %w", g.Name, err)
	}
	defer a.during("gateway " + u.Host)()
	conf, err := a.tlsConfig(g)
	if err != nil {
		return nil, err
	}
	network := networkTo(dialCtx, u)
	order := a.order(network)
	c, err := a.cfg.Dial(dialCtx, order, tunnel.DialConfig{Gateway: g, TLS: conf})
	if err != nil {
		return nil, tunnel.DialFailure(u.Host, err)
	}
	a.won(network, order, c.Name())
	l := newLink(c, g, u.Hostname(), s.Session)
	a.tasks.Go(func() { a.readEvents(life, l) })
	late := time.NewTimer(eventsSoon)
	defer late.Stop()
	select {
	case <-l.hears:
	case <-late.C: // it may do without
	case <-c.Done():
		l.Close()
		return nil, tunnel.DialFailure(u.Host, c.Err())
	case <-dialCtx.Done():
		l.Close()
		return nil, tunnel.DialFailure(u.Host, context.Cause(dialCtx))
	}
	return l, nil
}

// leave takes a link out of use for new flows; those that it has stay on it.
func (a *Agent) leave(l *link, why error) {
	l.mu.Lock()
	first := !l.left
	l.left = true
	l.mu.Unlock()
	if !first {
		return
	}
	close(l.gone)
	a.distrust(l)
	a.cfg.Log.Warn("gateway left", "gateway", l.gateway.URL, "carrier", l.carrier.Name(), "error", why)
}

// distrust has the link's gateway tried after all others.
func (a *Agent) distrust(l *link) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.badGateway = l.gateway.URL
	if a.goodGateway == a.badGateway {
		a.goodGateway = ""
	}
}

// answered runs ask, which waits for the gateway's answer, and leaves the link if
// the gateway gives no sign of life meanwhile. The error is then Unreached.
func (a *Agent) answered(ctx context.Context, l *link, ask func(context.Context) error) error {
	askCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan error, 1)
	go func() { done <- ask(askCtx) }()
	watch := time.NewTicker(answerSoon)
	defer watch.Stop()
	for {
		select {
		case err := <-done:
			return a.judged(ctx, l, err)
		case <-watch.C:
		}
		if err := l.alive(askCtx); err != nil && ctx.Err() == nil {
			select {
			case err := <-done: // the answer was quicker
				return a.judged(ctx, l, err)
			default:
			}
			a.leave(l, errNoSign)
			cancel(errNoSign)
			<-done
			return tunnel.DialFailure(l.host, errNoSign)
		}
	}
}

// judged leaves a link on which a request failed because nobody is there.
func (a *Agent) judged(ctx context.Context, l *link, err error) error {
	if err != nil && ctx.Err() == nil && Unreached(err) && !dead(l) {
		a.leave(l, err)
	}
	return err
}

// alive returns nil if the gateway answers anything at all. Everybody who waits on
// the link shares the question.
func (l *link) alive(ctx context.Context) error {
	answer := l.pings.DoChan("", func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), signOfLife)
		defer cancel()
		resp, err := l.request(ctx, http.MethodGet, connect.PathPing, nil, nil)
		if err != nil {
			return nil, err
		}
		return nil, resp.Body.Close()
	})
	select {
	case r := <-answer:
		return r.Err
	case <-ctx.Done():
		return nil
	}
}

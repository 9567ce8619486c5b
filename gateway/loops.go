package gateway

import (
	"context"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport"
	"sallyport/internal/backoff"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

const (
	// tickEvery is how exactly the clock is kept: a flow may outlive its end by
	// this much.
	tickEvery = 100 * time.Millisecond
	// peersEvery is how often the addresses of peers are compared: QUIC roams
	// without telling.
	peersEvery = time.Second
	// chunk is how many questions go into one call when much is due.
	chunk = 512
	// parallelAsks is how many of these calls are under way at the same time.
	parallelAsks = 4
	// parallelCuts is how many streams are reset at the same time, so that one
	// that is slow to close holds up few others.
	parallelCuts = 16
	// farewell is how long an agent may take to read why its carrier closes.
	farewell = 100 * time.Millisecond
)

// watch follows policyd's stream of changes until ctx ends.
func (s *Server) watch(ctx context.Context) error {
	retry := backoff.Backoff{First: 20 * time.Millisecond, Max: time.Second}
	retry.Keep(ctx,
		func(ctx context.Context) error { return s.deps.Changes.Watch(ctx, s.notice) },
		func(err error, attempt int) {
			s.log.Warn("stream of changes broke", "error", err, "attempt", attempt)
		})
	return nil
}

// notice takes one message of policyd.
func (s *Server) notice(n sallyport.Notice) error {
	marked, err := s.table.notice(time.Now(), n)
	if err != nil {
		return err
	}
	if n.Trust != nil {
		if err := s.believe(*n.Trust); err != nil {
			s.log.Error("trust bundle not taken, the earlier one stays", "error", err)
		}
	}
	if n.Forbidden != nil || n.First {
		if err := s.guard.SetForbidden(n.Forbidden); err != nil {
			s.log.Error("forbidden address not understood", "error", err)
		}
	}
	if marked > 0 {
		s.askAgain()
	}
	return nil
}

// askAgain wakes reask.
func (s *Server) askAgain() {
	select {
	case s.again <- struct{}{}:
	default:
	}
}

// reask asks again for everything that is due, as long as something is.
func (s *Server) reask(ctx context.Context) error {
	for {
		select {
		case <-s.again:
		case <-ctx.Done():
			return nil
		}
		for pause := minPause; !s.reaskDue(ctx); pause = min(2*pause, maxPause) {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return nil
			}
		}
	}
}

// reaskDue asks once for all that is due, cuts what is not allowed any more, and
// reports whether nothing is left to ask. Carriers come after all flows, so that a
// flow is cut for its own reason.
func (s *Server) reaskDue(ctx context.Context) bool {
	b := s.table.takeDue(time.Now(), tunnel.ServerConn.RemoteAddr)
	for _, part := range [][2]int{{0, b.flows}, {b.flows, len(b.questions)}} {
		if err := s.reaskPart(ctx, b, part[0], part[1]); err != nil {
			s.log.Warn("live flows could not be decided again", "flows", len(b.questions), "error", err)
			return false
		}
	}
	return s.table.dueCount() == 0
}

// reaskPart asks b's questions from first up to end in several calls: while the
// answers of one are carried out, the next are on their way.
func (s *Server) reaskPart(ctx context.Context, b batch, first, end int) error {
	calls, ctx := errgroup.WithContext(ctx)
	calls.SetLimit(parallelAsks)
	for from := first; from < end; from += chunk {
		to := min(from+chunk, end)
		calls.Go(func() error {
			answers, err := s.authorize(ctx, b.questions[from:to])
			if err != nil {
				return err
			}
			s.end(s.table.settle(b, from, answers))
			return nil
		})
	}
	return calls.Wait()
}

// tick keeps the clock: staleness, ends of validity, answers that did not come,
// peers that moved.
func (s *Server) tick(ctx context.Context) error {
	t := time.NewTicker(tickEvery)
	defer t.Stop()
	lastPeers := time.Now()
	for {
		var now time.Time
		select {
		case <-t.C:
			now = time.Now()
		case <-ctx.Done():
			return nil
		}
		cuts, marked := s.table.clock(now)
		s.end(cuts)
		if now.Sub(lastPeers) >= peersEvery {
			lastPeers = now
			marked = max(marked, s.comparePeers(now))
		}
		if marked > 0 {
			s.askAgain()
		}
	}
}

func (s *Server) comparePeers(now time.Time) (marked int) {
	conns := s.table.connections()
	peers := make([]netip.AddrPort, len(conns))
	for i, c := range conns {
		peers[i] = c.RemoteAddr()
	}
	return s.table.moved(now, conns, peers)
}

// end carries out withdrawals: flows first, all of them at once, then carriers.
func (s *Server) end(cuts []withdrawal) {
	if len(cuts) == 0 {
		return
	}
	var carriers []withdrawal
	var flows errgroup.Group
	flows.SetLimit(parallelCuts)
	for _, w := range cuts {
		if w.grant.isCarrier() {
			carriers = append(carriers, w)
			continue
		}
		flows.Go(func() error { s.endFlow(w); return nil })
	}
	flows.Wait()
	s.endCarriers(carriers)
}

// endFlow cuts one flow and tells its owner why.
func (s *Server) endFlow(w withdrawal) {
	w.grant.cancel(w.cut)
	if w.was != open {
		return // its CONNECT has not been answered: the refusal tells why
	}
	after := time.Since(w.cut.learned)
	s.metrics.cut(w.cut.word, after)
	s.log.Info("flow withdrawn", "flow", w.grant.flow, "session", w.grant.session, "target", w.grant.target.String(),
		"code", w.cut.word, "reason", w.cut.reason, "after", after)
	s.hub.publish(w.grant.session, withdrawnEvent(w, after))
}

func withdrawnEvent(w withdrawal, after time.Duration) connect.Event {
	d := connect.Visible(w.cut.decision)
	e := connect.Event{
		Type: connect.EventWithdrawn, Flow: w.grant.flow, Target: w.grant.target.String(),
		Code: w.cut.word, Reason: w.cut.reason, AfterMS: after.Milliseconds(),
		Decision: d.ID, Reasons: d.Reasons, WouldAllowIf: d.WouldAllowIf, PolicyRevision: d.PolicyRevision,
	}
	return e
}

// endCarriers closes connections whose session is over: what still flows on
// them first, then, once their agent has been told why, the connections.
func (s *Server) endCarriers(cuts []withdrawal) {
	bySession := make(map[sallyport.SessionID][]withdrawal)
	for _, w := range cuts {
		for _, f := range s.table.withdrawFlows(w.grant, w.cut) {
			s.endFlow(f)
		}
		bySession[w.grant.session] = append(bySession[w.grant.session], w)
	}
	for session, of := range bySession {
		c := of[0].cut
		if c.word != wordDrain {
			s.hub.publish(session, connect.Event{
				Type: connect.EventSession, Code: c.word, Reason: c.reason, Decision: c.decision.ID,
				AfterMS: time.Since(c.learned).Milliseconds(),
			})
			s.log.Info("session ended", "session", session, "code", c.word, "reason", c.reason, "connections", len(of))
		}
		marks := s.hub.flush(session)
		for _, w := range of {
			mark := marks[w.grant.conn]
			if mark == nil { // nobody reads events on it
				w.grant.conn.Close(w.cut.code, w.cut.reason)
				continue
			}
			s.endings.Go(func() {
				s.sayGoodbye(w.grant, mark)
				w.grant.conn.Close(w.cut.code, w.cut.reason)
			})
		}
	}
}

// sayGoodbye waits until the agent has had the time to read its events: they are
// written, and either it has gone by itself or farewell has passed.
func (s *Server) sayGoodbye(g *grant, written <-chan struct{}) {
	limit := time.NewTimer(farewell)
	defer limit.Stop()
	for _, done := range []<-chan struct{}{written, g.gone} {
		select {
		case <-done:
		case <-limit.C:
			return
		}
	}
}

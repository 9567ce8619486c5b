package gateway

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"sallyport"
	"sallyport/internal/relay"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

const (
	// maxOpens bounds how often one flow is decided, dialled and overtaken by a
	// change before it is told to come back.
	maxOpens = 8
	// The pause between a question whose answer was outdated and the next: policyd
	// tells of a change on one stream and answers on another, so it is short.
	minPause = 2 * time.Millisecond
	maxPause = 200 * time.Millisecond
)

// Admit implements tunnel.Handler: a connection is let in if its session may
// hold a carrier, and lives only as long as that holds.
func (s *Server) Admit(ctx context.Context, c tunnel.ServerConn) (released func(), err error) {
	g, err := s.table.admit(c)
	if err != nil {
		return nil, err
	}
	released = func() { s.table.drop(g) }
	for range maxOpens {
		if _, refusal := s.decide(ctx, g); refusal != nil {
			released()
			return nil, admitError(refusal)
		}
		if s.table.accept(g, time.Now()) {
			return released, nil
		}
	}
	released()
	return nil, admitError(unavailable(hopOvertaken, nil))
}

// admitError refuses a connection: with a code where the carrier has one, with
// the whole refusal where it answers a request instead.
func admitError(e *sallyport.Error) error {
	code := uint64(connect.CodeSessionRevoked)
	if e.Outcome == sallyport.OutcomeUnavailable {
		code = connect.CodePolicyStale
	}
	return &notAdmitted{tunnel.AdmitError{Code: code, Reason: e.Message}, e}
}

type notAdmitted struct {
	admit   tunnel.AdmitError
	refusal *sallyport.Error
}

func (e *notAdmitted) Error() string   { return e.refusal.Error() }
func (e *notAdmitted) Unwrap() []error { return []error{&e.admit, e.refusal} }

// Connect implements tunnel.Handler: the life of one flow.
func (s *Server) Connect(ctx context.Context, st tunnel.ServerStream) {
	began := time.Now()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	g, refusal := s.table.register(st.Conn(), st.Target(), func(c cut) { cancel(&relay.Cut{Code: c.code, Reason: c.reason}) })
	if refusal != nil {
		s.refuse(st, nil, refusal)
		return
	}
	defer s.table.drop(g)

	down, up := s.begin(ctx, st, g, began)
	if down == nil {
		return
	}
	result := s.splice(ctx, down, up)
	s.flowEnded(ctx, g, result, time.Since(began))
}

// begin answers the CONNECT; down is nil if it did not become a flow. A flow's
// stack holds Connect as long as it lives, and this not.
func (s *Server) begin(ctx context.Context, st tunnel.ServerStream, g *grant, began time.Time) (down tunnel.Conn, up relay.Conn) {
	up, refusal := s.open(ctx, g)
	if refusal != nil {
		s.refuse(st, g, refusal)
		return nil, nil
	}
	down, err := st.Accept(acceptHeader(g.flow, s.table.decisionOf(g)))
	if err != nil {
		up.Reset(0)
		s.auditClose(ctx, g, "client_gone", relay.Result{Err: err})
		return nil, nil
	}
	s.log.Debug("flow open", "flow", g.flow, "session", g.session, "target", g.target.String(), "took", time.Since(began))
	return down, up
}

func (s *Server) splice(ctx context.Context, down tunnel.Conn, up relay.Conn) relay.Result {
	return relay.Splice(ctx, down, up, relay.Options{
		Idle:      s.limits.Idle,
		UpReset:   connect.CodeUpstreamReset,
		Withdrawn: connect.CodeFlowWithdrawn,
		IdleReset: connect.CodeFlowWithdrawn,
	})
}

// open decides and dials until both agree: when it returns a connection, g is
// open and nothing that anybody has told touches its decision.
func (s *Server) open(ctx context.Context, g *grant) (up relay.Conn, refusal *sallyport.Error) {
	defer func() {
		if refusal != nil && up != nil {
			up.Reset(0)
			up = nil
		}
	}()
	var dialled sallyport.Upstream
	for range maxOpens {
		d, refusal := s.decide(ctx, g)
		if refusal != nil {
			return up, refusal
		}
		if up != nil && d.Upstream != dialled { // the route changed while it was dialled
			up.Reset(0)
			up = nil
		}
		if up == nil {
			if err := s.auditOpen(ctx, g, d); err != nil {
				return nil, errAudit(err)
			}
			if !s.table.stands(g, time.Now()) { // a change came while it was written down
				continue
			}
			dialled = d.Upstream
			if up, refusal = s.dial(ctx, g, dialled); refusal != nil {
				return nil, refusal
			}
		}
		if s.table.accept(g, time.Now()) {
			return up, nil
		}
	}
	return up, unavailable(hopOvertaken, nil)
}

// decide asks until an answer stands that nothing newer touches.
func (s *Server) decide(ctx context.Context, g *grant) (sallyport.Decision, *sallyport.Error) {
	ctx, cancel := context.WithTimeout(ctx, s.limits.DecisionTimeout)
	defer cancel()
	for pause := minPause; ; pause = min(2*pause, maxPause) {
		peer := g.conn.RemoteAddr()
		at := time.Now()
		q, asked, refusal := s.table.ask(g, at, peer)
		if refusal != nil {
			return sallyport.Decision{}, refusal
		}
		answers, err := s.authorize(ctx, []sallyport.Request{q})
		if err != nil {
			s.metrics.decisions.Inc("none")
			return sallyport.Decision{}, s.table.failed(g, hopPolicyd, err)
		}
		s.metrics.decisions.Inc(answers[0].Verdict.String())
		switch d := answers[0]; s.table.answer(g, d, asked, peer.Addr(), at) {
		case allowed:
			return d, nil
		case refused:
			return d, s.denial(g, d)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return sallyport.Decision{}, s.table.failed(g, hopOvertaken, ctx.Err())
		}
	}
}

// authorize asks within the decision timeout. An answer that does not fit its
// questions is an error.
func (s *Server) authorize(ctx context.Context, questions []sallyport.Request) ([]sallyport.Decision, error) {
	ctx, cancel := context.WithTimeout(ctx, s.limits.DecisionTimeout)
	defer cancel()
	began := time.Now()
	answers, err := s.deps.Authorizer.Authorize(ctx, questions)
	s.metrics.deciding.Observe(time.Since(began).Seconds())
	if err == nil && len(answers) != len(questions) {
		err = errors.New("policyd gave another number of answers than it was asked questions")
	}
	return answers, err
}

// denial is the refusal of a flow whose decision is no allow. UDP to an address
// that no gateway dials is told apart (RFC 9298 has no name that could hide it).
func (s *Server) denial(g *grant, d sallyport.Decision) *sallyport.Error {
	if addr, ok := g.target.Addr(); ok && g.target.Network == sallyport.UDP {
		if refusal := s.dialer.Prohibited(g.target, addr); refusal != nil {
			return refusal
		}
	}
	return connect.Denial(d)
}

// dial dials and prefers the reason of a withdrawal to that of the failed dial
// that it caused.
func (s *Server) dial(ctx context.Context, g *grant, u sallyport.Upstream) (relay.Conn, *sallyport.Error) {
	up, err := s.dialUpstream(ctx, u)
	if err == nil {
		return up, nil
	}
	if refusal := s.table.withdrawn(g); refusal != nil {
		return nil, refusal
	}
	var e *sallyport.Error
	if !errors.As(err, &e) {
		e = &sallyport.Error{Outcome: sallyport.OutcomeUpstream, Code: connect.ProblemUnreachable, Message: "the service did not answer", Err: err}
	}
	return nil, e
}

// refuse answers a CONNECT that did not become a flow. g is nil if there was
// not even a grant.
func (s *Server) refuse(st tunnel.ServerStream, g *grant, e *sallyport.Error) {
	if g != nil && g.audited {
		s.auditClose(context.Background(), g, e.Code, relay.Result{})
	}
	s.metrics.refusals.Inc(e.Code)
	s.log.Debug("flow refused", "session", st.Conn().Peer().Session, "target", st.Target().String(), "code", e.Code, "error", e)
	if err := st.Refuse(e); err != nil {
		s.log.Debug("refusal not delivered", "error", err)
	}
}

func acceptHeader(flow sallyport.FlowID, d sallyport.Decision) http.Header {
	h := http.Header{}
	h.Set(connect.HeaderFlow, string(flow))
	h.Set(connect.HeaderDecision, string(d.ID))
	if d.Rule != "" {
		h.Set(connect.HeaderRule, d.Rule)
	}
	if d.ValidFor > 0 {
		h.Set(connect.HeaderValidFor, strconv.FormatInt(int64((d.ValidFor+time.Second-1)/time.Second), 10))
	}
	if d.Carrier != "" {
		h.Set(connect.HeaderCarrier, d.Carrier)
	}
	return h
}

// flowEnded writes down how an open flow ended and tells its owner what the
// stream itself could not.
func (s *Server) flowEnded(ctx context.Context, g *grant, r relay.Result, took time.Duration) {
	code, tell := r.End.String(), ""
	switch c := s.table.cutOf(g); {
	case c != nil:
		code = c.word // whoever cut it has told
	case r.End == relay.EndUpReset:
		code, tell = wordUpstreamReset, "the service reset the connection"
	case r.End == relay.EndIdle:
		code, tell = wordIdle, "nothing moved for "+s.limits.Idle.String()
	case r.End == relay.EndWithdrawn:
		code = "carrier_gone"
	}
	if tell != "" {
		s.hub.publish(g.session, connect.Event{
			Type: connect.EventWithdrawn, Flow: g.flow, Target: g.target.String(), Decision: s.table.decisionOf(g).ID,
			Code: code, Reason: tell,
		})
	}
	s.auditClose(ctx, g, code, r)
	s.metrics.bytes.Add(float64(r.Up), "up")
	s.metrics.bytes.Add(float64(r.Down), "down")
	s.log.Debug("flow closed", "flow", g.flow, "code", code, "up", r.Up, "down", r.Down, "took", took)
}

func (s *Server) auditOpen(ctx context.Context, g *grant, d sallyport.Decision) error {
	err := s.deps.Audit.Append(ctx, auditRecord(sallyport.AuditFlowOpen, g, d))
	g.audited = g.audited || err == nil
	return err
}

// auditClose writes the last word about a flow. If that fails the flow is over
// all the same; the next one will be refused.
func (s *Server) auditClose(ctx context.Context, g *grant, code string, r relay.Result) {
	rec := auditRecord(sallyport.AuditFlowClose, g, s.table.decisionOf(g))
	rec.Code, rec.BytesUp, rec.BytesDown = code, r.Up, r.Down
	if err := s.deps.Audit.Append(context.WithoutCancel(ctx), rec); err != nil {
		s.log.Error("end of a flow not audited", "flow", g.flow, "error", err)
	}
}

func auditRecord(kind string, g *grant, d sallyport.Decision) sallyport.AuditRecord {
	return sallyport.AuditRecord{
		Type: kind, Time: time.Now(),
		User: d.Who.User, Session: g.session, Device: d.Who.Device,
		Flow: g.flow, DecisionID: d.ID, Target: g.target.String(), Peer: g.conn.RemoteAddr().String(),
	}
}

package gateway

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/tunnel"
	"sallyport/tunnel/lane"
)

// table holds every live carrier and flow, and what is known about changes. Its
// one lock makes "look whether anything changed, then go on" a single step that
// no change can fall between: a notice either comes before it, and is seen, or
// after it, and finds the grant. Nothing under the lock waits for anybody.
type table struct {
	limits Limits

	mu        sync.Mutex
	fresh     freshness
	grants    map[*grant]struct{}
	carriers  map[tunnel.ServerConn]*grant
	bySubject map[sallyport.Subject]map[*grant]struct{}
	sessions  map[sallyport.SessionID]*holding
	dueNow    map[*grant]struct{} // due != nil
	waiting   int                 // flows that are neither open nor over
	draining  bool
}

// holding counts what one session holds.
type holding struct {
	carriers, lanes, flows int
	waiting                int // of flows
}

func newTable(l Limits) *table {
	return &table{
		limits:    l,
		grants:    make(map[*grant]struct{}),
		carriers:  make(map[tunnel.ServerConn]*grant),
		bySubject: make(map[sallyport.Subject]map[*grant]struct{}),
		sessions:  make(map[sallyport.SessionID]*holding),
		dueNow:    make(map[*grant]struct{}),
	}
}

// admit registers a new connection, or refuses it because the session holds
// enough of them; the ones it holds are not touched.
func (t *table) admit(c tunnel.ServerConn) (*grant, error) {
	p := c.Peer()
	g := &grant{conn: c, session: p.Session, gone: make(chan struct{}), flows: make(map[*grant]struct{})}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.draining {
		return nil, &tunnel.AdmitError{Code: connect.CodeDraining, Reason: "the gateway is going away"}
	}
	h := t.holding(p.Session)
	count, limit := &h.carriers, t.limits.Carriers
	if p.Carrier == lane.Name {
		count, limit = &h.lanes, t.limits.Lanes
	}
	if *count >= limit {
		return nil, &tunnel.AdmitError{Code: connect.CodeTooMany, Reason: fmt.Sprintf("this session holds %d connections already", limit)}
	}
	*count++
	t.grants[g] = struct{}{}
	t.carriers[c] = g
	return g, nil
}

// register enters a flow that has been asked for on c.
func (t *table) register(c tunnel.ServerConn, target sallyport.Target, cancel func(cut)) (*grant, *sallyport.Error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	carrier := t.carriers[c]
	switch {
	case carrier == nil || carrier.state != open:
		return nil, errNoCarrier(carrier)
	case t.draining:
		return nil, errDraining()
	}
	h := t.holding(carrier.session)
	if t.waiting >= t.limits.Pending || h.waiting >= max(t.limits.Pending/4, 1) {
		return nil, unavailable(hopWaiting, nil)
	}
	if h.flows >= t.limits.Flows {
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable, Code: connect.ProblemTooMany,
			Message: fmt.Sprintf("this session has %d connections open, which is as many as it may", h.flows),
		}
	}
	g := &grant{
		conn: c, session: carrier.session, carrier: carrier, target: target,
		flow: sallyport.FlowID(sallyport.NewID("f")), cancel: cancel, gone: make(chan struct{}),
	}
	h.flows++
	h.waiting++
	t.waiting++
	t.grants[g] = struct{}{}
	carrier.flows[g] = struct{}{}
	return g, nil
}

func (t *table) holding(s sallyport.SessionID) *holding {
	h := t.sessions[s]
	if h == nil {
		h = new(holding)
		t.sessions[s] = h
	}
	return h
}

// admitted reports whether c may be served: nil, or the refusal.
func (t *table) admitted(c tunnel.ServerConn) *sallyport.Error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if g := t.carriers[c]; g == nil || g.state != open {
		return errNoCarrier(g)
	}
	return nil
}

func errNoCarrier(g *grant) *sallyport.Error {
	if g != nil && g.withdrawal != nil {
		return g.withdrawal.refusal()
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeLogin, Code: connect.ProblemSessionRevoked,
		Message: "this connection stands for no live session", Hint: "run: agent login",
	}
}

// ask prepares a question about g, or says why none can be asked.
func (t *table) ask(g *grant, now time.Time, peer netip.AddrPort) (sallyport.Request, stamp, *sallyport.Error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.step(g, ask) {
		return sallyport.Request{}, 0, t.refusal(g)
	}
	if err := t.fresh.mayOpen(now); err != nil {
		return sallyport.Request{}, 0, unavailable(err.Error(), nil)
	}
	return g.question(peer), t.fresh.tick(), nil
}

// refusal is what a flow that is not wanted any more is told.
func (t *table) refusal(g *grant) *sallyport.Error {
	if g.withdrawal != nil {
		return g.withdrawal.refusal()
	}
	return unavailable("the connection is "+g.state.String(), nil)
}

// answered says what became of an answer.
type answered uint8

const (
	outdated answered = iota // something newer touches it: ask again
	allowed
	refused
)

// answer enters d, the answer to the question about g that was asked at the
// stamp asked and the time at.
func (t *table) answer(g *grant, d sallyport.Decision, asked stamp, peer netip.Addr, at time.Time) answered {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.fresh.current(d, g.session, asked) {
		return outdated
	}
	t.fresh.saw(d)
	if !d.Allowed() {
		return refused
	}
	if !t.step(g, allow) {
		return outdated // withdrawn meanwhile: the next ask tells
	}
	t.restOn(g, d, asked, peer, at)
	return allowed
}

// stands reports whether the decision that g rests on still holds, as far as
// anybody has told.
func (t *table) stands(g *grant, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.standsLocked(g, now)
}

func (t *table) standsLocked(g *grant, now time.Time) bool {
	return g.state == dialling && g.due == nil && t.fresh.mayOpen(now) == nil &&
		(g.validUntil.IsZero() || now.Before(g.validUntil)) &&
		t.fresh.current(g.decision, g.session, g.asked)
}

// accept opens g if its decision still stands, in one step: from now on a
// change finds it as a live flow.
func (t *table) accept(g *grant, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.standsLocked(g, now) && t.step(g, accept)
}

// drop forgets g. It may be called more than once.
func (t *table) drop(g *grant) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.step(g, end) {
		return
	}
	for _, s := range g.depends {
		t.unindex(s, g)
	}
	delete(t.grants, g)
	delete(t.dueNow, g)
	t.release(g)
	close(g.gone)
}

func (t *table) release(g *grant) {
	h := t.sessions[g.session]
	switch {
	case !g.isCarrier():
		h.flows--
		delete(g.carrier.flows, g)
	case g.conn.Peer().Carrier == lane.Name:
		h.lanes--
		delete(t.carriers, g.conn)
	default:
		h.carriers--
		delete(t.carriers, g.conn)
	}
	if *h == (holding{}) {
		delete(t.sessions, g.session)
	}
}

// step moves g through its machine and keeps the count of waiting flows.
func (t *table) step(g *grant, e event) bool {
	next, ok := g.state.step(e)
	if !ok {
		return false
	}
	if !g.isCarrier() && g.state < open && next >= open {
		t.waiting--
		t.sessions[g.session].waiting--
	}
	g.state = next
	return true
}

// restOn makes g rest on d and keeps the index of subjects.
func (t *table) restOn(g *grant, d sallyport.Decision, asked stamp, peer netip.Addr, at time.Time) {
	if depends := dependencies(d, g.session); !slices.Equal(g.depends, depends) {
		for _, s := range g.depends {
			t.unindex(s, g)
		}
		for _, s := range depends {
			t.index(s, g)
		}
		g.depends = depends
	}
	g.rest(d, asked, peer, at)
	if g.due == nil {
		delete(t.dueNow, g)
	}
}

// dependencies are the subjects whose change concerns what rests on d. The
// session is always one of them, whatever d says. Policy is not: its change
// concerns everything.
func dependencies(d sallyport.Decision, session sallyport.SessionID) []sallyport.Subject {
	own := sallyport.Subject{Kind: sallyport.SubjectSession, ID: string(session)}
	if slices.Contains(d.DependsOn, own) {
		return d.DependsOn
	}
	return append(slices.Clip(d.DependsOn), own)
}

func (t *table) index(s sallyport.Subject, g *grant) {
	set := t.bySubject[s]
	if set == nil {
		set = make(map[*grant]struct{})
		t.bySubject[s] = set
	}
	set[g] = struct{}{}
}

func (t *table) unindex(s sallyport.Subject, g *grant) {
	set := t.bySubject[s]
	delete(set, g)
	if len(set) == 0 {
		delete(t.bySubject, s)
	}
}

// failed is the refusal after a question that got no answer: the reason of a
// withdrawal if there was one, for that cancels the question.
func (t *table) failed(g *grant, hop string, err error) *sallyport.Error {
	if refusal := t.withdrawn(g); refusal != nil {
		return refusal
	}
	return unavailable(hop, err)
}

// withdrawn is what the owner of a withdrawn g is told; nil if it was not.
func (t *table) withdrawn(g *grant) *sallyport.Error {
	if c := t.cutOf(g); c != nil {
		return c.refusal()
	}
	return nil
}

func (t *table) cutOf(g *grant) *cut {
	t.mu.Lock()
	defer t.mu.Unlock()
	return g.withdrawal
}

func (t *table) decisionOf(g *grant) sallyport.Decision {
	t.mu.Lock()
	defer t.mu.Unlock()
	return g.decision
}

// flowCount counts the flows of all sessions.
func (t *table) flowCount() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.grants) - len(t.carriers)
}

func (t *table) carrierCount() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.carriers)
}

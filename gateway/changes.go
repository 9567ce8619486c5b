package gateway

import (
	"net/netip"
	"slices"
	"time"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

// What changes do to the table: notices and the clock mark grants as due,
// answers renew or withdraw them.

const (
	// expiryGrace is how long after the end of valid_for an allow may still come.
	expiryGrace = time.Second
	// confirmGrace is how long after a change of its subjects a live grant may go
	// on without an answer. A change is a reason to doubt; silence is no reason to
	// stop doubting.
	confirmGrace = 2 * time.Second
)

// withdrawal is a grant that has just been withdrawn and must now be ended.
type withdrawal struct {
	grant *grant
	cut   cut
	was   state
}

// notice enters a notice of policyd and marks what it concerns.
func (t *table) notice(now time.Time, n sallyport.Notice) (marked int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, err := t.fresh.take(now, n)
	if err != nil {
		return 0, err
	}
	if e.all {
		for g := range t.grants {
			d := due{since: e.at, learned: now}
			if !g.isCarrier() {
				d.confirmBy = now.Add(t.fresh.maxStale)
			}
			t.mark(g, d)
		}
	}
	for _, c := range e.changes {
		concerned := t.bySubject[c.Subject]
		if c.Subject.Kind == sallyport.SubjectPolicy {
			concerned = t.grants
		}
		for g := range concerned {
			t.mark(g, due{since: e.at, learned: now, confirmBy: now.Add(confirmGrace), why: words(c.Why)})
		}
	}
	return len(t.dueNow), nil
}

// mark makes g due, if it rests on a decision at all: one that is being decided
// looks at the changes by itself.
func (t *table) mark(g *grant, d due) {
	if !g.state.held() {
		return
	}
	if g.due == nil {
		g.due = new(due)
		*g.due = d
	} else {
		g.due.join(d)
	}
	t.dueNow[g] = struct{}{}
}

// batch is what one round of asking again asks.
type batch struct {
	grants    []*grant // flows, then carriers
	flows     int      // how many of them
	questions []sallyport.Request
	asked     stamp
	at        time.Time
}

// takeDue returns the questions that are due, flows before carriers, so that a
// flow is cut for its own reason before its carrier goes. peers tells where
// connections are now. They stay due until they are answered.
func (t *table) takeDue(now time.Time, peers func(tunnel.ServerConn) netip.AddrPort) batch {
	t.mu.Lock()
	grants := make([]*grant, 0, len(t.dueNow))
	for g := range t.dueNow {
		grants = append(grants, g)
	}
	t.mu.Unlock()
	slices.SortStableFunc(grants, func(a, b *grant) int { return rank(a) - rank(b) })
	flows, _ := slices.BinarySearchFunc(grants, 1, func(g *grant, want int) int { return rank(g) - want })
	addrs := make([]netip.AddrPort, len(grants))
	for i, g := range grants {
		addrs[i] = peers(g.conn) // not under the lock: it is somebody else's code
	}

	t.mu.Lock()
	defer t.mu.Unlock()
	b := batch{grants: grants, flows: flows, questions: make([]sallyport.Request, len(grants)), asked: t.fresh.tick(), at: now}
	for i, g := range grants {
		b.questions[i] = g.question(addrs[i])
	}
	return b
}

func rank(g *grant) int {
	if g.isCarrier() {
		return 1
	}
	return 0
}

// settle enters the answers to a part of b that starts at first. It returns what
// they withdraw. Outdated answers are dropped; their grants stay due.
func (t *table) settle(b batch, first int, answers []sallyport.Decision) (cuts []withdrawal) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, d := range answers {
		g := b.grants[first+i]
		if !g.state.held() || g.due == nil || !t.fresh.current(d, g.session, b.asked) {
			continue
		}
		t.fresh.saw(d)
		elsewhere := !g.isCarrier() && d.Upstream != g.decision.Upstream
		if d.Allowed() && !elsewhere {
			t.step(g, renew)
			t.restOn(g, d, b.asked, b.questions[first+i].Peer.Addr(), b.at)
			continue
		}
		if d.Allowed() && g.state == dialling {
			continue // the flow's own goroutine asks once more, and dials the right one
		}
		// Also an allow ends a live flow whose route leads elsewhere now: what it
		// was connected to is not what is allowed.
		if w, ok := t.withdraw(g, cutFor(d, *g.due)); ok {
			cuts = append(cuts, w)
		}
	}
	return cuts
}

// withdraw ends g's right to live.
func (t *table) withdraw(g *grant, c cut) (withdrawal, bool) {
	was := g.state
	if !t.step(g, withdraw) {
		return withdrawal{}, false
	}
	g.withdrawal = &c
	g.due = nil
	delete(t.dueNow, g)
	return withdrawal{g, c, was}, true
}

// withdrawFlows withdraws what is left on a carrier that has been withdrawn.
func (t *table) withdrawFlows(carrier *grant, c cut) (cuts []withdrawal) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for g := range carrier.flows {
		if w, ok := t.withdraw(g, c); ok {
			cuts = append(cuts, w)
		}
	}
	return cuts
}

// clock does what time alone asks for: it cuts every flow once the records are
// stale, cuts what was not confirmed in time, and marks what has reached the end
// of its validity.
func (t *table) clock(now time.Time) (cuts []withdrawal, marked int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.grants) == 0 {
		return nil, 0
	}
	if t.fresh.stale(now) {
		cuts = t.cutStale()
	}
	for g := range t.grants {
		if g.due != nil && g.due.late(now) {
			if w, ok := t.withdraw(g, unconfirmed(*g.due)); ok {
				cuts = append(cuts, w)
			}
			continue
		}
		if !g.validUntil.IsZero() && !now.Before(g.validUntil) && (g.due == nil || !g.due.expired) {
			t.mark(g, due{since: t.fresh.tick(), learned: g.validUntil, confirmBy: g.validUntil.Add(expiryGrace), expired: true})
		}
	}
	return cuts, len(t.dueNow)
}

// cutStale withdraws all flows. Carriers stay: nothing new is let in on them
// while the records are stale, and they carry the news and the recovery.
func (t *table) cutStale() (cuts []withdrawal) {
	c := cut{
		code: connect.CodePolicyStale, word: wordStale,
		reason:  "policyd has not confirmed the decision for longer than max_stale",
		learned: t.fresh.confirmed.Add(t.fresh.maxStale),
	}
	for g := range t.grants {
		if g.isCarrier() {
			continue
		}
		if w, ok := t.withdraw(g, c); ok {
			cuts = append(cuts, w)
		}
	}
	return cuts
}

// moved marks what depends on the address of a peer that has moved. peers is
// where the connections of conns are now.
func (t *table) moved(now time.Time, conns []tunnel.ServerConn, peers []netip.AddrPort) (marked int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, c := range conns {
		carrier := t.carriers[c]
		if carrier == nil {
			continue
		}
		d := due{learned: now, confirmBy: now.Add(confirmGrace), why: words("the peer's address changed")}
		t.markMoved(carrier, peers[i].Addr(), d)
		for g := range carrier.flows {
			t.markMoved(g, peers[i].Addr(), d)
		}
	}
	return len(t.dueNow)
}

func (t *table) markMoved(g *grant, now netip.Addr, d due) {
	if g.decision.DependsOnPeer && g.peer != now && g.due == nil {
		d.since = t.fresh.tick()
		t.mark(g, d)
	}
}

// connections returns every connection that is admitted.
func (t *table) connections() []tunnel.ServerConn {
	t.mu.Lock()
	defer t.mu.Unlock()
	conns := make([]tunnel.ServerConn, 0, len(t.carriers))
	for c := range t.carriers {
		conns = append(conns, c)
	}
	return conns
}

// withdrawAll withdraws everything, flows before carriers.
func (t *table) withdrawAll(c cut) (cuts []withdrawal) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for g := range t.grants {
		if w, ok := t.withdraw(g, c); ok {
			cuts = append(cuts, w)
		}
	}
	return cuts
}

func (t *table) dueCount() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.dueNow)
}

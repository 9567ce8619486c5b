package plan

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sallyport"
	"sallyport/audit"
	"sallyport/policyd/policy"
)

// maker makes one plan.
type maker struct {
	q              Question
	plan           *Plan
	groups, untold map[Kind]*Group

	open   map[sallyport.FlowID]*openFlow
	byID   map[sallyport.DecisionID]*openFlow
	failed int // decisions whose inputs cannot be read
}

// openFlow is a connection without an end in the gateway's log.
type openFlow struct {
	record    sallyport.AuditRecord
	request   *sallyport.Request // of its decision; nil: not found
	recording *policy.Recording  // nil: not found, or of no use
}

// openFlows reads which connections are open. A gateway that was started again
// has lost those that it had.
func (m *maker) openFlows() error {
	m.open, m.byID = map[sallyport.FlowID]*openFlow{}, map[sallyport.DecisionID]*openFlow{}
	if m.q.Flows == nil {
		m.limit("the gateway's audit log is not on this machine: which connections are open cannot be told")
		return nil
	}
	var up time.Duration
	first, lost := true, 0
	for e, err := range m.q.Flows {
		if err != nil {
			m.limit("the gateway's audit log cannot be read to its end; connections behind that are not seen: %v", err)
			return err
		}
		if first && e.Sequence > 1 {
			m.limit("the gateway's audit log starts at record %d (%s): connections opened before are not seen", e.Sequence, stamp(e.Record.Time))
		}
		if e.Up < up {
			clear(m.open)
		}
		first, up, m.plan.Flows.Until = false, e.Up, e.Record.Time
		switch {
		case e.Record.Type == sallyport.AuditFlowClose:
			delete(m.open, e.Record.Flow)
		case e.Record.Type == sallyport.AuditFlowOpen && len(m.open) < maxOpen:
			m.open[e.Record.Flow] = &openFlow{record: e.Record}
		case e.Record.Type == sallyport.AuditFlowOpen:
			lost++
		}
	}
	if lost > 0 {
		m.limit("more than %d connections at once: %d are not looked at", maxOpen, lost)
	}
	for _, f := range m.open {
		m.byID[f.record.DecisionID] = f
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// decisions reads policyd's log once, from its beginning to its end.
func (m *maker) decisions() error {
	if m.q.Decisions == nil {
		m.limit("policyd's audit log is not on this machine: past decisions are not looked at")
		return nil
	}
	first := true
	for e, err := range m.q.Decisions {
		if err != nil {
			m.limit("policyd's audit log cannot be read to its end; decisions behind that are not looked at: %v", err)
			return err
		}
		if first && e.Sequence > 1 && e.Record.Time.After(m.q.Since) {
			m.limit("policyd's audit log starts at record %d (%s): earlier decisions are not looked at", e.Sequence, stamp(e.Record.Time))
		}
		first = false
		if e.Record.Type == sallyport.AuditDecision {
			m.decision(&e)
		}
	}
	if m.failed > 0 {
		m.limit("the inputs of %d decisions cannot be read", m.failed)
	}
	return nil
}

func (m *maker) decision(e *audit.Entry) {
	r := &e.Record
	recording, err := policy.ReadRecording(r)
	if f := m.byID[r.DecisionID]; f != nil {
		f.request, f.recording = r.Request, recording
	}
	if r.Time.Before(m.q.Since) || r.Decision == nil || r.Request == nil {
		return
	}
	if err != nil {
		m.failed++
	}
	all := &m.plan.Decisions
	all.Read++
	o := m.compare(recording, r.Request)
	k := Kind{User: r.User, Email: r.Decision.Who.Email, Target: r.Target, Was: r.Decision.Verdict, WasRule: r.Decision.Rule}
	if o.was.Certain {
		if o.basis == FromLog && o.was.Verdict != k.Was {
			all.Already++
		}
		k.Was, k.WasRule = o.was.Verdict, o.was.Rule
	}
	o.describe(&k)
	switch {
	case !o.would.Certain:
		all.Unknown++
		m.count(m.untold, k, r.Time)
	case o.would.Verdict == k.Was:
		all.Same++
	default:
		all.Differ++
		m.count(m.groups, k, r.Time)
	}
}

func (m *maker) count(to map[Kind]*Group, k Kind, at time.Time) {
	g := to[k]
	if g == nil {
		if len(to) >= maxGroups {
			m.plan.Decisions.Omitted++
			return
		}
		g = &Group{Kind: k, First: at}
		to[k] = g
	}
	g.Count++
	g.Last = at
}

// sorted returns the groups, the biggest first.
func sorted(groups map[Kind]*Group) []Group {
	var out []Group
	for g := range maps.Values(groups) {
		out = append(out, *g)
	}
	slices.SortFunc(out, func(a, b Group) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Target, b.Target), cmp.Compare(a.User, b.User), a.First.Compare(b.First), cmp.Compare(a.Why+a.Missing, b.Why+b.Missing))
	})
	return out
}

// outcome is one question decided by both configurations.
type outcome struct {
	was, would policy.Replayed
	basis      Basis
}

// compare decides by the recording, and what that cannot tell by the records as
// they are now.
func (m *maker) compare(recording *policy.Recording, q *sallyport.Request) outcome {
	o := outcome{basis: FromLog}
	if recording != nil {
		o.was, o.would = m.q.Old.set.Replay(recording), m.q.New.set.Replay(recording)
	}
	if o.would.Certain || m.q.Present == nil || q == nil {
		return o
	}
	if recording != nil && recording.Who.Session != "" && m.q.Present.Input(q, m.q.Now).Person == nil {
		return o // the session is over, which says nothing about the policies
	}
	return m.now(q)
}

// now decides by the records as they are.
func (m *maker) now(q *sallyport.Request) outcome {
	decide := func(s *Site) policy.Replayed {
		in := m.q.Present.Input(q, m.q.Now)
		a := s.set.Decide(in)
		from, _, _ := a.Route(q.Target)
		return policy.Replayed{Certain: true, Verdict: a.Verdict, Route: from, Rule: a.Rule(), Reasons: s.set.Reasons(in, a, false)}
	}
	return outcome{was: decide(m.q.Old), would: decide(m.q.New), basis: FromRecords}
}

// describe fills in what the candidate says.
func (o *outcome) describe(k *Kind) {
	k.Basis = o.basis
	if !o.would.Certain {
		k.Would, k.Missing = "unknown", "what was looked at is not there"
		if len(o.would.Missing) > 0 {
			k.Missing = "looks at " + strings.Join(o.would.Missing, ", ")
		}
		return
	}
	k.Would, k.Rule = o.would.Verdict.String(), o.would.Rule
	if o.would.Verdict == sallyport.VerdictAllow {
		return
	}
	const most = 3
	var why []string
	for _, r := range o.would.Reasons {
		if len(why) == most {
			why = append(why, "…")
			break
		}
		why = append(why, fmt.Sprintf("%s: wanted %s, found %s", r.Condition, r.Wanted, r.Found))
	}
	switch {
	case len(why) > 0:
		k.Why = strings.Join(why, "; ")
	case o.would.Route == "":
		k.Why = "no route"
	default:
		k.Why = "no rule allows it"
	}
}

// flows decides about the open connections: by the records as they are now, which
// is what gateways will be answered from, else as they were when it was let in.
func (m *maker) flows() {
	all := &m.plan.Flows
	for _, f := range slices.SortedFunc(maps.Values(m.open), func(a, b *openFlow) int {
		return cmp.Or(a.record.Time.Compare(b.record.Time), cmp.Compare(a.record.Flow, b.record.Flow))
	}) {
		all.Open++
		q := f.question()
		var o outcome
		if m.q.Present != nil && q != nil {
			o = m.now(q)
		} else {
			o = m.compare(f.recording, nil)
		}
		k := Kind{User: f.record.User, Target: f.record.Target, Was: sallyport.VerdictAllow, WasRule: o.was.Rule}
		if f.recording != nil {
			k.Email = f.recording.Who.Email
		}
		o.describe(&k)
		switch {
		case !o.would.Certain:
			all.Unknown++
		case o.would.Verdict == sallyport.VerdictAllow:
			all.Kept++
			continue
		case o.was.Certain && o.was.Verdict != sallyport.VerdictAllow:
			all.Already++
			continue
		default:
			all.Cut++
		}
		if len(all.List) < maxGroups {
			all.List = append(all.List, Flow{Flow: f.record.Flow, Opened: f.record.Time, Kind: k})
		}
	}
}

// question is what the gateway will ask about a connection: that of its decision,
// else what its own log tells of it.
func (f *openFlow) question() *sallyport.Request {
	if f.request != nil {
		return f.request
	}
	target, err := sallyport.ParseTarget(f.record.Target)
	peer, perr := netip.ParseAddrPort(f.record.Peer)
	if errors.Join(err, perr) != nil {
		return nil
	}
	return &sallyport.Request{
		Session: f.record.Session, Target: target, Flow: f.record.Flow,
		Peer: netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port()),
	}
}

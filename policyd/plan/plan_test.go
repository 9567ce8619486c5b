package plan

import (
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport"
	"sallyport/audit"
	"sallyport/policyd/policy"

	"github.com/google/go-cmp/cmp"
)

var noon = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

const db, wiki = "tcp://db.internal:5432", "tcp://wiki.internal:80"

func site(t testing.TB, routes ...sallyport.Route) *Site {
	t.Helper()
	s, err := Load(&sallyport.Config{Routes: routes})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func route(from, rules string) sallyport.Route { return sallyport.Route{From: from, Policy: rules} }

// person is somebody with groups and a firewall that is on or off.
type person struct {
	user     string // empty: nobody
	groups   []string
	firewall bool
}

func (p person) input(q *sallyport.Request) *policy.Input {
	in := &policy.Input{Now: noon, Request: q}
	if p.user == "" {
		return in
	}
	var gs []sallyport.Group
	for _, g := range p.groups {
		gs = append(gs, sallyport.Group{ID: g})
	}
	in.Person = &policy.Person{
		Session: &sallyport.Session{ID: q.Session, User: sallyport.UserID(p.user), Device: "dev"}, Login: &sallyport.Login{}, User: &sallyport.User{ID: sallyport.UserID(p.user)},
		Email: p.user + "@corp.example", Groups: policy.NewGroups(gs), Device: &sallyport.Device{ID: "dev"},
		Posture: &sallyport.Posture{Received: noon, Sequence: noon.UnixMilli(), Facts: map[string]sallyport.Fact{"firewall": {Value: p.firewall, Source: "os", At: noon}}},
	}
	return in
}

// now are people by their sessions.
type now map[sallyport.SessionID]person

func (n now) Input(q *sallyport.Request, _ time.Time) *policy.Input { return n[q.Session].input(q) }

// chain is an audit log.
type chain struct {
	t       testing.TB
	entries []audit.Entry
	err     error
}

func (c *chain) add(r sallyport.AuditRecord) {
	seq := uint64(len(c.entries) + 1)
	r.Time = noon.Add(time.Duration(seq) * time.Second)
	c.entries = append(c.entries, audit.Entry{Sequence: seq, Up: time.Duration(seq) * time.Second, Record: r})
}

// decide writes down what s says to p, who asks for a target in session s-USER.
func (c *chain) decide(s *Site, p person, to string) sallyport.DecisionID {
	c.t.Helper()
	target, err := sallyport.ParseTarget(to)
	if err != nil {
		c.t.Fatal(err)
	}
	q := &sallyport.Request{Session: sallyport.SessionID("s-" + p.user), Target: target}
	in := p.input(q)
	a := s.set.Decide(in)
	inputs, err := json.Marshal(a.Inputs(in))
	if err != nil {
		c.t.Fatal(err)
	}
	id := sallyport.DecisionID(fmt.Sprint("d", len(c.entries)))
	d := &sallyport.Decision{ID: id, Verdict: a.Verdict, Rule: a.Rule()}
	if p.user != "" {
		d.Who = sallyport.Identity{Session: q.Session, User: sallyport.UserID(p.user), Email: in.Person.Email, Device: "dev"}
	}
	c.add(sallyport.AuditRecord{Type: sallyport.AuditDecision, User: d.Who.User, Session: q.Session, DecisionID: id, Target: to, Request: q, Decision: d, Inputs: inputs})
	return id
}

func (c *chain) open(flow string, id sallyport.DecisionID, p person, to string) {
	c.add(sallyport.AuditRecord{
		Type: sallyport.AuditFlowOpen, Flow: sallyport.FlowID(flow), DecisionID: id, User: sallyport.UserID(p.user),
		Session: sallyport.SessionID("s-" + p.user), Target: to, Peer: "192.0.2.7:4711",
	})
}

func (c *chain) close(flow string) {
	c.add(sallyport.AuditRecord{Type: sallyport.AuditFlowClose, Flow: sallyport.FlowID(flow)})
}

func (c *chain) all() iter.Seq2[audit.Entry, error] {
	return func(yield func(audit.Entry, error) bool) {
		for _, e := range c.entries {
			if !yield(e, nil) {
				return
			}
		}
		if c.err != nil {
			yield(audit.Entry{}, c.err)
		}
	}
}

var (
	alice = person{user: "alice", groups: []string{"dba"}, firewall: true}
	bob   = person{user: "bob", groups: []string{"dba", "sre"}}
	eve   = person{user: "eve"}

	dba  = route(db, `[{name: dba, allow: {and: [{groups: dba}]}}]`)
	safe = route(db, `[{name: dba, allow: {and: [{groups: dba}, {device: {firewall: true}}]}}]`)
	sre  = route(db, `[{name: sre, allow: {and: [{groups: sre}]}}]`)
	all  = route(wiki, `[{name: all, allow: {or: [{authenticated_user: true}]}}]`)
)

func lines(groups []Group) []string {
	var out []string
	for _, g := range groups {
		out = append(out, fmt.Sprintf("%d %s %s %s(%s)→%s(%s) %s%s by %s", g.Count, g.User, g.Target, g.Was, g.WasRule, g.Would, g.Rule, g.Why, g.Missing, g.Basis))
	}
	return out
}

func TestDecisionsThatWouldDiffer(t *testing.T) {
	old := site(t, dba, all)
	c := &chain{t: t}
	for range 10_000 {
		c.decide(old, alice, db)
	}
	c.decide(old, bob, db)
	c.decide(old, eve, db)
	c.decide(old, person{}, db)
	c.decide(old, eve, wiki)
	p, err := Make(Question{Old: old, New: site(t, sre), Decisions: c.all()})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		`10000 alice tcp://db.internal:5432 allow(dba)→deny() groups: wanted has sre, found missing the membership that this rule asks for by log`,
		`1 eve tcp://wiki.internal:80 allow(all)→no_route() no route by log`,
	}
	if diff := cmp.Diff(want, lines(p.Decisions.Groups)); diff != "" {
		t.Error(diff)
	}
	// Bob was only looked up in the group dba, and has another one.
	if diff := cmp.Diff([]string{`1 bob tcp://db.internal:5432 allow(dba)→unknown() looks at group "sre" by log`}, lines(p.Decisions.Untold)); diff != "" {
		t.Error(diff)
	}
	d := p.Decisions
	if d.Read != 10_004 || d.Same != 2 || d.Differ != 10_001 || d.Unknown != 1 || d.Already != 0 || !p.Differs() {
		t.Errorf("got %+v", d)
	}
	if g := d.Groups[0]; !g.First.Equal(noon.Add(time.Second)) || !g.Last.Equal(noon.Add(10_000*time.Second)) {
		t.Errorf("from %v to %v", g.First, g.Last)
	}
}

// What the log does not tell, the records as they are now may; not about people
// whose session is over.
func TestWhatTheLogDoesNotTell(t *testing.T) {
	old := site(t, dba)
	c := &chain{t: t}
	c.decide(old, alice, db)
	c.decide(old, bob, db)
	carol := bob
	carol.user = "carol"
	c.decide(old, carol, db)
	p, err := Make(Question{Old: old, New: site(t, safe), Decisions: c.all(), Present: now{"s-alice": alice, "s-bob": bob}})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{`1 bob tcp://db.internal:5432 allow(dba)→deny() device.firewall: wanted is true, found false by records`}, lines(p.Decisions.Groups)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{`1 carol tcp://db.internal:5432 allow(dba)→unknown() looks at fact "firewall" by log`}, lines(p.Decisions.Untold)); diff != "" {
		t.Error(diff)
	}
}

// Decisions of an older policy are compared by what the one in force would say.
func TestDecisionsThatDifferAlready(t *testing.T) {
	older, old := site(t, route(db, `[{name: open, allow: {and: [{groups: {exclude: blocked}}, {groups: {exclude: dba}}]}}]`)), site(t, dba)
	c := &chain{t: t}
	c.decide(older, eve, db)
	p, err := Make(Question{Old: old, New: old, Decisions: c.all()})
	if err != nil {
		t.Fatal(err)
	}
	if d := p.Decisions; d.Already != 1 || d.Same != 1 || d.Differ != 0 || p.Differs() {
		t.Errorf("got %+v", d)
	}
}

func TestSince(t *testing.T) {
	old := site(t, dba)
	c := &chain{t: t}
	for range 5 {
		c.decide(old, alice, db)
	}
	p, err := Make(Question{Old: old, New: old, Decisions: c.all(), Since: noon.Add(3 * time.Second)})
	if err != nil || p.Decisions.Read != 3 {
		t.Errorf("got %+v, %v; want 3 decisions", p.Decisions, err)
	}
}

func TestOpenConnections(t *testing.T) {
	old := site(t, dba, all)
	decisions, flows := &chain{t: t}, &chain{t: t}
	open := func(flow string, p person, to string) { flows.open(flow, decisions.decide(old, p, to), p, to) }
	open("before the gateway was started again", alice, db)
	flows.entries[0].Up = time.Hour
	open("f-alice", alice, db)
	open("f-bob", bob, db)
	open("f-closed", bob, db)
	flows.close("f-closed")
	open("f-wiki", eve, wiki)
	flows.open("f-lost", "d-unknown", bob, db)
	told := func(q Question) (out []string, f Flows) {
		q.Old, q.New, q.Decisions, q.Flows, q.Since = old, site(t, safe, all), decisions.all(), flows.all(), noon.Add(time.Hour)
		p, err := Make(q)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range p.Flows.List {
			out = append(out, fmt.Sprintf("%s %s %s%s by %s", x.Flow, x.Would, x.Why, x.Missing, x.Basis))
		}
		f, p.Flows.List = p.Flows, nil
		return out, f
	}

	got, f := told(Question{Present: now{"s-alice": alice, "s-bob": bob}})
	if diff := cmp.Diff([]string{
		"f-bob deny device.firewall: wanted is true, found false by records",
		"f-lost deny device.firewall: wanted is true, found false by records",
	}, got); diff != "" {
		t.Error(diff)
	}
	// Eve's session is over: her connection ends whatever is applied.
	if f.Open != 4 || f.Kept != 1 || f.Cut != 2 || f.Already != 1 || f.Unknown != 0 {
		t.Errorf("got %+v", f)
	}

	got, f = told(Question{})
	if diff := cmp.Diff([]string{
		`f-alice unknown looks at fact "firewall" by log`, `f-bob unknown looks at fact "firewall" by log`, "f-lost unknown what was looked at is not there by log",
	}, got); diff != "" {
		t.Error(diff)
	}
	if f.Open != 4 || f.Kept != 1 || f.Unknown != 3 {
		t.Errorf("got %+v", f)
	}
}

func TestLimitsAreTold(t *testing.T) {
	old := site(t, dba)
	decisions, flows := &chain{t: t}, &chain{t: t}
	for range 3 {
		flows.open("f", decisions.decide(old, alice, db), alice, db)
	}
	for name, tt := range map[string]struct {
		change func(*Question)
		want   []string
		err    bool
	}{
		"nothing here": {func(q *Question) { q.Decisions, q.Flows = nil, nil }, []string{"gateway's audit log is not on this machine", "policyd's audit log is not on this machine"}, false},
		"rotated": {func(q *Question) {
			d, f := *decisions, *flows
			d.entries, f.entries = d.entries[1:], f.entries[1:]
			q.Decisions, q.Flows = d.all(), f.all()
		}, []string{"gateway's audit log starts at record 2", "policyd's audit log starts at record 2"}, false},
		"rotated before since": {func(q *Question) {
			d := *decisions
			d.entries = d.entries[1:]
			q.Decisions, q.Since = d.all(), noon.Add(time.Hour)
		}, nil, false},
		"broken": {func(q *Question) {
			d := *decisions
			d.err = errors.New("sequence 4: torn")
			q.Decisions = d.all()
		}, []string{"cannot be read to its end; decisions behind that are not looked at: sequence 4"}, true},
		"unreadable inputs": {func(q *Question) {
			d := *decisions
			d.entries = slices.Clone(d.entries)
			d.entries[1].Record.Inputs = json.RawMessage(`"unreadable"`)
			q.Decisions = d.all()
		}, []string{"the inputs of 1 decisions cannot be read"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			q := Question{Old: old, New: old, Decisions: decisions.all(), Flows: flows.all()}
			tt.change(&q)
			p, err := Make(q)
			if (err != nil) != tt.err || len(p.Limits) != len(tt.want) {
				t.Fatalf("got %q, %v; want %q", p.Limits, err, tt.want)
			}
			for i, w := range tt.want {
				if !strings.Contains(p.Limits[i], w) {
					t.Errorf("got %q; want …%s…", p.Limits[i], w)
				}
			}
		})
	}
}

func TestRoutes(t *testing.T) {
	before, after := all, all
	after.To, after.Name, after.Hidden, after.Carrier = "tcp://10.0.0.1:80", "wiki", true, "bulk"
	old := site(t, dba, before, route("tcp://gone.internal:1", all.Policy))
	next := site(t, sre, after, route("tcp://new.internal:1", all.Policy))
	next.config.PostureTTL = time.Minute
	p, err := Make(Question{Old: old, New: next})
	if err != nil {
		t.Fatal(err)
	}
	want := []RouteChange{
		{From: db, Change: "changed", Rules: []policy.RuleChange{{Rule: "dba", Action: "allow", Change: "removed"}, {Rule: "sre", Action: "allow", Change: "added"}}},
		{From: "tcp://gone.internal:1", Change: "removed"},
		{From: "tcp://new.internal:1", Change: "added"},
		{From: wiki, Change: "changed", Fields: []FieldChange{{"to", "", "tcp://10.0.0.1:80"}, {"name", "", "wiki"}, {"hidden", "false", "true"}, {"carrier", "", "bulk"}}},
	}
	if diff := cmp.Diff(want, p.Routes); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]FieldChange{{"policyd.posture_ttl", "", "1m0s"}}, p.Settings); diff != "" {
		t.Error(diff)
	}
}

// A log of any length takes no more memory than the groups that are told of.
func TestMemoryIsBounded(t *testing.T) {
	old := site(t, dba)
	c := &chain{t: t}
	c.decide(old, alice, db)
	e := c.entries[0]
	var high uint64
	endless := func(yield func(audit.Entry, error) bool) {
		var m runtime.MemStats
		for i := range 50_000 {
			e.Record.User = sallyport.UserID(fmt.Sprint("u", i))
			if !yield(e, nil) {
				return
			}
			if i%10_000 == 9_999 {
				runtime.GC()
				runtime.ReadMemStats(&m)
				high = max(high, m.HeapAlloc)
			}
		}
	}
	p, err := Make(Question{Old: old, New: site(t, all), Decisions: endless})
	if err != nil {
		t.Fatal(err)
	}
	if d := p.Decisions; len(d.Groups) != maxGroups || d.Omitted != 50_000-maxGroups || d.Differ != 50_000 {
		t.Errorf("%d groups, %d omitted, %d differ", len(d.Groups), d.Omitted, d.Differ)
	}
	if high > 32<<20 {
		t.Errorf("%d MiB in use", high>>20)
	}
}

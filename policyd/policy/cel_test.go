package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
	"pgregory.net/rapid"
)

// celOf compiles a policy of one allow rule with one expression.
func celOf(t testing.TB, text string) (*Set, *expression) {
	t.Helper()
	set := compileOne(t, "allow: {or: [{cel: '"+strings.ReplaceAll(text, "'", "''")+"'}]}")
	return set, set.routes[0].policy.allow[0].when.of[0].is.(*expression)
}

// greedy are expressions that would take long over greedyInput, and whether they are
// stopped.
var greedy = map[string]bool{
	`user.claims.long.matches("^(a+)+$")`:                                          true,
	`user.claims.long.matches("(.*)(.*)(.*)(.*)b")`:                                true,
	`user.claims.short.matches("(.*)(.*)(.*)(.*)b")`:                               false,
	`user.claims.long.contains("aaab")`:                                            false,
	`user.claims.teams.exists(t, t == "x")`:                                        true,
	`user.claims.teams.exists_one(t, t.startsWith("x"))`:                           true,
	`user.claims.teams.filter(t, t == "x").size() == 1`:                            true,
	strings.Repeat("user.claims.long + ", 15) + `"" == "x"`:                        true,
	`[user.claims.long].map(l, l + l + l + l).exists(l, l + l + l + l + l == "x")`: true,
	strings.Repeat(`user.id == "x" || `, 200) + `false`:                            false,
}

func greedyInput(t testing.TB) *Input {
	in := asker(t, "email=a@b groups=a,b,c")
	in.Person.User.Claims["long"] = strings.Repeat("a", 10<<10)
	in.Person.User.Claims["short"] = strings.Repeat("a", 1000)
	teams := make([]any, 5000)
	for i := range teams {
		teams[i] = fmt.Sprintf("team-%d", i)
	}
	in.Person.User.Claims["teams"] = teams
	return in
}

// An expression's regular expressions, loops and concatenations are bounded: there
// is an answer, or the error denies. BenchmarkGreedyCEL has the exact times.
func TestCase_I8_expressionsAreBounded(t *testing.T) {
	in := greedyInput(t)
	for text, stops := range greedy {
		set, c := celOf(t, text)
		_, err := c.run(in) // makes the program
		if (err != nil) != stops {
			t.Errorf("%.60s: got error %v; want one: %v", text, err, stops)
		}
		start := time.Now()
		if v := set.Decide(in).Verdict; v != sallyport.VerdictDeny {
			t.Errorf("%.60s: %v", text, v)
		}
		if took := time.Since(start); took > 250*time.Millisecond {
			t.Errorf("%.60s: %v", text, took)
		}
	}
}

func BenchmarkGreedyCEL(b *testing.B) {
	for text := range greedy {
		b.Run(fmt.Sprintf("%.50s", text), func(b *testing.B) {
			in := greedyInput(b)
			set, _ := celOf(b, text)
			set.Decide(in)
			var took []time.Duration
			for b.Loop() {
				start := time.Now()
				set.Decide(in)
				took = append(took, time.Since(start))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
		})
	}
}

func TestCase_I8_expressionsRefusedAtLoad(t *testing.T) {
	golden(t, "testdata/cel/bad_cost.txtar")
	golden(t, "testdata/cel/bad_regex.txtar")
	for name, text := range map[string]string{
		"text":          `user.id == "` + strings.Repeat("x", maxCELText) + `"`,
		"parentheses":   strings.Repeat("(", 2000) + "true" + strings.Repeat(")", 2000),
		"concatenation": strings.Repeat(`user.id + `, 400) + `"" == "x"`,
		"maps":          strings.Repeat("{1: ", 200) + "1" + strings.Repeat("}", 200) + " == {}",
		"list":          strings.Repeat("[", 2000) + strings.Repeat("]", 2000) + " == []",
	} {
		start := time.Now()
		_, err := Parse([]byte("allow: {or: [{cel: '" + text + "'}]}"))
		if err == nil {
			t.Errorf("%s: loads", name)
		}
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("%s: refused after %v", name, took)
		}
	}
}

// A search for remedies takes an expression as it is, and asks again before it
// tells somebody that a change would do.
func TestCELInRemedies(t *testing.T) {
	for policy, want := range map[string]int{
		`allow: {and: [{device: {firewall: true}}, {cel: 'user.id == "u1"'}]}`:                               1,
		`allow: {and: [{device: {firewall: true}}, {cel: 'user.id == "u1" && device.facts.edr > 3'}]}`:       1,
		`allow: {and: [{device: {firewall: true}}, {cel: 'device.facts.edr > 3 && user.id == "u2"'}]}`:       0,
		`allow: {and: [{device: {firewall: true}}, {cel: 'device.facts.firewall == false'}]}`:                0,
		`{allow: {and: [{device: {firewall: true}}]}, deny: {or: [{cel: 'device.facts.firewall == true'}]}}`: 0,
	} {
		in := asker(t, "fact.edr=4 fact.firewall=false")
		set := compileOne(t, policy)
		got := set.Remedies(in, set.Decide(in))
		if len(got) != want {
			t.Errorf("%s: got %v; want %d", policy, got, want)
		}
	}
}

// Errors are told without the values that led to them.
func TestCELErrorsTellNothing(t *testing.T) {
	in := asker(t, `claim.x="secret"`)
	for _, text := range []string{
		`int(user.claims.x) == 1`, `timestamp(user.claims.x) < now`, `duration(user.claims.x) < session.age`,
		`[1][int(user.claims.x)] == 1`, `user.claims.x.y == 1`,
	} {
		_, c := celOf(t, text)
		if got, _ := c.found(in); strings.Contains(got, "secret") || !strings.HasPrefix(got, "unknown (") {
			t.Errorf("%s: %s", text, got)
		}
	}
}

// A person with many groups is a member of them all the same.
func TestCELManyGroups(t *testing.T) {
	in := asker(t, "")
	gs := make([]sallyport.Group, 5000)
	for i := range gs {
		gs[i] = sallyport.Group{ID: fmt.Sprint("id-", i), Name: fmt.Sprint("team-", i)}
	}
	in.Person.Groups = NewGroups(gs)
	for text, want := range map[string]Value{
		`"team-4999" in groups && !("team-5000" in groups)`: True, `user.name in groups`: Unknown, `user.id in groups`: False,
		`size(groups) == 10000`: True, `groups.exists(g, g == "none")`: Unknown, `groups == ["a"]`: False,
		`groups[0] == "id-0" && groups + ["a"] != groups`: True,
	} {
		set, c := celOf(t, text)
		set.Decide(in)
		if got, err := c.run(in); got != want {
			t.Errorf("%s: got %v (%v); want %v", text, got, err, want)
		}
	}
}

func TestCELEqualExpressionsAreOne(t *testing.T) {
	policy := "{name: %s, allow: {or: [{cel: 'user.id == \"u1\"'}]}}"
	set, err := Compile([]sallyport.Route{
		{From: "tcp://a.internal:1", Policy: fmt.Sprintf(policy, "a")}, {From: "tcp://b.internal:1", Policy: fmt.Sprintf(policy, "b")},
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	first, second := set.routes[0].policy.allow[0].when.of[0].is, set.routes[1].policy.allow[0].when.of[0].is
	if first != second {
		t.Error("checked twice")
	}
	// A fault is told of each place.
	if _, err := Parse([]byte("- allow: {or: [{cel: groups}]}\n- allow: {or: [{cel: groups}]}")); len(err.(Errors)) != 2 {
		t.Errorf("got %v; want two faults", err)
	}
}

// The program is made once, by whoever comes first.
func TestCELIsSafeForManyGoroutines(t *testing.T) {
	set, _ := celOf(t, `"a" in groups && user.claims.list.exists(x, x == "b") && device.facts.firewall == true`)
	var all sync.WaitGroup
	for i := range 16 {
		in := asker(t, `groups=a claim.list=["a","b"] fact.firewall=true`)
		want := sallyport.VerdictAllow
		if i%2 == 0 {
			in.Person.Groups, want = NewGroups(nil), sallyport.VerdictDeny
		}
		all.Go(func() {
			for range 200 {
				if got := set.Decide(in).Verdict; got != want {
					t.Errorf("got %v; want %v", got, want)
				}
			}
		})
	}
	all.Wait()
}

func TestCELLooksAtThePeer(t *testing.T) {
	in := asker(t, "peer=10.1.2.3")
	for text, want := range map[string]bool{
		`request.ip == "10.1.2.3"`: true, `user.id == "u1" || request.ip == "10.1.2.3"`: true, `request.port == 5432`: false,
	} {
		set, _ := celOf(t, text)
		if got := set.Decide(in).DependsOnPeer; got != want {
			t.Errorf("%s: depends on the peer: %v; want %v", text, got, want)
		}
	}
}

// The audit holds what an expression refers to and nothing else.
func TestCELNotes(t *testing.T) {
	in := asker(t, `email=a@b groups=a,b claim.dept="ops" claim.other="private" fact.edr=4 fact.os="linux" logged-in=1h auth=pwd`)
	for text, want := range map[string]map[string]any{
		`user.claims.dept == "ops" && user.claims["none"] == 1`: {"user.claims.dept": "ops", "user.claims.none": nil},
		`user.claims.exists(k, k == user.email)`:                {"user.claims": map[string]any{"dept": "ops", "other": "private"}, "user.email": "a@b"},
		`user.claims[user.id] == 1`:                             {"user.claims": map[string]any{"dept": "ops", "other": "private"}, "user.id": "u1"},
		`"a" in groups || "x" in groups`:                        {"groups.a": true, "groups.x": false},
		`size(groups) == 2`:                                     {"groups": []string{"a", "b"}},
		`device.facts.edr > 3 || device.facts.missing == 1`:     {"device.facts.edr": 4.0, "device.facts.missing": nil},
		`session.age < duration("2h") && has(session.expires_in) && "pwd" in session.auth_methods`: {
			"session.age": "1h0m0s", "session.expires_in": nil, "session.auth_methods": []string{"pwd"},
		},
		`has(user.claims.dept) && device.approved`:   {"user.claims.dept": "ops", "device.approved": false},
		`request.path == "/x" && now > timestamp(0)`: nil,
	} {
		set, c := celOf(t, text)
		got := set.Decide(in).Inputs(in)
		if diff := cmp.Diff(want, got.Values); diff != "" {
			t.Errorf("%s (-want +got):\n%s", text, diff)
		}
		if !c.recalled(&got) {
			t.Errorf("%s: does not recall what it noted", text)
		}
	}
	if _, c := celOf(t, `size(groups) == 2`); c.recalled(&Inputs{Values: map[string]any{"groups.a": true}}) {
		t.Error("one membership recalls all groups")
	}
	if _, c := celOf(t, `user.claims.x == 1`); !c.recalled(&Inputs{Values: map[string]any{"user.claims": nil}}) {
		t.Error("all claims do not recall one")
	}
}

// replayed is in as the audit log would give it back.
func replayed(t rapid.TB, set *Set, in *Input) *Input {
	text, err := json.Marshal(set.Decide(in).Inputs(in))
	if err != nil {
		t.Fatal(err)
	}
	var noted Inputs
	if err := json.Unmarshal(text, &noted); err != nil {
		t.Fatal(err)
	}
	out := &Input{Now: noted.Now, Request: in.Request}
	if in.Person != nil {
		out.Person = &Person{Session: &sallyport.Session{}, Login: &sallyport.Login{}, User: &sallyport.User{}}
		out.recallValues(&noted)
	}
	return out
}

// A decision on what was noted is the decision that it was noted for.
func TestCELReplays(t *testing.T) {
	exprs := []string{
		`user.claims.dept == "ops"`, `has(user.claims.x)`, `user.claims.exists(k, k == "x")`, `user.claims.o.p == true`,
		`user.claims == session.claims`, `"a" in groups`, `!("b" in groups)`, `size(groups) > 1`, `groups.exists(g, g == "a")`,
		`user.email == "a@b"`, `has(user.email)`, `user.domain == "b"`, `device.approved`, `!device.approved`, `has(device.type)`,
		`device.facts.firewall == true`, `device.facts.edr > 3`, `!has(device.facts.edr)`, `session.age < duration("1h")`,
		`session.expires_in > duration("1h")`, `"pwd" in session.auth_methods`, `now < timestamp("2027-01-01T00:00:00Z")`,
		`request.path == "/x"`,
	}
	rapid.Check(t, func(t *rapid.T) {
		picked := rapid.SliceOfN(rapid.SampledFrom(exprs), 1, 3).Draw(t, "expressions")
		op := rapid.SampledFrom([]string{" && ", " || ", " == "}).Draw(t, "op")
		text := "(" + strings.Join(picked[:len(picked)-1], ") && (") + ")" + op + "(" + picked[len(picked)-1] + ")"
		if len(picked) == 1 {
			text = picked[0]
		}
		policy := "allow: {or: [{cel: '" + text + "'}]}"
		set, err := Compile([]sallyport.Route{{From: "tcp://db.internal:5432", Policy: policy}}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		in := drawInput(t)
		if in.Person != nil {
			in.Person.Login.Created = noon.Add(-time.Duration(rapid.IntRange(0, 2).Draw(t, "hours")) * time.Hour)
			in.Person.ExpiresIn = rapid.SampledFrom([]time.Duration{0, time.Minute, 2 * time.Hour}).Draw(t, "expires")
			in.Person.Session.AuthMethods = rapid.SampledFrom([][]string{nil, {"pwd"}}).Draw(t, "methods")
			if rapid.IntRange(0, 4).Draw(t, "deviceless") == 0 {
				in.Person.Device, in.Person.Posture = nil, nil
			}
		}
		want := set.Decide(in).Verdict
		again := replayed(t, set, in)
		if got := set.Decide(again).Verdict; got != want {
			t.Fatalf("%s\nwas %v, is %v", text, want, got)
		}
		c := set.routes[0].policy.allow[0].when.of[0].is.(*expression)
		in.prepare(&set.site)
		was, _ := c.run(in)
		if is, err := c.run(again); is != was {
			t.Fatalf("%s\nwas %v, is %v (%v)", text, was, is, err)
		}
	})
}

func FuzzCEL(f *testing.F) {
	for _, l := range allLeaves() {
		if text, is := strings.CutPrefix(l, "cel: '"); is {
			f.Add(strings.TrimSuffix(text, "'"))
		}
	}
	for _, s := range []string{
		`user.emial`, `groups + 1`, `user.id.matches("(a+)+$")`, `[1, 2].map(x, x + 1).filter(y, y > 2).exists_one(z, z == 3)`,
		`{"a": [1]}["a"][0] == 1u`, `type(user.claims.x) == type(1)`, `b"x" == bytes("x") ? true : dyn(1)`, "user.`id` == r'a'",
		`request.headers["Origin"].all(h, h.size() > 0)`, `now - duration("1h") < timestamp("2026-01-01T00:00:00Z")`,
		`google.protobuf.Duration{seconds: 1} == session.age`, `.now == now`, `has(device.facts.x.y)`, `{}.a`, `matches()`, `user.id.matches()`, `now.getHours()`, `timestamp() < now`,
	} {
		f.Add(s)
	}
	in := asker(f, `email=a@b groups=a,b claim.x=[1,"a",null,{"y":2}] claim.o={"p":true} fact.firewall=true fact.edr=4 `+
		`logged-in=1h auth=pwd expires=1h peer=10.1.2.3 method=GET path=/x header.Origin=a`)
	f.Fuzz(func(t *testing.T, text string) {
		p := parser{cels: new(expressions)}
		start := time.Now()
		c, ok := p.expression(&yaml.Node{Kind: yaml.ScalarNode, Line: 1, Column: 1}, text)
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("checked in %v", took)
		}
		if ok != (len(p.errs) == 0) {
			t.Fatalf("ok is %v with %v", ok, p.errs)
		}
		for _, e := range p.errs {
			if e.Line < 1 || e.Column < 1 || e.Message == "" {
				t.Errorf("fault without a place: %+v", e)
			}
		}
		if !ok {
			return
		}
		in.prepare(&Options{Sources: []string{"os"}, TTL: time.Minute})
		start = time.Now()
		v, err := c.run(in)
		if err != nil && v != Unknown {
			t.Errorf("%v with the error %v", v, err)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("took %v", took)
		}
		var to Inputs
		c.note(in, &to)
		if !c.recalled(&to) {
			t.Error("does not recall what it noted")
		}
		c.found(in)
		nobody := &Input{Now: noon, Request: in.Request}
		if v, err := c.run(nobody); len(c.refs) > 0 && (v != Unknown || !errors.Is(err, celNoSession)) {
			t.Errorf("%v (%v) about nobody", v, err)
		}
	})
}

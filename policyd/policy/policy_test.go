package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"sallyport"
	"sallyport/internal/fault"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

const anyone = `allow: {or: [{authenticated_user: true}]}`

func compileOne(t testing.TB, text string) *Set {
	t.Helper()
	set, err := Compile([]sallyport.Route{{From: "tcp://db.internal:5432", Policy: text}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func target(t testing.TB, s string) sallyport.Target {
	t.Helper()
	x, err := sallyport.ParseTarget(s)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func TestCase_I1_bytesThatNoPolicyNeeds(t *testing.T) {
	for name, tt := range map[string]struct{ text, want string }{
		"BOM":           {"\uFEFF" + anyone, "1:1: a byte-order mark"},
		"inner BOM":     {"name: a\uFEFF\n" + anyone, "1:8: a byte-order mark"},
		"NUL":           {"name: a\x00b\n" + anyone, "1:8: a byte-order mark, a control"},
		"escape":        {"\x1b[2J" + anyone, "1:1: "},
		"not UTF-8":     {"# caf\xe9\n" + anyone, "1:6: "},
		"UTF-16":        {"\xff\xfea\x00l\x00", "1:1: "},
		"empty":         {"", "1:1: the policy is empty"},
		"comment":       {"# nothing", "1:1: the policy is empty"},
		"empty list":    {"[]", "1:1: the policy is empty"},
		"null":          {"null", "1:1: a rule must be an object"},
		"text":          {"allow", "1:1: a rule must be an object"},
		"too long":      {strings.Repeat("#", maxText+1), "1:1: policy of"},
		"second in bad": {anyone + "\n---\n\t", "3:1: no YAML"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse([]byte(tt.text))
			if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("got %v; want %s…", err, tt.want)
			}
		})
	}
}

// A bomb of anchors is refused without being expanded.
func TestCase_I1_billionLaughs(t *testing.T) {
	var b strings.Builder
	b.WriteString("- allow: &a0 {or: [{accept: true}]}\n")
	for i := 1; i < 40; i++ {
		fmt.Fprintf(&b, "- allow: &a%d {or: [*a%d, *a%d]}\n", i, i-1, i-1)
	}
	_, err := Parse([]byte(b.String()))
	var errs Errors
	if !errors.As(err, &errs) || len(errs) == 0 || !strings.Contains(errs[0].Message, "anchors") {
		t.Fatalf("got %v; want a fault about anchors", err)
	}
}

func TestParseNodeKeepsTheFilesLines(t *testing.T) {
	n, fault := document([]byte("# a file\nroutes:\n  policy:\n    - alow: 1\n"))
	if fault != nil {
		t.Fatal(fault)
	}
	_, err := ParseNode(n.Content[0].Content[1].Content[1])
	var errs Errors
	if !errors.As(err, &errs) || errs[0].Line != 4 || errs[0].Column != 7 {
		t.Errorf("got %v; want a fault at 4:7", err)
	}
}

// Both readings that the error about several blocks shows must load.
func TestReadingsLoad(t *testing.T) {
	_, err := Parse([]byte("allow:\n  and: [{domain: corp.example}]\n  nor:\n  - email: {not: \"x y\"}\n  - device: {firewall: true}\n"))
	var errs Errors
	if !errors.As(err, &errs) || len(errs) != 1 {
		t.Fatalf("got %v; want one fault", err)
	}
	lines := strings.Split(errs[0].Message, "\n")
	if len(lines) != 4 {
		t.Fatalf("got %q; want two readings", errs[0].Message)
	}
	for _, reading := range []string{lines[1], lines[3]} {
		reading = strings.ReplaceAll(reading, `x y`, `xy`) // refused here for its blank only
		if _, err := Parse([]byte(reading)); err != nil {
			t.Errorf("%s: %v", reading, err)
		}
	}
}

func TestCase_K8_versions(t *testing.T) {
	for _, tt := range []struct {
		a, b     string
		want     int
		ok       bool
		semantic bool
	}{
		{a: "1.10", b: "1.9", want: 1, ok: true},
		{a: "1.9", b: "1.10", want: -1, ok: true},
		{a: "1.2", b: "1.2.0", want: 0, ok: true},
		{a: "v1.2", b: "1.2", want: 0, ok: true},
		{a: "24.04", b: "24.4", want: 0, ok: true},
		{a: "99999999999999999999.1", b: "99999999999999999999.2", want: -1, ok: true},
		{a: "6.1.0-18-amd64", b: "6.1", want: 0, ok: true},
		{a: "6.9-rc3", b: "6.9", want: -1, ok: true},
		{a: "6.9", b: "6.9-rc3", want: 1, ok: true},
		{a: "6.9.1-rc3", b: "6.9", want: 1, ok: true},
		{a: "", b: "1"},
		{a: "1", b: ""},
		{a: "-1", b: "1"},
		{a: "beta", b: "1"},
		{a: "1.2.3-beta", b: "1.2.3", want: -1, ok: true, semantic: true},
		{a: "1.2.3-beta", b: "1.2.2", want: 1, ok: true, semantic: true},
		{a: "1.0.0-alpha", b: "1.0.0-alpha.1", want: -1, ok: true, semantic: true},
		{a: "1.0.0-alpha.1", b: "1.0.0-alpha.beta", want: -1, ok: true, semantic: true},
		{a: "1.0.0-beta.2", b: "1.0.0-beta.11", want: -1, ok: true, semantic: true},
		{a: "1.0.0-rc.1", b: "1.0.0+build", want: -1, ok: true, semantic: true},
		{a: "1.0.0+a", b: "1.0.0+b", want: 0, ok: true, semantic: true},
		{a: "1.0.0x", b: "1.0.0", semantic: true},
		{a: "1.0.0-", b: "1.0.0", semantic: true},
	} {
		order := compareVersions
		if tt.semantic {
			order = compareSemantic
		}
		got, ok := order(tt.a, tt.b)
		if sign(got) != tt.want && ok || ok != tt.ok {
			t.Errorf("%q against %q: got %d, %v; want %d, %v", tt.a, tt.b, got, ok, tt.want, tt.ok)
		}
	}
}

func sign(n int) int {
	switch {
	case n < 0:
		return -1
	case n > 0:
		return 1
	}
	return 0
}

func TestRoutesMostSpecificWins(t *testing.T) {
	rule := func(name string) string { return "{name: " + name + ", " + anyone + "}" }
	set, err := Compile([]sallyport.Route{
		{From: "tcp://*.internal:22", Policy: rule("wide")},
		{From: "tcp://*.svc.internal:22", Policy: rule("narrow")},
		{From: "tcp://a.svc.internal:22", To: "tcp://10.0.0.1:2222", Policy: rule("exact")},
		{From: "tcp://*.svc.internal:443", Policy: rule("other-port")},
		{From: "udp://*.svc.internal:22", Policy: rule("udp")},
		{From: "tcp://10.1.2.3:22", Policy: rule("address")},
		{From: "https://wiki.corp.example", To: "http://10.0.3.9:8080", Policy: rule("web")},
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	up := func(n sallyport.Network, host string, port uint16, literal bool) sallyport.Upstream {
		return sallyport.Upstream{Network: n, Host: host, Port: port, Literal: literal}
	}
	for _, tt := range []struct {
		target, rule string
		up           sallyport.Upstream
	}{
		{"tcp://a.svc.internal:22", "exact", up("tcp", "10.0.0.1", 2222, true)},
		{"tcp://b.svc.internal:22", "narrow", up("tcp", "b.svc.internal", 22, false)},
		{"tcp://x.a.svc.internal:22", "narrow", up("tcp", "x.a.svc.internal", 22, false)},
		{"tcp://svc.internal:22", "wide", up("tcp", "svc.internal", 22, false)},
		{"tcp://a.svc.internal:443", "other-port", up("tcp", "a.svc.internal", 443, false)},
		{"udp://a.svc.internal:22", "udp", up("udp", "a.svc.internal", 22, false)},
		{"tcp://10.1.2.3:22", "address", up("tcp", "10.1.2.3", 22, true)},
		{"https://wiki.corp.example", "web", up("http", "10.0.3.9", 8080, true)},
		{target: "tcp://internal:22"},
		{target: "tcp://a.svc.internal:23"},
		{target: "tcp://a.svc.internal.evil:22"},
		{target: "tcp://xsvc.internal:2"},
		{target: "tcp://10.1.2.4:22"}, // G9: only names (and one address) are granted
		{target: "tcp://wiki.corp.example:443"},
	} {
		in := asker(t, "email=a@b")
		in.Request = &sallyport.Request{Session: "s1", Target: target(t, tt.target)}
		a := set.Decide(in)
		if tt.rule == "" {
			if a.Verdict != sallyport.VerdictNoRoute {
				t.Errorf("%s: got %v; want no route", tt.target, a.Verdict)
			}
			continue
		}
		_, _, up := a.Route(in.Request.Target)
		if a.Rule() != tt.rule || up != tt.up || a.Verdict != sallyport.VerdictAllow {
			t.Errorf("%s: got %v by %q to %+v; want allow by %q to %+v", tt.target, a.Verdict, a.Rule(), up, tt.rule, tt.up)
		}
	}
}

func TestCase_I6_duplicateRoutesNameBoth(t *testing.T) {
	_, err := Compile([]sallyport.Route{
		{From: "tcp://db.internal:5432", Name: "db", Policy: anyone},
		{From: "tcp://*.internal:22", Policy: anyone},
		{From: "TCP://DB.internal.:5432", Name: "db", Policy: anyone},
		{From: "ssh://*.internal", Policy: anyone},
	}, Options{})
	var faults fault.List
	if !errors.As(err, &faults) {
		t.Fatal(err)
	}
	want := []string{
		`routes[2].from: TCP://DB.internal.:5432 stands here and in routes[0].from; one of them would never be asked`,
		`routes[2].name: "db" is the name of routes[0] too`,
		`routes[3].from: ssh://*.internal stands here and in routes[1].from; one of them would never be asked`,
	}
	if diff := cmp.Diff(strings.Join(want, "\n"), faults.Error()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// G7 and J8: what a gateway must never dial does not load.
func TestCase_J8_forbiddenDestinations(t *testing.T) {
	opts := Options{Forbidden: []string{"10.9.9.9:8445", ":8443", "gw.localhost:443", "[::]:9000", "control.internal:8444"}}
	for _, tt := range []struct{ from, to, want string }{
		{to: "tcp://169.254.169.254:80", want: "metadata"},
		{to: "tcp://[fd00:ec2::254]:80", want: "metadata"},
		{to: "tcp://metadata.google.internal:80", want: "metadata"},
		{to: "tcp://169.254.1.1:80", want: "link-local"},
		{to: "tcp://[fe80::1]:80", want: "link-local"},
		{to: "tcp://[::ffff:169.254.169.254]:80", want: "metadata"},
		{to: "tcp://0.0.0.0:80", want: "unspecified"},
		{to: "tcp://[::]:80", want: "unspecified"},
		{to: "tcp://224.0.0.1:80", want: "multicast"},
		{to: "tcp://10.9.9.9:8445", want: "own listeners"},
		{to: "tcp://127.0.0.1:8443", want: "own listeners"},
		{to: "tcp://[::1]:9000", want: "own listeners"},
		{to: "tcp://gw.localhost:443", want: "own listeners"},
		{to: "tcp://control.internal:8444", want: "own listeners"},
		{to: "tcp://localhost:5432", want: "127.0.0.1:5432"},
		{to: "tcp://db.localhost:5432", want: "127.0.0.1:5432"},
		{from: "tcp://169.254.169.254:80", want: "metadata"},
		{from: "tcp://localhost:80", want: "127.0.0.1:80"},
		{to: "udp://10.0.0.1:53", want: "cannot lead to udp"},
		{to: "10.0.0.1:53", want: "scheme://"},
		{to: "tcp://10.0.0.1:53/x", want: "scheme://"},
		{to: "tcp://u@10.0.0.1:53", want: "scheme://"},
		{to: "tcp://10.0.0.1", want: "missing port"},
		{to: "tcp://2130706433:80", want: "a number is no host name"},
		{from: "db.internal:80", want: "no scheme"},
		{from: "tcp://db.internal:80/x", want: "only scheme"},
		{from: "tcp://*.1:80", want: "a number is no host name"},
		{from: "tcp://*.10.0.0.1:80", want: "address"},
		{from: "tcp://a.*.b:80", want: "character"},
		{from: "tcp://*:80", want: "character"},
		// and these do load
		{to: "tcp://127.0.0.1:5432"},
		{to: "tcp://[::1]:5432"},
		{from: "tcp://127.0.0.1:5432"},
		{to: "tcp://10.9.9.9:8446"},
		{to: "tcp://10.9.9.8:8443"},
	} {
		r := sallyport.Route{From: tt.from, To: tt.to, Policy: anyone}
		if r.From == "" {
			r.From = "tcp://x.internal:1"
		}
		_, err := Compile([]sallyport.Route{r}, opts)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%+v: got %v; want it to load", tt, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%+v: got %v; want %q", tt, err, tt.want)
		}
	}
}

func TestCompileReportsEveryFault(t *testing.T) {
	_, err := Compile([]sallyport.Route{
		{From: "nowhere", Policy: "alow: 1", Carrier: "fast", Name: "a b"},
		{From: "tcp://x:1", Policy: "allow: {or: [{emial: a@b}, {accept: false}]}"},
	}, Options{Forbidden: []string{"nonsense"}})
	var faults fault.List
	if !errors.As(err, &faults) {
		t.Fatal(err)
	}
	var keys []string
	for _, f := range faults {
		keys = append(keys, f.Key)
	}
	want := []string{
		"forbidden[0]", "routes[0].from", "routes[0].carrier", "routes[0].name", "routes[0].policy",
		"routes[1].policy", "routes[1].policy",
	}
	if diff := cmp.Diff(want, keys); diff != "" {
		t.Errorf("-want +got:\n%s\n%v", diff, err)
	}
}

func TestZeroTargetAsksForACarrier(t *testing.T) {
	set := compileOne(t, anyone)
	for words, want := range map[string]sallyport.Verdict{"email=a@b expires=5m": sallyport.VerdictAllow, "nobody": sallyport.VerdictLogin} {
		in := asker(t, words)
		in.Request = &sallyport.Request{Session: "s1"}
		a := set.Decide(in)
		if a.Verdict != want {
			t.Errorf("%s: got %v; want %v", words, a.Verdict, want)
		}
		if want == sallyport.VerdictAllow && a.ValidFor != 5*time.Minute {
			t.Errorf("%s: got valid for %v; want 5m", words, a.ValidFor)
		}
	}
}

// To whom a route is hidden nothing tells it from one that does not exist. The
// audit log, which is not for them, does.
func TestHiddenLooksLikeNothing(t *testing.T) {
	set, err := Compile([]sallyport.Route{
		{From: "tcp://vault.internal:8200", Hidden: true, Policy: "allow: {and: [{device: {firewall: true}}]}"},
		{From: "tcp://deny.internal:8200", Hidden: true, Policy: "deny: {or: [{accept: true}]}"},
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, words := range []string{"fact.firewall=false@3m expires=1h", "nobody", "no-device"} {
		told := func(host string) string {
			in := asker(t, words)
			in.Request = &sallyport.Request{Session: "s1", Target: target(t, host)}
			a := set.Decide(in)
			from, carrier, up := a.Route(in.Request.Target)
			return describe(set, in) + fmt.Sprint(from, carrier, up, a.Subjects(in))
		}
		want := told("tcp://absent.internal:8200")
		for _, hidden := range []string{"tcp://vault.internal:8200", "tcp://deny.internal:8200"} {
			if got := told(hidden); got != want {
				t.Errorf("%s asks %s: got %q; want %q", words, hidden, got, want)
			}
		}
	}
}

// A device's clock that is wrong ages no fact; policyd's counts from the report on.
func TestFactAgeNeedsNoCommonClock(t *testing.T) {
	wrong := noon.Add(-7 * time.Minute)
	p := &sallyport.Posture{Received: noon.Add(-time.Minute), Sequence: wrong.UnixMilli()}
	f := sallyport.Fact{At: wrong.Add(-20 * time.Second)}
	if got, want := FactAge(p, f, noon), 80*time.Second; got != want {
		t.Errorf("got %v; want %v", got, want)
	}
	f.At = wrong.Add(time.Hour) // from the future: as new as the report
	if got, want := FactAge(p, f, noon), time.Minute; got != want {
		t.Errorf("got %v; want %v", got, want)
	}
	if got := FactAge(&sallyport.Posture{}, f, noon); got < time.Hour {
		t.Errorf("a report that was never received is %v old; want very old", got)
	}
	f.At = time.Date(2, 1, 1, 0, 0, 0, 0, time.UTC) // an age of its own that no duration can say
	if got := FactAge(p, f, noon); got < time.Hour {
		t.Errorf("a fact of the year 2 is %v old; want very old", got)
	}
}

func TestShortestAge(t *testing.T) {
	set := compileOne(t, "allow: {or: [{device: {firewall: {is: true, max_age: 2m}}}, {device: {screen_lock: {is: true, max_age: 1h}}}]}")
	if got := set.ShortestAge(); got != 2*time.Minute {
		t.Errorf("got %v; want 2m", got)
	}
	if got := compileOne(t, anyone).ShortestAge(); got != 10*time.Minute {
		t.Errorf("got %v; want posture_ttl", got)
	}
}

func TestInputsHoldWhatWasLookedAt(t *testing.T) {
	set := compileOne(t, "allow: {and: [{groups: {has: dba}}, {claim/dept: ops}, {device: {firewall: true, approved: true}}, {domain: b}]}")
	in := asker(t, `email=a@b groups=dba,other claim.dept="ops" claim.secret="x" fact.firewall=true@2s fact.os="linux" type=tpm`)
	in.Request = &sallyport.Request{Session: "s1", Target: target(t, "tcp://db.internal:5432")}
	a := set.Decide(in)
	want := Inputs{
		Now: noon, Email: new("a@b"), Groups: map[string]bool{"dba": true}, GroupCount: 2, Claims: map[string]any{"dept": "ops"},
		Device: &DeviceInput{ID: "d1", Type: "tpm"},
		Facts:  map[string]*FactInput{"firewall": {Value: true, Source: "os", Age: 2 * time.Second}},
	}
	if diff := cmp.Diff(want, a.Inputs(in)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestEachHidesAndDecides(t *testing.T) {
	set, err := Compile([]sallyport.Route{
		{From: "tcp://a:1", Name: "a", Policy: "allow: {or: [{groups: a}]}"},
		{From: "tcp://b:1", Policy: "allow: {or: [{groups: b}]}"},
		{From: "tcp://c:1", Hidden: true, Policy: "allow: {or: [{groups: b}]}"},
		{From: "tcp://*.d:1", Hidden: true, Policy: "allow: {or: [{groups: a}]}"},
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	in := asker(t, "groups=a")
	in.Request = &sallyport.Request{Session: "s1"}
	var got []string
	set.Each(in, func(e Entry) { got = append(got, e.From+" "+e.Answer.Verdict.String()) })
	if diff := cmp.Diff([]string{"tcp://a:1 allow", "tcp://b:1 deny", "tcp://*.d:1 allow"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestExplainAnAllow(t *testing.T) {
	set := compileOne(t, `
- {name: dba, allow: {and: [{groups: dba}]}}
- {name: ops, allow: {and: [{groups: ops}, {authenticated_user: true}]}}
`)
	in := asker(t, "groups=ops")
	in.Request = &sallyport.Request{Session: "s1", Target: target(t, "tcp://db.internal:5432")}
	a := set.Decide(in)
	var got []string
	for _, r := range set.Reasons(in, a, true) {
		got = append(got, r.Rule+" "+r.Condition+" "+r.Result)
	}
	if diff := cmp.Diff([]string{"dba groups false", "ops groups true", "ops authenticated_user true"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got := set.Reasons(in, a, false); got != nil {
		t.Errorf("an allow that nobody asked about: got %v; want no reasons", got)
	}
}

func TestCase_K2_factsThatNoHonestAgentReports(t *testing.T) {
	for _, tt := range []struct {
		name  string
		value any
		ok    bool
	}{
		{"os", "linux", true},
		{"os", "darwin", true},
		{"os", "templeos", false},
		{"os", true, false},
		{"os", "", false},
		{"os_version", "15.4", true},
		{"os_version", "24.04", true},
		{"os_version", "9999", false},
		{"os_version", "-1", false},
		{"os_version", "", false},
		{"os_version", "2023", true},
		{"os_version", "20260102", true},
		{"os_version", "4152.2.0", true},
		{"os_version", "99999.1", false},
		{"os_version", "10.0.22631", true},
		{"os_version", 15.4, false},
		{"kernel", "6.1.0-18-amd64", true},
		{"kernel", "9999", false},
		{"agent_version", "1.2.3-beta", true},
		{"agent_version", "dev", false},
		{"agent_version", "0.0.0-dev", true},
		{"disk_encrypted", true, true},
		{"disk_encrypted", "true", false},
		{"disk_encrypted", 1.0, false},
		{"disk_encrypted", nil, false},
		{"edr", "falcon", true},
		{"edr", 7.0, true},
		{"edr", []any{"a"}, false},
		{"edr", strings.Repeat("x", 300), false},
		{"edr", "a\nb", false},
		{"Edr", true, false},
		{"", true, false},
		{"approved", true, false},
		{"is", "d1", false},
		{"max_age", "1h", false},
	} {
		if err := CheckFact(tt.name, tt.value); (err == nil) != tt.ok {
			t.Errorf("%s = %v: got %v; want ok %v", tt.name, tt.value, err, tt.ok)
		}
	}
}

func TestGroupsFindEveryName(t *testing.T) {
	for n := range 200 {
		var gs []sallyport.Group
		for i := range n {
			gs = append(gs, sallyport.Group{ID: fmt.Sprintf("id-%d", i), Name: fmt.Sprintf("name-%d", i/2)})
		}
		g := NewGroups(gs)
		for i := range n {
			if !g.has(gs[i].ID) || !g.has(gs[i].Name) {
				t.Fatalf("%d groups: %v is not found", n, gs[i])
			}
		}
		for _, absent := range []string{"", "id-", fmt.Sprintf("id-%d", n), "name-", "Id-0"} {
			if g.has(absent) {
				t.Errorf("%d groups: %q is found", n, absent)
			}
		}
	}
}

// age counts as Time.Sub does.
func TestFactAgeIsExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		day := int64(24 * time.Hour)
		signed := noon.Add(time.Duration(rapid.Int64Range(-day, day).Draw(t, "signed")))
		received := noon.Add(-time.Duration(rapid.Int64Range(0, day).Draw(t, "received")))
		at := noon.Add(time.Duration(rapid.Int64Range(-day, day).Draw(t, "at")))
		p := &sallyport.Posture{Received: received, Sequence: signed.UnixMilli()}
		want := noon.Sub(received) + max(time.UnixMilli(p.Sequence).Sub(at), 0)
		if got := FactAge(p, sallyport.Fact{At: at}, noon); got != want {
			t.Fatalf("got %v; want %v", got, want)
		}
	})
}

// Half a megabyte of anything is read or refused with a bounded error, and not in
// a time that grows with its square (which would be minutes).
func TestHugePoliciesAreCheap(t *testing.T) {
	repeat := func(format string) string {
		var b strings.Builder
		for i := 0; b.Len() < maxText/2; i++ {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	for name, text := range map[string]string{
		"facts":          "allow: {or: [{device: {" + repeat("f%d: 1, ") + "g: 1}}]}",
		"unknown words":  "allow: {or: [" + repeat("{emailx%d: 1}, ") + "{reject: true}]}",
		"rules":          repeat("- {alow%d: 1}\n"),
		"names in one":   `allow: {or: [{groups: "` + repeat("g%d,") + `"}]}`,
		"names in list":  "allow: {or: [{groups: [" + repeat("g%d, ") + "g]}]}",
		"two blocks":     "allow: {or: [" + repeat("{groups: g%d}, ") + "{reject: true}], and: [{reject: true}]}",
		"bounds of fact": "allow: {or: [{device: {edr: {" + repeat("max_age: 1m%.0d, ") + "is: 1}}}]}",
	} {
		start := time.Now()
		_, err := Parse([]byte(text))
		if took := time.Since(start); took > 30*time.Second {
			t.Errorf("%s: took %v", name, took)
		}
		if err != nil && len(err.Error()) > 64<<10 {
			t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
		}
	}
}

package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyport"

	"pgregory.net/rapid"
)

// leaves are criteria over few values, so that random people meet them often, by
// what they look at. Who adds a criterion adds them here, and draws in drawInput
// what they look at.
var leaves = []struct {
	about string
	lines []string
}{
	{"nothing", []string{"accept: true", "reject: true"}},
	{"the person", []string{
		"authenticated_user: true", "user: u1", "user: {not_in: [u1, u2]}",
		"email: {ends_with: \"@b\"}", "domain: {not: b}",
	}},
	{"groups", []string{"groups: a", "groups: {exclude: b}", "groups: {is: a}"}},
	{"claims", []string{"claim/x: 1", "claim/x: {exclude: \"1\"}", "claim/o.p: true"}},
	{"the device", []string{"device: {approved: true}"}},
	{"facts", []string{
		"device: {firewall: true}", "device: {firewall: {not: true}}", "device: {firewall: {is: true, max_age: 1m}}",
		"device: {screen_lock: {is: true, source: file}}", "device: {os_version: {\">=\": \"15.4\"}}",
		"device: {os_version: {\"<\": \"16\"}}", "device: {firewall: true, os: {in: [linux, darwin]}}",
		"device: {edr: {\">\": 3}}",
	}},
	{"the login", []string{
		"session_age: {\"<\": 1h}", "session_age: {\">=\": 10m, \"<=\": 2h}",
		"auth_method: mfa", "auth_method: {exclude: pwd}", "auth_method: {is: hwk}",
	}},
	{"records", []string{
		"record: {type: risk, field: score, \"<\": 10}", "record: {type: risk, exists: false}",
		"record: {type: risk, of: peer, field: tags, has: tor}",
	}},
	{"time", []string{
		"time_of_day: {timezone: Europe/Berlin, after: \"2:30\", before: 17:00}", "time_of_day: {timezone: Australia/Lord_Howe, before: \"1:45\"}",
		"day_of_week: mon-fri", "day_of_week: {is: \"sat,sun\", timezone: Pacific/Apia}",
		"date: {after: 2026-03-29T01:00:00Z, before: 2026-10-25T01:00:00Z}", "date: {before: 2011-12-31, timezone: Pacific/Apia}",
	}},
}

func allLeaves() []string {
	var all []string
	for _, l := range leaves {
		all = append(all, l.lines...)
	}
	return all
}

func drawLeaf(t *rapid.T) string {
	of := rapid.SampledFrom(leaves).Draw(t, "about")
	return rapid.SampledFrom(of.lines).Draw(t, of.about)
}

// changes are moments around which clocks on the wall jump, or days are left out.
var changes = []time.Time{
	noon, time.Date(2026, 3, 29, 1, 0, 0, 0, time.UTC), time.Date(2026, 10, 25, 1, 0, 0, 0, time.UTC), // Berlin
	time.Date(2026, 3, 8, 7, 0, 0, 0, time.UTC), time.Date(2026, 11, 1, 6, 0, 0, 0, time.UTC), // New York
	time.Date(2026, 4, 4, 15, 0, 0, 0, time.UTC), time.Date(2026, 10, 3, 15, 30, 0, 0, time.UTC), // Lord Howe
	time.Date(2011, 12, 30, 10, 0, 0, 0, time.UTC), // Apia
}

func drawNow(t *rapid.T) time.Time {
	now := rapid.SampledFrom(changes).Draw(t, "day")
	switch rapid.IntRange(0, 3).Draw(t, "near") {
	case 0:
		return now.Add(time.Duration(rapid.IntRange(-100, 100).Draw(t, "ns")))
	case 1:
		return now.Add(time.Duration(rapid.IntRange(-12, 12).Draw(t, "quarters")) * 15 * time.Minute)
	}
	return now.Add(time.Duration(rapid.Int64Range(-int64(9*day), int64(9*day)).Draw(t, "off")))
}

func drawBlock(t *rapid.T, depth int) string {
	op := rapid.SampledFrom(operatorKeys).Draw(t, "op")
	n := rapid.IntRange(1, 3).Draw(t, "n")
	parts := make([]string, n)
	for i := range parts {
		if depth < 3 && rapid.IntRange(0, 3).Draw(t, "nest") == 0 {
			parts[i] = drawBlock(t, depth+1)
		} else {
			parts[i] = "{" + drawLeaf(t) + "}"
		}
	}
	return "{" + op + ": [" + strings.Join(parts, ", ") + "]}"
}

func drawPolicy(t *rapid.T) string {
	var b strings.Builder
	for i := range rapid.IntRange(1, 4).Draw(t, "rules") {
		action := rapid.SampledFrom([]string{"allow", "allow", "deny"}).Draw(t, "action")
		mode := rapid.SampledFrom([]string{"", "", "", "mode: observe, "}).Draw(t, "mode")
		fmt.Fprintf(&b, "- {name: r%d, %s%s: %s}\n", i, mode, action, drawBlock(t, 1))
	}
	return b.String()
}

func drawInput(t *rapid.T) *Input {
	in := &Input{Now: drawNow(t), Request: drawRequest(t), Records: rapid.SampledFrom(someRecords).Draw(t, "records")}
	if rapid.IntRange(0, 7).Draw(t, "nobody") > 0 {
		in.Person = drawPerson(t, in.Now)
	}
	return in
}

var someRecords = []goldenRecords{
	nil, {"risk/u1": {"score": 5.0}}, {"risk/u1": {"score": 50.0}, "risk/192.0.2.7": {"tags": []any{"tor"}}},
}

func drawRequest(*rapid.T) *sallyport.Request {
	return &sallyport.Request{
		Session: "s1",
		Target:  sallyport.Target{Network: "tcp", Host: "db.internal", Port: 5432},
		Peer:    netip.MustParseAddrPort("192.0.2.7:4711"),
	}
}

func drawPerson(t *rapid.T, now time.Time) *Person {
	p := &Person{
		Session: &sallyport.Session{ID: "s1", User: "u1", Device: "d1", Claims: drawClaims(t, "session claims")},
		Login: &sallyport.Login{
			Created:     now.Add(-time.Duration(rapid.SampledFrom([]int{0, 3, 10, 55, 60, 120, 500, -1, -2}).Draw(t, "logged in")) * time.Minute),
			AuthMethods: rapid.SampledFrom([][]string{nil, {"pwd"}, {"pwd", "mfa"}, {"hwk"}, {"hwk", "mfa"}}).Draw(t, "methods"),
		},
		User: &sallyport.User{
			ID:     rapid.SampledFrom([]sallyport.UserID{"u1", "u2", "u3"}).Draw(t, "user"),
			Claims: drawClaims(t, "user claims"),
		},
		Email:  rapid.SampledFrom([]string{"", "a@b", "A@B", "a@c"}).Draw(t, "email"),
		Groups: rapid.SampledFrom(someGroups).Draw(t, "groups"),
	}
	drawDevice(t, p, now)
	return p
}

var someGroups = []Groups{
	{}, NewGroups(nil), NewGroups([]sallyport.Group{{ID: "a"}}), NewGroups([]sallyport.Group{{ID: "1", Name: "a"}, {ID: "b"}}),
}

var someClaims = []map[string]any{
	nil, {"x": 1.0}, {"x": "1"}, {"x": []any{"1", 1.0}}, {"o": map[string]any{"p": true}}, {"o.p": false}, {"o": "z"},
}

func drawClaims(t *rapid.T, whose string) map[string]any {
	return rapid.SampledFrom(someClaims).Draw(t, whose)
}

// drawDevice gives p a device, mostly, and the device a report, mostly.
func drawDevice(t *rapid.T, p *Person, now time.Time) {
	if rapid.IntRange(0, 9).Draw(t, "device") == 0 {
		p.Session.Device = ""
		return
	}
	p.Device = &sallyport.Device{ID: "d1", Approved: rapid.Bool().Draw(t, "approved")}
	if rapid.IntRange(0, 5).Draw(t, "reported") > 0 {
		p.Posture = &sallyport.Posture{
			Device: "d1", Received: now.Add(-time.Duration(rapid.IntRange(0, 90).Draw(t, "received")) * time.Second),
			Sequence: now.UnixMilli(), Facts: drawFacts(t, now),
		}
	}
}

// someFacts are values by fact.
var someFacts = []struct {
	name   string
	values []any
}{
	{"firewall", []any{true, false}},
	{"screen_lock", []any{true, false}},
	{"os", []any{"linux", "windows"}},
	{"os_version", []any{"15.4", "15.10", "14", "16", "", "x"}},
	{"edr", []any{2.0, 4.0, "4"}},
}

func drawFacts(t *rapid.T, now time.Time) map[string]sallyport.Fact {
	facts := map[string]sallyport.Fact{}
	for _, f := range someFacts {
		if rapid.IntRange(0, 3).Draw(t, f.name+" known") == 0 {
			continue
		}
		facts[f.name] = sallyport.Fact{
			Value:  rapid.SampledFrom(f.values).Draw(t, f.name),
			At:     now.Add(-time.Duration(rapid.IntRange(0, 700).Draw(t, f.name+" age")) * time.Second),
			Source: rapid.SampledFrom([]string{"os", "os", "file"}).Draw(t, f.name+" source"),
		}
	}
	return facts
}

func drawSet(t *rapid.T) (*Set, string) {
	text := drawPolicy(t)
	set, err := Compile([]sallyport.Route{{From: "tcp://db.internal:5432", Policy: text}}, Options{})
	if err != nil {
		t.Fatalf("%s\n%v", text, err)
	}
	return set, text
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		anyone, "- {name: a, allow: {and: [{groups: {has: dba}}, {device: {disk_encrypted: {is: true, max_age: 5m, source: [os]}}}]}}",
		"deny: {nor: [{claim/a.b: 5}, {or: [{email: {in: [a@b]}}]}]}", "- &a {allow: *a}", "a: !!binary x", "? ", "\t", "{", "- - -",
	} {
		f.Add([]byte(s))
	}
	in := &Input{Now: noon, Request: &sallyport.Request{Target: sallyport.Target{Network: "tcp", Host: "db.internal", Port: 5432}}}
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := Parse(text)
		if err != nil {
			errs, ok := err.(Errors)
			if !ok || len(errs) == 0 {
				t.Fatalf("%T %v: want Errors", err, err)
			}
			for _, e := range errs {
				if e.Line < 1 || e.Column < 1 || e.Message == "" {
					t.Errorf("fault without a place: %+v", e)
				}
			}
			return
		}
		if len(p.allow)+len(p.deny)+len(p.observed) == 0 {
			t.Fatal("a policy without rules loaded")
		}
		// It must hold for everything that loads: no panic, and nobody is let in
		// by a rule that looks at people.
		set, err := Compile([]sallyport.Route{{From: "tcp://db.internal:5432", Policy: string(text)}}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		a := set.Decide(in)
		set.Reasons(in, a, true)
	})
}

func FuzzVersions(f *testing.F) {
	f.Add("1.10", "1.9")
	f.Add("1.2.3-beta.1", "v1.2.3+x")
	f.Fuzz(func(t *testing.T, a, b string) {
		for _, order := range []func(a, b string) (int, bool){compareVersions, compareSemantic} {
			x, okX := order(a, b)
			y, okY := order(b, a)
			if okX != okY || okX && sign(x) != -sign(y) {
				t.Errorf("%q, %q: %d %v, reversed %d %v", a, b, x, okX, y, okY)
			}
		}
	})
}

package policy

import (
	"fmt"
	"slices"
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
	in := &Input{Now: noon, Request: drawRequest(t)}
	if rapid.IntRange(0, 7).Draw(t, "nobody") > 0 {
		in.Person = drawPerson(t)
	}
	return in
}

func drawRequest(*rapid.T) *sallyport.Request {
	return &sallyport.Request{
		Session: "s1",
		Target:  sallyport.Target{Network: "tcp", Host: "db.internal", Port: 5432},
	}
}

func drawPerson(t *rapid.T) *Person {
	p := &Person{
		Session: &sallyport.Session{ID: "s1", User: "u1", Device: "d1", Claims: drawClaims(t, "session claims")},
		Login:   &sallyport.Login{},
		User: &sallyport.User{
			ID:     rapid.SampledFrom([]sallyport.UserID{"u1", "u2", "u3"}).Draw(t, "user"),
			Claims: drawClaims(t, "user claims"),
		},
		Email:  rapid.SampledFrom([]string{"", "a@b", "A@B", "a@c"}).Draw(t, "email"),
		Groups: rapid.SampledFrom(someGroups).Draw(t, "groups"),
	}
	drawDevice(t, p)
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
func drawDevice(t *rapid.T, p *Person) {
	if rapid.IntRange(0, 9).Draw(t, "device") == 0 {
		p.Session.Device = ""
		return
	}
	p.Device = &sallyport.Device{ID: "d1", Approved: rapid.Bool().Draw(t, "approved")}
	if rapid.IntRange(0, 5).Draw(t, "reported") > 0 {
		p.Posture = &sallyport.Posture{
			Device: "d1", Received: noon.Add(-time.Duration(rapid.IntRange(0, 90).Draw(t, "received")) * time.Second),
			Sequence: noon.UnixMilli(), Facts: drawFacts(t),
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

func drawFacts(t *rapid.T) map[string]sallyport.Fact {
	facts := map[string]sallyport.Fact{}
	for _, f := range someFacts {
		if rapid.IntRange(0, 3).Draw(t, f.name+" known") == 0 {
			continue
		}
		facts[f.name] = sallyport.Fact{
			Value:  rapid.SampledFrom(f.values).Draw(t, f.name),
			At:     noon.Add(-time.Duration(rapid.IntRange(0, 700).Draw(t, f.name+" age")) * time.Second),
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

// Every remedy works, and none of its parts would do.
func TestRemediesWork(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set, text := drawSet(t)
		in := drawInput(t)
		a := set.Decide(in)
		if a.Verdict != sallyport.VerdictDeny || in.Person == nil {
			return
		}
		h := set.newSearch(in, a.route)
		want := bruteForce(h)
		got := set.Remedies(in, a)
		if (len(got) > 0) != want {
			t.Fatalf("%s\ngot %v; a change that helps exists: %v", text, got, want)
		}
		for i, x := range got {
			for j, y := range got {
				if i != j && isWithin(x, y) && len(x) < len(y) {
					t.Fatalf("%s\n%v is within %v", text, x, y)
				}
			}
		}
	})
}

// bruteForce reports whether any assignment of the facts' candidate values allows.
func bruteForce(h *search) bool {
	var try func(i int) bool
	try = func(i int) bool {
		if i == len(h.atoms) {
			v, _ := h.route.decide(&h.in)
			return v == sallyport.VerdictAllow
		}
		if try(i + 1) {
			return true
		}
		name := h.atoms[i].name
		old, had := h.posture.Facts[name]
		defer func() {
			delete(h.posture.Facts, name)
			if had {
				h.posture.Facts[name] = old
			}
		}()
		for _, c := range h.atoms[i].changes {
			h.posture.Facts[name] = c.fact
			if try(i + 1) {
				return true
			}
		}
		return false
	}
	return try(0)
}

func isWithin(x, y []sallyport.Remedy) bool {
	for _, r := range x {
		if !slices.ContainsFunc(y, func(o sallyport.Remedy) bool { return o.Condition == r.Condition }) {
			return false
		}
	}
	return true
}

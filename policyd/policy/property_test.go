package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport"

	"pgregory.net/rapid"
)

// leaves are criteria over few values, so that random people meet them often.
var leaves = []string{
	"accept: true", "reject: true", "authenticated_user: true",
	"user: u1", "user: {not_in: [u1, u2]}", "email: {ends_with: \"@b\"}", "domain: {not: b}",
	"groups: a", "groups: {exclude: b}", "groups: {is: a}",
	"claim/x: 1", "claim/x: {exclude: \"1\"}", "claim/o.p: true",
	"device: {firewall: true}", "device: {firewall: {not: true}}", "device: {firewall: {is: true, max_age: 1m}}",
	"device: {screen_lock: {is: true, source: file}}", "device: {os_version: {\">=\": \"15.4\"}}",
	"device: {os_version: {\"<\": \"16\"}}", "device: {firewall: true, os: {in: [linux, darwin]}}",
	"device: {approved: true}", "device: {edr: {\">\": 3}}",
}

func drawBlock(t *rapid.T, depth int) string {
	op := rapid.SampledFrom(operatorKeys).Draw(t, "op")
	n := rapid.IntRange(1, 3).Draw(t, "n")
	parts := make([]string, n)
	for i := range parts {
		if depth < 3 && rapid.IntRange(0, 3).Draw(t, "nest") == 0 {
			parts[i] = drawBlock(t, depth+1)
		} else {
			parts[i] = "{" + rapid.SampledFrom(slices.Concat(leaves, requestLeaves)).Draw(t, "leaf") + "}"
		}
	}
	return "{" + op + ": [" + strings.Join(parts, ", ") + "]}"
}

func drawPolicy(t *rapid.T) string {
	var b strings.Builder
	for i := range rapid.IntRange(1, 4).Draw(t, "rules") {
		action := rapid.SampledFrom([]string{"allow", "allow", "deny"}).Draw(t, "action")
		fmt.Fprintf(&b, "- {name: r%d, %s: %s}\n", i, action, drawBlock(t, 1))
	}
	return b.String()
}

func drawInput(t *rapid.T) *Input {
	in := &Input{Now: noon, Request: &sallyport.Request{Session: "s1", Target: sallyport.Target{Network: "tcp", Host: "db.internal", Port: 5432}}}
	drawRequest(t, in.Request)
	if rapid.IntRange(0, 7).Draw(t, "nobody") == 0 {
		return in
	}
	claims := func(label string) map[string]any {
		return rapid.SampledFrom([]map[string]any{
			nil, {"x": 1.0}, {"x": "1"}, {"x": []any{"1", 1.0}}, {"o": map[string]any{"p": true}}, {"o.p": false}, {"o": "z"},
		}).Draw(t, label)
	}
	p := &Person{
		Session: &sallyport.Session{ID: "s1", User: "u1", Device: "d1", Claims: claims("session claims")},
		Login:   &sallyport.Login{},
		User:    &sallyport.User{ID: rapid.SampledFrom([]sallyport.UserID{"u1", "u2", "u3"}).Draw(t, "user"), Claims: claims("user claims")},
		Email:   rapid.SampledFrom([]string{"", "a@b", "A@B", "a@c"}).Draw(t, "email"),
		Device:  &sallyport.Device{ID: "d1", Approved: rapid.Bool().Draw(t, "approved")},
	}
	p.Groups = rapid.SampledFrom([]Groups{{}, NewGroups(nil), NewGroups([]sallyport.Group{{ID: "a"}}), NewGroups([]sallyport.Group{{ID: "1", Name: "a"}, {ID: "b"}})}).Draw(t, "groups")
	if rapid.IntRange(0, 5).Draw(t, "reported") > 0 {
		p.Posture = &sallyport.Posture{
			Device: "d1", Received: noon.Add(-time.Duration(rapid.IntRange(0, 90).Draw(t, "received")) * time.Second),
			Sequence: noon.UnixMilli(), Facts: drawFacts(t),
		}
	}
	in.Person = p
	return in
}

func drawFacts(t *rapid.T) map[string]sallyport.Fact {
	values := map[string][]any{
		"firewall": {true, false}, "screen_lock": {true, false}, "os": {"linux", "windows"},
		"os_version": {"15.4", "15.10", "14", "16", "", "x"}, "edr": {2.0, 4.0, "4"},
	}
	facts := map[string]sallyport.Fact{}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if rapid.IntRange(0, 3).Draw(t, name+" known") == 0 {
			continue
		}
		facts[name] = sallyport.Fact{
			Value: rapid.SampledFrom(values[name]).Draw(t, name), At: noon.Add(-time.Duration(rapid.IntRange(0, 700).Draw(t, name+" age")) * time.Second),
			Source: rapid.SampledFrom([]string{"os", "os", "file"}).Draw(t, name+" source"),
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

// The path that stops early and the one that looks at everything agree.
func TestShortCircuitAgrees(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set, text := drawSet(t)
		in := drawInput(t)
		a := set.Decide(in)
		full := func(rules []rule) Value {
			v := False
			for i := range rules {
				c := &rules[i].when
				if short, long := c.eval(in), c.full(in); short != long {
					t.Fatalf("%s\nrule %d: short %v, full %v", text, i, short, long)
				}
				v = max(v, c.full(in))
			}
			return v
		}
		deny, allow := full(set.routes[0].policy.deny), full(set.routes[0].policy.allow)
		if want := deny == False && allow == True; (a.Verdict == sallyport.VerdictAllow) != want {
			t.Fatalf("%s\ngot %v; want allow %v (deny %v, allow %v)", text, a.Verdict, want, deny, allow)
		}
	})
}

// A denial has reasons, and each of them is a criterion that is not as wanted.
func TestReasonsExplain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set, text := drawSet(t)
		in := drawInput(t)
		a := set.Decide(in)
		reasons := set.Reasons(in, a, false)
		hasAllow := len(set.routes[0].policy.allow) > 0
		if a.Verdict == sallyport.VerdictDeny && len(reasons) == 0 && hasAllow {
			t.Fatalf("%s\na denial without reasons", text)
		}
		if a.Verdict == sallyport.VerdictAllow && len(reasons) != 0 {
			t.Fatalf("%s\nan allow with reasons %v", text, reasons)
		}
	})
}

// valid_for: until then the clock changes nothing; afterwards it may.
func TestValidForHolds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set, text := drawSet(t)
		in := drawInput(t)
		a := set.Decide(in)
		limit := a.ValidFor
		if limit == 0 {
			limit = 24 * time.Hour
		}
		in.Now = noon.Add(time.Duration(rapid.Int64Range(0, int64(limit)-1).Draw(t, "later")))
		if b := set.Decide(in); b.Verdict != a.Verdict {
			t.Fatalf("%s\n%v was to hold for %v, but is %v after %v", text, a.Verdict, a.ValidFor, b.Verdict, in.Now.Sub(noon))
		}
	})
}

// Unknown never allows: taking facts, groups or the report away from a person
// never turns a denial by unknowns into an allow that was not one for some
// complete knowledge. Checked in its simplest form: with nothing known at all,
// only what holds without looking is allowed.
func TestNothingKnownAllowsNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set, text := drawSet(t)
		in := &Input{Now: noon, Request: &sallyport.Request{Target: sallyport.Target{Network: "tcp", Host: "db.internal", Port: 5432}}}
		a := set.Decide(in)
		if a.Verdict != sallyport.VerdictAllow {
			return
		}
		for range 20 { // whoever comes is allowed too
			in := drawInput(t)
			if b := set.Decide(in); b.Verdict != sallyport.VerdictAllow {
				t.Fatalf("%s\nnobody is allowed, somebody is not (%v)", text, b.Verdict)
			}
		}
	})
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
		if len(p.allow)+len(p.deny) == 0 {
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

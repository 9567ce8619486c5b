package policy

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"sallyport"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"pgregory.net/rapid"
)

// TestLint runs testdata/lint.txtar: policies, and under the same name with
// ".want" what is said of them.
func TestLint(t *testing.T) {
	const file = "testdata/lint.txtar"
	a, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range a.Files {
		if strings.HasSuffix(f.Name, ".want") {
			continue
		}
		got := lintText(t, string(f.Data))
		if *update {
			setSection(a, f.Name+".want", got)
		} else if diff := cmp.Diff(section(a, f.Name+".want"), got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", f.Name, diff)
		}
	}
	if *update {
		if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func lintText(t testing.TB, text string) string {
	p, err := Parse([]byte(text))
	if err != nil {
		t.Fatalf("%s\n%v", text, err)
	}
	var out strings.Builder
	for _, f := range p.Lint(LintOptions{Now: noon, Groups: []string{"dba", "sre", "ops"}}) {
		fmt.Fprintf(&out, "%d:%d: %s: %s: %s\n", f.Line, f.Column, f.Severity, f.Code, f.Message)
	}
	return out.String()
}

// A policy for a group that was removed loads, is warned of, and denies.
func TestCase_I14_removedGroup(t *testing.T) {
	const text = "allow: {and: [{groups: {has: removed}}]}"
	if got, want := lintText(t, text), `warning: unknown_group: no group "removed" is known`; !strings.Contains(got, want) {
		t.Errorf("got %q; want …%s…", got, want)
	}
	if a := compileOne(t, text).Decide(asker(t, "groups=dba")); a.Verdict != sallyport.VerdictDeny {
		t.Errorf("got %v; want deny", a.Verdict)
	}
}

func TestLintFindsDatesThatAreOver(t *testing.T) {
	over := condition{op: and, of: []condition{leafOf(&until{noon}), leafOf(authenticated{})}}
	for end, want := range map[time.Duration]int{-time.Hour: 1, 0: 1, time.Hour: 0} {
		over.of[0].is = &until{noon.Add(end)}
		p := &Policy{allow: []rule{{when: over, at: place{1, 1}}}}
		if got := p.Lint(LintOptions{Now: noon}); len(got) != want {
			t.Errorf("end %v from now: got %v; want %d", end, got, want)
		}
	}
}

// until is false from a time on.
type until struct{ end time.Time }

func (u *until) ends() time.Time                          { return u.end }
func (u *until) eval(in *Input) Value                     { return truth(in.Now.Before(u.end)) }
func (u *until) path() string                             { return "until" }
func (u *until) wanted(bool) string                       { return "before its end" }
func (u *until) found(*Input) (_ string, _ time.Duration) { return "now", 0 }
func (u *until) note(*Input, *Inputs)                     {}
func (u *until) recalled(*Inputs) bool                    { return true }

// lintLeaves are criteria that imply and contradict each other.
var lintLeaves = []string{
	"accept: true", "reject: true", "authenticated_user: true", "user: u1", "user: {in: [u1, u2]}", "user: {not: u1}", "user: {not_in: [u1, u2]}",
	"user: {starts_with: u}", "user: {starts_with: u1}", "user: {contains: \"1\"}", "user: {ends_with: \"2\"}",
	"email: {ends_with: \"@b\"}", "email: {ends_with: \"B\"}", "email: A@B", "domain: b", "domain: {not: b}",
	"groups: a", "groups: b", "groups: {exclude: b}", "groups: {exclude: a}", "groups: {is: a}",
	"claim/x: 1", "claim/x: \"1\"", "claim/x: {exclude: \"1\"}", "claim/x: {is: \"1\"}",
	"device: {firewall: true}", "device: {firewall: {not: true}}", "device: {firewall: false}", "device: {firewall: {is: true, max_age: 1m}}",
	"device: {firewall: {is: false, source: [os, file]}}", "device: {firewall: {is: false, source: os}}",
	"device: {os_version: {\">=\": \"15.4\"}}", "device: {os_version: {\">\": \"15.4\"}}", "device: {os_version: {\"<\": \"15.4\"}}",
	"device: {os_version: {\"<\": \"16\"}}", "device: {os_version: {\"<=\": \"14\"}}", "device: {os_version: {in: [\"15.4\", \"x\"]}}", "device: {os_version: {not: \"x\"}}", "device: {os_version: {not: \"15.4\"}}",
	"device: {edr: {\">\": 3}}", "device: {edr: {in: [2, \"4\"]}}", "device: {edr: {not_in: [2, \"4\"]}}", "device: {edr: {not: 4}}", "device: {edr: \"4\"}", "device: {edr: {contains: \"4\"}}",
	"device: {os: linux}", "device: {os: windows}", "device: {approved: true}", "device: {approved: false}",
}

func drawLintBlock(t *rapid.T, depth int) string {
	parts := make([]string, rapid.IntRange(1, 3).Draw(t, "n"))
	for i := range parts {
		if depth < 2 && rapid.IntRange(0, 4).Draw(t, "nest") == 0 {
			parts[i] = drawLintBlock(t, depth+1)
		} else {
			parts[i] = "{" + rapid.SampledFrom(lintLeaves).Draw(t, "leaf") + "}"
		}
	}
	return "{" + rapid.SampledFrom(operatorKeys).Draw(t, "op") + ": [" + strings.Join(parts, ", ") + "]}"
}

// Whatever is proven of two criteria holds for everybody, and something is.
func TestImplicationsAreSound(t *testing.T) {
	var all []normalForm
	for _, leaf := range lintLeaves {
		p, err := Parse([]byte("allow: {and: [{" + leaf + "}]}"))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, normal(&p.allow[0].when, false), normal(&p.allow[0].when, true))
	}
	var inputs []*Input
	rapid.Check(t, func(t *rapid.T) {
		in := drawInput(t)
		in.prepare(&Options{Sources: []string{"os"}, TTL: 10 * time.Minute})
		inputs = append(inputs, in)
	})
	proven := map[sound]int{}
	for i := range all {
		for j := range all {
			for _, s := range []sound{whereTrue, everywhere} {
				if p := (prover{100}); i == j || !p.implies(&all[i], &all[j], s) {
					continue
				}
				proven[s]++
				for _, in := range inputs {
					a, b := all[i].value(in), all[j].value(in)
					if s == everywhere && a > b || a == True && b != True {
						t.Fatalf("%s (%v) does not imply %s (%v) for %+v", all[i].words(), a, all[j].words(), b, in.Person)
					}
				}
			}
		}
	}
	if proven[whereTrue] < 500 || proven[everywhere] < 300 {
		t.Errorf("only %v proven", proven)
	}
}

// value evaluates a formula in the plain way.
func (f *normalForm) value(in *Input) Value {
	least, most := True, False
	for i := range f.of {
		v := f.of[i].value(in)
		least, most = min(least, v), max(most, v)
	}
	switch f.op {
	case and:
		return least
	case or:
		return most
	}
	c := f.is.is
	switch x := c.(type) { // with this test alone
	case *identity:
		one := *x
		one.match.tests = []test{f.is.test}
		c = &one
	case *groups:
		c = &groups{[]test{f.is.test}}
	case *claim:
		one := *x
		one.tests = []test{f.is.test}
		c = &one
	case *fact:
		one := *x
		one.match.tests = []test{f.is.test}
		c = &one
	case *deviceField:
		one := *x
		one.match.tests = []test{f.is.test}
		c = &one
	}
	if f.is.negated {
		return c.eval(in).not()
	}
	return c.eval(in)
}

// What is said of rules is true for everybody: one that never matters can be left
// out, one that can never be true never is, and where everybody is denied nobody
// gets in.
func TestLintIsRight(t *testing.T) {
	said := map[string]int{}
	rapid.Check(t, func(t *rapid.T) {
		for range 20 {
			var text strings.Builder
			for i := range rapid.IntRange(1, 4).Draw(t, "rules") {
				fmt.Fprintf(&text, "- {name: r%d, %s: %s}\n", i, rapid.SampledFrom([]string{"allow", "deny"}).Draw(t, "action"), drawLintBlock(t, 1))
			}
			p, err := Parse([]byte(text.String()))
			if err != nil {
				t.Fatal(err)
			}
			findings := p.Lint(LintOptions{})
			for range 8 {
				in := drawInput(t)
				in.prepare(&Options{Sources: []string{"os"}, TTL: 10 * time.Minute})
				for _, f := range findings {
					said[f.Code]++
					checkFinding(t, text.String(), p, f, in)
				}
			}
		}
	})
	for _, code := range []string{"shadowed", "never", "never_part", "always_denies", "deny_only"} {
		if said[code] == 0 {
			t.Errorf("%s was never found", code)
		}
	}
}

func checkFinding(t *rapid.T, text string, p *Policy, f Finding, in *Input) {
	verdict, _ := (&route{policy: p}).decide(in)
	at := place{int32(f.Line), int32(f.Column)}
	var rest Policy
	for _, rules := range [][]rule{p.allow, p.deny} {
		for _, r := range rules {
			to := &rest.allow
			if r.denies {
				to = &rest.deny
			}
			if f.Code == "never" && r.at == at && r.when.eval(in) == True || f.Code == "never_part" && partAt(&r.when, at, in) {
				t.Fatalf("%s%+v\nis true for %+v", text, f, in.Person)
			}
			if r.at != at {
				*to = append(*to, r)
			}
		}
	}
	without, _ := (&route{policy: &rest}).decide(in)
	switch {
	case f.Code == "shadowed" && without != verdict:
		t.Fatalf("%s%+v\nwith it %v, without %v for %+v", text, f, verdict, without, in.Person)
	case (f.Code == "always_denies" || f.Code == "deny_only") && verdict == sallyport.VerdictAllow:
		t.Fatalf("%s%+v\nallows %+v", text, f, in.Person)
	}
}

// partAt reports whether the part of a rule at a place makes its rule true: under
// a negation that is its being false.
func partAt(c *condition, at place, in *Input) bool {
	var find func(c *condition, negated bool) bool
	find = func(c *condition, negated bool) bool {
		if c.at == at && (c.op != leaf || c.is.path() != "reject") {
			v := c.eval(in)
			if negated {
				v = v.not()
			}
			if v == True {
				return true
			}
		}
		for i := range c.of {
			if find(&c.of[i], negated != (c.op == not || c.op == nor)) {
				return true
			}
		}
		return false
	}
	return find(c, false)
}

// Thousands of rules are looked at for a bounded time.
func TestLintIsBounded(t *testing.T) {
	var b strings.Builder
	for i := range 3000 {
		fmt.Fprintf(&b, "- {allow: {or: [{user: u%d}, {and: [{groups: g%d}, {email: a%d@b}]}, {domain: {not: d%d}}]}}\n", i, i, i, i)
	}
	p, err := Parse([]byte(b.String()))
	if err != nil {
		t.Fatal(err)
	}
	l := linter{prover: prover{lintSteps}}
	l.rules(p.allow)
	if l.steps > 0 {
		t.Errorf("%d steps left; the test is too small", l.steps)
	}
}

package policy

import (
	"flag"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// peopleEach is how many people meet each random policy; a policy costs as much
// to draw and read as several of them.
const peopleEach = 8

// law is something that holds for every policy and everybody who asks. It
// returns what is wrong, or "".
type law struct {
	name  string
	holds func(t *rapid.T, c *trial) string
}

var laws = []law{
	{"the path that stops early agrees with the definition", lawPathsAgree},
	{"listing and what-if see the same route", lawViewsAgree},
	{"what explanations blame would settle it", lawBlameSettles},
	{"a denial has reasons, an allow that nobody asked about none", lawReasons},
	{"observed rules do nothing", lawObserveDoesNothing},
	{"an observation says what enforcing would do", lawObservedIsRight},
	{"a deny rule more, or an allow rule less, never allows more", lawDenyIsMonotonic},
	{"the order of rules and criteria changes no verdict", lawOrderIsNothing},
	{"not and nor are or and and, turned round", lawDuality},
	{"blocks within blocks of the same kind are one block", lawNesting},
	{"what is decided without knowing something stays so with it", lawUnknownNeverAllows},
	{"the clock alone changes nothing before valid_for ends", lawValidForHolds},
	{"a hidden route is there for those it allows only", lawHidden},
	{"the case of e-mail addresses and domains is nothing", lawCaseOfEmail},
}

// trial is a random policy on one route, and one who asks.
type trial struct {
	set  *Set
	text string
	in   *Input
	a    Answer
	// extra is a rule of another random policy.
	extra rule
}

func (c *trial) route() *route { return c.set.routes[0] }

// setOf is a site of one route.
func (c *trial) setOf(r *route) *Set {
	x, _ := newIndex([]*route{r})
	return &Set{site: c.set.site, routes: []*route{r}, index: x}
}

// verdict decides for somebody else, or by another policy on the same route.
func (c *trial) verdict(p *Policy, in *Input) sallyport.Verdict { return c.decide(p, in).Verdict }

func (c *trial) decide(p *Policy, in *Input) Answer {
	r := *c.route()
	r.policy = p
	s := c.setOf(&r)
	return s.Decide(in)
}

// checkLaws holds every law against one random policy and several people.
func checkLaws(t *rapid.T, met map[sallyport.Verdict]int) {
	set, text := drawSet(t)
	other, err := Parse([]byte(drawPolicy(t)))
	if err != nil {
		t.Fatal(err)
	}
	c := &trial{set: set, text: text, extra: slices.Concat(other.allow, other.deny, other.observed)[0]}
	for range peopleEach {
		c.in = drawInput(t)
		c.a = set.Decide(c.in)
		for _, l := range laws {
			if wrong := l.holds(t, c); wrong != "" {
				t.Fatalf("%s: %s\n%s", l.name, wrong, text)
			}
		}
		met[c.a.Verdict]++
	}
}

// TestProperty meets -rapid.checks policies with peopleEach people each. `make
// property` asks for 100,000 cases.
func TestProperty(t *testing.T) {
	t.Parallel()
	met := make(map[sallyport.Verdict]int)
	rapid.Check(t, func(t *rapid.T) { checkLaws(t, met) })
	n := 0
	for _, v := range []sallyport.Verdict{sallyport.VerdictAllow, sallyport.VerdictDeny, sallyport.VerdictLogin} {
		n += met[v]
	}
	t.Logf("%d cases: %d allow, %d deny, %d login", n, met[sallyport.VerdictAllow], met[sallyport.VerdictDeny], met[sallyport.VerdictLogin])
	want := flag.Lookup("rapid.checks").Value.(flag.Getter).Get().(int) * peopleEach
	if n < want {
		t.Errorf("%d cases; want %d", n, want)
	}
	for v, share := range map[sallyport.Verdict]int{sallyport.VerdictAllow: 10, sallyport.VerdictDeny: 10, sallyport.VerdictLogin: 50} {
		if met[v] < n/share {
			t.Errorf("%v is met in %d of %d cases only: it proves little", v, met[v], n)
		}
	}
}

// FuzzEvaluator lets the fuzzer choose policy and people.
func FuzzEvaluator(f *testing.F) {
	f.Add([]byte("sallyport"))
	f.Add([]byte(strings.Repeat("\x01\xff\x10\x80\x03", 200)))
	f.Fuzz(rapid.MakeFuzz(func(t *rapid.T) { checkLaws(t, make(map[sallyport.Verdict]int)) }))
}

// meaning is the definition of a condition's value, leaf by leaf.
func meaning(c *condition, of func(criterion) Value) Value {
	if c.op == leaf {
		return of(c.is)
	}
	all, anyOf := True, False
	for i := range c.of {
		v := meaning(&c.of[i], of)
		all, anyOf = min(all, v), max(anyOf, v)
	}
	return map[operator]Value{and: all, or: anyOf, not: True - anyOf, nor: True - all}[c.op]
}

func highest(rules []rule, in *Input) Value {
	v := False
	for i := range rules {
		v = max(v, meaning(&rules[i].when, func(c criterion) Value { return c.eval(in) }))
	}
	return v
}

func lawPathsAgree(_ *rapid.T, c *trial) string {
	p := c.route().policy
	for _, r := range slices.Concat(p.deny, p.allow, p.observed) {
		short, long := r.when.eval(c.in), r.when.full(c.in)
		if want := highest([]rule{r}, c.in); short != want || long != want {
			return fmt.Sprintf("rule %q: stopping early %v, in full %v; want %v", r.name, short, long, want)
		}
	}
	want := sallyport.VerdictDeny
	switch denied, allowed := highest(p.deny, c.in), highest(p.allow, c.in); {
	case denied == False && allowed == True:
		want = sallyport.VerdictAllow
	case c.in.Person == nil && (denied == Unknown || denied == False && allowed == Unknown):
		want = sallyport.VerdictLogin
	}
	if c.a.Verdict != want {
		return fmt.Sprintf("got %v; want %v", c.a.Verdict, want)
	}
	return ""
}

func lawViewsAgree(_ *rapid.T, c *trial) string {
	in := *c.in
	seen := 0
	wrong := ""
	c.set.Each(&in, func(e Entry) {
		seen++
		if e.Answer.Verdict != c.a.Verdict || e.Answer.Rule() != c.a.Rule() {
			wrong = fmt.Sprintf("listed as %v by %q, decided %v by %q", e.Answer.Verdict, e.Answer.Rule(), c.a.Verdict, c.a.Rule())
		}
	})
	if seen != 1 {
		return fmt.Sprintf("%d routes are listed; want 1", seen)
	}
	if in.Person == nil || wrong != "" {
		return wrong
	}
	h := newSearch(c.in, c.route(), searchCost)
	if v, _ := h.route.decide(h.changedInput(nil)); v != c.a.Verdict {
		return fmt.Sprintf("what-if without a change says %v; want %v", v, c.a.Verdict)
	}
	return ""
}

// Were each criterion that is blamed as it is wanted, the rule would be, too.
func lawBlameSettles(_ *rapid.T, c *trial) string {
	p := c.route().policy
	for _, r := range slices.Concat(p.deny, p.allow) {
		for _, want := range []Value{True, False} {
			changed := make(map[criterion]Value)
			wrong, fixed := "", false
			r.when.blame(c.in, want, func(is criterion, got, want Value) {
				if got != is.eval(c.in) || got == want {
					wrong = fmt.Sprintf("%s is blamed for being %v, is %v", is.path(), got, is.eval(c.in))
				}
				// Accept and the like are one for all places, equal expressions too.
				if reflect.TypeOf(is).Kind() != reflect.Pointer || places(&r.when, is) > 1 {
					fixed = true
					return
				}
				changed[is] = want
			})
			if wrong != "" {
				return wrong
			}
			if fixed {
				continue
			}
			got := meaning(&r.when, func(is criterion) Value {
				if reflect.TypeOf(is).Kind() == reflect.Pointer {
					if v, ok := changed[is]; ok {
						return v
					}
				}
				return is.eval(c.in)
			})
			if got != want {
				return fmt.Sprintf("rule %q would be %v after all that is blamed changed; want %v", r.name, got, want)
			}
		}
	}
	return ""
}

// places is how often c looks at the same criterion; is is a pointer.
func places(c *condition, is criterion) int {
	n := 0
	c.each(func(o criterion) {
		if reflect.TypeOf(o).Kind() == reflect.Pointer && o == is {
			n++
		}
	})
	return n
}

func lawReasons(_ *rapid.T, c *trial) string {
	reasons := c.set.Reasons(c.in, c.a, false)
	all := c.set.Reasons(c.in, c.a, true)
	switch {
	case c.a.Verdict == sallyport.VerdictAllow && len(reasons) != 0:
		return fmt.Sprintf("an allow with reasons %v", reasons)
	case c.a.Verdict != sallyport.VerdictAllow && len(reasons) == 0 && len(c.route().policy.allow) > 0:
		return "a denial without reasons"
	case len(all) == 0 && c.a.Verdict == sallyport.VerdictAllow:
		return "an allow that has no explanation"
	case len(all) < len(reasons):
		return "who asks why is told less"
	case c.a.rule != nil && !slices.ContainsFunc(all, func(r sallyport.Reason) bool { return r.Rule == c.a.Rule() }):
		return fmt.Sprintf("%q decided, and the explanation does not name it", c.a.Rule())
	}
	return ""
}

func lawObserveDoesNothing(_ *rapid.T, c *trial) string {
	p := *c.route().policy
	before := told(c, &p)
	p.observed = append(slices.Clone(p.observed), c.extra)
	if diff := cmp.Diff(before, told(c, &p)); diff != "" {
		return "an observed rule more changes the answer:\n" + diff
	}
	p.observed = nil
	if diff := cmp.Diff(before, told(c, &p)); diff != "" {
		return "without observed rules the answer is another:\n" + diff
	}
	return ""
}

// told is all that an answer says, but for what is observed.
func told(c *trial, p *Policy) []any {
	r := *c.route()
	r.policy = p
	s := c.setOf(&r)
	a := s.Decide(c.in)
	return []any{a.Verdict, a.Rule(), a.ValidFor, a.DependsOnPeer, s.Reasons(c.in, a, true)}
}

func lawObservedIsRight(_ *rapid.T, c *trial) string {
	p := c.route().policy
	told := c.set.Observed(c.in, c.a)
	for i, r := range p.observed {
		enforced := *p
		if enforced.observed = nil; r.denies {
			enforced.deny = append(slices.Clone(p.deny), r)
		} else {
			enforced.allow = append(slices.Clone(p.allow), r)
		}
		would := c.verdict(&enforced, c.in)
		if would == c.a.Verdict {
			continue
		}
		if len(told) == 0 || told[0].Rule != c.route().label(&p.observed[i]) || told[0].Would != would {
			return fmt.Sprintf("enforcing %q would make it %v; told %v", r.name, would, told)
		}
		told = told[1:]
	}
	if len(told) > 0 {
		return fmt.Sprintf("told %v, which enforcing would not do", told)
	}
	return ""
}

func lawDenyIsMonotonic(t *rapid.T, c *trial) string {
	p := *c.route().policy
	p.deny = append(slices.Clone(p.deny), c.extra)
	if c.a.Verdict != sallyport.VerdictAllow && c.verdict(&p, c.in) == sallyport.VerdictAllow {
		return "a deny rule more allows"
	}
	p = *c.route().policy
	if len(p.allow) > 0 {
		i := rapid.IntRange(0, len(p.allow)-1).Draw(t, "removed")
		p.allow = slices.Delete(slices.Clone(p.allow), i, i+1)
		if c.a.Verdict != sallyport.VerdictAllow && c.verdict(&p, c.in) == sallyport.VerdictAllow {
			return "an allow rule less allows"
		}
	}
	p = *c.route().policy
	p.allow = append(slices.Clone(p.allow), c.extra)
	if c.a.Verdict == sallyport.VerdictAllow && c.verdict(&p, c.in) != sallyport.VerdictAllow {
		return "an allow rule more denies"
	}
	return ""
}

func lawOrderIsNothing(_ *rapid.T, c *trial) string {
	var reversed func(c condition) condition
	reversed = func(c condition) condition {
		c.of = slices.Clone(c.of)
		slices.Reverse(c.of)
		for i := range c.of {
			c.of[i] = reversed(c.of[i])
		}
		return c
	}
	p := *c.route().policy
	for _, rules := range []*[]rule{&p.allow, &p.deny} {
		*rules = slices.Clone(*rules)
		slices.Reverse(*rules)
		for i := range *rules {
			(*rules)[i].when = reversed((*rules)[i].when)
		}
	}
	if got := c.verdict(&p, c.in); got != c.a.Verdict {
		return fmt.Sprintf("backwards it is %v; want %v", got, c.a.Verdict)
	}
	return ""
}

// conditions are all conditions of the trial's rules, with those below them.
func (c *trial) conditions() []condition {
	var out []condition
	var walk func(c *condition)
	walk = func(c *condition) {
		out = append(out, *c)
		for i := range c.of {
			walk(&c.of[i])
		}
	}
	p := c.route().policy
	for _, r := range slices.Concat(p.allow, p.deny) {
		walk(&r.when)
	}
	return out
}

func block(op operator, of ...condition) condition { return condition{op: op, of: of} }

func lawDuality(_ *rapid.T, c *trial) string {
	for _, x := range c.conditions() {
		v := x.eval(c.in)
		for _, same := range []condition{
			block(and, x), block(or, x), block(not, block(not, x)), block(nor, block(nor, x)), block(not, block(nor, x)),
		} {
			if got := same.eval(c.in); got != v {
				return fmt.Sprintf("%v became %v", v, got)
			}
		}
		if x.op == leaf {
			continue
		}
		single := func(op operator) condition { // not: [a, b] is and: [not: [a], not: [b]]
			out := block(op)
			for _, child := range x.of {
				out.of = append(out.of, block(not, child))
			}
			return out
		}
		for _, pair := range [][2]condition{
			{block(not, x.of...), block(not, block(or, x.of...))},
			{block(nor, x.of...), block(not, block(and, x.of...))},
			{block(not, x.of...), single(and)},
			{block(nor, x.of...), single(or)},
		} {
			if l, r := pair[0].eval(c.in), pair[1].eval(c.in); l != r {
				return fmt.Sprintf("left %v, right %v", l, r)
			}
		}
	}
	return ""
}

func lawNesting(_ *rapid.T, c *trial) string {
	for _, x := range c.conditions() {
		if len(x.of) < 2 {
			continue
		}
		for _, op := range []operator{and, or} {
			flat := block(op, x.of...)
			nested := block(op, block(op, x.of[:1]...), block(op, x.of[1:]...))
			if l, r := flat.eval(c.in), nested.eval(c.in); l != r {
				return fmt.Sprintf("flat %v, nested %v", l, r)
			}
		}
	}
	p := *c.route().policy // rules of one action are OR-ed
	if len(p.allow) < 2 {
		return ""
	}
	one := rule{number: 1, when: block(or)}
	for _, r := range p.allow {
		one.when.of = append(one.when.of, r.when)
	}
	p.allow = []rule{one}
	if got := c.verdict(&p, c.in); got != c.a.Verdict {
		return fmt.Sprintf("as one rule it is %v; want %v", got, c.a.Verdict)
	}
	return ""
}

// forgetting are the ways in which something can be unknown. Each gets a copy of
// the question and of the person of its own. A claim that is missing is an empty
// list, as in PPL, not unknown: it is not among them.
var forgetting = []struct {
	what string
	do   func(in *Input)
}{
	{"the session", func(in *Input) { in.Person = nil }},
	{"the directory", func(in *Input) { in.Person.Groups = Groups{} }},
	{"the e-mail address", func(in *Input) { in.Person.Email = "" }},
	{"the device", func(in *Input) { in.Person.Device, in.Person.Posture = nil, nil }},
	{"the report", func(in *Input) { in.Person.Posture = nil }},
	{"how they logged in", func(in *Input) {
		login := *in.Person.Login
		login.AuthMethods, login.Created = nil, time.Time{}
		in.Person.Login = &login
	}},
	{"firewall", func(in *Input) { forgetFact(in, "firewall") }},
	{"screen_lock", func(in *Input) { forgetFact(in, "screen_lock") }},
	{"edr", func(in *Input) { forgetFact(in, "edr") }},
	{"os_version", func(in *Input) { forgetFact(in, "os_version") }},
	{"os", func(in *Input) { forgetFact(in, "os") }},
	{"all facts' age", func(in *Input) {
		if p := in.Person.Posture; p != nil {
			old := *p
			old.Received = time.Time{}
			in.Person.Posture = &old
		}
	}},
}

func forgetFact(in *Input, name string) {
	p := in.Person.Posture
	if p == nil {
		return
	}
	known := *p
	known.Facts = make(map[string]sallyport.Fact)
	for n, f := range p.Facts {
		if n != name {
			known.Facts[n] = f
		}
	}
	in.Person.Posture = &known
}

// Unknown never allows, exactly: let less be more with something forgotten. A
// rule that is true or false for less has the same value for more, whatever more
// is; so who is allowed without it being known is allowed by every completion.
func lawUnknownNeverAllows(_ *rapid.T, c *trial) string {
	if c.in.Person == nil {
		return ""
	}
	p := c.route().policy
	for _, f := range forgetting {
		less, person := *c.in, *c.in.Person
		less.Person = &person
		f.do(&less)
		a := c.set.Decide(&less)
		if a.Verdict == sallyport.VerdictAllow && c.a.Verdict != sallyport.VerdictAllow {
			return fmt.Sprintf("without %s it is allowed, with it %v", f.what, c.a.Verdict)
		}
		for _, r := range slices.Concat(p.allow, p.deny) {
			l, m := r.when.eval(&less), r.when.eval(c.in)
			if l != Unknown && l != m {
				return fmt.Sprintf("rule %q: without %s %v, with it %v", r.name, f.what, l, m)
			}
		}
	}
	return ""
}

func lawValidForHolds(t *rapid.T, c *trial) string {
	limit := c.a.ValidFor
	if limit == 0 {
		limit = 24 * time.Hour
	}
	for _, d := range []time.Duration{limit - 1, time.Duration(rapid.Int64Range(0, int64(limit)-1).Draw(t, "later"))} {
		later := *c.in
		later.Now = later.Now.Add(d)
		if got := c.verdict(c.route().policy, &later); got != c.a.Verdict {
			return fmt.Sprintf("%v was to hold for %v, but is %v after %v", c.a.Verdict, c.a.ValidFor, got, d)
		}
	}
	return ""
}

func lawHidden(_ *rapid.T, c *trial) string {
	r := *c.route()
	r.hidden = true
	s := c.setOf(&r)
	a := s.Decide(c.in)
	want := c.a.Verdict
	if want != sallyport.VerdictAllow {
		if want = sallyport.VerdictNoRoute; c.in.Person == nil {
			want = sallyport.VerdictLogin
		}
	}
	if a.Verdict != want {
		return fmt.Sprintf("hidden it is %v; want %v", a.Verdict, want)
	}
	listed := false
	in := *c.in
	s.Each(&in, func(Entry) { listed = true })
	if listed != (want == sallyport.VerdictAllow) {
		return fmt.Sprintf("%v and listed: %v", want, listed)
	}
	return ""
}

func lawCaseOfEmail(_ *rapid.T, c *trial) string {
	// An expression compares as it says, and names of accounts with their case.
	if c.in.Person == nil || strings.Contains(c.text, "cel:") || strings.Contains(c.text, "ssh_username_matches_email") {
		return ""
	}
	for _, change := range []func(string) string{strings.ToUpper, strings.ToLower} {
		in, person := *c.in, *c.in.Person
		person.Email = change(person.Email)
		in.Person = &person
		if got := c.verdict(c.route().policy, &in); got != c.a.Verdict {
			return fmt.Sprintf("%q is %v, %q is %v", c.in.Person.Email, c.a.Verdict, person.Email, got)
		}
	}
	return ""
}

// Two operator blocks in one rule never load, and both readings that the error
// shows do and mean what they say.
func TestPropertyTwoBlocks(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		one, two := drawBlock(t, 2), drawBlock(t, 2)
		if one[:4] == two[:4] { // the same key twice is another fault
			return
		}
		body := one[:len(one)-1] + ", " + two[1:]
		_, err := Parse([]byte("allow: " + body))
		if err == nil {
			t.Fatalf("%s loads", body)
		}
		lines := strings.Split(err.Error(), "\n")
		if len(lines) != 4 {
			t.Fatalf("%s\n%v\nwant two readings", body, err)
		}
		in := drawInput(t)
		a, b := compiled(t, "allow: {or: ["+one+"]}"), compiled(t, "allow: {or: ["+two+"]}")
		for i, join := range map[int]func(x, y bool) bool{
			1: func(x, y bool) bool { return x && y },
			3: func(x, y bool) bool { return x || y },
		} {
			got := allows(compiled(t, lines[i]), in)
			if want := join(allows(a, in), allows(b, in)); got != want {
				t.Fatalf("%s\nallows %v; want %v", lines[i], got, want)
			}
		}
	})
}

func compiled(t *rapid.T, text string) *Set {
	set, err := Compile([]sallyport.Route{{From: "tcp://db.internal:5432", Policy: text}}, Options{})
	if err != nil {
		t.Fatalf("%s\n%v", text, err)
	}
	return set
}

func allows(s *Set, in *Input) bool { return s.Decide(in).Verdict == sallyport.VerdictAllow }

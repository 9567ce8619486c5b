package scenario

import (
	"cmp"
	"strings"
	"time"

	"sallyport"
	"sallyport/policyd"
	"sallyport/policyd/policy"
)

// Site is what tests run against.
type Site struct {
	// Config has the routes for tests without a policy; nil: there are none.
	Config *sallyport.Config
	// Now is the time of a question where neither request nor given names one.
	Now time.Time
	// Coverage takes what every criterion said; nil: nobody asks.
	Coverage *Coverage
}

// Result is what a test got.
type Result struct {
	Test *Test
	Got  Outcome
	// Decision has no id; it is zero after LoadError.
	Decision sallyport.Decision
	// Err is why the policy does not load.
	Err error
}

// Passed reports whether the test got what it expects.
func (r Result) Passed() bool {
	return r.Got == r.Test.Expect && (r.Test.Rule == "" || sameRule(r.Test.Rule, r.Decision.Rule))
}

// sameRule compares names; the target before a rule's number may be left out.
func sameRule(want, got string) bool {
	if want == got {
		return true
	}
	_, wanted, numbered := cutLast(want)
	_, number, ok := cutLast(got)
	return numbered && ok && wanted == number && (strings.HasPrefix(want, "#") || strings.HasPrefix(want, "ROUTE#"))
}

func cutLast(rule string) (before, number string, ok bool) {
	i := strings.LastIndexByte(rule, '#')
	if i < 0 {
		return rule, "", false
	}
	return rule[:i], rule[i+1:], true
}

// NoPolicy returns the first test that neither brings a policy nor can use the
// site's routes, as an *Error; nil if there is none.
func (f *File) NoPolicy(s Site) error {
	for _, t := range f.Tests {
		if t.Policy == nil && s.Config == nil {
			return &Error{f.Path, t.Line, t.Column, "no policy and no policy_file, and no configuration whose routes could decide"}
		}
	}
	return nil
}

// Run runs the tests in their order.
func (f *File) Run(s Site) []Result {
	out := make([]Result, len(f.Tests))
	for i := range f.Tests {
		out[i] = f.Tests[i].run(s)
	}
	return out
}

func (t *Test) run(s Site) Result {
	r := Result{Test: t, Got: LoadError}
	if t.Policy != nil && t.Policy.Err != nil {
		r.Err = t.Policy.Err
		return r
	}
	q := t.Request.Request
	if q.Target.IsZero() {
		q.Target = defaultTarget
	}
	now := t.now(s)
	o, err := policyd.NewOffline(policyd.Config{}, s.configFor(t, q.Target), t.Given.At(now))
	if err != nil {
		r.Err = err
		return r
	}
	r.Decision = o.Decide(q, now)
	switch r.Decision.Verdict {
	case sallyport.VerdictAllow:
		r.Got = Allow
	case sallyport.VerdictLogin:
		r.Got = Login
	default:
		r.Got = Deny
	}
	if s.Coverage != nil && t.Policy != nil {
		s.Coverage.policy(t.Policy).decided(r.Decision.Rule)
		o.Cover(q, now, s.Coverage.policy(t.Policy).see)
	}
	return r
}

func (t *Test) now(s Site) time.Time {
	if !t.Request.Time.IsZero() {
		return t.Request.Time
	}
	if latest := t.Given.Latest(); !latest.IsZero() {
		return latest
	}
	return s.Now
}

// PostureTTL is posture_ttl where people come from a test: their devices go on
// reporting.
const PostureTTL = 200 * 365 * 24 * time.Hour

// configFor is the configuration that decides t: the site's, with one route to
// target if t brings a policy. The route leads to an address that belongs to
// nobody (RFC 5737), so that only the policy can keep it from loading.
func (s Site) configFor(t *Test, target sallyport.Target) sallyport.Config {
	c := sallyport.Config{ExplainGroups: true}
	if s.Config != nil {
		c = *s.Config
	}
	c.PostureTTL = PostureTTL
	if t.Policy != nil {
		c.Routes = []sallyport.Route{{From: target.String(), To: string(target.Network) + "://192.0.2.1:9", Policy: t.Policy.text}}
	}
	return c
}

// Coverage is what tests saw of the policies that they bring.
type Coverage struct {
	policies []*covered
	by       map[*Policy]*covered
}

// covered is one policy as it was seen; all in the order in which it came.
type covered struct {
	of       *Policy
	criteria []*Criterion
	at       map[[2]int]*Criterion
	rules    []*rule         // that can decide
	named    map[string]bool // rules that decided
}

type rule struct {
	name         string
	line, column int
}

// Criterion is a place in a policy and the values that it had.
type Criterion struct {
	File         string
	Line, Column int
	Path, Rule   string
	True, False  bool
}

// Gap is something that no test shows.
type Gap struct {
	File         string `json:"file"`
	Line         int    `json:"line"`
	Column       int    `json:"column"`
	Rule         string `json:"rule"`
	Condition    string `json:"condition,omitempty"` // empty: the rule itself
	NeverTrue    bool   `json:"never_true,omitempty"`
	NeverFalse   bool   `json:"never_false,omitempty"`
	NeverDecides bool   `json:"never_decides,omitempty"`
}

func (c *Coverage) policy(p *Policy) *covered {
	if c.by == nil {
		c.by = map[*Policy]*covered{}
	}
	k := c.by[p]
	if k == nil {
		k = &covered{of: p, at: map[[2]int]*Criterion{}, named: map[string]bool{}}
		c.by[p], c.policies = k, append(c.policies, k)
	}
	return k
}

func (c *covered) decided(rule string) { c.named[shortRule(rule)] = true }

// shortRule drops the target before a rule's number: a policy's tests may ask for
// different ones.
func shortRule(name string) string {
	if _, number, ok := cutLast(name); ok {
		return "#" + number
	}
	return name
}

func (c *covered) see(s policy.Seen) {
	line, column := c.of.place(s.RuleLine, s.RuleColumn)
	if !s.Observed && !c.has(line, column) {
		c.rules = append(c.rules, &rule{shortRule(s.Rule), line, column})
	}
	line, column = c.of.place(s.Line, s.Column)
	k := c.at[[2]int{line, column}]
	if k == nil {
		k = &Criterion{File: c.of.File, Line: line, Column: column, Path: s.Path, Rule: shortRule(s.Rule)}
		c.at[[2]int{line, column}], c.criteria = k, append(c.criteria, k)
	}
	k.True = k.True || s.Value == policy.True
	k.False = k.False || s.Value == policy.False
}

func (c *covered) has(line, column int) bool {
	for _, r := range c.rules {
		if r.line == line && r.column == column {
			return true
		}
	}
	return false
}

// Gaps lists criteria that no test made true, or none made false, and rules that
// never decided.
func (c *Coverage) Gaps() []Gap {
	var out []Gap
	for _, p := range c.policies {
		for _, r := range p.rules {
			if !p.named[r.name] {
				out = append(out, Gap{File: p.of.File, Line: r.line, Column: r.column, Rule: r.name, NeverDecides: true})
			}
		}
		for _, k := range p.criteria {
			if !k.True || !k.False {
				out = append(out, Gap{k.File, k.Line, k.Column, k.Rule, k.Path, !k.True, !k.False, false})
			}
		}
	}
	return out
}

// String is "file:line:col: condition: no test makes it true".
func (g Gap) String() string {
	what := "no test makes it true or false"
	switch {
	case g.NeverDecides:
		what = "decides no test"
	case !g.NeverTrue:
		what = "no test makes it false"
	case !g.NeverFalse:
		what = "no test makes it true"
	}
	return (&Error{g.File, g.Line, g.Column, cmp.Or(g.Condition, "rule "+g.Rule) + ": " + what}).Error()
}

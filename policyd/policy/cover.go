package policy

// Seen is a criterion of a policy, and what it said to one question.
type Seen struct {
	// Rule is the name of its rule to people; RuleLine and RuleColumn are where the
	// rule stands in the policy's text, Line and Column where the criterion does.
	Rule                 string
	Observed             bool // the rule decides nothing
	RuleLine, RuleColumn int
	// Path names the criterion: "groups", "device.disk_encrypted".
	Path         string
	Line, Column int
	Value        Value
}

// Cover evaluates every criterion of every rule of the route that in asks for, in
// the order of the text within each action, also those that could not have
// changed the answer.
func (s *Set) Cover(in *Input, f func(Seen)) {
	in.prepare(&s.site)
	r := s.lookup(in.Request.Target)
	if r == nil {
		return
	}
	for k, rules := range [][]rule{r.policy.deny, r.policy.allow, r.policy.observed} {
		for i := range rules {
			seen := Seen{Rule: r.label(&rules[i]), Observed: k == 2, RuleLine: int(rules[i].at.line), RuleColumn: int(rules[i].at.column)}
			rules[i].when.cover(in, seen, f)
		}
	}
}

func (c *condition) cover(in *Input, seen Seen, f func(Seen)) {
	if c.op == leaf {
		seen.Path, seen.Line, seen.Column = c.is.path(), int(c.at.line), int(c.at.column)
		seen.Value = c.is.eval(in)
		f(seen)
	}
	for i := range c.of {
		c.of[i].cover(in, seen, f)
	}
}

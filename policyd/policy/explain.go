package policy

import (
	"cmp"
	"strings"

	"sallyport"
)

// maxReasons bounds an explanation; a policy can have thousands of rules.
const maxReasons = 64

// Reasons says what stood between in and an allow: for each allow rule the
// criteria that did not hold, for a deny rule those that did. With all, which is
// for those who ask "why", an allow is explained too: what made it true, and what
// the other rules lacked. in must be as it was for a.
func (s *Set) Reasons(in *Input, a Answer, all bool) []sallyport.Reason {
	return s.reasons(in, a, all, func(criterion) bool { return true })
}

// reasons is Reasons about the criteria that tell approves of.
func (s *Set) reasons(in *Input, a Answer, all bool, tell func(criterion) bool) []sallyport.Reason {
	in.prepare(&s.site)
	switch {
	case in.Person == nil && a.Verdict == sallyport.VerdictLogin:
		return []sallyport.Reason{{
			Condition: "session", Wanted: "a live session", Found: cmp.Or(in.Absent, "none"), Result: Unknown.String(),
		}}
	case a.route == nil, a.Verdict == sallyport.VerdictAllow && !all:
		return nil
	}
	e := explanation{in: in, route: a.route, open: s.site.ExplainGroups, tell: tell}
	for i := range a.route.policy.deny {
		r := &a.route.policy.deny[i]
		if r.when.full(in) != False {
			r.when.blame(in, False, e.of(r))
		}
	}
	if len(e.reasons) > 0 && !all {
		return e.reasons
	}
	for i := range a.route.policy.allow {
		r := &a.route.policy.allow[i]
		if r.when.full(in) == True {
			r.when.each(func(c criterion) { e.add(r, c, c.eval(in), c.eval(in)) })
		} else {
			r.when.blame(in, True, e.of(r))
		}
	}
	return e.reasons
}

// opposite negates a matcher's words.
func opposite(words string) string {
	switch rest, is := strings.CutPrefix(words, "is "); {
	case words == "is true":
		return "is false"
	case words == "is false":
		return "is true"
	case is && !strings.Contains(rest, " "):
		return "is not " + rest
	}
	return "not: " + words
}

type explanation struct {
	in      *Input
	route   *route
	open    bool
	tell    func(criterion) bool
	reasons []sallyport.Reason
}

func (e *explanation) of(r *rule) func(c criterion, got, want Value) {
	return func(c criterion, got, want Value) { e.add(r, c, got, want) }
}

func (e *explanation) add(r *rule, c criterion, got, want Value) {
	if len(e.reasons) == maxReasons || !e.tell(c) {
		return
	}
	wanted := c.wanted(e.open)
	if want == False {
		wanted = opposite(wanted)
	}
	found, age := c.found(e.in)
	e.reasons = append(e.reasons, sallyport.Reason{
		Rule: e.route.label(r), Condition: c.path(), Wanted: wanted, Found: found, Age: age, Result: got.String(),
	})
}

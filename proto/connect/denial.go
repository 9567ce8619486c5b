package connect

import (
	"fmt"
	"strings"
	"time"

	"sallyport"
)

// Visible returns what d's owner may see of it: no upstream, no subjects, no
// identity. Of a target that does not exist, or hides itself, nothing but the id
// is left, so that both look the same.
func Visible(d sallyport.Decision) sallyport.Decision {
	if d.Verdict == sallyport.VerdictNoRoute {
		return sallyport.Decision{ID: d.ID, Verdict: d.Verdict, PolicyRevision: d.PolicyRevision}
	}
	d.Upstream = sallyport.Upstream{}
	d.DependsOn, d.DependsOnPeer = nil, false
	d.Who = sallyport.Identity{}
	return d
}

// Denial returns a decision that is no allow as an error a person understands:
// one line that says what stood in the way, and a hint that says what would turn
// it into an allow. Explain says the same at length. An allow is nil.
func Denial(d sallyport.Decision) *sallyport.Error {
	e := &sallyport.Error{Decision: &d}
	switch d.Verdict {
	case sallyport.VerdictAllow:
		return nil
	case sallyport.VerdictLogin:
		e.Outcome, e.Code = sallyport.OutcomeLogin, ProblemLogin
		e.Message, e.Hint = "there is no live session", "run: agent login"
	case sallyport.VerdictNoRoute:
		e.Outcome, e.Code = sallyport.OutcomeUsage, ProblemNotFound
		e.Message, e.Hint = "no such target", "run: agent ls"
	case sallyport.VerdictPending:
		e.Outcome, e.Code = sallyport.OutcomePending, ProblemPending
		e.Message = "approval has been asked for and is not given yet"
		if len(d.Reasons) > 0 {
			e.Message += ": " + reason(d.Reasons[0])
		}
	default:
		e.Outcome, e.Code = sallyport.OutcomeDenied, ProblemDenied
		e.Message, e.Hint = denialMessage(d), Fix(d)
	}
	return e
}

func denialMessage(d sallyport.Decision) string {
	if len(d.Reasons) == 0 {
		if d.Rule != "" {
			return fmt.Sprintf("denied by rule %q", d.Rule)
		}
		return "denied: no rule allows it"
	}
	rule := d.Rule
	if rule == "" {
		rule = d.Reasons[0].Rule
	}
	var said []string
	for _, r := range d.Reasons {
		if r.Rule == "" || r.Rule == rule {
			said = append(said, reason(r))
		}
	}
	if len(said) == 0 {
		said = append(said, reason(d.Reasons[0]))
	}
	if rule == "" {
		return "denied: " + strings.Join(said, ", ")
	}
	return fmt.Sprintf("denied by rule %q: %s", rule, strings.Join(said, ", "))
}

// reason is "device.disk_encrypted is false".
func reason(r sallyport.Reason) string {
	if r.Found == "" {
		return fmt.Sprintf("%s %s does not hold", r.Condition, r.Wanted)
	}
	return fmt.Sprintf("%s is %s", r.Condition, r.Found)
}

// Fix says in words what would turn d into an allow: the smallest of the sets of
// changes that policyd named. Empty if there is none.
func Fix(d sallyport.Decision) string {
	if len(d.WouldAllowIf) == 0 {
		return ""
	}
	best := d.WouldAllowIf[0]
	for _, set := range d.WouldAllowIf[1:] {
		if len(set) < len(best) {
			best = set
		}
	}
	steps := make([]string, len(best))
	login := false
	for i, r := range best {
		steps[i] = r.Hint
		if r.Hint == "" {
			steps[i] = "make " + r.Condition + " " + r.Want
		}
		login = login || strings.Contains(r.Hint, "agent login") || strings.Contains(r.Hint, "log in")
	}
	fix := strings.Join(steps, " and ") + "; then this is allowed"
	if !login {
		fix += ", no new login needed"
	}
	return fix
}

// Explain returns the lines in which a terminal tells a denial, indented, without
// the heading that names the target:
//
//	why:  rule "finance" matched you, but 1 condition failed:
//	        device.disk_encrypted   is false   (checked 9 s ago on this machine)
//	fix:  turn on disk encryption; then this is allowed, no new login needed
//	decision d-01JD7F3A, policy revision 214
func Explain(d sallyport.Decision) []string {
	var out []string
	for i, g := range groupByRule(d) {
		label := "why:  "
		if i > 0 {
			label = "      "
		}
		out = append(out, label+g.heading())
		for _, r := range g.reasons {
			out = append(out, "        "+detail(r))
		}
	}
	if len(out) == 0 && d.Verdict == sallyport.VerdictDeny {
		out = append(out, "why:  no rule of this target matches you")
	}
	if fix := Fix(d); fix != "" {
		out = append(out, "fix:  "+fix)
	}
	out = append(out, Observed(d)...)
	if d.ID != "" {
		out = append(out, fmt.Sprintf("decision %s, policy revision %d", d.ID, d.PolicyRevision))
	}
	return out
}

// Observed tells of rules that are only watched: what they would have changed.
func Observed(d sallyport.Decision) []string {
	var out []string
	for _, o := range d.Observed {
		out = append(out, fmt.Sprintf("note: rule %q is only observed; in force it would have made this: %s", o.Rule, o.Would))
	}
	return out
}

type ruleReasons struct {
	rule    string
	reasons []sallyport.Reason
}

func (g ruleReasons) heading() string {
	conditions := "1 condition"
	if len(g.reasons) > 1 {
		conditions = fmt.Sprintf("%d conditions", len(g.reasons))
	}
	if g.reasons[0].Result == "true" {
		return fmt.Sprintf("rule %q denies it:", g.rule)
	}
	if g.rule == "" {
		return conditions + " failed:"
	}
	return fmt.Sprintf("rule %q matched you, but %s failed:", g.rule, conditions)
}

// groupByRule keeps the order in which policyd named the rules.
func groupByRule(d sallyport.Decision) []ruleReasons {
	var groups []ruleReasons
	at := make(map[string]int)
	for _, r := range d.Reasons {
		rule := r.Rule
		if rule == "" {
			rule = d.Rule
		}
		i, ok := at[rule]
		if !ok {
			i = len(groups)
			at[rule] = i
			groups = append(groups, ruleReasons{rule: rule})
		}
		groups[i].reasons = append(groups[i].reasons, r)
	}
	return groups
}

func detail(r sallyport.Reason) string {
	s := fmt.Sprintf("%-24s is %s", r.Condition, r.Found)
	if r.Found == "" {
		s = fmt.Sprintf("%-24s %s", r.Condition, r.Wanted)
	}
	if asks(r) {
		s += ", wanted: " + r.Wanted
	}
	if r.Age > 0 {
		s += fmt.Sprintf("   (checked %s ago", ago(r.Age))
		if strings.HasPrefix(r.Condition, "device.") {
			s += " on this machine"
		}
		s += ")"
	}
	return s
}

// asks reports whether what was wanted says more than what was found: of a truth
// value, and of what a rule does not name, it does not.
func asks(r sallyport.Reason) bool {
	if r.Found == "" || r.Result == "true" || r.Wanted == "is true" || r.Wanted == "is false" {
		return false
	}
	return !strings.Contains(r.Wanted, "that this rule") && !strings.Contains(r.Wanted, "live session") &&
		!strings.Contains(r.Found, r.Wanted)
}

// ago prints a duration the way people say it: 9 s, 12 m, 3 h, 2 d.
func ago(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d m", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d d", int(d.Hours()/24))
}

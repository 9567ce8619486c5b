package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Severity says what a finding means for whoever wants to put a policy in force.
type Severity string

// The severities.
const (
	SeverityError   Severity = "error"   // it does not load
	SeverityFinding Severity = "finding" // it loads, and surely does not do what it seems to
	SeverityWarning Severity = "warning" // it may be meant so
)

// Finding is something wrong or doubtful in a policy.
type Finding struct {
	// Line and Column count from 1; those of the file for ParseNode.
	Line     int      `json:"line"`
	Column   int      `json:"column"`
	Severity Severity `json:"severity"`
	// Code is the kind of finding: shadowed, never, never_part, always_denies,
	// deny_only, date_over, unknown_group, method, affix, not_none, nor_some, script; syntax
	// for what does not load.
	Code    string `json:"code"`
	Message string `json:"message"`
}

// LintOptions are what a policy is compared with.
type LintOptions struct {
	// Groups are the ids and names of the groups that exist; nil: not known.
	Groups []string
	// Now is for dates that are over; zero: nobody asks.
	Now time.Time
}

// lintSteps bounds the comparisons within one policy.
const lintSteps = 2_000_000

// Lint returns what is doubtful in a policy that loads, in the order of the text.
// It never calls a rule idle that is not.
func (p *Policy) Lint(opts LintOptions) []Finding {
	l := linter{opts: opts, prover: prover{lintSteps}}
	if len(p.allow) == 0 {
		l.add(p.first(), SeverityFinding, "deny_only", "no allow rule is in force: nobody is ever allowed")
	}
	l.rules(p.allow)
	l.rules(p.deny)
	for _, rules := range [][]rule{p.allow, p.deny, p.observed} {
		for i := range rules {
			l.words(&rules[i], &rules[i].when)
		}
	}
	slices.SortStableFunc(l.out, func(a, b Finding) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return slices.Compact(l.out)
}

// first is where the policy's first rule stands.
func (p *Policy) first() place {
	at := place{1, 1}
	for _, rules := range [][]rule{p.deny, p.observed} {
		for i, r := range rules {
			if i == 0 && (at == place{1, 1} || r.at.line < at.line) {
				at = r.at
			}
		}
	}
	return at
}

type linter struct {
	prover
	opts LintOptions
	out  []Finding
}

func (l *linter) add(at place, s Severity, code, format string, args ...any) {
	l.out = append(l.out, Finding{int(at.line), int(at.column), s, code, fmt.Sprintf(format, args...)})
}

func (r *rule) label() string {
	if r.name != "" {
		return "rule " + strconv.Quote(r.name)
	}
	return "rule #" + strconv.Itoa(r.number)
}

// rules looks for rules of one action that cannot matter.
func (l *linter) rules(rules []rule) {
	all := make([]normalForm, len(rules))
	idle := make([]bool, len(rules))
	for i := range rules {
		all[i] = normal(&rules[i].when, false)
		why := l.never(&all[i])
		if idle[i] = why != ""; idle[i] {
			l.add(rules[i].at, SeverityFinding, "never", "%s can never be true: %s", rules[i].label(), why)
			continue
		}
		l.parts(&rules[i], &all[i])
		if rules[i].denies && l.neverFalse(&all[i]) {
			l.add(rules[i].at, SeverityFinding, "always_denies", "%s denies everybody: nobody is ever allowed", rules[i].label())
		}
	}
	for i := range rules {
		if idle[i] || l.steps < 0 {
			continue
		}
		for j := range rules {
			if i == j || idle[j] || !l.covered(&rules[i], &all[i], &all[j]) {
				continue
			}
			if j > i && l.covered(&rules[j], &all[j], &all[i]) {
				continue // they say the same; the later one will be told of
			}
			l.shadowed(&rules[i], &rules[j])
			break
		}
	}
}

// covered reports whether whatever r does another rule of its action does too.
// For an allow rule that is where it is true; an unknown deny rule denies, and
// asks somebody without a session to log in.
func (l *linter) covered(r *rule, its, other *normalForm) bool {
	if r.denies {
		return l.implies(its, other, everywhere)
	}
	return l.implies(its, other, whereTrue)
}

func (l *linter) shadowed(r, by *rule) {
	does := "already allows everybody whom it allows"
	if r.denies {
		does = "already denies whenever it does"
	}
	l.add(r.at, SeverityFinding, "shadowed", "%s never matters: %s (line %d) %s", r.label(), by.label(), by.at.line, does)
}

// parts tells of what can never be true within a rule that can.
func (l *linter) parts(r *rule, f *normalForm) {
	for i := range f.of {
		child := &f.of[i]
		if why := l.never(child); why == "" {
			l.parts(r, child)
		} else if f.op == or && child.at != (place{}) {
			l.add(child.at, SeverityFinding, "never_part", "this part of %s can never be true: %s", r.label(), why)
		}
	}
}

// never says why a formula is never true, or nothing if it may be.
func (l *linter) never(f *normalForm) string {
	switch f.op {
	case or:
		why := "it says reject"
		for i := range f.of {
			if why = l.never(&f.of[i]); why == "" {
				break
			}
		}
		return why
	case and:
		var all []*normalForm
		flatten(f, &all)
		for i, x := range all {
			if why := l.never(x); why != "" {
				return why
			}
			for _, y := range all[:i] {
				if l.steps < 0 {
					return ""
				}
				if l.conflict(x, y) {
					return fmt.Sprintf("%s, and %s", y.words(), x.words())
				}
			}
		}
	default:
		if _, ok := f.is.is.(authenticated); ok && f.is.negated {
			return "authenticated_user is never false, only unknown"
		}
		if c, ok := f.is.is.(neverer); ok && !f.is.negated {
			return c.never()
		}
	}
	return ""
}

// flatten collects what stands under nested ands.
func flatten(f *normalForm, to *[]*normalForm) {
	for i := range f.of {
		if f.of[i].op == and && len(f.of[i].of) > 0 {
			flatten(&f.of[i], to)
		} else {
			*to = append(*to, &f.of[i])
		}
	}
}

// conflict reports whether two formulas are never true together.
func (l *linter) conflict(a, b *normalForm) bool {
	if l.steps--; l.steps < 0 {
		return false
	}
	switch {
	case a.op == leaf && b.op == leaf:
		if a.is.about.key == "" || b.is.about.key == "" {
			return a.is.negated != b.is.negated && a.is.implies(&proposition{is: b.is.is, negated: a.is.negated}, ofValues)
		}
		x, y := a.is.opposite(), b.is.opposite()
		return a.is.implies(&y, ofValues) || b.is.implies(&x, ofValues)
	case a.op == leaf:
		return l.conflict(b, a)
	}
	with := func(x normalForm) bool { return l.conflict(&x, b) }
	if a.op == and {
		return slices.ContainsFunc(a.of, with)
	}
	return !slices.ContainsFunc(a.of, func(x normalForm) bool { return !with(x) })
}

// neverFalse reports whether a formula is always true or unknown.
func (l *linter) neverFalse(f *normalForm) bool {
	switch f.op {
	case and:
		return !slices.ContainsFunc(f.of, func(x normalForm) bool { return !l.neverFalse(&x) })
	case or:
		for i := range f.of {
			x := &f.of[i]
			if l.neverFalse(x) {
				return true
			}
			if x.op != leaf || x.is.about.key == "" {
				continue
			}
			opposite := x.is.opposite()
			for j := range f.of[:i] {
				if l.steps < 0 {
					return false
				}
				if y := &f.of[j]; y.op == leaf && l.implies(&normalForm{is: opposite}, y, ofValues) {
					return true
				}
			}
		}
		return false
	}
	_, ok := f.is.is.(authenticated)
	return ok && !f.is.negated
}

// words says a formula shortly, in the policy's own names.
func (f *normalForm) words() string {
	switch {
	case f.op != leaf:
		return "what stands in line " + strconv.Itoa(int(f.at.line))
	case f.is.about.key == "":
		w := f.is.is.path() + " " + f.is.is.wanted(true)
		if f.is.negated {
			w = f.is.is.path() + " not: " + f.is.is.wanted(true)
		}
		return w
	case f.is.negated:
		return f.is.about.key + " not: " + f.is.test.words()
	}
	return f.is.about.key + " " + f.is.test.words()
}

// neverer is a criterion that says why it can never be true, or nothing.
type neverer interface{ never() string }

// ender is a criterion that is false for ever from some time on.
type ender interface{ ends() time.Time }

// words looks at a rule's words one by one.
func (l *linter) words(r *rule, c *condition) {
	action := "allows"
	if r.denies {
		action = "denies"
	}
	if len(c.of) > 1 {
		switch {
		case c.op == nor:
			l.add(c.at, SeverityWarning, "nor_some", "nor holds if at least one of these does not, and then %s; for none of them write not", action)
		case c.op == not && r.denies:
			l.add(c.at, SeverityWarning, "not_none", "not holds only if none of these does; to deny unless all of them hold write nor")
		}
	}
	for i := range c.of {
		l.words(r, &c.of[i])
	}
	if c.op != leaf {
		return
	}
	if e, ok := c.is.(ender); ok && !l.opts.Now.IsZero() {
		if end := e.ends(); !end.IsZero() && !end.After(l.opts.Now) {
			l.add(c.at, SeverityWarning, "date_over", "this date is over since %s", end.UTC().Format(time.RFC3339))
		}
	}
	about, tests := subjectOf(c.is)
	for i := range tests {
		l.affix(r, c.at, about.key, &tests[i])
		for _, s := range tests[i].of {
			l.script(c.at, about.key, s.s)
			switch about.key {
			case "groups":
				l.group(c.at, s.s)
			case "http_method":
				l.method(c.at, s.s)
			}
		}
	}
}

// group warns of a group that does not exist, or does no longer.
func (l *linter) group(at place, name string) {
	if l.opts.Groups == nil || slices.Contains(l.opts.Groups, name) {
		return
	}
	l.add(at, SeverityWarning, "unknown_group", "no group %q is known: nobody is a member of it%s", name, suggest(name, l.opts.Groups))
}

// method tells of a method that differs from the one that is meant by its case,
// which counts (RFC 9110, section 9.1).
func (l *linter) method(at place, name string) {
	if upper := strings.ToUpper(name); name != upper && methods[upper] {
		l.add(at, SeverityFinding, "method", "http_method %s is not %[2]s: methods compare with case; write %[2]s", name, upper)
	}
}

// affix tells of comparisons that also hold for names that somebody else can
// have.
func (l *linter) affix(r *rule, at place, key string, t *test) {
	s := t.of[0].s
	advice := ""
	switch {
	case key == "email" && t.op == endsWith && !strings.ContainsAny(s, "@") && !strings.HasPrefix(s, "."):
		advice = fmt.Sprintf("email ends_with %q also holds for x@evil%[1]s; write domain: %[1]s, or ends_with: \"@%[1]s\"", s)
		if !strings.Contains(s, ".") {
			advice = fmt.Sprintf("email ends_with %q holds for addresses of every domain that ends so; write domain: {ends_with: \".%s\"}", s, s)
		}
	case key == "domain" && t.op == endsWith && !strings.HasPrefix(s, "."):
		advice = fmt.Sprintf("domain ends_with %q also holds for evil%[1]s; write domain: %[1]s, or ends_with: \".%[1]s\"", s)
	case key == "domain" && t.op == startsWith, key == "email" && t.op == startsWith && strings.Contains(s, "@"):
		advice = fmt.Sprintf("%s starts_with %q also holds for names that go on into other domains; write the whole %[1]s", key, s)
	case (key == "email" || key == "domain") && t.op == contains && strings.ContainsAny(s, "@."):
		advice = fmt.Sprintf("%s contains %q also holds within names of other domains; write the whole domain", key, s)
	case key == "http_path" && t.op == startsWith && !strings.HasSuffix(s, "/"):
		advice = fmt.Sprintf("http_path starts_with %q also holds for %[1]sx; write prefix: %[1]s for whole segments", s)
	}
	if advice == "" {
		return
	}
	severity := SeverityFinding
	if r.denies {
		severity = SeverityWarning // it denies more than it says, which lets nobody in
	}
	l.add(at, severity, "affix", "%s", advice)
}

// scripts are those whose letters look like each other's.
var scripts = []struct {
	name  string
	table *unicode.RangeTable
}{
	{"Latin", unicode.Latin},
	{"Cyrillic", unicode.Cyrillic},
	{"Greek", unicode.Greek},
	{"Armenian", unicode.Armenian},
	{"Cherokee", unicode.Cherokee},
	{"Coptic", unicode.Coptic},
	{"Lisu", unicode.Lisu},
}

// script warns of a name that may look like another one (Unicode TR 39, section
// 5: single-script names do not mix Latin with what looks like it).
func (l *linter) script(at place, key, name string) {
	var found []string
	for _, s := range scripts {
		if strings.ContainsFunc(name, func(r rune) bool { return unicode.Is(s.table, r) }) {
			found = append(found, s.name)
		}
	}
	hidden := func(r rune) bool {
		return unicode.Is(unicode.Cf, r) || unicode.Is(unicode.Mn, r) && r > 0x7F || r >= 0xFF01 && r <= 0xFF5E
	}
	switch {
	case len(found) > 1:
		l.add(at, SeverityWarning, "script", "%s %+q mixes %s letters: it may look like another name", key, name, strings.Join(found, " and "))
	case strings.ContainsFunc(name, hidden):
		l.add(at, SeverityWarning, "script", "%s %+q has characters that are not seen, or look like others", key, name)
	}
}

package policy

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// maxSkew is how far in the future a login may lie by policyd's clock: authd's is
// another one.
const maxSkew = time.Minute

// sessionAge is how long ago the person last logged in.
type sessionAge struct {
	limits []ageLimit // all must hold
}

type ageLimit struct {
	op compare
	of time.Duration
}

// parseSessionAge reads {"<": 1h}.
func parseSessionAge(p *parser, _ string, n *yaml.Node) (condition, bool) {
	if n.Kind != yaml.MappingNode && n.Value != "" && n.Tag != "!!null" {
		p.fail(n, `session_age needs an operator; write session_age: {"<": %.40s}`, n.Value)
		return condition{}, false
	}
	entries, ok := p.mapping(n, "session_age", []string{"<", "<=", ">", ">="})
	c := &sessionAge{}
	for _, e := range entries {
		d, good := p.duration(e.value, "session_age")
		ok = ok && good
		c.limits = append(c.limits, ageLimit{orderOperators[e.key], d})
	}
	return leafOf(c), ok
}

// loggedIn is when the person last logged in, as well as it is known.
func (p *Person) loggedIn() time.Time {
	if l := p.Login; l != nil && !l.Authenticated.IsZero() {
		return l.Authenticated
	} else if l != nil && !l.Created.IsZero() {
		return l.Created
	}
	return p.Session.Created
}

// loginAge is how long ago the person logged in; known is false if nobody knows,
// or it lies in the future by more than clocks differ.
func (in *Input) loginAge() (age time.Duration, known bool) {
	since := in.Person.loggedIn()
	if since.IsZero() {
		return 0, false
	}
	age = in.Now.Sub(since)
	return age, age >= -maxSkew
}

func (c *sessionAge) eval(in *Input) Value {
	if in.Person == nil {
		return Unknown
	}
	age, known := in.loginAge()
	if !known {
		if age < 0 {
			in.lasts(-maxSkew - age)
		}
		return Unknown
	}
	for _, l := range c.limits {
		left := l.of - age
		if l.op == lessOrEqual || l.op == greater { // which the limit itself does not change
			left++
		}
		if left > 0 {
			in.lasts(left)
		}
	}
	return c.of(age)
}

// of is the answer for an age.
func (c *sessionAge) of(age time.Duration) Value {
	v := True
	for _, l := range c.limits {
		v = min(v, ordered(l.op, cmp.Compare(max(age, 0), l.of)))
	}
	return v
}

func (c *sessionAge) path() string { return "session_age" }

func (c *sessionAge) wanted(bool) string {
	words := map[compare]string{less: "less than ", lessOrEqual: "at most ", greater: "more than ", greaterOrEqual: "at least "}
	var out []string
	for _, l := range c.limits {
		out = append(out, words[l.op]+shortDuration(l.of))
	}
	return strings.Join(out, " and ")
}

func (c *sessionAge) found(in *Input) (string, time.Duration) {
	if in.Person == nil {
		return noSession, 0
	}
	age, known := in.loginAge()
	if !known {
		return "unknown (nobody knows when you logged in)", 0
	}
	return shortDuration(max(age, 0).Truncate(time.Second)), 0
}

func (c *sessionAge) note(in *Input, to *Inputs) { noteLogin(in, to) }
func (c *sessionAge) recalled(from *Inputs) bool { return from.Login != nil }

func noteLogin(in *Input, to *Inputs) {
	if in.Person == nil {
		return
	}
	to.Login = &LoginInput{Age: -1, AuthMethods: in.Person.authMethods()}
	if age, known := in.loginAge(); known {
		to.Login.Age = max(age, 0)
	}
}

// authMethod is how the person logged in.
type authMethod struct{ tests []test }

func parseAuthMethod(p *parser, _ string, n *yaml.Node) (condition, bool) {
	tests, ok := p.listTests(n, "auth_method", textOf(p.nameText))
	return leafOf(&authMethod{tests}), ok
}

// authMethods are those of the login, else those of the session; nil: not known.
func (p *Person) authMethods() []string {
	if p.Login != nil && len(p.Login.AuthMethods) > 0 {
		return p.Login.AuthMethods
	}
	return p.Session.AuthMethods
}

func (c *authMethod) eval(in *Input) Value {
	if in.Person == nil {
		return Unknown
	}
	return c.of(in.Person.authMethods())
}

// of is the answer for somebody who logged in with these methods.
func (c *authMethod) of(methods []string) Value {
	if len(methods) == 0 {
		return Unknown
	}
	v := True
	for i := range c.tests {
		v = min(v, c.tests[i].list(len(methods), slices.Contains(methods, c.tests[i].of[0].s)))
	}
	return v
}

func (c *authMethod) path() string { return "auth_method" }

func (c *authMethod) wanted(bool) string {
	m := matcher{tests: c.tests}
	return m.words()
}

func (c *authMethod) found(in *Input) (string, time.Duration) {
	if in.Person == nil {
		return noSession, 0
	}
	if methods := in.Person.authMethods(); len(methods) > 0 {
		return strings.Join(methods, ", "), 0
	}
	return "unknown (nobody knows how you logged in)", 0
}

func (c *authMethod) note(in *Input, to *Inputs) { noteLogin(in, to) }
func (c *authMethod) recalled(from *Inputs) bool { return from.Login != nil }

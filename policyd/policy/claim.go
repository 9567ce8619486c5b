package policy

import (
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// claim tests an IdP claim; one that is not there is an empty list, as in PPL.
type claim struct {
	name  string
	steps []string // the name as a dotted path
	tests []test
}

func parseClaim(p *parser, sub string, n *yaml.Node) (condition, bool) {
	tests, ok := p.listTests(n, "claim/"+sub, p.scalar)
	c := newClaim(sub)
	c.tests = tests
	return leafOf(&c), ok
}

func newClaim(name string) claim { return claim{name: name, steps: strings.Split(name, ".")} }

func (c *claim) eval(in *Input) Value {
	if in.Person == nil {
		return Unknown
	}
	v := True
	value := c.lookup(in.Person)
	for i := range c.tests {
		v = min(v, testClaim(&c.tests[i], value))
	}
	return v
}

func testClaim(t *test, value any) Value {
	list, ok := value.([]any)
	if !ok {
		count := 0
		if kindOf(value) != 0 {
			count = 1
		}
		return t.list(count, t.of[0].equal(value))
	}
	found := false
	for _, e := range list {
		found = found || t.of[0].equal(e)
	}
	return t.list(len(list), found)
}

// lookup takes the user's claims over the session's; the literal name goes
// before the dotted path.
func (c *claim) lookup(p *Person) any {
	user, session := p.User.Claims, p.Session.Claims
	if v, ok := user[c.name]; ok {
		return v
	}
	if v, ok := session[c.name]; ok {
		return v
	}
	for i, step := range c.steps {
		u, inUser := user[step]
		s, inSession := session[step]
		if i == len(c.steps)-1 {
			if inUser {
				return u
			}
			return s
		}
		user, _ = u.(map[string]any)
		session, _ = s.(map[string]any)
		if inUser && user == nil {
			return nil // the user's value hides the session's, as in a merge of both
		}
		if !inUser && !inSession {
			return nil
		}
	}
	return nil
}

func (c *claim) path() string { return "claim/" + c.name }

func (c *claim) wanted(open bool) string {
	if !open {
		return "the value that this rule asks for"
	}
	m := matcher{tests: c.tests}
	return m.words()
}

func (c *claim) found(in *Input) (string, time.Duration) {
	if in.Person == nil {
		return noSession, 0
	}
	return claimWords(c.lookup(in.Person)), 0
}

func (c *claim) note(in *Input, to *Inputs) {
	if in.Person == nil {
		return
	}
	if to.Claims == nil {
		to.Claims = make(map[string]any)
	}
	to.Claims[c.name] = c.lookup(in.Person)
}

func (c *claim) recalled(from *Inputs) bool {
	_, ok := from.Claims[c.name]
	return ok
}

// claimWords prints a claim's value shortly: it is the caller's own.
func claimWords(v any) string {
	const most = 5
	switch v := v.(type) {
	case nil:
		return "not set"
	case []any:
		if len(v) == 0 {
			return "empty"
		}
		var out []string
		for _, e := range v[:min(len(v), most)] {
			out = append(out, claimWords(e))
		}
		if len(v) > most {
			out = append(out, "…")
		}
		return strings.Join(out, ", ")
	}
	return valueWords(v)
}

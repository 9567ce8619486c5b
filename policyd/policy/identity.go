package policy

import (
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// authenticated is authenticated_user: there is a live session.
type authenticated struct{}

func parseAuthenticated(p *parser, _ string, n *yaml.Node) (condition, bool) {
	return leafOf(authenticated{}), p.onlyTrue(n, "authenticated_user")
}

func (authenticated) eval(in *Input) Value {
	if in.Person == nil {
		return Unknown
	}
	return True
}
func (authenticated) path() string       { return "authenticated_user" }
func (authenticated) wanted(bool) string { return "a live session" }
func (authenticated) found(in *Input) (string, time.Duration) {
	if in.Person == nil {
		return noSession, 0
	}
	return "a live session", 0
}
func (authenticated) note(*Input, *Inputs)  {}
func (authenticated) recalled(*Inputs) bool { return true }

const noSession = "unknown (no live session)"

// identity is user, email and domain: one text of the person.
type identity struct {
	name  string
	value func(*Person) string
	match matcher
	// private: the operands are other people's names, which nobody is told.
	private bool
}

func userOf(p *Person) string  { return string(p.User.ID) }
func emailOf(p *Person) string { return p.Email }

// domainOf is empty for an address without @ or with several: in which of the
// parts its owner is at home nobody knows.
func domainOf(p *Person) string {
	_, domain, _ := strings.Cut(p.Email, "@")
	if strings.Contains(domain, "@") {
		return ""
	}
	return domain
}

func parseUser(p *parser, _ string, n *yaml.Node) (condition, bool) {
	return p.identity(identity{name: "user", value: userOf, private: true}, n)
}

func parseEmail(p *parser, _ string, n *yaml.Node) (condition, bool) {
	return p.identity(identity{name: "email", value: emailOf, match: matcher{fold: true}, private: true}, n)
}

func parseDomain(p *parser, _ string, n *yaml.Node) (condition, bool) {
	return p.identity(identity{name: "domain", value: domainOf, match: matcher{fold: true}}, n)
}

func (p *parser) identity(c identity, n *yaml.Node) (condition, bool) {
	var ok bool
	c.match.tests, ok = p.textTests(n, c.name, textOperators, textOf(p.nameText))
	return leafOf(&c), ok
}

// eval is unknown for a person without the value: an e-mail address that is not
// there is not "not mallory@example.com" either.
func (c *identity) eval(in *Input) Value {
	if in.Person == nil {
		return Unknown
	}
	s := c.value(in.Person)
	if s == "" {
		return Unknown
	}
	return c.match.text(s)
}

func (c *identity) path() string { return c.name }

func (c *identity) wanted(bool) string {
	if c.private {
		return "one that this rule names"
	}
	return c.match.words()
}

func (c *identity) found(in *Input) (string, time.Duration) {
	if in.Person == nil {
		return noSession, 0
	}
	if s := c.value(in.Person); s != "" {
		return s, 0
	}
	return "unknown (you have none)", 0
}

func (c *identity) note(in *Input, to *Inputs) {
	if in.Person != nil && c.name != "user" { // the user's id stands in every record
		to.Email = &in.Person.Email
	}
}

func (c *identity) recalled(from *Inputs) bool { return c.name == "user" || from.Email != nil }

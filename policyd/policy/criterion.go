package policy

import (
	"strings"
	"time"

	"sallyport"

	"go.yaml.in/yaml/v3"
)

// criterion is a condition that looks at the input.
type criterion interface {
	// eval answers without allocating. Without a live session every criterion
	// about the person is unknown.
	eval(in *Input) Value
	// path names it to people: "groups", "device.disk_encrypted".
	path() string
	// wanted is its matcher in words. open: names of groups and claims may be told.
	wanted(open bool) string
	// found is what is there in words, and how old it is (0: has no age).
	found(in *Input) (string, time.Duration)
	// note writes what it looks at into the audit's inputs.
	note(in *Input, to *Inputs)
}

// row is one criterion of the language.
type row struct {
	// parse reads its value; nil: part of the language, but not of this version.
	parse func(p *parser, sub string, n *yaml.Node) (condition, bool)
	// sub: it is written NAME/SUBPATH.
	sub bool
}

// criteria is the language's table of criteria. Adding one is adding a row.
var criteria = map[string]row{
	"accept":             {parse: parseAccept},
	"reject":             {parse: parseReject},
	"authenticated_user": {parse: parseAuthenticated},
	"user":               {parse: parseUser},
	"email":              {parse: parseEmail},
	"domain":             {parse: parseDomain},
	"groups":             {parse: parseGroups},
	"claim":              {parse: parseClaim, sub: true},
	"device":             {parse: parseDevice},

	"http_method":                {},
	"http_path":                  {},
	"cors_preflight":             {},
	"source_ip":                  {},
	"client_certificate":         {},
	"invalid_client_certificate": {},
	"date":                       {},
	"day_of_week":                {},
	"time_of_day":                {},
	"ssh_publickey":              {},
	"ssh_ca":                     {},
	"ssh_username":               {},
	"ssh_username_matches_email": {},
	"ssh_username_matches_claim": {sub: true},
	"mcp_tool":                   {},
	"record":                     {},
	"session_age":                {},
	"auth_method":                {},
	"cel":                        {},
}

func leafOf(c criterion) condition { return condition{is: c} }

// onlyTrue reads the value of accept, reject and authenticated_user. PPL ignores
// it, so "accept: false" would accept there; here it does not load.
func (p *parser) onlyTrue(n *yaml.Node, what string) bool {
	v, ok := p.boolean(n, what)
	if ok && !v {
		p.fail(n, "%s: false says nothing; write %[1]s: true, or put it under not", what)
	}
	return ok && v
}

// constant is accept and reject.
type constant Value

func parseAccept(p *parser, _ string, n *yaml.Node) (condition, bool) {
	return leafOf(constant(True)), p.onlyTrue(n, "accept")
}

func parseReject(p *parser, _ string, n *yaml.Node) (condition, bool) {
	return leafOf(constant(False)), p.onlyTrue(n, "reject")
}

func (c constant) eval(*Input) Value { return Value(c) }

func (c constant) path() string {
	if Value(c) == True {
		return "accept"
	}
	return "reject"
}

func (c constant) wanted(bool) string {
	if Value(c) == True {
		return "always holds"
	}
	return "never holds"
}
func (c constant) found(*Input) (string, time.Duration) { return Value(c).String(), 0 }
func (c constant) note(*Input, *Inputs)                 {}

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
func (authenticated) note(*Input, *Inputs) {}

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
func domainOf(p *Person) string {
	i := strings.LastIndexByte(p.Email, '@')
	return p.Email[i+1:]
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
		to.Email = in.Person.Email
	}
}

// groups tests the directory's groups by id and name.
type groups struct{ tests []test }

func parseGroups(p *parser, _ string, n *yaml.Node) (condition, bool) {
	tests, ok := p.listTests(n, "groups", textOf(p.nameText))
	return leafOf(&groups{tests}), ok
}

func (c *groups) eval(in *Input) Value {
	if in.Person == nil || !in.Person.Groups.known() {
		return Unknown
	}
	v := True
	for i := range c.tests {
		t := &c.tests[i]
		v = min(v, t.list(len(in.Person.Groups.names), in.Person.Groups.has(t.of[0].s)))
	}
	return v
}

func (c *groups) path() string { return "groups" }

func (c *groups) wanted(open bool) string {
	if !open {
		return "the membership that this rule asks for"
	}
	m := matcher{tests: c.tests}
	return m.words()
}

func (c *groups) found(in *Input) (string, time.Duration) {
	switch {
	case in.Person == nil:
		return noSession, 0
	case !in.Person.Groups.known():
		return "unknown (the directory does not know you)", 0
	case c.eval(in) == True:
		return "enough", 0
	}
	return "missing the membership that this rule asks for", 0
}

func (c *groups) note(in *Input, to *Inputs) {
	if in.Person == nil || !in.Person.Groups.known() {
		return
	}
	if to.Groups == nil {
		to.Groups = make(map[string]bool)
	}
	for _, t := range c.tests {
		to.Groups[t.of[0].s] = in.Person.Groups.has(t.of[0].s)
	}
	to.GroupCount = len(in.Person.Groups.names)
}

// claim tests an IdP claim; one that is not there is an empty list, as in PPL.
type claim struct {
	name  string
	steps []string // the name as a dotted path
	tests []test
}

func parseClaim(p *parser, sub string, n *yaml.Node) (condition, bool) {
	tests, ok := p.listTests(n, "claim/"+sub, p.scalar)
	return leafOf(&claim{name: sub, steps: strings.Split(sub, "."), tests: tests}), ok
}

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

// Inputs is what a decision looked at, for the audit log.
type Inputs struct {
	Email      string               `json:"email,omitempty"`
	Groups     map[string]bool      `json:"groups,omitempty"`      // those that the rules name: is a member
	GroupCount int                  `json:"group_count,omitempty"` // ids and names
	Claims     map[string]any       `json:"claims,omitempty"`
	Device     *DeviceInput         `json:"device,omitempty"`
	Facts      map[string]FactInput `json:"facts,omitempty"`
}

// DeviceInput is what was looked at in the device's record.
type DeviceInput struct {
	ID       sallyport.DeviceID `json:"id"`
	Approved bool               `json:"approved"`
	Type     string             `json:"type,omitempty"`
}

// FactInput is a fact as it was looked at.
type FactInput struct {
	Value  any    `json:"value"`
	Source string `json:"source"`
	AgeMS  int64  `json:"age_ms"`
}

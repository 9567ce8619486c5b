package policy

import (
	"strconv"
	"strings"
	"time"

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
	// note writes what it looks at into the audit's inputs, also that it is not
	// there; nothing that stands in the audit's request.
	note(in *Input, to *Inputs)
	// recalled reports whether inputs that other criteria noted hold all that it
	// looks at. It is not asked about somebody without a live session.
	recalled(from *Inputs) bool
}

// row is one criterion of the language.
type row struct {
	// parse reads its value.
	parse func(p *parser, sub string, n *yaml.Node) (condition, bool)
	// sub: it is written NAME/SUBPATH; maySub: it can be.
	sub, maySub bool
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

	"http_method":    {parse: parseHTTPMethod},
	"http_path":      {parse: parseHTTPPath},
	"cors_preflight": {parse: parsePreflight},
	"mcp_tool":       {parse: parseMCPTool},
	"source_ip":      {parse: parseSourceIP},

	"client_certificate":         {parse: parseCertificate},
	"invalid_client_certificate": {parse: parseInvalidCertificate},

	"ssh_publickey":              {parse: parseSSHKey},
	"ssh_ca":                     {parse: parseSSHAuthority},
	"ssh_username":               {parse: parseSSHUsername},
	"ssh_username_matches_email": {parse: parseSSHMatchesEmail},
	"ssh_username_matches_claim": {parse: parseSSHMatchesClaim, maySub: true},

	"date":        {parse: parseDate},
	"day_of_week": {parse: parseDayOfWeek},
	"time_of_day": {parse: parseTimeOfDay},
	"session_age": {parse: parseSessionAge},
	"auth_method": {parse: parseAuthMethod},
	"record":      {parse: parseRecord},

	"cel": {parse: parseCEL},
}

func leafOf(c criterion) condition { return condition{is: c} }

// onlyTrue reads the value of criteria that need none. PPL ignores it, so
// "accept: false" would accept there; what can be read as false does not load.
func (p *parser) onlyTrue(n *yaml.Node, what string) bool {
	v, ok := p.scalar(n, what)
	if ok && v.readsFalse() {
		p.fail(n, "%s: %s says nothing; write {%[1]s: true} or {not: [{%[1]s: true}]}", what, n.Value)
		return false
	}
	return ok
}

// falseWords are texts that somebody may mean as false.
var falseWords = map[string]bool{
	"false": true, "f": true, "no": true, "n": true, "off": true, "never": true, "none": true, "nil": true,
	"null": true, "~": true, "disabled": true, "": true,
}

func (s scalar) readsFalse() bool {
	switch s.kind {
	case 'b':
		return !s.b
	case 'n':
		return s.n == 0
	}
	text := strings.ToLower(strings.TrimSpace(s.s))
	n, err := strconv.ParseFloat(text, 64)
	return falseWords[text] || err == nil && n == 0
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
func (c constant) recalled(*Inputs) bool                { return true }

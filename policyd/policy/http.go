package policy

import (
	"strings"
	"time"

	"sallyport"

	"go.yaml.in/yaml/v3"
)

// requestText is http_method, http_path, mcp_tool and ssh_username: one text of
// the request.
type requestText struct {
	ofRequest
	name string
	// value returns the text; or, if why says in words that there is none, the
	// answer of every matcher.
	value func(*sallyport.Request) (s string, absent Value, why string)
	match matcher
}

func (c *requestText) eval(in *Input) Value {
	s, absent, why := c.value(in.Request)
	if why != "" {
		return absent
	}
	return c.match.text(s)
}

// text implements texter. mcp_tool is false for requests that call no tool, whatever
// the operator, so one of its tests is not the opposite of another.
func (c *requestText) text() (name string, m *matcher) {
	if c.name == "mcp_tool" {
		return "", &c.match
	}
	return c.name, &c.match
}

func (c *requestText) path() string       { return c.name }
func (c *requestText) wanted(bool) string { return c.match.words() }

func (c *requestText) found(in *Input) (string, time.Duration) {
	s, _, why := c.value(in.Request)
	if why != "" {
		return why, 0
	}
	return valueWords(s), 0
}

func (p *parser) requestText(c requestText, n *yaml.Node, ops map[string]compare, read func(*yaml.Node, string) (string, bool)) (condition, bool) {
	var ok bool
	c.match.tests, ok = p.textTests(n, c.name, ops, textOf(read))
	return leafOf(&c), ok
}

const noHTTP = "unknown (no HTTP request)"

func parseHTTPMethod(p *parser, _ string, n *yaml.Node) (condition, bool) {
	return p.requestText(requestText{name: "http_method", value: methodOf}, n, textOperators, p.nameText)
}

func methodOf(q *sallyport.Request) (string, Value, string) {
	if q.Method == "" {
		return "", Unknown, noHTTP
	}
	return q.Method, True, ""
}

// methods are those of RFC 9110, section 9, and RFC 5789.
var methods = map[string]bool{
	"GET": true, "HEAD": true, "POST": true, "PUT": true, "DELETE": true,
	"CONNECT": true, "OPTIONS": true, "TRACE": true, "PATCH": true,
}

func parseHTTPPath(p *parser, _ string, n *yaml.Node) (condition, bool) {
	ops := map[string]compare{"prefix": within}
	for name, op := range textOperators {
		ops[name] = op
	}
	c, ok := p.requestText(requestText{name: "http_path", value: pathOf}, n, ops, p.pathText)
	if !ok {
		return c, false
	}
	for _, t := range c.is.(*requestText).match.tests {
		if t.op != isAny && t.op != isNone && t.op != within {
			continue // a part of a path
		}
		for _, s := range t.of {
			if !plainPath(s.s) {
				p.fail(n, "http_path %q would match no request; write it with a leading slash, without empty, . and .. segments, and without ;", s.s)
				ok = false
			}
		}
	}
	return c, ok
}

// pathText reads a path or a part of one.
func (p *parser) pathText(n *yaml.Node, what string) (string, bool) {
	s, ok := p.plainText(n, what)
	if !ok {
		return "", false
	}
	if path, _, has := strings.Cut(s, "?"); has {
		p.fail(n, "%s never sees the query string; write %q", what, path)
		return "", false
	}
	for i := 0; i < len(s); {
		size := pathByte(s[i:])
		if size == 0 {
			p.fail(n, "%s %q has a character that stands in no path like this; write it as the request does: a blank is %%20, é is %%C3%%A9, a letter is itself", what, s)
			return "", false
		}
		i += size
	}
	return s, true
}

// pathOf returns the path without the query. One that two servers may read
// differently is as good as unknown: neither "is under /api" nor "is not" can be
// said of /api/../admin.
func pathOf(q *sallyport.Request) (string, Value, string) {
	if q.Path == "" {
		return "", Unknown, noHTTP
	}
	path, _, _ := strings.Cut(q.Path, "?")
	if !plainPath(path) {
		return "", Unknown, "unknown (a path that can be read in two ways)"
	}
	return path, True, ""
}

// plainPath reports whether a path, as it stands in the request, can be read in
// one way only: it is absolute, without empty, "." and ".." segments (RFC 3986,
// section 5.2.4), without backslashes (some servers take them for slashes) and
// path parameters (/..;/ is /../ to some), and exactly that is percent-encoded
// which must be.
func plainPath(path string) bool {
	if path == "" || path[0] != '/' {
		return false
	}
	for i := 0; i < len(path); {
		size := pathByte(path[i:])
		if size == 0 {
			return false
		}
		i += size
	}
	for rest := path[1:]; ; {
		segment, after, more := strings.Cut(rest, "/")
		switch {
		case segment == "." || segment == "..", segment == "" && more:
			return false
		case !more:
			return true
		}
		rest = after
	}
}

// pathByte returns how many bytes of s, which is not empty, spell the first
// octet of a path; 0 if it is not spelt in its only right way.
func pathByte(s string) int {
	if s[0] != '%' {
		if s[0] == '/' || s[0] != ';' && isPathChar(s[0]) {
			return 1
		}
		return 0
	}
	if len(s) < 3 {
		return 0
	}
	high, low := hexDigit(s[1]), hexDigit(s[2])
	if high < 0 || low < 0 {
		return 0
	}
	c := byte(high<<4 | low)
	if c < ' ' || c == 0x7F || c == '/' || c == '\\' || c == '%' || isPathChar(c) {
		return 0 // %61 is a, %2F may be a slash, %25 hides one more encoding
	}
	return 3
}

// hexDigit knows upper-case digits only, the normal form (RFC 3986, section 6.2.2.1).
func hexDigit(c byte) int { return strings.IndexByte("0123456789ABCDEF", c) }

// isPathChar: pchar of RFC 3986, section 3.3, but the percent sign.
func isPathChar(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' ||
		strings.IndexByte("-._~!$&'()*+,;=:@", c) >= 0
}

// preflight is cors_preflight.
type preflight struct{ ofRequest }

func parsePreflight(p *parser, _ string, n *yaml.Node) (condition, bool) {
	return leafOf(preflight{}), p.onlyTrue(n, "cors_preflight")
}

func (preflight) eval(in *Input) Value {
	if in.Request.Method == "" {
		return Unknown
	}
	return truth(in.Request.Method == "OPTIONS" &&
		hasHeader(in.Request, "Origin") && hasHeader(in.Request, "Access-Control-Request-Method"))
}

func (preflight) path() string       { return "cors_preflight" }
func (preflight) wanted(bool) string { return "a CORS preflight request" }

func (c preflight) found(in *Input) (string, time.Duration) {
	switch c.eval(in) {
	case Unknown:
		return noHTTP, 0
	case True:
		return "a CORS preflight request", 0
	}
	return "none (" + valueWords(in.Request.Method) + ")", 0
}

func hasHeader(q *sallyport.Request, name string) bool {
	if len(q.Headers[name]) > 0 {
		return true
	}
	for key, values := range q.Headers {
		if len(values) > 0 && strings.EqualFold(key, name) {
			return true
		}
	}
	return false
}

func parseMCPTool(p *parser, _ string, n *yaml.Node) (condition, bool) {
	return p.requestText(requestText{name: "mcp_tool", value: toolOf}, n, textOperators, p.nameText)
}

// toolOf: a request of MCP that calls no tool is false whatever the operator, so
// that a deny rule with not_in stops no tools/list.
func toolOf(q *sallyport.Request) (string, Value, string) {
	switch {
	case q.MCP == nil || q.MCP.Method == "":
		return "", Unknown, "unknown (no MCP request)"
	case q.MCP.Method != "tools/call":
		return "", False, "no call of a tool"
	case q.MCP.Tool == "":
		return "", Unknown, "unknown (a call without a tool's name)"
	}
	return q.MCP.Tool, True, ""
}

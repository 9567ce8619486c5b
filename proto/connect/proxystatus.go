package connect

import (
	"strings"
)

// Proxy error types that Sallyport sends (RFC 9209, section 2.3).
const (
	ProxyRequestDenied    = "http_request_denied"
	ProxyRequestError     = "http_request_error"
	ProxyInternalResponse = "proxy_internal_response"
	ProxyInternalError    = "proxy_internal_error"
	ProxyNotFound         = "destination_not_found"
	ProxyUnavailable      = "destination_unavailable"
	ProxyIPProhibited     = "destination_ip_prohibited"
	ProxyRefused          = "connection_refused"
	ProxyTerminated       = "connection_terminated"
	ProxyTimeout          = "connection_timeout"
	ProxyLimitReached     = "connection_limit_reached"
	ProxyDNSError         = "dns_error"
	ProxyCertificateError = "tls_certificate_error"
)

// proxyName is how this proxy names itself in Proxy-Status.
const proxyName = "sallyport"

// MaxDetails bounds the details parameter, in bytes before escaping.
const MaxDetails = 512

// ProxyStatus is our member of a Proxy-Status field.
type ProxyStatus struct {
	Error   string // a proxy error type
	Details string // for people; printable ASCII
}

// String returns the field's value, a structured-field list of one item
// (RFC 8941): sallyport; error=…; details="…". Characters that a structured
// string cannot hold become '?', control characters a blank.
func (p ProxyStatus) String() string {
	var b strings.Builder
	b.WriteString(proxyName)
	if p.Error != "" {
		b.WriteString("; error=")
		b.WriteString(p.Error)
	}
	if p.Details != "" {
		b.WriteString(`; details="`)
		appendString(&b, p.Details)
		b.WriteByte('"')
	}
	return b.String()
}

// appendString escapes s as the inside of an RFC 8941 string, at most MaxDetails
// bytes of it.
func appendString(b *strings.Builder, s string) {
	n := 0
	for _, r := range s {
		if n++; n > MaxDetails {
			return
		}
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteByte(byte(r))
		case r >= 0x20 && r <= 0x7e:
			b.WriteByte(byte(r))
		case r < 0x20 || r == 0x7f:
			b.WriteByte(' ')
		default:
			b.WriteByte('?')
		}
	}
}

// ParseProxyStatus finds our member in a Proxy-Status field; lines of the field
// are joined with commas by the caller (RFC 9110, section 5.3). ok is false if
// the field is no structured-field list or we are not in it.
func ParseProxyStatus(field string) (p ProxyStatus, ok bool) {
	s := &sfScanner{rest: field}
	s.skipBlank()
	for s.rest != "" {
		name, params, good := s.item()
		if !good {
			return ProxyStatus{}, false
		}
		if name == proxyName && !ok {
			p, ok = ProxyStatus{Error: params["error"], Details: params["details"]}, true
		}
		if !s.nextMember() {
			return ProxyStatus{}, false
		}
	}
	return p, ok
}

// sfScanner reads the part of RFC 8941 that Proxy-Status needs: a list of items
// with parameters. Inner lists are refused: the field has none.
type sfScanner struct{ rest string }

func (s *sfScanner) skipBlank() { s.rest = strings.TrimLeft(s.rest, " \t") }

func (s *sfScanner) skip(c byte) bool {
	if s.rest == "" || s.rest[0] != c {
		return false
	}
	s.rest = s.rest[1:]
	return true
}

// nextMember steps over the comma between two members; false if what follows is
// neither a comma with a member behind it nor the end.
func (s *sfScanner) nextMember() bool {
	s.skipBlank()
	if s.rest == "" {
		return true
	}
	if !s.skip(',') {
		return false
	}
	s.skipBlank()
	return s.rest != ""
}

func (s *sfScanner) item() (value string, params map[string]string, ok bool) {
	value, ok = s.bare()
	if !ok {
		return "", nil, false
	}
	for s.skip(';') {
		s.skipBlank()
		key := s.take(isKeyByte)
		if key == "" || key[0] < 'a' && key[0] != '*' {
			return "", nil, false
		}
		v := "?1"
		if s.skip('=') {
			if v, ok = s.bare(); !ok {
				return "", nil, false
			}
		}
		if params == nil {
			params = make(map[string]string)
		}
		params[key] = v
	}
	return value, params, true
}

// bare reads a bare item: a string unescaped, everything else as it stands.
func (s *sfScanner) bare() (string, bool) {
	if s.rest == "" {
		return "", false
	}
	switch c := s.rest[0]; {
	case c == '"':
		return s.quoted()
	case c == ':':
		end := strings.IndexByte(s.rest[1:], ':')
		if end < 0 {
			return "", false
		}
		v := s.rest[:end+2]
		s.rest = s.rest[end+2:]
		return v, true
	case c == '?' || c == '-' || c == '*' || isAlnum(c):
		v := s.rest[:1]
		s.rest = s.rest[1:]
		return v + s.take(isTokenByte), true
	}
	return "", false
}

func (s *sfScanner) quoted() (string, bool) {
	var b strings.Builder
	for i := 1; i < len(s.rest); i++ {
		switch c := s.rest[i]; {
		case c == '"':
			s.rest = s.rest[i+1:]
			return b.String(), true
		case c == '\\':
			if i++; i >= len(s.rest) || s.rest[i] != '"' && s.rest[i] != '\\' {
				return "", false
			}
			b.WriteByte(s.rest[i])
		case c < 0x20 || c > 0x7e:
			return "", false
		default:
			b.WriteByte(c)
		}
	}
	return "", false
}

func (s *sfScanner) take(in func(byte) bool) string {
	i := 0
	for i < len(s.rest) && in(s.rest[i]) {
		i++
	}
	v := s.rest[:i]
	s.rest = s.rest[i:]
	return v
}

func isAlnum(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

func isKeyByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || strings.IndexByte("_-.*", c) >= 0
}

// isTokenByte: RFC 8941, section 3.3.4: tchar, ":" and "/".
func isTokenByte(c byte) bool {
	return isAlnum(c) || strings.IndexByte("!#$%&'*+-.^_`|~:/", c) >= 0
}

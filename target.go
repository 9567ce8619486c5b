package sallyport

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Network says how a target is spoken to.
type Network string

// The networks of a target. HTTP and HTTPS are routes for browsers (gateway/web).
const (
	TCP   Network = "tcp"
	UDP   Network = "udp"
	HTTP  Network = "http"
	HTTPS Network = "https"
)

// Target is what a person asks to reach: a network, a host name or literal
// address, and a port. It is always in canonical form when it comes from
// ParseTarget or ParseAuthority: lower-case ASCII host, no trailing dot, IPv6
// without brackets and in RFC 5952 form. The zero Target means "none"; in a
// Request it asks whether the session may hold a carrier at all.
type Target struct {
	Network Network `json:"network"`
	Host    string  `json:"host"`
	Port    uint16  `json:"port"`
}

// IsZero reports whether t is the zero Target.
func (t Target) IsZero() bool { return t == Target{} }

// Authority returns host:port as RFC 9110, section 4.2 writes it, with
// brackets around IPv6.
func (t Target) Authority() string {
	if strings.Contains(t.Host, ":") {
		return "[" + t.Host + "]:" + strconv.Itoa(int(t.Port))
	}
	return t.Host + ":" + strconv.Itoa(int(t.Port))
}

// String returns network://host:port, the form that ParseTarget reads back.
func (t Target) String() string {
	if t.IsZero() {
		return ""
	}
	return string(t.Network) + "://" + t.Authority()
}

// Addr returns the literal address of the host, if it is one.
func (t Target) Addr() (netip.Addr, bool) {
	a, err := netip.ParseAddr(t.Host)
	return a, err == nil
}

// MarshalText implements encoding.TextMarshaler with String.
func (t Target) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler with ParseTarget; empty
// text is the zero Target.
func (t *Target) UnmarshalText(b []byte) (err error) {
	if len(b) == 0 {
		*t = Target{}
		return nil
	}
	*t, err = ParseTarget(string(b))
	return err
}

// defaultPorts are the ports that a scheme people type stands for.
var defaultPorts = map[string]uint16{
	"ssh": 22, "postgres": 5432, "postgresql": 5432, "mysql": 3306, "redis": 6379,
	"mongodb": 27017, "rdp": 3389, "vnc": 5900, "ldap": 389, "ldaps": 636,
	"http": 80, "https": 443, "amqp": 5672, "imaps": 993, "smtps": 465,
}

// ParseTarget reads what a person types: "db.internal:5432",
// "tcp://db.internal:5432", "udp://dns.internal:53", "postgres://db.internal/app"
// (known schemes bring their port and mean TCP; user, path and query are
// dropped). A host without port and scheme is an error that says so; resolving
// short names against a listing is the caller's business.
func ParseTarget(s string) (Target, error) {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		return ParseAuthority(TCP, s)
	}
	scheme = strings.ToLower(scheme)
	rest, _, _ = strings.Cut(rest, "/")
	rest, _, _ = strings.Cut(rest, "?")
	if i := strings.LastIndexByte(rest, '@'); i >= 0 {
		rest = rest[i+1:]
	}
	network := TCP
	switch scheme {
	case "tcp":
	case "udp", "http", "https":
		network = Network(scheme)
	default:
		if defaultPorts[scheme] == 0 {
			return Target{}, fmt.Errorf("target %.80q: unknown scheme %.20q (tcp, udp, http, https, ssh, postgres, …)", s, scheme)
		}
	}
	if port := defaultPorts[scheme]; port != 0 && !hasPort(rest) {
		rest += ":" + strconv.Itoa(int(port))
	}
	return ParseAuthority(network, rest)
}

func hasPort(s string) bool {
	i := strings.LastIndexByte(s, ':')
	return i > 0 && !strings.HasSuffix(s, "]") && (s[0] == '[' || strings.IndexByte(s, ':') == i)
}

// ParseAuthority reads host:port as it stands in a CONNECT request (RFC 9110,
// section 9.3.6) and returns its one canonical form: case folded, one trailing
// dot dropped. What could be read in two ways is refused: numeric hosts that are
// no dotted quad ("2130706433", "127.1", "0x7f.1"), zone ids, user info,
// non-ASCII names, ports with signs, blanks or leading zeros.
func ParseAuthority(network Network, s string) (Target, error) {
	if len(s) > 300 {
		return Target{}, fmt.Errorf("target of %d bytes: longer than a host and a port can be", len(s))
	}
	host, port, err := splitHostPort(s)
	if err != nil {
		return Target{}, fmt.Errorf("target %.80q: %w", s, err)
	}
	n, err := parsePort(port)
	if err != nil {
		return Target{}, fmt.Errorf("target %.80q: %w", s, err)
	}
	host, err = canonicalHost(host, strings.HasPrefix(s, "["))
	if err != nil {
		return Target{}, fmt.Errorf("target %.80q: %w", s, err)
	}
	return Target{Network: network, Host: host, Port: n}, nil
}

func splitHostPort(s string) (host, port string, err error) {
	if strings.HasPrefix(s, "[") {
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return "", "", errors.New("missing ]")
		}
		if !strings.HasPrefix(s[end+1:], ":") {
			return "", "", errors.New("missing port, for example :5432")
		}
		return s[1:end], s[end+2:], nil
	}
	i := strings.IndexByte(s, ':')
	if i < 0 {
		return "", "", errors.New("missing port, for example :5432")
	}
	if strings.IndexByte(s[i+1:], ':') >= 0 {
		return "", "", errors.New("too many colons (an IPv6 address stands in brackets)")
	}
	return s[:i], s[i+1:], nil
}

func parsePort(s string) (uint16, error) {
	if s == "" || len(s) > 5 || s[0] == '0' {
		return 0, fmt.Errorf("port %.20q is not a number from 1 to 65535", s)
	}
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0, fmt.Errorf("port %.20q is not a number from 1 to 65535", s)
		}
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("port %.20q is not a number from 1 to 65535", s)
	}
	return uint16(n), nil
}

func canonicalHost(h string, bracketed bool) (string, error) {
	if bracketed {
		a, err := netip.ParseAddr(h)
		if err != nil || !a.Is6() || a.Zone() != "" {
			return "", errors.New("the brackets hold no IPv6 address (zone ids are not allowed)")
		}
		return a.Unmap().String(), nil
	}
	h = strings.TrimSuffix(h, ".")
	if h == "" || len(h) > 253 {
		return "", errors.New("the host name is empty or longer than 253 bytes")
	}
	h = strings.ToLower(h)
	if a, err := netip.ParseAddr(h); err == nil && a.Is4() {
		return a.String(), nil
	}
	labels := strings.Split(h, ".")
	for _, l := range labels {
		if err := checkLabel(l); err != nil {
			return "", err
		}
	}
	// RFC 1123, section 2.1 lets a label start with a digit; the last one must
	// not look like part of an address, or "127.1" would be a name here and an
	// address in a resolver.
	if looksNumeric(labels[len(labels)-1]) {
		return "", errors.New("a number is no host name (write a dotted quad or a name)")
	}
	return h, nil
}

func checkLabel(l string) error {
	if l == "" || len(l) > 63 {
		return errors.New("a part of the host name is empty or longer than 63 bytes")
	}
	if l[0] == '-' || l[len(l)-1] == '-' {
		return errors.New("a part of the host name starts or ends with a hyphen")
	}
	for i := range len(l) {
		c := l[i]
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
			return errors.New("the host name has a character that is no ASCII letter, digit, hyphen or underscore (write IDN names in their xn-- form)")
		}
	}
	return nil
}

func looksNumeric(l string) bool {
	if strings.HasPrefix(l, "0x") {
		return true
	}
	for i := range len(l) {
		if l[i] < '0' || l[i] > '9' {
			return false
		}
	}
	return true
}

package policy

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"sallyport"
)

// pattern is what a route's from names.
type pattern struct {
	network sallyport.Network
	// host is a name or address in canonical form; for a wildcard what stands
	// behind "*."; for a network its first address.
	host     string
	wildcard bool
	prefix   netip.Prefix // valid: every address in it
	ports    ports
}

// ports is a range of ports, both ends included.
type ports struct{ first, last uint16 }

func (p ports) width() int { return int(p.last) - int(p.first) }

func (p ports) overlap(q ports) (ports, bool) {
	both := ports{max(p.first, q.first), min(p.last, q.last)}
	return both, both.first <= both.last
}

func (p ports) String() string {
	if p.first == p.last {
		return strconv.Itoa(int(p.first))
	}
	return fmt.Sprintf("%d-%d", p.first, p.last)
}

// sample is one target that the pattern names: its lowest port, a network's
// first address, what stands behind a wildcard.
func (p pattern) sample() sallyport.Target {
	return sallyport.Target{Network: p.network, Host: p.host, Port: p.ports.first}
}

// parseFrom reads a route's from: scheme://HOST:PORT, where HOST may be *.NAME,
// NETWORK/BITS or [NETWORK/BITS], and PORT may be FIRST-LAST.
func parseFrom(s string) (pattern, error) {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		return pattern{}, fmt.Errorf("%.80q has no scheme; write tcp://HOST:PORT", s)
	}
	if strings.ContainsAny(rest, "?#@") {
		return pattern{}, fmt.Errorf("%.80q: only scheme, host and port are allowed here", s)
	}
	rest, wildcard := strings.CutPrefix(rest, "*.")
	host, bits, port, err := cutBits(scheme, rest)
	if err != nil {
		return pattern{}, err
	}
	target, span, err := parseTarget(scheme, host, port)
	if err != nil {
		return pattern{}, err
	}
	p := pattern{network: target.Network, host: target.Host, wildcard: wildcard, ports: span}
	_, isAddress := target.Addr()
	switch {
	case wildcard && isAddress:
		return pattern{}, fmt.Errorf("%.80q: a wildcard stands before a name, not before an address", s)
	case bits != "" && !isAddress:
		return pattern{}, fmt.Errorf("%.80q: only scheme, host and port are allowed here", s)
	case bits != "":
		if p.prefix, err = parseBits(host, bits); err != nil {
			return pattern{}, fmt.Errorf("%.80q: %w", s, err)
		}
		// IPv4-mapped addresses are IPv4, and host bits are worth a mention.
		if first := p.prefix.Masked(); first != p.prefix {
			return pattern{}, fmt.Errorf("%.80q has bits set behind /%d; write %s, or %s for the one address",
				s, p.prefix.Bits(), authority(scheme, first.String(), port), authority(scheme, p.host, port))
		}
	}
	return p, p.served()
}

// served refuses what the network has no use for.
func (p pattern) served() error {
	if p.network != sallyport.HTTP && p.network != sallyport.HTTPS {
		return nil
	}
	if p.prefix.IsValid() || p.ports.width() > 0 {
		return fmt.Errorf("an %s route names one host and one port: browsers ask by name", p.network)
	}
	return nil
}

// cutBits takes the prefix length out of a host: NETWORK/BITS:PORT, or in
// brackets for IPv6. host keeps its brackets; bits is empty if there is none.
func cutBits(scheme, s string) (host, bits, port string, err error) {
	inside, after, bracketed := strings.Cut(s, "]")
	if bracketed && strings.HasPrefix(inside, "[") {
		host, bits, hasBits := strings.Cut(inside[1:], "/")
		if hasBits && bits == "" {
			return "", "", "", fmt.Errorf("%.80q has no prefix length behind the slash", scheme+"://"+s)
		}
		if outside, isBits := strings.CutPrefix(after, "/"); isBits {
			n, port, _ := strings.Cut(outside, ":")
			return "", "", "", fmt.Errorf("the prefix length stands within the brackets; write %s", authority(scheme, host+"/"+n, port))
		}
		if a, err := netip.ParseAddr(host); err == nil && a.Is4() {
			return "", "", "", fmt.Errorf("brackets are for IPv6; write %s", authority(scheme, inside[1:], strings.TrimPrefix(after, ":")))
		}
		return "[" + host + "]", bits, after, nil
	}
	if i := strings.LastIndexByte(s, '/'); i >= 0 && strings.Count(s[:i], ":") > 1 {
		n, port, _ := strings.Cut(s[i+1:], ":")
		return "", "", "", fmt.Errorf("an IPv6 network stands in brackets; write %s", authority(scheme, s[:i]+"/"+n, port))
	}
	host, port, hasPort := strings.Cut(s, ":")
	if hasPort {
		port = ":" + port
	}
	host, bits, hasBits := strings.Cut(host, "/")
	if hasBits && bits == "" || strings.Contains(port, "/") {
		return "", "", "", fmt.Errorf("%.80q: only scheme, host and port are allowed here", scheme+"://"+s)
	}
	return host, bits, port, nil
}

// authority writes a target; host is an address, a network or a name, port empty
// or with or without its colon.
func authority(scheme, host, port string) string { return scheme + "://" + hostPort(host, port) }

func hostPort(host, port string) string {
	if strings.Contains(host, ":") && !strings.HasPrefix(host, "[") {
		host = "[" + host + "]"
	}
	if port != "" && port[0] != ':' {
		port = ":" + port
	}
	return host + port
}

func parseBits(host, bits string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(strings.Trim(host, "[]") + "/" + bits)
	switch {
	case err != nil:
		return p, fmt.Errorf("/%.20s is no prefix length (IPv4: 1 to 32, IPv6: 1 to 128)", bits)
	case p.Addr().Is4In6() && p.Bits() < 96:
		return p, errors.New("the network has IPv4-mapped addresses and others; write the IPv4 network by itself")
	case p.Addr().Is4In6():
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	if p.Bits() == 0 {
		return p, errors.New("/0 is every address there is; write the networks that are meant")
	}
	return p, nil
}

// parseTarget reads host and port, which may be a range. port is empty, for
// schemes that bring their own, or starts with a colon.
func parseTarget(scheme, host, port string) (sallyport.Target, ports, error) {
	first, last, isRange := strings.Cut(port, "-")
	if !isRange {
		t, err := sallyport.ParseTarget(scheme + "://" + host + port)
		return t, ports{t.Port, t.Port}, err
	}
	t, err := sallyport.ParseTarget(scheme + "://" + host + first)
	if err != nil {
		return t, ports{}, err
	}
	end, err := sallyport.ParseTarget(scheme + "://" + host + ":" + last)
	if err != nil {
		return t, ports{}, err
	}
	switch cmp.Compare(t.Port, end.Port) {
	case 0:
		return t, ports{}, fmt.Errorf("ports %s are one port; write %s", port[1:], authority(scheme, host, last))
	case 1:
		return t, ports{}, fmt.Errorf("ports %s run backwards; write %s", port[1:], authority(scheme, host, last+"-"+first[1:]))
	}
	return t, ports{t.Port, end.Port}, nil
}

// destination reads a route's to, and what it dials without one. A zero Host or
// Port of the upstream stands for the asked-for one.
func destination(from pattern, to string) (up sallyport.Upstream, span ports, err error) {
	if to == "" {
		up = sallyport.Upstream{Network: from.network, Port: from.ports.only()}
		if !from.wildcard && !from.prefix.IsValid() {
			up.Host, up.Literal = from.host, isAddress(from.host)
		}
		return up, from.ports, nil
	}
	scheme, rest, ok := strings.Cut(to, "://")
	if !ok || strings.ContainsAny(rest, "/?#@*") {
		return up, span, fmt.Errorf("%.80q: write scheme://HOST:PORT", to)
	}
	host, _, port, err := cutBits(scheme, rest)
	if err != nil {
		return up, span, err
	}
	target, span, err := parseTarget(scheme, host, port)
	if err != nil {
		return up, span, err
	}
	if !carries(from.network, target.Network) {
		return up, span, fmt.Errorf("a %s route cannot lead to %s", from.network, target.Network)
	}
	if err := sameRange(from.ports, span, authority(scheme, host, "")+":"); err != nil {
		return up, span, err
	}
	return sallyport.Upstream{
		Network: target.Network, Host: target.Host, Port: span.only(), Literal: isAddress(target.Host),
	}, span, nil
}

// only is the one port of p; 0: there are more.
func (p ports) only() uint16 {
	if p.width() > 0 {
		return 0
	}
	return p.first
}

// sameRange refuses to guess which port of one range is which of another; host
// is the rewrite without its port.
func sameRange(from, to ports, host string) error {
	switch {
	case from == to, from.width() == 0 && to.width() == 0:
		return nil
	case from.width() == 0:
		return fmt.Errorf("ports %v stand under the one port %v; write one, for example %s%v", to, from, host, from)
	case to.width() == 0:
		return fmt.Errorf("the one port %v stands under ports %v; write %s%v to dial the asked-for port, or port %v alone in from",
			to, from, host, from, to)
	}
	return fmt.Errorf("ports %v stand under ports %v, and the asked-for port is the one that is dialled; write %s%v", to, from, host, from)
}

func isAddress(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}

func carries(from, to sallyport.Network) bool {
	web := func(n sallyport.Network) bool { return n == sallyport.HTTP || n == sallyport.HTTPS }
	return from == to || web(from) && web(to)
}

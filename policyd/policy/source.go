package policy

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// ofRequest is part of the criteria that look at nothing but the request: all of
// it stands in the audit anyway.
type ofRequest struct{}

func (ofRequest) note(*Input, *Inputs)  {}
func (ofRequest) recalled(*Inputs) bool { return true }

// sourceIP is source_ip: the peer's address lies in one of the networks.
type sourceIP struct {
	ofRequest
	networks []netip.Prefix // masked, no IPv4-mapped ones
}

func parseSourceIP(p *parser, _ string, n *yaml.Node) (condition, bool) {
	if n.Kind == yaml.MappingNode {
		p.fail(n, "source_ip takes an address, a CIDR or a list of them; write source_ip: [10.0.0.0/8, 192.0.2.7]")
		return condition{}, false
	}
	texts, ok := p.oneOrMore(n, "source_ip", p.plainText)
	c := &sourceIP{}
	for _, t := range texts {
		network, err := parseNetwork(t.text)
		if err != "" {
			p.fail(t.at, "source_ip %s", err)
			ok = false
		}
		c.networks = append(c.networks, network)
	}
	return leafOf(c), ok
}

// located is a text and where it stands.
type located struct {
	text string
	at   *yaml.Node
}

// oneOrMore reads one text or a list of at least one.
func (p *parser) oneOrMore(n *yaml.Node, what string, read func(*yaml.Node, string) (string, bool)) ([]located, bool) {
	nodes := []*yaml.Node{n}
	if n.Kind == yaml.SequenceNode {
		if n.Anchor != "" || n.Style&yaml.TaggedStyle != 0 || len(n.Content) == 0 {
			p.fail(n, "%s needs a list of at least one value", what)
			return nil, false
		}
		nodes = n.Content
	}
	var out []located
	all := true
	for _, n := range nodes {
		s, ok := read(n, what)
		all = all && ok
		if ok {
			out = append(out, located{s, n})
		}
	}
	return out, all
}

// parseNetwork reads an address or a CIDR, or says what is wrong with it. What
// is IPv4 mapped into IPv6 becomes IPv4 (RFC 4291, section 2.5.5.2).
func parseNetwork(s string) (network netip.Prefix, fault string) {
	if strings.ContainsAny(s, ", ;") {
		return network, s + " has a blank or a separator; write a list: [10.0.0.0/8, 192.0.2.7]"
	}
	if address, _, zoned := strings.Cut(s, "%"); zoned {
		return network, s + ": a zone means something on one machine only; write " + address
	}
	if !strings.Contains(s, "/") {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return network, s + " is neither an address nor a CIDR; write 192.0.2.7 or 10.0.0.0/8"
		}
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), ""
	}
	network, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return network, s + " is no CIDR; write an address and 0 to 32 bits (IPv6: 0 to 128), like 10.0.0.0/8"
	case network.Addr().Is4In6() && network.Bits() < 96:
		return network, s + " holds more than IPv4 and less than IPv6; write 0.0.0.0/0"
	case network != network.Masked():
		return network, s + " has host bits set; write " + network.Masked().String() +
			", or " + network.Addr().String() + " for the one address"
	case network.Addr().Is4In6():
		return netip.PrefixFrom(network.Addr().Unmap(), network.Bits()-96), ""
	}
	return network, ""
}

// peer returns the address the request came from, and notes that it was looked
// at. It is not valid if nobody knows it.
func peer(in *Input) netip.Addr {
	in.peer = true
	return in.Request.Peer.Addr().Unmap().WithZone("")
}

func (c *sourceIP) eval(in *Input) Value {
	a := peer(in)
	if !a.IsValid() {
		return Unknown
	}
	return truth(slices.ContainsFunc(c.networks, func(n netip.Prefix) bool { return n.Contains(a) }))
}

func (c *sourceIP) path() string { return "source_ip" }

func (c *sourceIP) wanted(bool) string {
	words := make([]string, len(c.networks))
	for i, n := range c.networks {
		words[i] = n.String()
		if n.IsSingleIP() {
			words[i] = n.Addr().String()
		}
	}
	return "is in " + strings.Join(words, ", ")
}

func (c *sourceIP) found(in *Input) (string, time.Duration) {
	if a := peer(in); a.IsValid() {
		return a.String(), 0
	}
	return "unknown (no address)", 0
}

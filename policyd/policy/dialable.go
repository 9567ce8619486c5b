package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"sallyport"
	"sallyport/internal/fault"
	"sallyport/internal/localhost"
)

// barredAddress is an address that no route may lead to.
type barredAddress struct {
	text string // as configured
	host string // canonical; empty: every address of this machine
	port uint16
}

func parseForbidden(list []string, faults *fault.List) []barredAddress {
	var out []barredAddress
	for i, s := range list {
		host, port, ok := splitLast(s)
		if host == "" || host == "0.0.0.0" || host == "[::]" {
			host = "0.0.0.0"
		}
		t, err := sallyport.ParseAuthority(sallyport.TCP, host+":"+port)
		if !ok || err != nil {
			faults.Addf(fmt.Sprintf("forbidden[%d]", i), "%.80q is no host:port", s)
			continue
		}
		if t.Host == "0.0.0.0" {
			t.Host = ""
		}
		out = append(out, barredAddress{s, t.Host, t.Port})
	}
	return out
}

func splitLast(s string) (host, port string, ok bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

// metadata are the addresses at which clouds hand out machine credentials.
var metadata = []netip.Addr{
	netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("100.100.100.200"),
}

var broadcast = netip.MustParseAddr("255.255.255.255")

// dialable refuses upstreams that no gateway may dial; span is the ports that it
// may be dialled at. What a name resolves to and what lies in a network is for the
// gateway to check when it dials: there a route names no address literally.
func dialable(up sallyport.Upstream, span ports, barred []barredAddress) error {
	if up.Host == "" {
		return nil
	}
	addr, err := netip.ParseAddr(up.Host)
	literal := err == nil
	at := hostPort(up.Host, span.String())
	own := slices.IndexFunc(barred, func(b barredAddress) bool { return b.covers(up.Host, span, addr) })
	switch {
	case literal && slices.Contains(metadata, addr), up.Host == "metadata.google.internal":
		return fmt.Errorf("%s is the cloud's metadata service", at)
	case literal && (addr.IsLinkLocalUnicast() || addr.IsMulticast() || addr.IsUnspecified() || addr == broadcast):
		return fmt.Errorf("%s is a link-local, multicast or unspecified address", at)
	case own < 0 && !literal && localhost.Is(up.Host):
		return fmt.Errorf("%s is this machine by name; write the address (127.0.0.1:%v) if that is meant", at, span)
	case own < 0:
		return nil
	case span.width() > 0:
		return fmt.Errorf("%s has one of Sallyport's own listeners (%s) among its ports; leave port %d out",
			at, barred[own].text, barred[own].port)
	}
	return fmt.Errorf("%s is one of Sallyport's own listeners (%s)", at, barred[own].text)
}

// covers reports whether b is host at one of the ports; addr is host's address,
// if it is one.
func (b barredAddress) covers(host string, span ports, addr netip.Addr) bool {
	if b.port < span.first || b.port > span.last {
		return false
	}
	if b.host == "" {
		return addr.IsLoopback()
	}
	return host == b.host
}

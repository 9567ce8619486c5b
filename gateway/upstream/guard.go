package upstream

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
)

// Guard says which addresses are never dialled, whatever a route says:
// the gateway's own listeners, the control plane (Notice.Forbidden), cloud
// metadata, link-local, multicast, unspecified and, unless the route itself
// names the address, loopback. The zero Guard knows no listeners and no control
// plane yet.
type Guard struct {
	own       atomic.Pointer[[]endpoint]
	forbidden atomic.Pointer[[]endpoint]

	// interfaces and resolver replace the machine in tests.
	interfaces func() ([]net.Addr, error)
	resolver   Resolver
}

// endpoint is an address that must not be dialled: addr, or every address of
// this machine if any is set, or whatever name resolves to.
type endpoint struct {
	addr netip.Addr
	name string
	any  bool
	port uint16
}

// SetOwn replaces the addresses of this gateway's listeners. An unspecified
// address stands for every address of this machine.
func (g *Guard) SetOwn(addrs []netip.AddrPort) {
	var list []endpoint
	for _, a := range addrs {
		list = append(list, endpointOf(a))
	}
	g.own.Store(&list)
}

// SetForbidden replaces the control plane's addresses, host:port. What is not
// host:port is returned as an error after the rest has been taken.
func (g *Guard) SetForbidden(addrs []string) error {
	var list []endpoint
	var bad error
	for _, s := range addrs {
		e, err := parseEndpoint(s)
		if err != nil {
			bad = err
			continue
		}
		list = append(list, e)
	}
	g.forbidden.Store(&list)
	return bad
}

func endpointOf(a netip.AddrPort) endpoint {
	addr := a.Addr().Unmap().WithZone("")
	return endpoint{addr: addr, any: !addr.IsValid() || addr.IsUnspecified(), port: a.Port()}
}

func parseEndpoint(s string) (endpoint, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return endpoint{}, fmt.Errorf("forbidden address %.80q: %w", s, err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return endpoint{}, fmt.Errorf("forbidden address %.80q: port: %w", s, err)
	}
	if host == "" {
		return endpoint{any: true, port: uint16(n)}, nil
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return endpointOf(netip.AddrPortFrom(a, uint16(n))), nil
	}
	return endpoint{name: strings.ToLower(host), port: uint16(n)}, nil
}

// Check returns why a must not be dialled, or nil. literal says that the route
// itself names this address; only then may it be loopback.
func (g *Guard) Check(ctx context.Context, a netip.AddrPort, literal bool) error {
	addr := a.Addr().Unmap()
	if err := checkRange(addr, literal); err != nil {
		return err
	}
	if inner, ok := embedded(addr); ok {
		if err := checkRange(inner, false); err != nil {
			return fmt.Errorf("%s carries an IPv4 address: %w", addr, err)
		}
	}
	for _, list := range []*[]endpoint{g.own.Load(), g.forbidden.Load()} {
		if list == nil {
			continue
		}
		for _, e := range *list {
			if e.port == a.Port() && g.is(ctx, e, addr) {
				return fmt.Errorf("%s is a listener of the gateway or the control plane", a)
			}
		}
	}
	return nil
}

// is reports whether addr is e's. What cannot be found out counts as a yes: the
// port is one of ours, and services on it are rare.
func (g *Guard) is(ctx context.Context, e endpoint, addr netip.Addr) bool {
	switch {
	case e.any:
		return g.local(addr)
	case e.name != "":
		r := g.resolver
		if r == nil {
			r = net.DefaultResolver
		}
		addrs, err := r.LookupNetIP(ctx, "ip", e.name)
		for _, a := range addrs {
			if a.Unmap() == addr {
				return true
			}
		}
		return err != nil
	}
	return e.addr == addr
}

// local reports whether addr is an address of this machine.
func (g *Guard) local(addr netip.Addr) bool {
	if addr.IsLoopback() {
		return true
	}
	interfaces := g.interfaces
	if interfaces == nil {
		interfaces = net.InterfaceAddrs
	}
	list, err := interfaces()
	if err != nil {
		return true
	}
	for _, a := range list {
		if n, ok := a.(*net.IPNet); ok {
			if got, ok := netip.AddrFromSlice(n.IP); ok && got.Unmap() == addr {
				return true
			}
		}
	}
	return false
}

// metadata are the addresses at which clouds hand their machines credentials and
// that are not link-local (those are refused as such).
var metadata = map[netip.Addr]bool{
	netip.MustParseAddr("fd00:ec2::254"):   true, // AWS
	netip.MustParseAddr("fd20:ce::254"):    true, // Google Cloud
	netip.MustParseAddr("100.100.100.200"): true, // Alibaba Cloud
	netip.MustParseAddr("168.63.129.16"):   true, // Azure
}

var (
	thisNetwork = netip.MustParsePrefix("0.0.0.0/8") // RFC 1122, section 3.2.1.3
	broadcast   = netip.MustParseAddr("255.255.255.255")
)

// checkRange refuses what is wrong on every gateway.
func checkRange(a netip.Addr, literal bool) error {
	switch {
	case !a.IsValid() || a.Zone() != "":
		return fmt.Errorf("%s is no address without a zone", a)
	case a.IsUnspecified(), thisNetwork.Contains(a):
		return fmt.Errorf("%s is the unspecified address", a)
	case a.IsLoopback() && !literal:
		return fmt.Errorf("%s is loopback and the route does not name it", a)
	case a.IsLinkLocalUnicast():
		return fmt.Errorf("%s is link-local", a)
	case a.IsMulticast(), a == broadcast:
		return fmt.Errorf("%s is multicast", a)
	case metadata[a]:
		return fmt.Errorf("%s serves cloud metadata", a)
	}
	return nil
}

// The IPv6 ranges whose addresses stand for an IPv4 address somewhere on the
// way: what is behind them is judged by that address.
var (
	compatible = netip.MustParsePrefix("::/96")        // RFC 4291, section 2.5.5.1
	nat64      = netip.MustParsePrefix("64:ff9b::/96") // RFC 6052, section 2.1
	sixToFour  = netip.MustParsePrefix("2002::/16")    // RFC 3056, section 2
)

// embedded returns the IPv4 address that a carries.
func embedded(a netip.Addr) (netip.Addr, bool) {
	if !a.Is6() || a.IsLoopback() {
		return netip.Addr{}, false
	}
	b := a.As16()
	switch {
	case compatible.Contains(a), nat64.Contains(a):
		return netip.AddrFrom4([4]byte(b[12:16])), true
	case sixToFour.Contains(a):
		return netip.AddrFrom4([4]byte(b[2:6])), true
	}
	return netip.Addr{}, false
}

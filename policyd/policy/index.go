package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"sallyport"
)

// index finds the route that decides a target. What it costs depends on the
// target's labels and on how many prefix lengths are in use, not on how many
// routes there are.
type index struct {
	exact    map[hostKey]portTable
	wild     map[hostKey]portTable // by what stands behind "*."
	networks map[networkKey]portTable
	// lengths are the prefix lengths in use, longest first, of IPv4 and IPv6.
	lengths [2][]int
}

// hostKey is a host that routes name.
type hostKey struct {
	network sallyport.Network
	host    string
}

// networkKey is a range of addresses that routes name.
type networkKey struct {
	network sallyport.Network
	prefix  netip.Prefix
}

// find returns the route that names t most exactly, or nil. Hosts come before
// ports: its own host goes before the longest suffix or prefix that has its port,
// and only among routes of one host the narrower range of ports counts.
func (x *index) find(t sallyport.Target) *route {
	if r := x.exact[hostKey{t.Network, t.Host}].find(t.Port); r != nil {
		return r
	}
	if !endsInNumber(t.Host) {
		return x.byName(t)
	}
	addr, err := netip.ParseAddr(t.Host)
	var canonical [64]byte
	if err != nil || string(addr.AppendTo(canonical[:0])) != t.Host || addr.Is4In6() || addr.Zone() != "" {
		return nil // or another spelling would get past the route of the address itself
	}
	return x.byAddress(t.Network, addr, t.Port)
}

// endsInNumber tells addresses from names: no name's last label is a number.
// (ParseAddr would allocate its error.)
func endsInNumber(host string) bool {
	last := host[strings.LastIndexByte(host, '.')+1:]
	return strings.Contains(host, ":") || strings.Trim(last, "0123456789") == ""
}

func (x *index) byName(t sallyport.Target) *route {
	if len(x.wild) == 0 {
		return nil
	}
	for _, rest, ok := strings.Cut(t.Host, "."); ok; _, rest, ok = strings.Cut(rest, ".") {
		if r := x.wild[hostKey{t.Network, rest}].find(t.Port); r != nil {
			return r
		}
	}
	return nil
}

func (x *index) byAddress(n sallyport.Network, addr netip.Addr, port uint16) *route {
	for _, bits := range x.lengths[family(addr)] {
		prefix, err := addr.Prefix(bits)
		if err != nil {
			return nil
		}
		if r := x.networks[networkKey{n, prefix}].find(port); r != nil {
			return r
		}
	}
	return nil
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// portTable says which route decides which ports of a host: ranges in ascending
// order that do not overlap.
type portTable []segment

type segment struct {
	ports
	route *route
}

func (t portTable) find(port uint16) *route {
	i, _ := slices.BinarySearchFunc(t, port, func(s segment, port uint16) int { return cmp.Compare(s.last, port) })
	if i == len(t) || t[i].first > port {
		return nil
	}
	return t[i].route
}

// clash is two routes that are equally specific for some ports of one host.
type clash struct {
	a, b *route // a stands before b in the configuration
	at   ports
}

// weigh makes the table of one host from the routes that name it: the narrower
// range of ports goes before the wider.
func weigh(routes []*route) (portTable, []clash) {
	if len(routes) == 1 {
		return portTable{{routes[0].at.ports, routes[0]}}, nil
	}
	slices.SortFunc(routes, func(a, b *route) int {
		return cmp.Or(cmp.Compare(a.at.ports.width(), b.at.ports.width()),
			cmp.Compare(a.at.ports.first, b.at.ports.first), cmp.Compare(a.number, b.number))
	})
	var clashes []clash
	for i := 1; i < len(routes); i++ {
		a, b := routes[i-1], routes[i]
		if both, yes := a.at.ports.overlap(b.at.ports); yes && a.at.ports.width() == b.at.ports.width() {
			if a.number > b.number {
				a, b = b, a
			}
			clashes = append(clashes, clash{a, b, both})
		}
	}
	return paint(routes), clashes
}

// paint gives each port to the first of the routes that names it.
func paint(routes []*route) portTable {
	edges := make([]int, 0, 2*len(routes))
	for _, r := range routes {
		edges = append(edges, int(r.at.ports.first), int(r.at.ports.last)+1)
	}
	slices.Sort(edges)
	edges = slices.Compact(edges)
	// Cell k is the ports from edges[k] to the next edge; the last cell has none.
	cells := make([]*route, len(edges))
	next := make([]int, len(edges)) // where to look for a free cell instead
	for k := range next {
		next[k] = k
	}
	free := func(k int) int {
		for next[k] != k {
			next[k] = next[next[k]]
			k = next[k]
		}
		return k
	}
	for _, r := range routes {
		k, _ := slices.BinarySearch(edges, int(r.at.ports.first))
		for k = free(k); edges[k] <= int(r.at.ports.last); k = free(k) {
			cells[k], next[k] = r, k+1
		}
	}
	var t portTable
	for k, r := range cells {
		switch n := len(t); {
		case r == nil:
		case n > 0 && t[n-1].route == r && int(t[n-1].last)+1 == edges[k]:
			t[n-1].last = uint16(edges[k+1] - 1)
		default:
			t = append(t, segment{ports{uint16(edges[k]), uint16(edges[k+1] - 1)}, r})
		}
	}
	return t
}

// newIndex sorts the routes by what they name.
func newIndex(routes []*route) (*index, []clash) {
	exact, wild, networks := map[hostKey][]*route{}, map[hostKey][]*route{}, map[networkKey][]*route{}
	for _, r := range routes {
		at := hostKey{r.at.network, r.at.host}
		switch {
		case r.at.wildcard:
			wild[at] = append(wild[at], r)
		case r.at.prefix.IsValid() && !r.at.prefix.IsSingleIP():
			n := networkKey{r.at.network, r.at.prefix}
			networks[n] = append(networks[n], r)
		default:
			exact[at] = append(exact[at], r)
		}
	}
	x := &index{}
	var clashes [3][]clash
	x.exact, clashes[0] = weighAll(exact)
	x.wild, clashes[1] = weighAll(wild)
	x.networks, clashes[2] = weighAll(networks)
	for n := range x.networks {
		f, bits := family(n.prefix.Addr()), n.prefix.Bits()
		if !slices.Contains(x.lengths[f], bits) {
			x.lengths[f] = append(x.lengths[f], bits)
		}
	}
	for _, l := range x.lengths {
		slices.Sort(l)
		slices.Reverse(l)
	}
	return x, slices.Concat(clashes[:]...)
}

func weighAll[K comparable](named map[K][]*route) (map[K]portTable, []clash) {
	out := make(map[K]portTable, len(named))
	var clashes []clash
	for k, routes := range named {
		t, c := weigh(routes)
		out[k], clashes = t, append(clashes, c...)
	}
	return out, clashes
}

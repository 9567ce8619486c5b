package policy

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport"
	"sallyport/internal/fault"
	"sallyport/internal/localhost"
)

// Options are the site's settings that decisions need.
type Options struct {
	// Sources are the sources whose facts count unless a criterion names its own.
	// Empty: os and attested.
	Sources []string
	// TTL is how long a fact counts without a newer report. 0: 10 minutes.
	TTL time.Duration
	// Forbidden are addresses no route may point to, host:port; an empty or
	// unspecified host stands for every address of the machine.
	Forbidden []string
	// ExplainGroups lets explanations name groups and claims.
	ExplainGroups bool
}

func (o Options) withDefaults() Options {
	if len(o.Sources) == 0 {
		o.Sources = []string{sallyport.SourceOS, sallyport.SourceAttested}
	}
	if o.TTL <= 0 {
		o.TTL = 10 * time.Minute
	}
	return o
}

// Set is the compiled routes of a site: immutable, safe for any number of
// goroutines.
type Set struct {
	site   Options
	routes []*route // in the order of the configuration
	exact  map[spot]*route
	wild   map[spot]*route // by what stands behind "*."
}

// spot is what a route listens for.
type spot struct {
	network sallyport.Network
	host    string
	port    uint16
}

type route struct {
	from, name, carrier string
	hidden              bool
	at                  spot
	wildcard            bool
	upstream            sallyport.Upstream // zero Host: the asked-for name
	policy              *Policy
}

// Compile checks routes and makes them ready for questions. The error is a
// fault.List with every fault, under keys like "routes[2].from"; faults in a
// policy start with line:column within its text.
//
// A target is decided by the one route that names it most exactly: its own host
// and port, else the longest "*." suffix with its port, at any depth. Two routes
// for the same place are a fault that names both.
func Compile(routes []sallyport.Route, opts Options) (*Set, error) {
	s := &Set{
		site:  opts.withDefaults(),
		exact: make(map[spot]*route, len(routes)),
		wild:  make(map[spot]*route),
	}
	var faults fault.List
	barred := parseForbidden(opts.Forbidden, &faults)
	c := compiler{set: s, barred: barred, faults: &faults, first: map[spot]int{}, wildFirst: map[spot]int{}, names: map[string]int{}, policies: map[string]*Policy{}, cels: map[string]*expression{}}
	for i := range routes {
		c.route(i, &routes[i])
	}
	if err := faults.Err(); err != nil {
		return nil, err
	}
	return s, nil
}

type compiler struct {
	set              *Set
	barred           []barredAddress
	faults           *fault.List
	first, wildFirst map[spot]int       // which route named the place first
	names            map[string]int     // … and took the name
	policies         map[string]*Policy // by text
	cels             map[string]*expression
}

func (c *compiler) route(i int, in *sallyport.Route) {
	key := fmt.Sprintf("routes[%d]", i)
	r := &route{from: in.From, name: in.Name, hidden: in.Hidden, carrier: in.Carrier}
	target, wildcard, err := parseFrom(in.From)
	if err != nil {
		c.faults.Addf(key+".from", "%v", err)
	} else {
		r.at, r.wildcard = spot{target.Network, target.Host, target.Port}, wildcard
		c.index(i, key, r)
		if r.upstream, err = c.upstream(target, wildcard, in.To); err != nil {
			field := key + ".to"
			if in.To == "" {
				field = key + ".from"
			}
			c.faults.Addf(field, "%v", err)
		}
	}
	if in.Carrier != "" && in.Carrier != "bulk" {
		c.faults.Addf(key+".carrier", "unknown carrier %q; write bulk or leave it out", in.Carrier)
	}
	c.name(i, key, in.Name)
	if r.policy = c.policies[in.Policy]; r.policy == nil {
		if r.policy, err = parse([]byte(in.Policy), c.cels); err != nil {
			c.refuse(key, err)
			return
		}
		c.policies[in.Policy] = r.policy
	}
	c.set.routes = append(c.set.routes, r)
}

func (c *compiler) refuse(key string, err error) {
	var errs Errors
	errors.As(err, &errs) // Parse promises them
	for _, e := range errs {
		c.faults.Addf(key+".policy", "%v", e)
	}
}

// label is the rule's name to people, "ROUTE#N" if it has none.
func (r *route) label(ru *rule) string {
	switch {
	case ru == nil:
		return ""
	case ru.name != "":
		return ru.name
	}
	return r.from + "#" + strconv.Itoa(ru.number)
}

func (c *compiler) index(i int, key string, r *route) {
	table, first := c.set.exact, c.first
	if r.wildcard {
		table, first = c.set.wild, c.wildFirst
	}
	if j, taken := first[r.at]; taken {
		c.faults.Addf(key+".from", "%s stands here and in routes[%d].from; one of them would never be asked", r.from, j)
		return
	}
	first[r.at], table[r.at] = i, r
}

func (c *compiler) name(i int, key, name string) {
	if name == "" {
		return
	}
	if strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == ':' || r == '/' || r >= 0x7F }) {
		c.faults.Addf(key+".name", "%q has a blank, a colon, a slash or a character that is not ASCII", name)
		return
	}
	if j, taken := c.names[name]; taken {
		c.faults.Addf(key+".name", "%q is the name of routes[%d] too", name, j)
		return
	}
	c.names[name] = i
}

// parseFrom reads a route's from: a target with scheme, or one whose host
// starts with "*."; then target.Host is what stands behind that.
func parseFrom(s string) (target sallyport.Target, wildcard bool, err error) {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		return target, false, fmt.Errorf("%.80q has no scheme; write tcp://HOST:PORT", s)
	}
	if strings.ContainsAny(rest, "/?#@") {
		return target, false, fmt.Errorf("%.80q: only scheme, host and port are allowed here", s)
	}
	rest, wildcard = strings.CutPrefix(rest, "*.")
	target, err = sallyport.ParseTarget(scheme + "://" + rest)
	if err == nil && wildcard {
		if _, isAddress := target.Addr(); isAddress {
			err = fmt.Errorf("%.80q: a wildcard stands before a name, not before an address", s)
		}
	}
	return target, wildcard, err
}

// upstream reads a route's to and refuses what must never be dialled.
func (c *compiler) upstream(from sallyport.Target, wildcard bool, to string) (sallyport.Upstream, error) {
	if to == "" {
		if wildcard {
			return sallyport.Upstream{Network: from.Network}, nil // checked when dialled
		}
		_, literal := from.Addr()
		return sallyport.Upstream{Network: from.Network, Host: from.Host, Port: from.Port, Literal: literal},
			c.dialable(from)
	}
	if !strings.Contains(to, "://") || strings.ContainsAny(strings.SplitN(to, "://", 2)[1], "/?#@*") {
		return sallyport.Upstream{}, fmt.Errorf("%.80q: write scheme://HOST:PORT", to)
	}
	target, err := sallyport.ParseTarget(to)
	if err != nil {
		return sallyport.Upstream{}, err
	}
	if !carries(from.Network, target.Network) {
		return sallyport.Upstream{}, fmt.Errorf("a %s route cannot lead to %s", from.Network, target.Network)
	}
	_, literal := target.Addr()
	return sallyport.Upstream{Network: target.Network, Host: target.Host, Port: target.Port, Literal: literal}, c.dialable(target)
}

func carries(from, to sallyport.Network) bool {
	web := func(n sallyport.Network) bool { return n == sallyport.HTTP || n == sallyport.HTTPS }
	return from == to || web(from) && web(to)
}

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

// dialable refuses targets that no gateway may dial. Names are checked again
// after resolution, by the gateway.
func (c *compiler) dialable(t sallyport.Target) error {
	addr, literal := t.Addr()
	switch {
	case literal && slices.Contains(metadata, addr), t.Host == "metadata.google.internal":
		return fmt.Errorf("%s is the cloud's metadata service", t.Authority())
	case literal && (addr.IsLinkLocalUnicast() || addr.IsMulticast() || addr.IsUnspecified() || addr == netip.AddrFrom4([4]byte{255, 255, 255, 255})):
		return fmt.Errorf("%s is a link-local, multicast or unspecified address", t.Authority())
	case !literal && localhost.Is(t.Host) && !c.isBarred(t):
		return fmt.Errorf("%s is this machine by name; write the address (127.0.0.1:%d) if that is meant", t.Authority(), t.Port)
	}
	for _, b := range c.barred {
		if b.covers(t, addr, literal) {
			return fmt.Errorf("%s is one of Sallyport's own listeners (%s)", t.Authority(), b.text)
		}
	}
	return nil
}

func (c *compiler) isBarred(t sallyport.Target) bool {
	return slices.ContainsFunc(c.barred, func(b barredAddress) bool { return b.covers(t, netip.Addr{}, false) })
}

func (b barredAddress) covers(t sallyport.Target, addr netip.Addr, literal bool) bool {
	if t.Port != b.port {
		return false
	}
	if b.host == "" {
		return literal && addr.IsLoopback()
	}
	return t.Host == b.host
}

// ShortestAge is the shortest time for which some rule lets a fact count: how
// often, at least, a report has to be renewed.
func (s *Set) ShortestAge() time.Duration {
	shortest := s.site.TTL
	for _, r := range s.routes {
		r.each(func(c criterion) {
			if f, ok := c.(*fact); ok && f.maxAge != 0 {
				shortest = min(shortest, f.maxAge)
			}
		})
	}
	return shortest
}

// each calls f for every criterion of the route's rules that are in force.
func (r *route) each(f func(criterion)) {
	for _, rules := range [][]rule{r.policy.deny, r.policy.allow} {
		for i := range rules {
			rules[i].when.each(f)
		}
	}
}

// eachWatched calls f for every criterion of rules that are only observed.
func (r *route) eachWatched(f func(criterion)) {
	for i := range r.policy.observed {
		r.policy.observed[i].when.each(f)
	}
}

// lookup finds the route that decides t, or nil.
func (s *Set) lookup(t sallyport.Target) *route {
	if r := s.exact[spot{t.Network, t.Host, t.Port}]; r != nil {
		return r
	}
	if len(s.wild) == 0 {
		return nil
	}
	host := t.Host
	for range math.MaxUint8 { // a name has at most 127 labels
		_, rest, ok := strings.Cut(host, ".")
		if !ok {
			return nil
		}
		if r := s.wild[spot{t.Network, rest, t.Port}]; r != nil {
			return r
		}
		host = rest
	}
	return nil
}

package policy

import (
	"cmp"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyport"
	"sallyport/internal/fault"
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
	// Known are policies that need not be read again, by their text: those of the
	// Set before, as its Policies returns them.
	Known map[string]*Policy
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
	site     Options
	routes   []*route // in the order of the configuration
	index    *index
	policies map[string]*Policy // by text
}

type route struct {
	number              int // in the configuration, from 0
	from, name, carrier string
	hidden              bool
	at                  pattern
	upstream            sallyport.Upstream // zero Host, Port: the asked-for one
	policy              *Policy
}

// Compile checks routes and makes them ready for questions. The error is a
// fault.List with every fault, under keys like "routes[2].from"; faults in a
// policy start with line:column within its text.
//
// A target is decided by the one route that names it most exactly: its own host,
// else the longest "*." suffix (at any depth) or the longest prefix of its
// address; among routes of one host the narrowest range that has the port. A
// route that does not name the port does not count, however exact its host is.
// Two routes that are equally exact for some target are a fault that names both.
func Compile(routes []sallyport.Route, opts Options) (*Set, error) {
	s := &Set{site: opts.withDefaults(), routes: make([]*route, len(routes))}
	s.site.Known = nil // not to keep every configuration that there ever was
	var faults fault.List
	c := compiler{set: s, barred: parseForbidden(opts.Forbidden, &faults), faults: make([]fault.List, len(routes))}
	for i := range routes {
		s.routes[i] = c.route(i, &routes[i])
	}
	c.index()
	names := map[string]int{}
	for i := range routes {
		c.upstream(i, routes[i].To)
		c.carrier(i)
		c.name(i, names)
	}
	c.policies(routes, opts.Known)
	if err := append(faults, slices.Concat(c.faults...)...).Err(); err != nil {
		return nil, err
	}
	return s, nil
}

// compiler collects faults by route, so that they come in the order of the
// configuration whichever is found first.
type compiler struct {
	set    *Set
	barred []barredAddress
	faults []fault.List
}

func (c *compiler) fail(i int, field, format string, args ...any) {
	c.faults[i].Addf(fmt.Sprintf("routes[%d].%s", i, field), format, args...)
}

func (c *compiler) route(i int, in *sallyport.Route) *route {
	r := &route{number: i, from: in.From, name: in.Name, hidden: in.Hidden, carrier: in.Carrier}
	var err error
	if r.at, err = parseFrom(in.From); err != nil {
		r.at = pattern{}
		c.fail(i, "from", "%v", err)
	}
	return r
}

// index refuses routes of which none is more specific than the other.
func (c *compiler) index() {
	named := slices.Clone(c.set.routes)
	named = slices.DeleteFunc(named, func(r *route) bool { return r.at == pattern{} })
	x, clashes := newIndex(named)
	slices.SortFunc(clashes, func(a, b clash) int {
		return cmp.Or(cmp.Compare(a.a.number, b.a.number), cmp.Compare(a.at.first, b.at.first))
	})
	for _, k := range clashes {
		if k.a.at.ports == k.b.at.ports {
			c.fail(k.b.number, "from", "%s stands here and in routes[%d].from; one of them would never be asked", k.b.from, k.a.number)
			continue
		}
		c.fail(k.b.number, "from", "%s and routes[%d].from, %s, are equally specific for %s; give that to one of them alone",
			k.b.from, k.a.number, k.a.from, portWords(k.at))
	}
	c.set.index = x
}

func portWords(p ports) string {
	if p.width() == 0 {
		return "port " + p.String()
	}
	return "ports " + p.String()
}

// upstream reads a route's to and refuses what must never be dialled.
func (c *compiler) upstream(i int, to string) {
	r := c.set.routes[i]
	if r.at == (pattern{}) {
		return
	}
	up, span, err := destination(r.at, to)
	if err == nil {
		err = dialable(up, span, c.barred)
	}
	switch {
	case err != nil && to == "":
		c.fail(i, "from", "%v", err)
	case err != nil:
		c.fail(i, "to", "%v", err)
	}
	r.upstream = up
}

func (c *compiler) carrier(i int) {
	if word := c.set.routes[i].carrier; word != "" && word != "bulk" {
		c.fail(i, "carrier", "unknown carrier %q; write bulk or leave it out", word)
	}
}

// name notes which route took a name first.
func (c *compiler) name(i int, first map[string]int) {
	name := c.set.routes[i].name
	if name == "" {
		return
	}
	if strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == ':' || r == '/' || r >= 0x7F }) {
		c.fail(i, "name", "%q has a blank, a colon, a slash or a character that is not ASCII", name)
		return
	}
	if j, taken := first[name]; taken {
		c.fail(i, "name", "%q is the name of routes[%d] too", name, j)
		return
	}
	first[name] = i
}

// policies gives each route its policy; routes with the same text share one.
func (c *compiler) policies(routes []sallyport.Route, known map[string]*Policy) {
	c.set.policies = make(map[string]*Policy, len(routes))
	var unread []string
	for i := range routes {
		text := routes[i].Policy
		if _, met := c.set.policies[text]; !met {
			if c.set.policies[text] = known[text]; known[text] == nil {
				unread = append(unread, text)
			}
		}
	}
	refused := map[string]error{}
	for i, r := range parseAll(unread) {
		c.set.policies[unread[i]] = r.policy
		if r.err != nil {
			refused[unread[i]] = r.err
		}
	}
	for i := range routes {
		c.set.routes[i].policy = c.set.policies[routes[i].Policy]
		var errs Errors
		errors.As(refused[routes[i].Policy], &errs) // Parse promises them
		for _, e := range errs {
			c.fail(i, "policy", "%v", e)
		}
	}
}

type parsed struct {
	policy *Policy
	err    error
}

// parseAll reads texts on every processor: reading them is what a configuration
// with many routes waits for.
func parseAll(texts []string) []parsed {
	out := make([]parsed, len(texts))
	cels := new(expressions)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(texts)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(texts); i = int(next.Add(1)) - 1 {
				out[i].policy, out[i].err = parse([]byte(texts[i]), cels)
			}
		})
	}
	wg.Wait()
	return out
}

// Policies are the policies of the routes by their text, for Options.Known.
func (s *Set) Policies() map[string]*Policy { return s.policies }

// lookup finds the route that decides t, or nil.
func (s *Set) lookup(t sallyport.Target) *route { return s.index.find(t) }

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

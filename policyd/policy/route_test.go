package policy

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"sallyport"
)

// runRoutes says which route decides each target, and what is dialled. A line of
// routes is FROM and words: TO, name=NAME, only=GROUP (else everybody may),
// hidden. A line of targets may say groups=GROUP of who asks. forbidden lists own
// listeners.
func runRoutes(t *testing.T, lines, targets, forbidden string) string {
	var routes []sallyport.Route
	for line := range strings.Lines(lines) {
		if words := strings.Fields(line); len(words) > 0 {
			routes = append(routes, parseRoute(words))
		}
	}
	set, err := Compile(routes, Options{Forbidden: strings.Fields(forbidden)})
	if err != nil {
		return err.Error() + "\n"
	}
	var out strings.Builder
	for line := range strings.Lines(targets) {
		word, groups, _ := strings.Cut(strings.TrimSpace(line), " ")
		fmt.Fprintf(&out, "%s: %s\n", strings.TrimSpace(line), decidedBy(set, asker(t, "email=a@b "+groups), word))
	}
	return out.String()
}

func parseRoute(words []string) sallyport.Route {
	r := sallyport.Route{From: words[0], Policy: anyone}
	for _, w := range words[1:] {
		if group, ok := strings.CutPrefix(w, "only="); ok {
			r.Policy = "allow: {or: [{groups: " + group + "}]}"
		} else if name, ok := strings.CutPrefix(w, "name="); ok {
			r.Name = name
		} else if w == "hidden" {
			r.Hidden = true
		} else {
			r.To = w
		}
	}
	return r
}

func decidedBy(set *Set, in *Input, word string) string {
	asked, err := sallyport.ParseTarget(word)
	if err != nil {
		return err.Error()
	}
	in.Request = &sallyport.Request{Session: "s1", Target: asked}
	a := set.Decide(in)
	from, _, up := a.Route(asked)
	if a.Verdict != sallyport.VerdictAllow {
		return strings.TrimSpace(fmt.Sprint(a.Verdict, " ", from))
	}
	dialled := sallyport.Target{Network: up.Network, Host: up.Host, Port: up.Port}.String()
	if up.Literal {
		dialled += " literally"
	}
	return from + " dials " + dialled
}

func TestCase_I6_equallySpecificRoutesNameBoth(t *testing.T) {
	golden(t, "testdata/routes/ambiguous.txtar")
}

func TestCase_G9_addressesNeedRoutesThatNameAddresses(t *testing.T) {
	golden(t, "testdata/routes/addresses.txtar")
}

func TestCase_G7_J8_ownListenersInRanges(t *testing.T) {
	golden(t, "testdata/routes/own_listeners.txtar")
}

func TestCase_I12_networksAsWritten(t *testing.T) {
	golden(t, "testdata/routes/networks_refused.txtar")
}

// Targets come in one spelling; another must not get past an address's own route
// to that of its network.
func TestOnlyCanonicalAddressesAreDecided(t *testing.T) {
	set := siteOf(t, 2, func(i int) string { return []string{"tcp://10.0.0.0/8:22", "tcp://[2001:db8::/32]:22"}[i] })
	for host, want := range map[string]bool{
		"10.0.0.5": true, "2001:db8::5": true,
		"::ffff:10.0.0.5": false, "2001:DB8::5": false, "2001:db8:0::5": false, "2001:db8::5%eth0": false, "10.0.0.05": false, "10.0.5": false, "": false,
	} {
		if got := set.lookup(sallyport.Target{Network: "tcp", Host: host, Port: 22}) != nil; got != want {
			t.Errorf("%q: got decided %v; want %v", host, got, want)
		}
	}
}

// The table of a host agrees with asking its routes one after the other.
func TestNarrowestRangeWins(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var routes []*route
		for i := range rapid.IntRange(1, 12).Draw(t, "routes") {
			first := rapid.Uint16Range(1, 40).Draw(t, "first")
			last := first + rapid.Uint16Range(0, 30).Draw(t, "more")
			routes = append(routes, &route{number: i, at: pattern{host: "h", ports: ports{first, last}}})
		}
		clear := slices.Clone(routes)
		table, clashes := weigh(routes)
		for port := range uint16(80) {
			want, twice := narrowest(clear, port)
			if got := table.find(port); !twice && got != want {
				t.Fatalf("port %d: got %v; want %v", port, got, want)
			}
			if twice && len(clashes) == 0 {
				t.Fatalf("port %d has two routes that are equally specific, and no fault says so", port)
			}
		}
	})
}

func narrowest(routes []*route, port uint16) (best *route, twice bool) {
	for _, r := range routes {
		switch p := r.at.ports; {
		case port < p.first || port > p.last:
		case best == nil || p.width() < best.at.ports.width():
			best, twice = r, false
		case p.width() == best.at.ports.width():
			twice = true
		}
	}
	return best, twice
}

func FuzzRoute(f *testing.F) {
	for _, s := range []string{
		"tcp://db.internal:5432", "tcp://*.internal:1-65535", "tcp://10.0.0.0/8:22", "tcp://[2001:db8::/32]:22-23",
		"ssh://10.0.0.0/8", "tcp://[::ffff:10.0.0.0/104]:22", "https://*.corp.example", "tcp://[::1]/64:1", "tcp://*.[::]:1-",
	} {
		f.Add(s, "")
		f.Add(s, "tcp://10.0.0.1:1-65535")
	}
	f.Fuzz(func(t *testing.T, from, to string) {
		set, err := Compile([]sallyport.Route{{From: from, To: to, Policy: anyone}}, Options{})
		if err != nil {
			return
		}
		r := set.routes[0]
		sample := r.at.sample()
		if r.at.wildcard {
			sample.Host = "x." + sample.Host
		}
		canonical, err := sallyport.ParseTarget(sample.String())
		if err != nil || canonical != sample {
			if len(sample.Host) < 250 {
				t.Fatalf("%q names %v, which nobody can ask for (%v)", from, sample, err)
			}
			return
		}
		if set.lookup(sample) != r {
			t.Fatalf("%q names %v and does not decide it", from, sample)
		}
	})
}

func TestLookupAllocatesNothing(t *testing.T) {
	for kind, site := range lookups {
		set, asked := site(t, 1000)
		if n := testing.AllocsPerRun(100, func() { set.lookup(asked) }); n != 0 {
			t.Errorf("%s: %v allocations; want none", kind, n)
		}
		miss := asked
		miss.Port = 9
		if n := testing.AllocsPerRun(100, func() { set.lookup(miss) }); n != 0 {
			t.Errorf("%s, not found: %v allocations; want none", kind, n)
		}
	}
}

// lookups are sites of n routes of one kind, each with a target that one of them decides.
var lookups = map[string]func(tb testing.TB, n int) (*Set, sallyport.Target){
	"exact": func(tb testing.TB, n int) (*Set, sallyport.Target) {
		return siteOf(tb, n, func(i int) string { return fmt.Sprintf("tcp://db%d.internal:5432", i) }), target(tb, "tcp://db7.internal:5432")
	},
	"wildcard": func(tb testing.TB, n int) (*Set, sallyport.Target) {
		return siteOf(tb, n, func(i int) string { return fmt.Sprintf("tcp://*.team%d.internal:22", i) }), target(tb, "tcp://a.b.team7.internal:22")
	},
	"network": func(tb testing.TB, n int) (*Set, sallyport.Target) {
		return siteOf(tb, n, func(i int) string {
			return fmt.Sprintf("tcp://%d.%d.%d.0/%d:22", 10+i%7, i/256, i%256, 24+i%5)
		}), target(tb, "tcp://10.0.7.1:22")
	},
	"network6": func(tb testing.TB, n int) (*Set, sallyport.Target) {
		return siteOf(tb, n, func(i int) string { return fmt.Sprintf("tcp://[2001:db8:%x::/%d]:22", i, 48+i%16) }), target(tb, "tcp://[2001:db8:7::1]:22")
	},
	"range": func(tb testing.TB, n int) (*Set, sallyport.Target) {
		return siteOf(tb, n, func(i int) string { return fmt.Sprintf("tcp://db%d.internal:5000-5010", i) }), target(tb, "tcp://db7.internal:5005")
	},
	"ports of one host": func(tb testing.TB, n int) (*Set, sallyport.Target) {
		return siteOf(tb, n, func(i int) string { return fmt.Sprintf("tcp://db.internal:%d-%d", 1000+3*i, 1001+3*i) }), target(tb, "tcp://db.internal:1022")
	},
}

func siteOf(tb testing.TB, n int, from func(i int) string) *Set {
	routes := make([]sallyport.Route, n)
	for i := range routes {
		routes[i] = sallyport.Route{From: from(i), Policy: anyone}
	}
	set, err := Compile(routes, Options{})
	if err != nil {
		tb.Fatal(err)
	}
	return set
}

func BenchmarkLookup(b *testing.B) {
	for kind, site := range lookups {
		b.Run("kind="+strings.ReplaceAll(kind, " ", "_"), func(b *testing.B) {
			set, asked := site(b, 10_000)
			if set.lookup(asked) == nil {
				b.Fatalf("nothing decides %v", asked)
			}
			b.ReportAllocs()
			for b.Loop() {
				set.lookup(asked)
			}
		})
	}
}

// A policy that is known is taken as it is, and one that is not is read.
func TestKnownPoliciesAreNotReadAgain(t *testing.T) {
	routes := []sallyport.Route{{From: "tcp://a:1", Policy: anyone}, {From: "tcp://b:1", Policy: "allow: {or: [{groups: b}]}"}}
	old, err := Compile(routes, Options{})
	if err != nil {
		t.Fatal(err)
	}
	routes[1].Policy = "deny: {or: [{groups: b}]}"
	set, err := Compile(routes, Options{Known: old.Known})
	if err != nil {
		t.Fatal(err)
	}
	if set.routes[0].policy != old.routes[0].policy {
		t.Error("a policy that did not change was read again")
	}
	if set.routes[1].policy == old.routes[1].policy || len(set.routes[1].policy.deny) != 1 {
		t.Error("a policy that changed was not read")
	}
	if set.Known("allow: {or: [{groups: b}]}") != nil || set.site.Known != nil {
		t.Error("what is no longer in force is kept")
	}
}

// large is what the memory of a site allows: 10,000 routes under one policy of
// 1,000 rules.
func large() []sallyport.Route {
	var text strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&text, "- {name: rule-%d, allow: {and: [{groups: {has: team-%d}}, {device: {disk_encrypted: true}}]}}\n", i, i)
	}
	routes := make([]sallyport.Route, 10_000)
	for i := range routes {
		routes[i] = sallyport.Route{From: fmt.Sprintf("tcp://db%d.internal:5432", i), Policy: text.String()}
	}
	return routes
}

// TestCase_I15_ManyRoutesManyRules runs in a process of its own, whose memory is
// nobody else's.
func TestCase_I15_ManyRoutesManyRules(t *testing.T) {
	if os.Getenv("POLICY_TEST_LARGE") == "" {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(self, "-test.run=^TestCase_I15_ManyRoutesManyRules$", "-test.v")
		cmd.Env = append(os.Environ(), "POLICY_TEST_LARGE=1")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		t.Logf("%s", out)
		return
	}
	start := time.Now()
	set, err := Compile(large(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	loading := time.Since(start)
	in := asker(t, "email=a@b groups=team-999 fact.disk_encrypted=true")
	took := make([]time.Duration, 5000)
	for i := range took {
		in.Request = &sallyport.Request{Session: "s1", Target: sallyport.Target{Network: "tcp", Host: fmt.Sprintf("db%d.internal", i), Port: 5432}}
		took[i] = time.Hour
		for range 3 { // the best of them: what else the machine does is not the policy's
			start := time.Now()
			if a := set.Decide(in); a.Rule() != "rule-999" {
				t.Fatalf("got %v by %q; want the last rule", a.Verdict, a.Rule())
			}
			took[i] = min(took[i], time.Since(start))
		}
	}
	slices.Sort(took)
	p99, peak := took[len(took)*99/100], peakMemory(t)
	t.Logf("loaded in %v, p99 %v, %d MiB", loading, p99, peak>>20)
	if loading > 2*time.Second || p99 > time.Millisecond || peak > 256<<20 {
		t.Errorf("loaded in %v, p99 %v, %d MiB; want at most 2s, 1ms, 256 MiB", loading, p99, peak>>20)
	}
}

// peakMemory is the largest resident set the process has had, in bytes; 0 where
// the system does not tell.
func peakMemory(t *testing.T) int {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	words := strings.Fields(rest)
	if len(words) == 0 {
		return 0
	}
	kib, err := strconv.Atoi(words[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

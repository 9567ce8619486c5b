package policy

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"sallyport"
)

// benchInput is a person with 50 groups and 10 facts at a site of n routes.
func benchInput(tb testing.TB, n int) (*Set, *Input) {
	routes := make([]sallyport.Route, n)
	for i := range routes {
		routes[i] = sallyport.Route{
			From: fmt.Sprintf("tcp://db%d.internal:5432", i), To: "tcp://10.0.3.7:5432",
			Policy: fmt.Sprintf(`
- name: dba
  allow: {and: [{groups: {has: team-%d}}, {device: {disk_encrypted: true, os_version: {">=": "15.4"}}}]}
- name: leavers
  deny: {or: [{groups: {has: leavers}}, {device: {firewall: false}}]}
`, 40+i%10),
		}
	}
	set, err := Compile(routes, Options{})
	if err != nil {
		tb.Fatal(err)
	}
	var groups []sallyport.Group
	for i := range 50 {
		groups = append(groups, sallyport.Group{ID: fmt.Sprintf("00000000-%d", i), Name: fmt.Sprintf("team-%d", i)})
	}
	facts := map[string]sallyport.Fact{"os_version": {Value: "15.10", At: noon, Source: "os"}}
	for _, name := range []string{"disk_encrypted", "firewall", "screen_lock", "secure_boot", "managed", "a", "b", "c", "d"} {
		facts[name] = sallyport.Fact{Value: true, At: noon, Source: "os"}
	}
	return set, &Input{
		Now:     noon,
		Request: &sallyport.Request{Session: "s1", Target: sallyport.Target{Network: "tcp", Host: fmt.Sprintf("db%d.internal", n-1), Port: 5432}},
		Person: &Person{
			Session: &sallyport.Session{ID: "s1", Device: "d1"}, User: &sallyport.User{ID: "u1"}, Email: "a@b",
			Groups: NewGroups(groups), Device: &sallyport.Device{ID: "d1"},
			Posture: &sallyport.Posture{Received: noon, Sequence: noon.UnixMilli(), Facts: facts},
		},
	}
}

func TestDecideAllocatesNothing(t *testing.T) {
	set, in := benchInput(t, 100)
	for name, change := range map[string]func(){
		"allow":   func() {},
		"deny":    func() { in.Person.Groups = NewGroups(nil) },
		"nobody":  func() { in.Person = nil },
		"nowhere": func() { in.Request.Target.Host = "a.b.c.d.e.f" },
	} {
		saved, request := *in, *in.Request
		person := *in.Person
		change()
		if n := testing.AllocsPerRun(1000, func() { set.Decide(in) }); n != 0 {
			t.Errorf("%s: %v allocations a decision; want none", name, n)
		}
		*in, *in.Request = saved, request
		*in.Person = person
	}
}

// Every criterion's evaluation is free of allocations, too; CEL's takes a few.
func TestCriteriaAllocateNothing(t *testing.T) {
	in := asker(t, `email=a@b groups=a claim.x="1" claim.o={"p":true} fact.firewall=true fact.os_version="15.4" fact.edr=4 fact.os="linux" type=tpm approved=true`+requestWords)
	for _, l := range append([]string{"device: {is: d1}", "device: {type: tpm}", "email: {contains: A, starts_with: a, ends_with: B}"}, allLeaves()...) {
		if strings.HasPrefix(l, "ssh_ca") {
			continue // verifies a signature
		}
		set := compileOne(t, "allow: {or: [{"+l+"}]}")
		most := 0.0
		switch {
		case strings.HasPrefix(l, "cel:"):
			most = 25
		case strings.Contains(l, "of: peer"):
			most = 1 // the address as text
		}
		if n := testing.AllocsPerRun(100, func() { set.Decide(in) }); n > most {
			t.Errorf("%s: %v allocations", l, n)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprintf("routes=%d", n), func(b *testing.B) {
			set, in := benchInput(b, n)
			b.ReportAllocs()
			for b.Loop() {
				if set.Decide(in).Verdict != sallyport.VerdictAllow {
					b.Fatal("denied")
				}
			}
		})
	}
}

// BenchmarkExplain answers "why" as for a person who asks: with all reasons, and
// with what would help.
func BenchmarkExplain(b *testing.B) {
	set, allowed := benchInput(b, 1)
	_, denied := benchInput(b, 1)
	for _, name := range []string{"disk_encrypted", "firewall"} {
		f := denied.Person.Posture.Facts[name]
		f.Value = false
		denied.Person.Posture.Facts[name] = f
	}
	for _, bb := range []struct {
		name string
		in   *Input
		ask  func(*Input, Answer) int
		want int
	}{
		{"allow", allowed, func(in *Input, a Answer) int { return len(set.Reasons(in, a, true)) }, 3},
		{"deny", denied, func(in *Input, a Answer) int { return len(set.Reasons(in, a, true)) }, 2},
		{"deny with remedies", denied, func(in *Input, a Answer) int {
			return len(set.Reasons(in, a, true)) + len(set.Remedies(in, a))
		}, 3},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if got := bb.ask(bb.in, set.Decide(bb.in)); got != bb.want {
					b.Fatalf("got %d reasons and remedies; want %d", got, bb.want)
				}
			}
		})
	}
}

// manyRules are n routes with as many rules each, no two policies alike, as they
// are stored.
func manyRules(tb testing.TB, n, rules int) []sallyport.Route {
	routes := make([]sallyport.Route, n)
	for i := range routes {
		var text strings.Builder
		for j := range rules {
			fmt.Fprintf(&text, "- {name: r%d, allow: {and: [{groups: {has: team-%d-%d}}, {device: {disk_encrypted: true}}]}}\n", j, i, j)
		}
		n, err := document([]byte(text.String()))
		if err != nil {
			tb.Fatal(err)
		}
		routes[i] = sallyport.Route{From: fmt.Sprintf("tcp://db%d.internal:5432", i), Policy: Text(n)}
	}
	return routes
}

// BenchmarkCompile also tells how much memory the compiled routes keep.
func BenchmarkCompile(b *testing.B) {
	for _, rules := range []int{1, 10} {
		b.Run(fmt.Sprintf("routes=10000/rules=%d", rules), func(b *testing.B) {
			routes := manyRules(b, 10_000, rules)
			before := heap()
			b.ReportAllocs()
			var set *Set
			var err error
			for b.Loop() {
				if set, err = Compile(routes, Options{}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(heap()-before)/(1<<20), "kept-MiB")
			runtime.KeepAlive(set)
			runtime.KeepAlive(routes)
		})
	}
}

// BenchmarkCompileChange is what it costs to take over the change of one policy.
func BenchmarkCompileChange(b *testing.B) {
	routes := manyRules(b, 10_000, 10)
	old, err := Compile(routes, Options{})
	if err != nil {
		b.Fatal(err)
	}
	routes[7].Policy = anyone
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Compile(routes, Options{Known: old.Known}); err != nil {
			b.Fatal(err)
		}
	}
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func BenchmarkRemedies(b *testing.B) {
	set := compileOne(b, `
allow: {and: [{device: {disk_encrypted: true, firewall: true, screen_lock: true, secure_boot: true, managed: true, a: true,
  b: true, c: true, d: true, e: true, f: true, g: true}}, {groups: nobody}]}
`)
	_, in := benchInput(b, 1)
	in.Request.Target.Host = "db.internal"
	in.Person.Posture.Facts = nil
	b.ReportAllocs()
	for b.Loop() {
		set.Remedies(in, set.Decide(in))
	}
}

// benchCEL is benchInput with one CEL expression a route, each another one.
func benchCEL(tb testing.TB, n int) ([]sallyport.Route, *Input) {
	_, in := benchInput(tb, 1)
	in.Request.Target.Host = fmt.Sprintf("db%d.internal", n-1)
	routes := make([]sallyport.Route, n)
	for i := range routes {
		routes[i] = sallyport.Route{
			From: fmt.Sprintf("tcp://db%d.internal:5432", i), To: "tcp://10.0.3.7:5432",
			Policy: fmt.Sprintf(`
allow: {or: [{cel: '"team-%d" in groups && device.facts.disk_encrypted == true && user.email.endsWith("@b") && %d > 0'}]}
`, 40+i%10, i+1),
		}
	}
	return routes, in
}

func BenchmarkDecideCEL(b *testing.B) {
	routes, in := benchCEL(b, 10_000)
	set, err := Compile(routes, Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if set.Decide(in).Verdict != sallyport.VerdictAllow {
			b.Fatal("denied")
		}
	}
}

func BenchmarkCompileCEL(b *testing.B) {
	routes, _ := benchCEL(b, 10_000)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Compile(routes, Options{}); err != nil {
			b.Fatal(err)
		}
	}
}

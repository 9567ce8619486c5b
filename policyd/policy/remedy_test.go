package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"sallyport"

	"pgregory.net/rapid"
)

// Every remedy works when it is really carried out; where no CEL expression has a
// say, no part of it would do, and none is missing: compared with trying everything
// on the question itself.
func TestRemediesWork(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set, text := drawSet(t)
		in := drawInput(t)
		a := set.Decide(in)
		if a.Verdict != sallyport.VerdictDeny || in.Person == nil {
			return
		}
		h := newSearch(in, a.route, searchCost)
		h.run()
		var got []string
		for _, f := range h.found {
			if v, _ := a.route.decide(h.changedInput(f.changes)); v != sallyport.VerdictAllow {
				t.Fatalf("%s\n%v does not help", text, f.words)
			}
			got = append(got, abouts(h, f.changes))
		}
		cel := false // what an expression says is taken as it is, and a set that turns it is not found
		a.route.each(func(c criterion) { cel = cel || c.path() == "cel" })
		if cel {
			return
		}
		slices.Sort(got)
		got = slices.Compact(got)
		want := everyMinimal(h, candidates(h))
		if len(h.found) == maxAnswers {
			want = slices.DeleteFunc(want, func(s string) bool { return !slices.Contains(got, s) })
		}
		if !slices.Equal(got, want) {
			t.Fatalf("%s\n%s\ngot  %q\nwant %q", text, describe(set, in), got, want)
		}
	})
}

// abouts are the atoms that changes are of.
func abouts(h *search, changes []*change) string {
	var out []string
	for _, c := range changes {
		out = append(out, stepOf(h, c))
	}
	slices.Sort(out)
	return strings.Join(out, "+")
}

// stepOf tells a plain login from one by other methods.
func stepOf(h *search, c *change) string {
	if c.login && !c.isPlainLogin() {
		return "login by other methods"
	}
	return h.about(c.by)
}

// candidates are all changes that could matter, by atom: more than a search tries.
func candidates(h *search) map[string][]*change {
	out := map[string][]*change{}
	var methods []criterion
	h.route.each(func(c criterion) {
		about := h.about(c)
		switch c := c.(type) {
		case *fact:
			if about != "" {
				for _, v := range c.match.values() {
					out[about] = append(out[about], &change{by: c, value: v, source: c.counted(h.in)[0]})
				}
			}
		case *deviceField:
			if about != "" && !h.in.Person.Device.Approved {
				out[about] = append(out[about], &change{by: c})
			}
		case *sessionAge:
			out[about] = append(out[about], &change{by: c, login: true, methods: h.in.Person.authMethods()})
		case *authMethod:
			methods = append(methods, c)
		}
	})
	for _, c := range methods {
		for bits := 1; bits < 8; bits++ {
			var login []string
			for i, m := range []string{"pwd", "mfa", "hwk"} {
				if bits&(1<<i) != 0 {
					login = append(login, m)
				}
			}
			if c := loginBy(c, h.in.Person.authMethods(), login); !c.isPlainLogin() {
				out[aboutLogin] = append(out[aboutLogin], &c)
			}
		}
	}
	return out
}

// everyMinimal asks the route about every combination of changes.
func everyMinimal(h *search, all map[string][]*change) []string {
	atoms := slices.Sorted(maps.Keys(all))
	helps := map[string]bool{}
	var try func(i int, done []*change)
	try = func(i int, done []*change) {
		if i < len(atoms) {
			try(i+1, done)
			for _, c := range all[atoms[i]] {
				try(i+1, append(slices.Clone(done), c))
			}
			return
		}
		name := abouts(h, done)
		if !helps[name] {
			v, _ := h.route.decide(h.changedInput(done))
			helps[name] = v == sallyport.VerdictAllow
		}
	}
	try(0, nil)
	var out []string
	for name := range helps {
		if helps[name] && !slices.ContainsFunc(slices.Collect(maps.Keys(helps)), func(o string) bool { return o != name && helps[o] && isPartOf(o, name) }) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// isPartOf reports whether all of x is part of y; a login by other methods is a login.
func isPartOf(x, y string) bool {
	of := strings.Split(y, "+")
	if slices.Contains(of, "login by other methods") {
		of = append(of, aboutLogin)
	}
	return !slices.ContainsFunc(strings.Split(x, "+"), func(s string) bool { return !slices.Contains(of, s) })
}

// All 4,095 sets of twelve things are gone through.
func TestRemediesAreExactToTwelve(t *testing.T) {
	var facts []string
	for i := range maxAtoms {
		facts = append(facts, fmt.Sprintf("{device: {f%d: true}}", i))
	}
	for _, tt := range []struct {
		name, text string
		sets, size int
	}{
		{"all", "allow: {and: [" + strings.Join(facts, ", ") + "]}", 1, maxAtoms},
		{"any", "allow: {or: [" + strings.Join(facts[:maxAnswers], ", ") + "]}", maxAnswers, 1},
		{"halves", "allow: {or: [{and: [" + strings.Join(facts[:6], ", ") + "]}, {and: [" + strings.Join(facts[6:], ", ") + "]}]}", 2, 6},
	} {
		set := compileOne(t, tt.text)
		in := asker(t, "")
		got := set.Remedies(in, set.Decide(in))
		if len(got) != tt.sets {
			t.Fatalf("%s: %d sets; want %d", tt.name, len(got), tt.sets)
		}
		for _, s := range got {
			if len(s) != tt.size {
				t.Errorf("%s: a set of %d; want %d", tt.name, len(s), tt.size)
			}
		}
	}
}

// Of thirteen things that matter twelve are tried; things that do not matter do
// not count.
func TestRemediesBeyondTwelve(t *testing.T) {
	facts := func(n int) string {
		var out []string
		for i := range n {
			out = append(out, fmt.Sprintf("{device: {f%d: true}}", i))
		}
		return strings.Join(out, ", ")
	}
	for text, want := range map[string]int{
		"allow: {and: [" + facts(maxAtoms+1) + "]}": 0,
		"- {allow: {and: [{groups: nobody}, " + facts(maxAtoms+1) + "]}}\n- {allow: {and: [{device: {last: true}}]}}": 1,
	} {
		set := compileOne(t, text)
		in := asker(t, "")
		if got := set.Remedies(in, set.Decide(in)); len(got) != want {
			t.Errorf("%s\n%d sets; want %d", text, len(got), want)
		}
	}
}

// A batch that has spent its budget still gets what is found at once.
func TestRemediesShareABudget(t *testing.T) {
	hard := compileOne(t, hardPolicy())
	easy := compileOne(t, "allow: {and: [{device: {firewall: true, screen_lock: true}}]}")
	budget := &Budget{}
	in := asker(t, "")
	in.Budget = budget
	for budget.spent < batchCost {
		before := budget.spent
		hard.Remedies(in, hard.Decide(in))
		if budget.spent-before > 2*searchCost || budget.spent == before {
			t.Fatalf("one search cost %d; want up to %d", budget.spent-before, searchCost)
		}
	}
	before := budget.spent
	hard.Remedies(in, hard.Decide(in))
	if cost := budget.spent - before; cost > 2*leastCost {
		t.Errorf("a search cost %d when nothing was left; want about %d", cost, leastCost)
	}
	if got := easy.Remedies(in, easy.Decide(in)); len(got) != 1 || len(got[0]) != 2 {
		t.Errorf("a common denial got %v", got)
	}
}

// hardPolicy needs all sets of twelve facts to be tried, with 50 rules in which any
// four facts are not enough.
func hardPolicy() string {
	var b strings.Builder
	for i := range 50 {
		fmt.Fprintf(&b, "- {allow: {and: [{device: {f%d: true, f%d: true, f%d: true}}, {device: {f%d: false}}]}}\n", i%12, (i*5+1)%12, (i*7+2)%12, i%12)
	}
	return b.String()
}

func BenchmarkRemediesTypical(b *testing.B) {
	set := compileOne(b, `
- {name: dba, allow: {and: [{groups: {has: team-1}}, {device: {disk_encrypted: true, firewall: true, os_version: {">=": "15.4"}}}, {session_age: {"<": 1h}}]}}
- {name: admins, allow: {and: [{groups: {has: admins}}]}}
- {name: old, deny: {or: [{device: {os_version: {"<": "14"}}}]}}
`)
	_, in := benchInput(b, 1)
	in.Request.Target.Host = "db.internal"
	in.Person.Posture.Facts["firewall"] = sallyport.Fact{Value: false, At: noon, Source: "os"}
	in.Person.Session.Created = noon.Add(-2 * day)
	a := set.Decide(in)
	b.ReportAllocs()
	for b.Loop() {
		if len(set.Remedies(in, a)) != 1 {
			b.Fatal("not one remedy")
		}
	}
}

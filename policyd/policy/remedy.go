package policy

import (
	"maps"
	"math/bits"
	"slices"
	"strings"
	"time"

	"sallyport"
)

const (
	maxAtoms   = 12      // facts that a search changes; more are left as they are
	maxTrials  = 1 << 14 // decisions that a search may cost, some milliseconds
	maxAnswers = 8
)

// Remedies returns the smallest sets of changes to the caller's own device or
// session that would turn the answer a to in into an allow. Each set is minimal:
// no part of it would do. For policies that look at up to maxAtoms facts every one
// is found, as long as maxTrials decisions suffice.
// What other people's records or the directory would have to say is never part
// of it.
func (s *Set) Remedies(in *Input, a Answer) [][]sallyport.Remedy {
	in.prepare(&s.site)
	switch {
	case a.Verdict == sallyport.VerdictLogin:
		return [][]sallyport.Remedy{{{Condition: "session", Want: "live", Hint: "run: agent login"}}}
	case a.Verdict != sallyport.VerdictDeny || a.route == nil || in.Person == nil || in.Person.Session.Device == "":
		return nil
	}
	h := s.newSearch(in, a.route)
	h.run()
	return h.found
}

// change is one value that a fact could take.
type change struct {
	fact   sallyport.Fact
	remedy sallyport.Remedy
}

// atom is a fact that could change, and what to.
type atom struct {
	name    string
	changes []change
}

// search tries changes of a copy of the question.
type search struct {
	route   *route
	in      Input
	posture sallyport.Posture
	atoms   []atom
	trials  int
	done    []sallyport.Remedy // of the set that is being tried
	found   [][]sallyport.Remedy
}

func (s *Set) newSearch(in *Input, r *route) *search {
	h := &search{route: r, in: *in}
	person := *in.Person
	h.posture = reportedNow(in)
	person.Posture = &h.posture
	h.in.Person = &person
	h.in.prepare(&s.site)
	r.each(func(c criterion) {
		switch c := c.(type) {
		case *fact:
			h.add(c)
		case *expression:
			h.settle(c)
		}
	})
	return h
}

// reportedNow returns the device's posture as a report of this moment, in which
// each fact is as old as it is.
func reportedNow(in *Input) sallyport.Posture {
	p := sallyport.Posture{Received: in.Now, Sequence: in.Now.UnixMilli(), Facts: make(map[string]sallyport.Fact)}
	if old := in.Person.Posture; old != nil {
		for name, f := range old.Facts {
			f.At = time.UnixMilli(p.Sequence).Add(-FactAge(old, f, in.Now))
			p.Facts[name] = f
		}
	}
	return p
}

// add notes the values that make f true, and those that make it false.
func (h *search) add(f *fact) {
	i := slices.IndexFunc(h.atoms, func(a atom) bool { return a.name == f.name })
	if i < 0 {
		if len(h.atoms) == maxAtoms {
			return
		}
		i = len(h.atoms)
		h.atoms = append(h.atoms, atom{name: f.name})
	}
	source := h.in.site.Sources[0]
	if f.sources != nil {
		source = f.sources[0]
	}
	words := wantWords(&f.match)
	for _, v := range f.match.values() {
		want := words
		switch f.match.value(v) {
		case False:
			want = "not " + words
			if b, ok := v.(bool); ok {
				want = valueWords(b)
			}
		case Unknown:
			continue
		}
		if f.sources != nil && source != h.in.site.Sources[0] {
			want += " (" + source + ")"
		}
		h.atoms[i].add(change{
			sallyport.Fact{Value: v, Source: source},
			sallyport.Remedy{Condition: f.path(), Want: want, Hint: h.hint(f, v, source)},
		})
	}
}

func (a *atom) add(c change) {
	if !slices.ContainsFunc(a.changes, func(o change) bool { return o.fact == c.fact }) {
		a.changes = append(a.changes, c)
	}
}

// hint tells how to change the fact; when it already has the value, it is the
// report that is missing.
func (h *search) hint(f *fact, v any, source string) string {
	if now, ok := h.posture.Facts[f.name]; ok && now.Value == v && now.Source == source {
		return "report it again: agent posture"
	}
	if b, ok := v.(bool); ok && !b {
		return ""
	}
	return knownFacts[f.name].hint
}

// wantWords is the matcher's words without a leading "is".
func wantWords(m *matcher) string { return strings.TrimPrefix(m.words(), "is ") }

// values returns values at which the matcher's answer can change: its operands,
// and one that is none of them.
func (m *matcher) values() []any {
	var out []any
	for _, t := range m.tests {
		for _, s := range t.of {
			switch s.kind {
			case 'b':
				out = append(out, s.b, !s.b)
			case 'n':
				out = append(out, s.n, s.n-1, s.n+1)
			default:
				out = append(out, s.s, "")
				if t.op >= less && t.op <= greaterOrEqual {
					out = append(out, s.s+".1", "0")
				}
			}
		}
	}
	return out
}

// run tries all sets of facts, small ones first, and skips those that contain
// one that was found.
func (h *search) run() {
	if !h.couldAllow(1<<len(h.atoms) - 1) {
		return
	}
	sets := make([]uint, 0, 1<<len(h.atoms))
	for set := uint(1); set < 1<<len(h.atoms); set++ {
		sets = append(sets, set)
	}
	slices.SortStableFunc(sets, func(a, b uint) int { return bits.OnesCount(a) - bits.OnesCount(b) })
	var minimal []uint
	for _, set := range sets {
		if slices.ContainsFunc(minimal, func(m uint) bool { return m&set == m }) || !h.couldAllow(set) {
			continue
		}
		before := len(h.found)
		h.try(set)
		if len(h.found) > before {
			minimal = append(minimal, set)
		}
		if h.trials > maxTrials || len(h.found) >= maxAnswers {
			return
		}
	}
}

// couldAllow reports whether some values of the facts in set may allow: with
// those facts unknown, nothing else settles the answer.
func (h *search) couldAllow(set uint) bool {
	h.trials++
	saved := make(map[string]sallyport.Fact, maxAtoms)
	for ; set != 0; set &= set - 1 {
		name := h.atoms[bits.TrailingZeros(set)].name
		if f, ok := h.posture.Facts[name]; ok {
			saved[name] = f
			delete(h.posture.Facts, name)
		}
	}
	denied, _ := strongest(h.route.policy.deny, &h.in)
	allowed, _ := strongest(h.route.policy.allow, &h.in)
	maps.Copy(h.posture.Facts, saved)
	return denied != True && allowed != False
}

// try gives the facts of set all their values, one after the other.
func (h *search) try(set uint) {
	if set == 0 {
		h.trials++
		if v, _ := h.route.decide(&h.in); v == sallyport.VerdictAllow && !h.isKnown(h.done) {
			h.found = append(h.found, slices.Clone(h.done))
		}
		return
	}
	a := &h.atoms[bits.TrailingZeros(set)]
	old, had := h.posture.Facts[a.name]
	for _, c := range a.changes {
		if h.trials > maxTrials || len(h.found) >= maxAnswers {
			break
		}
		h.posture.Facts[a.name] = c.fact
		h.done = append(h.done, c.remedy)
		h.try(set & (set - 1))
		h.done = h.done[:len(h.done)-1]
	}
	delete(h.posture.Facts, a.name)
	if had {
		h.posture.Facts[a.name] = old
	}
}

// isKnown: the same words were found with other values.
func (h *search) isKnown(remedies []sallyport.Remedy) bool {
	return slices.ContainsFunc(h.found, func(f []sallyport.Remedy) bool { return slices.Equal(f, remedies) })
}

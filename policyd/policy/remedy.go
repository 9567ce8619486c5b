package policy

import (
	"math/bits"
	"slices"
	"strings"

	"sallyport"
)

const (
	maxAtoms   = 12 // things that a search changes; more are left as they are
	maxChanges = 63 // of one atom
	maxAnswers = 8

	// What searches may cost, in conditions looked at; one takes a few nanoseconds.
	batchCost  = 1 << 22
	searchCost = 1 << 20
	leastCost  = 1 << 12 // … even when the batch has spent its budget: enough for common denials
	buildCost  = 32      // of taking a criterion into the formula
	askCost    = 1 << 10 // of asking a route again
)

// Budget bounds what the searches for remedies of one batch of questions cost
// together, to about twenty milliseconds. It belongs to one goroutine. The zero
// Budget is a whole one.
type Budget struct{ spent int }

// grant takes what one search may cost out of b.
func (b *Budget) grant() int {
	if b == nil {
		return searchCost
	}
	return max(min(searchCost, batchCost-b.spent), leastCost)
}

// Remedies returns the smallest sets of changes to the caller's own device or
// session that would turn the answer a to in into an allow: other facts, the
// administrator's approval, a new login. Each set is minimal: no part of it would
// do. If up to maxAtoms things matter every one is found, up to maxAnswers, as long
// as in.Budget lasts. What a CEL expression says is taken as it is; no set is
// returned that it would not allow.
// What other people's records or the directory would have to say is never part
// of it.
func (s *Set) Remedies(in *Input, a Answer) [][]sallyport.Remedy {
	in.prepare(&s.site)
	switch {
	case a.Verdict == sallyport.VerdictLogin:
		return [][]sallyport.Remedy{{{Condition: "session", Want: "live", Hint: "run: agent login"}}}
	case a.Verdict != sallyport.VerdictDeny || a.route == nil || in.Person == nil:
		return nil
	}
	granted := in.Budget.grant()
	h := newSearch(in, a.route, granted)
	h.run()
	if in.Budget != nil {
		in.Budget.spent += granted - h.left
	}
	var out [][]sallyport.Remedy
	for _, f := range h.found {
		out = append(out, f.words)
	}
	return out
}

// search tries changes on a formula that says when the route allows. Questions are
// not asked again: what each change makes of each criterion is worked out once.
type search struct {
	in    *Input
	route *route
	allow formula
	atoms []atom
	now   [maxAtoms]choices // that the formula is looked at with
	left  int               // of what it may cost
	done  []*change         // of the set that is being tried
	found []answer
}

// answer is a set of changes that would do, and the same in words.
type answer struct {
	changes []*change
	words   []sallyport.Remedy
}

// atom is something that could change, and what to.
type atom struct {
	about   string // a fact's name, or one that no fact can have
	changes []change
}

// choices are ways in which an atom could be: bit 0 is as it is now, bit i+1 is
// changes[i].
type choices uint64

const (
	unchanged choices = 1
	anything  choices = 1<<64 - 1
	changed   choices = anything &^ unchanged
)

// formula says when a condition is as wanted. It has no negation: a change that
// helps one part harms no other, except by what it makes of the same atom.
type formula struct {
	kind formulaKind
	of   []formula // allOf and anyOf
	// of a literal: the criterion must be want, and is for the choices of the atom
	is    criterion
	want  Value
	atom  int
	holds choices
}

type formulaKind uint8

const (
	never formulaKind = iota
	always
	choice
	allOf
	anyOf
)

// newSearch works out the formula of what still matters: criteria that nothing
// changes, and whatever they settle, are gone.
func newSearch(in *Input, r *route, cost int) *search {
	h := &search{in: in, route: r, left: cost}
	parts := make([]formula, 0, len(r.policy.deny)+1)
	for i := range r.policy.deny {
		parts = append(parts, h.formula(&r.policy.deny[i].when, False))
	}
	allow := make([]formula, 0, len(r.policy.allow))
	for i := range r.policy.allow {
		allow = append(allow, h.formula(&r.policy.allow[i].when, True))
	}
	if h.left <= 0 {
		return h // too big a policy for what is left: nothing is proposed
	}
	h.allow = joined(allOf, append(parts, joined(anyOf, allow)))
	h.allow.each(h.gather)
	h.logins()
	h.allow = h.bind(h.allow)
	return h
}

// formula says when c is want, True or False. An unknown is neither.
func (h *search) formula(c *condition, want Value) formula {
	if c.op == leaf {
		return h.literal(c.is, want)
	}
	kind := anyOf
	if (c.op == and || c.op == not) == (want == True) {
		kind = allOf
	}
	if c.op == not || c.op == nor {
		want = want.not()
	}
	of := make([]formula, len(c.of))
	for i := range c.of {
		of[i] = h.formula(&c.of[i], want)
	}
	return joined(kind, of)
}

// joined simplifies an allOf or anyOf, in the memory of its parts.
func joined(kind formulaKind, of []formula) formula {
	neutral, settled := always, never
	if kind == anyOf {
		neutral, settled = never, always
	}
	kept := of[:0]
	for _, f := range of {
		switch f.kind {
		case settled:
			return formula{kind: settled}
		case neutral:
		default:
			kept = append(kept, f)
		}
	}
	switch len(kept) {
	case 0:
		return formula{kind: neutral}
	case 1:
		return kept[0]
	}
	return formula{kind: kind, of: kept}
}

func (h *search) literal(c criterion, want Value) formula {
	if h.left -= buildCost; h.left <= 0 {
		return formula{}
	}
	if h.about(c) != "" {
		return formula{kind: choice, is: c, want: want}
	}
	return constantly(c.eval(h.in) == want)
}

func constantly(b bool) formula {
	if b {
		return formula{kind: always}
	}
	return formula{kind: never}
}

// aboutLogin is the atom of session_age and auth_method: a login changes both.
const aboutLogin = "a new login"

// about names the atom that c looks at; empty: nothing that its person can change.
func (h *search) about(c criterion) string {
	switch c := c.(type) {
	case *fact:
		if h.in.Person.Device != nil {
			return c.name
		}
	case *deviceField:
		if c.name == "approved" && h.in.Person.Device != nil {
			return c.name
		}
	case *sessionAge, *authMethod:
		return aboutLogin
	}
	return ""
}

// gather finds the atom of a literal and adds the changes that it asks for.
func (h *search) gather(f *formula) {
	about := h.about(f.is)
	f.atom = slices.IndexFunc(h.atoms, func(a atom) bool { return a.about == about })
	if f.atom < 0 {
		if len(h.atoms) == maxAtoms {
			return
		}
		f.atom = len(h.atoms)
		h.atoms = append(h.atoms, atom{about: about})
	}
	a := &h.atoms[f.atom]
	for _, c := range h.proposals(f.is, f.want) {
		a.add(c)
	}
}

// add puts a plain new login before one with other methods.
func (a *atom) add(c change) {
	if len(a.changes) == maxChanges || slices.ContainsFunc(a.changes, c.same) {
		return
	}
	if c.isPlainLogin() {
		a.changes = slices.Insert(a.changes, 0, c)
		return
	}
	a.changes = append(a.changes, c)
}

// bind notes for which choices f's literals hold, and simplifies once more.
func (h *search) bind(f formula) formula {
	switch f.kind {
	case allOf, anyOf:
		for i := range f.of {
			f.of[i] = h.bind(f.of[i])
		}
		return joined(f.kind, f.of)
	case choice:
	default:
		return f
	}
	now := f.is.eval(h.in) == f.want
	if f.atom < 0 { // one atom too many
		return constantly(now)
	}
	if now {
		f.holds = unchanged
	}
	changes := h.atoms[f.atom].changes
	for i := range changes {
		if changes[i].makes(f.is, h.in) == f.want {
			f.holds |= 1 << (i + 1)
		}
	}
	switch f.holds {
	case 0:
		return formula{kind: never}
	case 1<<(len(changes)+1) - 1:
		return formula{kind: always}
	}
	return f
}

// may reports whether f holds for some of the choices now: for certain if each atom
// has only one left.
func (h *search) may(f *formula) bool {
	h.left--
	switch f.kind {
	case choice:
		return f.holds&h.now[f.atom] != 0
	case allOf:
		for i := range f.of {
			if !h.may(&f.of[i]) {
				return false
			}
		}
		return true
	case anyOf:
		for i := range f.of {
			if h.may(&f.of[i]) {
				return true
			}
		}
		return false
	}
	return f.kind == always
}

// step is a part of a set that is tried: an atom is to be changed, in one of these
// ways. A new login is two steps, of which a set takes one: a plain one asks for
// less than one by other methods.
type step struct {
	atom int
	ways choices
}

// steps returns the steps that may help. Those that come first are needed: without
// them nothing helps.
func (h *search) steps() (all []step, needed int) {
	var rest []step
	for i := range h.atoms {
		h.now[i] = anything
	}
	if !h.may(&h.allow) {
		return nil, 0
	}
	for i := range h.atoms {
		if !h.allow.mentions(i) {
			continue
		}
		ofAtom := h.atoms[i].steps(i)
		isNeeded := slices.IndexFunc(ofAtom, func(s step) bool {
			h.now[i] = anything &^ s.ways
			return !h.may(&h.allow)
		})
		if isNeeded >= 0 { // and nothing instead of it
			all = append(all, ofAtom[isNeeded])
		} else {
			rest = append(rest, ofAtom...)
		}
		h.now[i] = anything
	}
	return append(all, rest...), len(all)
}

func (a *atom) steps(i int) []step {
	if plain := choices(1 << 1); len(a.changes) > 1 && a.changes[0].isPlainLogin() {
		return []step{{i, plain}, {i, changed &^ plain}}
	}
	return []step{{i, changed}}
}

// run tries all sets of steps, small ones first, and skips those that contain one
// that was found.
func (h *search) run() {
	steps, needed := h.steps()
	var minimal []uint
	for size := range len(steps) - needed + 1 {
		for picks := uint(1)<<size - 1; picks < 1<<(len(steps)-needed) && !h.over(); picks = nextPicks(picks) {
			set := picks<<needed | (1<<needed - 1)
			if set != 0 && !covered(steps, minimal, set) && h.helps(steps, set) {
				minimal = append(minimal, set)
			}
			if picks == 0 {
				break
			}
		}
	}
}

// covered reports whether set contains one of minimal, or would if its login were
// a plain one, or has two logins.
func covered(steps []step, minimal []uint, set uint) bool {
	has := set
	for i := range steps[:max(len(steps)-1, 0)] {
		if steps[i].atom == steps[i+1].atom {
			if set>>i&3 == 3 {
				return true
			}
			has |= set >> 1 & (1 << i)
		}
	}
	return slices.ContainsFunc(minimal, func(m uint) bool { return m&has == m })
}

// helps reports whether some changes in the steps of set, and no others, were found
// to do.
func (h *search) helps(steps []step, set uint) bool {
	before := len(h.found)
	for i := range h.atoms {
		h.now[i] = unchanged
	}
	taken := make([]step, 0, maxAtoms+1)
	for ; set != 0; set &= set - 1 {
		s := steps[bits.TrailingZeros(set)]
		taken = append(taken, s)
		h.now[s.atom] = s.ways
	}
	if h.may(&h.allow) {
		slices.SortFunc(taken, func(a, b step) int { return a.atom - b.atom }) // as in the policy
		h.try(taken)
	}
	return len(h.found) > before
}

// try takes the steps in all their ways, one after the other.
func (h *search) try(steps []step) {
	if len(steps) == 0 {
		h.keep()
		return
	}
	s := steps[0]
	changes := h.atoms[s.atom].changes
	for j := range changes {
		way := choices(1) << (j + 1)
		if h.over() || way&s.ways == 0 {
			continue
		}
		h.now[s.atom] = way
		if h.may(&h.allow) {
			h.done = append(h.done, &changes[j])
			h.try(steps[1:])
			h.done = h.done[:len(h.done)-1]
		}
	}
	h.now[s.atom] = s.ways
}

func (h *search) over() bool { return h.left <= 0 || len(h.found) >= maxAnswers }

// nextPicks returns the next number with as many bits (Hacker's Delight, 2-1).
func nextPicks(x uint) uint {
	lowest := x & -x
	ripple := x + lowest
	return ripple | (x^ripple)>>2/lowest
}

func (f *formula) mentions(atom int) bool {
	if f.kind == choice {
		return f.atom == atom
	}
	return slices.ContainsFunc(f.of, func(f formula) bool { return f.mentions(atom) })
}

// each calls do for every literal of f.
func (f *formula) each(do func(*formula)) {
	if f.kind == choice {
		do(f)
	}
	for i := range f.of {
		f.of[i].each(do)
	}
}

// keep adds the set that was tried to those found, unless one with the same words,
// or less of a login, is there already.
func (h *search) keep() {
	words := make([]sallyport.Remedy, len(h.done))
	for i, c := range h.done {
		words[i] = c.remedy(h.in)
	}
	covered := slices.ContainsFunc(h.found, func(f answer) bool {
		return slices.EqualFunc(f.changes, h.done, func(a, b *change) bool { return a.covers(b, h.in) })
	})
	if !covered && h.holdsReally() {
		h.found = append(h.found, answer{slices.Clone(h.done), words})
	}
}

// covers reports whether c is the same in words as o, or a login that asks for less.
func (c *change) covers(o *change, in *Input) bool {
	if !c.login || !o.login {
		return c.remedy(in) == o.remedy(in)
	}
	return len(minus(c.with, o.with))+len(minus(c.without, o.without)) == 0
}

// holdsReally asks the route again, with the changes made, if it has criteria that
// look at more than the formula knows.
func (h *search) holdsReally() bool {
	wide := false
	h.route.each(func(c criterion) { wide = wide || c.path() == "cel" })
	if !wide {
		return true
	}
	h.left -= askCost
	v, _ := h.route.decide(h.changedInput(h.done))
	return v == sallyport.VerdictAllow
}

// changedInput is a copy of the question in which the changes were made.
func (h *search) changedInput(changes []*change) *Input {
	in, person := *h.in, *h.in.Person
	in.Person = &person
	for _, c := range changes {
		c.make(&in, &person)
	}
	in.prepare(in.site)
	return &in
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

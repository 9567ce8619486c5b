package policy

import (
	"reflect"
	"slices"
)

// normalForm is a condition in negation normal form: its negations stand before
// single tests only. An and of nothing is true, an or of nothing is false.
type normalForm struct {
	op operator // and, or; leaf: a proposition
	of []normalForm
	is proposition
	at place
}

// proposition is one test of a criterion, or its opposite.
type proposition struct {
	is      criterion
	about   subject
	test    test // nothing if the subject is not known
	negated bool
}

// subject is what a test looks at. Tests with the same subject are comparable; a
// criterion without one is comparable to itself alone.
type subject struct {
	key    string // empty: not known
	match  *matcher
	bounds bounds
	// person: without a live session it is unknown.
	person bool
}

// texter is a criterion about one text of the request.
type texter interface {
	// text returns what the text is called ("http_path"), or nothing if its tests
	// cannot be compared, and its matcher.
	text() (name string, m *matcher)
}

// subjectOf returns what a criterion looks at, and its tests, all of which must
// hold.
func subjectOf(c criterion) (subject, []test) {
	switch c := c.(type) {
	case *identity:
		return subject{key: c.name, match: &c.match, person: true}, c.match.tests
	case *groups:
		return subject{key: "groups", match: &matcher{}, person: true}, c.tests
	case *authMethod:
		return subject{key: c.path(), match: &matcher{}, person: true}, c.tests
	case *claim:
		return subject{key: c.path(), match: &matcher{}, person: true}, c.tests
	case *deviceField:
		return subject{key: "device." + c.name, match: &c.match, person: true}, c.match.tests
	case *fact:
		return subject{key: "device." + c.name, match: &c.match, bounds: c.bounds, person: true}, c.match.tests
	case texter:
		if name, m := c.text(); name != "" {
			return subject{key: name, match: m}, m.tests
		}
	}
	return subject{}, nil
}

// normal returns c, or its opposite, as a formula that always has the same value.
func normal(c *condition, negate bool) normalForm {
	if c.op == leaf {
		f := criterionFormula(c.is, negate)
		f.at = c.at
		return f
	}
	all := c.op == and || c.op == nor // nor is an and that is negated, not an or
	if c.op == not || c.op == nor {
		negate = !negate
	}
	f := normalForm{op: or, at: c.at}
	if all != negate { // the opposite of all is some opposite
		f.op = and
	}
	for i := range c.of {
		f.of = append(f.of, normal(&c.of[i], negate))
	}
	return f
}

func criterionFormula(c criterion, negate bool) normalForm {
	if k, ok := c.(constant); ok {
		if (Value(k) == True) != negate {
			return normalForm{op: and}
		}
		return normalForm{op: or}
	}
	about, tests := subjectOf(c)
	if len(tests) == 0 {
		return normalForm{is: proposition{is: c, negated: negate}}
	}
	f := normalForm{op: and}
	if negate {
		f.op = or
	}
	for _, t := range tests {
		a := proposition{is: c, about: about, test: t}
		if negate {
			a = a.opposite()
		}
		f.of = append(f.of, normalForm{is: a.simple()})
	}
	if len(f.of) == 1 {
		return f.of[0]
	}
	return f
}

var opposites = map[compare]compare{
	isAny: isNone, isNone: isAny, has: exclude, exclude: has,
	less: greaterOrEqual, greaterOrEqual: less, lessOrEqual: greater, greater: lessOrEqual,
}

// opposite has at every input the opposite value.
func (a proposition) opposite() proposition {
	if op, ok := opposites[a.test.op]; ok {
		a.test.op = op
		return a.simple()
	}
	a.negated = !a.negated
	return a
}

// simple writes "not true" as "is false".
func (a proposition) simple() proposition {
	if t := a.test; t.op == isNone && len(t.of) == 1 && t.of[0].kind == 'b' {
		a.test = test{op: isAny, of: []scalar{{kind: 'b', b: !t.of[0].b}}}
	}
	return a
}

// holds evaluates the proposition's test for one value.
func (a *proposition) holds(s scalar) Value {
	m := *a.about.match
	m.tests = []test{a.test}
	var v any = s.s
	switch s.kind {
	case 'n':
		v = s.n
	case 'b':
		v = s.b
	}
	out := m.value(v)
	if a.negated {
		out = out.not()
	}
	return out
}

// mixed reports whether the operands are of several types.
func (t *test) mixed() bool {
	return slices.ContainsFunc(t.of, func(s scalar) bool { return s.kind != t.of[0].kind })
}

// sound says what an implication has to preserve.
type sound uint8

const (
	// whereTrue: where the first is true the second is.
	whereTrue sound = iota
	// everywhere: the second is nowhere less than the first.
	everywhere
	// ofValues: as whereTrue, for facts that count for both.
	ofValues
)

// prover compares formulas within a number of steps; when they are used up it
// proves nothing more.
type prover struct{ steps int }

// implies reports whether it can show that a implies b. It never says so
// wrongly; it may fail to see it.
func (p *prover) implies(a, b *normalForm, s sound) bool {
	if p.steps--; p.steps < 0 {
		return false
	}
	each := func(x normalForm) bool { return p.implies(&x, b, s) }
	toEach := func(x normalForm) bool { return p.implies(a, &x, s) }
	switch {
	case a.op == or:
		return !slices.ContainsFunc(a.of, func(x normalForm) bool { return !each(x) })
	case b.op == and:
		return !slices.ContainsFunc(b.of, func(x normalForm) bool { return !toEach(x) })
	case a.op == and && slices.ContainsFunc(a.of, each):
		return true
	case b.op == or:
		return slices.ContainsFunc(b.of, toEach)
	}
	return a.op == leaf && b.op == leaf && a.is.implies(&b.is, s)
}

func (a *proposition) implies(b *proposition, s sound) bool {
	if _, ok := b.is.(authenticated); ok && !b.negated && a.about.person {
		return true
	}
	if a.about.key == "" || b.about.key == "" {
		return a.negated == b.negated && sameCriterion(a.is, b.is)
	}
	if a.about.key != b.about.key || !a.about.bounds.within(b.about.bounds, s) {
		return false
	}
	switch {
	case a.test.op >= has:
		return a.impliesList(b)
	case s == everywhere && b.test.mixed():
		return false // b may be false for what a, without operands of its type, is unknown for
	}
	return a.impliesValue(b, s)
}

// sameCriterion reports whether two criteria are the same word for word.
func sameCriterion(a, b criterion) bool {
	if x, ok := a.(*expression); ok {
		y, ok := b.(*expression)
		return ok && x.text == y.text
	}
	return a.path() == b.path() && a.wanted(true) == b.wanted(true) && reflect.DeepEqual(a, b)
}

// within reports whether what counts for b counts for c.
func (b bounds) within(c bounds, s sound) bool {
	switch s {
	case ofValues:
		return true
	case everywhere:
		return b.maxAge == c.maxAge && slices.Equal(b.sources, c.sources)
	}
	younger := c.maxAge == 0 || b.maxAge != 0 && b.maxAge <= c.maxAge
	fewer := (b.sources == nil) == (c.sources == nil) &&
		!slices.ContainsFunc(b.sources, func(s string) bool { return !slices.Contains(c.sources, s) })
	return younger && fewer
}

// impliesList compares tests of lists of which one element is asked for.
func (a *proposition) impliesList(b *proposition) bool {
	same := a.test.of[0] == b.test.of[0]
	switch {
	case a.negated: // not the only one
		return same && b.negated
	case b.negated:
		return !same && (a.test.op == has || a.test.op == hasOnly) || same && a.test.op == exclude
	case a.test.op == hasOnly:
		return same && b.test.op != exclude || !same && b.test.op == exclude
	}
	return same && a.test.op == b.test.op
}

// impliesValue compares tests of single values.
func (a *proposition) impliesValue(b *proposition, s sound) bool {
	switch {
	case a.test.op == isAny:
		return !slices.ContainsFunc(a.test.of, func(x scalar) bool { return b.holds(x) != True })
	case b.test.op == isNone:
		return a.excludes(b, s)
	case a.test.op == isNone || b.test.op == isAny:
		return false
	case a.isOrder() && b.isOrder():
		return a.impliesOrder(b)
	case a.isOrder() || b.isOrder():
		return false
	case a.negated && b.negated:
		x, y := *b, *a
		x.negated, y.negated = false, false
		return x.impliesPart(&y)
	case b.negated:
		return a.test.op == b.test.op && a.test.op != contains && !a.impliesPart(&proposition{about: a.about, test: b.test}) && !b.impliesPart(&proposition{about: a.about, test: a.test})
	}
	return !a.negated && a.impliesPart(b)
}

// excludes reports whether what makes a true is none of b's values.
func (a *proposition) excludes(b *proposition, s sound) bool {
	if a.test.op == isNone {
		kindsOf := func(t *test) (out [256]bool) {
			for _, x := range t.of {
				out[x.kind] = true
			}
			return out
		}
		if kindsOf(&a.test) != kindsOf(&b.test) {
			return false
		}
	} else if k := a.test.of[0].kind; !slices.ContainsFunc(b.test.of, func(x scalar) bool { return x.kind == k }) {
		return false
	}
	return !slices.ContainsFunc(b.test.of, func(x scalar) bool {
		v := a.holds(x)
		return v == True || v == Unknown && s == everywhere
	})
}

func (a *proposition) isOrder() bool { return a.test.op >= less && a.test.op <= greaterOrEqual }

// impliesOrder: above 3 implies above 2.
func (a *proposition) impliesOrder(b *proposition) bool {
	x, y := a.test.of[0], b.test.of[0]
	if x.kind != y.kind {
		return false
	}
	c, ok := 0, true
	if x.kind == 'n' {
		c = int(truth(x.n > y.n)) - int(truth(x.n < y.n))
	} else {
		c, ok = a.about.match.order(x.s, y.s)
	}
	upper := a.test.op == less || a.test.op == lessOrEqual
	if upper != (b.test.op == less || b.test.op == lessOrEqual) {
		return false
	}
	if upper {
		c = -c
	}
	strict := func(op compare) bool { return op == less || op == greater }
	if strict(b.test.op) && !strict(a.test.op) {
		return ok && c > 0
	}
	return ok && c >= 0
}

// impliesPart compares contains, starts_with and ends_with.
func (a *proposition) impliesPart(b *proposition) bool {
	if a.test.op != b.test.op && b.test.op != contains {
		return false
	}
	return b.holds(a.test.of[0]) == True
}

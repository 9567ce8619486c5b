package policy

import (
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// compare is an operator of a matcher.
type compare uint8

const (
	isAny  compare = iota + 1 // is, in: one of them
	isNone                    // not, not_in: none of them
	contains
	startsWith
	endsWith
	within // prefix: the path itself, or what lies under it
	less
	lessOrEqual
	greater
	greaterOrEqual
	has     // lists from here on
	hasOnly // is, of a list: exactly this one element
	exclude
)

var (
	textOperators = map[string]compare{
		"is": isAny, "not": isNone, "in": isAny, "not_in": isNone,
		"contains": contains, "starts_with": startsWith, "ends_with": endsWith,
	}
	orderOperators = map[string]compare{"<": less, "<=": lessOrEqual, ">": greater, ">=": greaterOrEqual}
	listOperators  = map[string]compare{"has": has, "is": hasOnly, "exclude": exclude}
)

// test is one operator with its operands; all tests of a matcher must hold.
type test struct {
	op compare
	of []scalar // never empty
}

// matcher tests a single value.
type matcher struct {
	tests []test
	// fold compares ASCII letters without case. Only ASCII: Unicode folding would
	// make the Kelvin sign equal to k.
	fold bool
	// order compares two texts for <, <=, >, >=; ok is false for what it cannot read.
	order func(a, b string) (int, bool)
}

// text tests a text.
func (m *matcher) text(s string) Value {
	v := True
	for i := range m.tests {
		v = min(v, m.textTest(&m.tests[i], s))
	}
	return v
}

func (m *matcher) textTest(t *test, s string) Value {
	switch t.op {
	case contains:
		return truth(m.contains(s, t.of[0].s))
	case startsWith:
		return truth(len(s) >= len(t.of[0].s) && m.same(s[:len(t.of[0].s)], t.of[0].s))
	case endsWith:
		return truth(len(s) >= len(t.of[0].s) && m.same(s[len(s)-len(t.of[0].s):], t.of[0].s))
	case within:
		return truth(underPath(s, t.of[0].s))
	case less, lessOrEqual, greater, greaterOrEqual:
		if t.of[0].kind != 's' || m.order == nil {
			return Unknown
		}
		c, ok := m.order(s, t.of[0].s)
		if !ok {
			return Unknown
		}
		return ordered(t.op, c)
	}
	found, comparable := false, false
	for i := range t.of {
		if t.of[i].kind == 's' {
			comparable = true
			found = found || m.same(s, t.of[i].s)
		}
	}
	return oneOf(t.op, found, comparable)
}

// value tests a fact's value: text, a number or a truth value. A value of
// another type than the operand is unknown.
func (m *matcher) value(v any) Value {
	if s, ok := v.(string); ok {
		return m.text(s)
	}
	out := True
	for i := range m.tests {
		out = min(out, m.tests[i].value(v))
	}
	return out
}

func (t *test) value(v any) Value {
	switch t.op {
	case isAny, isNone:
		found, comparable := false, false
		for i := range t.of {
			comparable = comparable || t.of[i].kind == kindOf(v)
			found = found || t.of[i].equal(v)
		}
		return oneOf(t.op, found, comparable)
	case less, lessOrEqual, greater, greaterOrEqual:
		n, ok := v.(float64)
		if !ok || t.of[0].kind != 'n' {
			return Unknown
		}
		switch {
		case n < t.of[0].n:
			return ordered(t.op, -1)
		case n > t.of[0].n:
			return ordered(t.op, 1)
		case n == t.of[0].n:
			return ordered(t.op, 0)
		}
	}
	return Unknown // NaN, or a text operator on no text
}

func oneOf(op compare, found, comparable bool) Value {
	if !comparable {
		return Unknown
	}
	return truth(found == (op == isAny))
}

func ordered(op compare, c int) Value {
	switch op {
	case less:
		return truth(c < 0)
	case lessOrEqual:
		return truth(c <= 0)
	case greater:
		return truth(c > 0)
	default:
		return truth(c >= 0)
	}
}

func kindOf(v any) byte {
	switch v.(type) {
	case string:
		return 's'
	case float64, int:
		return 'n'
	case bool:
		return 'b'
	}
	return 0
}

func (m *matcher) same(a, b string) bool {
	if !m.fold {
		return a == b
	}
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return true
}

func (m *matcher) contains(s, part string) bool {
	if !m.fold {
		return strings.Contains(s, part)
	}
	for i := 0; i+len(part) <= len(s); i++ {
		if m.same(s[i:i+len(part)], part) {
			return true
		}
	}
	return false
}

// underPath: whole segments only, so that /api is no prefix of /apis. A prefix that
// ends in a slash has no path of its own.
func underPath(path, prefix string) bool {
	rest, ok := strings.CutPrefix(path, prefix)
	return ok && (rest == "" || rest[0] == '/' || strings.HasSuffix(prefix, "/"))
}

func lower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

// words says the matcher as people do: `is true`, `is one of a, b`, `at least 15.4`.
func (m *matcher) words() string {
	out := make([]string, len(m.tests))
	for i, t := range m.tests {
		out[i] = t.words()
	}
	return strings.Join(out, " and ")
}

func (t *test) words() string {
	of := make([]string, len(t.of))
	for i, s := range t.of {
		of[i] = s.String()
	}
	list := strings.Join(of, ", ")
	switch t.op {
	case isAny:
		if len(of) > 1 {
			return "is one of " + list
		}
		return "is " + list
	case isNone:
		if len(of) > 1 {
			return "is none of " + list
		}
		return "is not " + list
	case contains:
		return "contains " + list
	case startsWith:
		return "starts with " + list
	case endsWith:
		return "ends with " + list
	case within:
		return "is or lies under " + list
	case less:
		return "below " + list
	case lessOrEqual:
		return "at most " + list
	case greater:
		return "above " + list
	case greaterOrEqual:
		return "at least " + list
	case has:
		return "has " + list
	case hasOnly:
		return "has only " + list
	default:
		return "excludes " + list
	}
}

// list tests the elements of a list one by one against the operand.
func (t *test) list(count int, found bool) Value {
	switch t.op {
	case has:
		return truth(found)
	case hasOnly:
		return truth(found && count == 1)
	default:
		return truth(!found)
	}
}

// literal reads one operand of a matcher.
type literal func(n *yaml.Node, what string) (scalar, bool)

// textOf makes a literal of a reader of texts.
func textOf(read func(*yaml.Node, string) (string, bool)) literal {
	return func(n *yaml.Node, what string) (scalar, bool) {
		s, ok := read(n, what)
		return scalar{kind: 's', s: s}, ok
	}
}

// textTests reads a string matcher: a bare value is `is`, a bare list `in`, an
// object has operators among ops.
func (p *parser) textTests(n *yaml.Node, what string, ops map[string]compare, read literal) ([]test, bool) {
	switch n.Kind {
	case yaml.SequenceNode:
		t, ok := p.operand("in", isAny, n, what, read)
		return []test{t}, ok
	case yaml.MappingNode:
		return p.operators(n, what, ops, read)
	}
	t, ok := p.operand("is", isAny, n, what, read)
	return []test{t}, ok
}

// listTests reads a list matcher: a bare value is `has`.
func (p *parser) listTests(n *yaml.Node, what string, read literal) ([]test, bool) {
	switch n.Kind {
	case yaml.SequenceNode:
		p.fail(n, "%s takes one value, not a list; write %s", what, eitherOf(what, n.Content))
		return nil, false
	case yaml.MappingNode:
		return p.operators(n, what, listOperators, read)
	}
	t, ok := p.operand("has", has, n, what, read)
	return []test{t}, ok
}

func (p *parser) operators(n *yaml.Node, what string, ops map[string]compare, read literal) ([]test, bool) {
	entries, ok := p.mapping(n, "the matcher of "+what, slices.Sorted(maps.Keys(ops)))
	if !ok {
		return nil, false
	}
	var out []test
	for _, e := range entries {
		t, good := p.operand(e.key, ops[e.key], e.value, what, read)
		ok = ok && good
		out = append(out, t)
	}
	return out, ok
}

// operand reads what stands behind one operator; in and not_in take a list, the
// others one value.
func (p *parser) operand(key string, op compare, n *yaml.Node, what string, read literal) (test, bool) {
	t := test{op: op}
	if key != "in" && key != "not_in" {
		s, ok := read(n, what)
		if ok && s.kind != 's' && (op == contains || op == startsWith || op == endsWith) {
			p.fail(n, "%s needs text; put quotes around it: %q", key, n.Value)
			ok = false
		}
		t.of = []scalar{s}
		return t, ok
	}
	if n.Kind != yaml.SequenceNode || n.Anchor != "" || n.Style&yaml.TaggedStyle != 0 || len(n.Content) == 0 {
		p.fail(n, "%s needs a list of at least one value", key)
		return t, false
	}
	ok := true
	for _, c := range n.Content {
		s, good := read(c, what)
		ok = ok && good
		t.of = append(t.of, s)
	}
	return t, ok
}

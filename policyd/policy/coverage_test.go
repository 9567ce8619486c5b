package policy

import (
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
	"go.yaml.in/yaml/v3"
)

// outcomes of a part of the grammar in the golden files.
const (
	passes  = "passes"
	fails   = "fails"
	unknown = "unknown"
	refused = "refused at load"
)

var allOutcomes = []string{passes, fails, unknown, refused}

// impossible lists outcomes that a part of the grammar cannot have, and why.
var impossible = map[string]map[string]string{
	"accept":             {fails: "always holds", unknown: "always holds"},
	"reject":             {passes: "never holds", unknown: "never holds"},
	"authenticated_user": {fails: "without a session it is unknown"},
	"date":               {unknown: "the clock is always there"},
	"day_of_week":        {unknown: "the clock is always there"},
	"time_of_day":        {unknown: "the clock is always there"},
}

// TestGoldenCoversTheGrammar evaluates what the golden files ask and wants every
// criterion, every operator of a matcher and every construct of the grammar to
// have passed, failed, been unknown and been refused at load in some of them.
func TestGoldenCoversTheGrammar(t *testing.T) {
	seen := coverage{}
	files, err := filepath.Glob("testdata/*/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		seen.file(t, file)
	}
	for _, part := range parts() {
		if slices.Contains(stubs(), part) {
			t.Logf("%s is not built yet", part)
			continue
		}
		for _, o := range allOutcomes {
			_, cannot := impossible[part][o]
			switch {
			case seen[part][o] && cannot:
				t.Errorf("%s %s in a golden file; take it out of impossible", part, o)
			case !seen[part][o] && !cannot:
				t.Errorf("no golden file in which %s: %s", part, o)
			}
		}
	}
}

// parts are the parts of the grammar, as coverage names them.
func parts() []string {
	out := slices.Collect(maps.Keys(criteria))
	out = append(out, operatorKeys...)
	out = append(out, "allow", "deny", "name", "mode: observe", "nesting", "one object", "a list of rules", "device.max_age", "device.source", "device.OTHER")
	for name := range knownFacts {
		out = append(out, "device."+name)
	}
	for name := range recordFields {
		out = append(out, "device."+name)
	}
	for kind, ops := range map[string]map[string]compare{"text": textOperators, "list": listOperators, "order": orderOperators} {
		for op := range ops {
			out = append(out, kind+" matcher's "+op)
		}
	}
	slices.Sort(out)
	return out
}

// stubs are the criteria that this version does not read.
func stubs() []string {
	var out []string
	for name, row := range criteria {
		key := name
		if row.sub {
			key += "/x"
		}
		_, err := Parse([]byte("allow: {or: [{" + key + ": x}]}"))
		if err != nil && strings.Contains(err.Error(), "not supported by this version") {
			out = append(out, name)
		}
	}
	return out
}

// coverage is which outcomes each part has had.
type coverage map[string]map[string]bool

func (c coverage) add(part, outcome string) {
	if c[part] == nil {
		c[part] = make(map[string]bool)
	}
	c[part][outcome] = true
}

func (c coverage) value(part string, v Value) {
	c.add(part, map[Value]string{True: passes, False: fails, Unknown: unknown}[v])
}

func (c coverage) file(t *testing.T, file string) {
	a, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text := section(a, "policy")
	doc, fault := document([]byte(text))
	if fault != nil {
		return // no YAML; there is nothing to say what it would be
	}
	form := "one object"
	if doc.Content[0].Kind == yaml.SequenceNode {
		form = "a list of rules"
	}
	keys := keysAt(doc.Content[0], nil, map[place][][]string{})
	p, err := Parse([]byte(text))
	var errs Errors
	if errors.As(err, &errs) {
		c.add(form, refused)
		for _, e := range errs {
			for _, path := range keys[place{int32(e.Line), int32(e.Column)}] {
				c.refused(path)
			}
		}
		return
	}
	site := Options{}.withDefaults()
	for line := range strings.Lines(section(a, "ask")) {
		_, words, _ := strings.Cut(strings.TrimSpace(line), ":")
		in := asker(t, words)
		in.prepare(&site)
		for _, r := range slices.Concat(p.allow, p.deny, p.observed) {
			v := r.when.full(in)
			c.value(form, v)
			c.rule(&r, v, slices.ContainsFunc(p.observed, func(o rule) bool { return o.at == r.at }))
			c.condition(&r.when, keys, in, 0)
		}
	}
}

func (c coverage) rule(r *rule, v Value, observed bool) {
	c.value(map[bool]string{true: "deny", false: "allow"}[r.denies], v)
	if r.name != "" {
		c.value("name", v)
	}
	if observed {
		c.value("mode: observe", v)
	}
}

func (c coverage) condition(of *condition, keys map[place][][]string, in *Input, depth int) {
	v := of.full(in)
	for _, path := range keys[of.at] {
		name, _, _ := strings.Cut(path[len(path)-1], "/")
		c.value(name, v)
		if operators[name] != leaf && depth > 0 {
			c.value("nesting", v)
		}
	}
	if of.op == leaf {
		c.leaf(of.is, v)
	}
	for i := range of.of {
		c.condition(&of.of[i], keys, in, depth+1)
	}
}

// leaf counts the facts of device, and the operator of a matcher that has one.
func (c coverage) leaf(is criterion, v Value) {
	var tests []test
	kind := "text"
	switch is := is.(type) {
	case *identity:
		tests = is.match.tests
	case *groups:
		tests, kind = is.tests, "list"
	case *claim:
		tests, kind = is.tests, "list"
	case *deviceField:
		tests = is.match.tests
		c.value("device."+is.name, v)
	case *fact:
		tests = is.match.tests
		c.fact(is, v)
	}
	if len(tests) != 1 {
		return
	}
	op := tests[0].op
	for _, table := range []map[string]compare{textOperators, orderOperators, listOperators} {
		for key, o := range table {
			if o != op || (key == "in" || key == "not_in") != (len(tests[0].of) > 1) && (o == isAny || o == isNone) {
				continue
			}
			if o >= less && o <= greaterOrEqual {
				kind = "order"
			}
			c.value(kind+" matcher's "+key, v)
		}
	}
}

func (c coverage) fact(f *fact, v Value) {
	if _, known := knownFacts[f.name]; known {
		c.value("device."+f.name, v)
	} else {
		c.value("device.OTHER", v)
	}
	if f.maxAge != 0 {
		c.value("device.max_age", v)
	}
	if f.sources != nil {
		c.value("device.source", v)
	}
}

// refused counts a fault that stands at the end of a path of keys.
func (c coverage) refused(path []string) {
	last := path[len(path)-1]
	switch {
	case slices.Contains(operatorKeys, last):
		c.add(last, refused)
		if len(path) > 3 {
			c.add("nesting", refused)
		}
	case last == "mode":
		c.add("mode: observe", refused)
	case len(path) == 1:
		c.add(last, refused)
	}
	for i, key := range path {
		name, _, _ := strings.Cut(key, "/")
		if _, is := criteria[name]; !is || i < 2 {
			continue
		}
		c.add(name, refused)
		rest := path[i+1:]
		if name == "device" && len(rest) > 0 {
			c.deviceRefused(rest)
		}
		if len(rest) > 0 {
			c.operatorRefused(name, rest)
		}
	}
}

func (c coverage) deviceRefused(rest []string) {
	name := rest[0]
	if _, known := knownFacts[name]; !known && recordFields[name].kind == 0 && !isBound(name) {
		name = "OTHER"
	}
	c.add("device."+name, refused)
	if last := rest[len(rest)-1]; isBound(last) {
		c.add("device."+last, refused)
	}
}

func (c coverage) operatorRefused(criterion string, rest []string) {
	last := rest[len(rest)-1]
	switch _, orders := orderOperators[last]; {
	case orders:
		c.add("order matcher's "+last, refused)
	case criterion == "groups" || criterion == "claim":
		c.add("list matcher's "+last, refused)
	default:
		c.add("text matcher's "+last, refused)
	}
}

// keysAt returns, for each place in a policy's text, the keys that lead there.
func keysAt(n *yaml.Node, path []string, to map[place][][]string) map[place][][]string {
	if len(path) > 0 {
		to[placeOf(n)] = append(to[placeOf(n)], path)
	}
	if n.Kind != yaml.MappingNode {
		for _, child := range n.Content {
			keysAt(child, path, to)
		}
		return to
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		below := append(slices.Clone(path), n.Content[i].Value)
		to[placeOf(n.Content[i])] = append(to[placeOf(n.Content[i])], below)
		keysAt(n.Content[i+1], below, to)
	}
	return to
}

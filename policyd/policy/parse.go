package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

const (
	maxText  = 1 << 20 // bytes of one policy
	maxDepth = 8       // blocks within blocks
	// maxFaults are told at once; a megabyte of nonsense would make ten of errors.
	maxFaults = 100
	// maxShown is how many values an error shows rewritten.
	maxShown = 16
)

// Error is one fault in a policy's text.
type Error struct {
	// Line and Column count from 1; those of the file for ParseNode.
	Line, Column int
	Message      string
}

func (e *Error) Error() string {
	return fmt.Sprintf("%d:%d: %s", e.Line, e.Column, e.Message)
}

// Errors are all faults of a policy's text, in the order of the text.
type Errors []*Error

func (es Errors) Error() string {
	lines := make([]string, len(es))
	for i, e := range es {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// Policy is a checked policy. It is immutable; routes with the same text share one.
type Policy struct {
	allow, deny []rule // in the order of the text
	observed    []rule // those with "mode: observe", of both actions
}

type rule struct {
	name   string // as written; may be empty
	number int    // of its {name, allow, deny} object in the text, from 1
	denies bool   // it stands under deny
	when   condition
	at     place
}

// Parse reads a policy. The error is Errors.
func Parse(text []byte) (*Policy, error) { return parse(text, new(expressions)) }

// parse is Parse; policies that are parsed with the same cels share expressions.
func parse(text []byte, cels *expressions) (*Policy, error) {
	n, err := document(text)
	if err != nil {
		return nil, Errors{err}
	}
	return parseNode(n, cels)
}

// ParseNode reads a policy that stands in a bigger YAML file; lines and columns
// are those of the file. The error is Errors.
func ParseNode(n *yaml.Node) (*Policy, error) { return parseNode(n, new(expressions)) }

func parseNode(n *yaml.Node, cels *expressions) (*Policy, error) {
	p := parser{cels: cels}
	if n.Kind == yaml.DocumentNode && len(n.Content) == 1 {
		n = n.Content[0]
	}
	pol := p.policy(n)
	if len(p.errs) > 0 {
		slices.SortStableFunc(p.errs, func(a, b *Error) int {
			if a.Line != b.Line {
				return a.Line - b.Line
			}
			return a.Column - b.Column
		})
		return nil, p.errs
	}
	return pol, nil
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// document reads the one YAML document of text into nodes.
func document(text []byte) (*yaml.Node, *Error) {
	if len(text) > maxText {
		return nil, &Error{1, 1, fmt.Sprintf("policy of %d bytes; at most %d", len(text), maxText)}
	}
	if i := badByte(text); i >= 0 {
		line, column := position(text, i)
		return nil, &Error{line, column, "a byte-order mark, a control character or a byte that is not UTF-8"}
	}
	d := yaml.NewDecoder(bytes.NewReader(text))
	var n, second yaml.Node
	switch err := d.Decode(&n); {
	case errors.Is(err, io.EOF):
		return nil, &Error{1, 1, "the policy is empty; write at least one rule"}
	case err != nil:
		return nil, syntaxError(err)
	}
	switch err := d.Decode(&second); {
	case err == nil:
		return nil, &Error{second.Line, second.Column, "a second document; write one list of rules"}
	case !errors.Is(err, io.EOF):
		return nil, syntaxError(err)
	}
	return &n, nil
}

func syntaxError(err error) *Error {
	m := yamlLine.FindStringSubmatch(err.Error())
	line := 1
	if m != nil && m[1] != "" {
		line, _ = strconv.Atoi(m[1]) // digits by the expression; absurd numbers stay 0
	}
	return &Error{max(line, 1), 1, "no YAML: " + yamlLine.ReplaceAllString(err.Error(), "")}
}

// badByte returns the index of the first byte that no policy needs: a BOM
// (U+FEFF anywhere), controls other than tab and newline, invalid UTF-8; or -1.
func badByte(text []byte) int {
	for i := 0; i < len(text); {
		r, size := utf8.DecodeRune(text[i:])
		switch {
		case r == utf8.RuneError && size == 1, r == '\uFEFF', r == 0x7F,
			r < 0x20 && r != '\t' && r != '\n' && r != '\r', r >= 0x80 && r < 0xA0:
			return i
		}
		i += size
	}
	return -1
}

func position(text []byte, i int) (line, column int) {
	before := text[:i]
	return 1 + bytes.Count(before, []byte{'\n'}), i - bytes.LastIndexByte(before, '\n')
}

// parser collects faults; its methods return ok=false when what they read is of
// no use, after having noted why.
type parser struct {
	errs Errors
	cels *expressions
}

func (p *parser) fail(n *yaml.Node, format string, args ...any) {
	switch {
	case p.full():
		return
	case len(p.errs) == maxFaults-1:
		format, args = "more faults from here on; mend these first", nil
	}
	p.errs = append(p.errs, &Error{max(n.Line, 1), max(n.Column, 1), fmt.Sprintf(format, args...)})
}

// full: no more faults are taken, so there is no use in reading on.
func (p *parser) full() bool { return len(p.errs) >= maxFaults }

func (p *parser) policy(n *yaml.Node) *Policy {
	objects := []*yaml.Node{n}
	if n.Kind == yaml.SequenceNode {
		objects = n.Content
		if len(objects) == 0 {
			p.fail(n, "the policy is empty; write at least one rule")
		}
	}
	pol := &Policy{}
	for i, o := range objects {
		if p.full() {
			break
		}
		p.rules(o, i+1, pol)
	}
	return pol
}

// rules reads one {name, allow, deny} object.
func (p *parser) rules(n *yaml.Node, number int, to *Policy) {
	entries, ok := p.mapping(n, "a rule", ruleKeys)
	if !ok {
		return
	}
	r := rule{number: number}
	observe := false
	for _, e := range entries {
		switch e.key {
		case "name":
			r.name, _ = p.plainText(e.value, "a rule's name")
		case "mode":
			observe = p.mode(e.value)
		}
	}
	for _, e := range entries {
		if e.key != "allow" && e.key != "deny" {
			continue
		}
		r.denies, r.at = e.key == "deny", placeOf(e.at)
		r.when, _ = p.body(e.value, e.key)
		switch {
		case observe:
			to.observed = append(to.observed, r)
		case r.denies:
			to.deny = append(to.deny, r)
		default:
			to.allow = append(to.allow, r)
		}
	}
	if !slices.ContainsFunc(entries, func(e entry) bool { return e.key == "allow" || e.key == "deny" }) {
		p.fail(n, "a rule without allow and deny")
	}
}

// mode reads a rule's mode and reports whether it is observe.
func (p *parser) mode(n *yaml.Node) bool {
	s, ok := p.plainText(n, "mode")
	if ok && s != "observe" && s != "enforce" {
		p.fail(n, "unknown mode %q (observe, or enforce, which is the default)%s", s, suggest(s, []string{"observe", "enforce"}))
	}
	return s == "observe"
}

func placeOf(n *yaml.Node) place { return place{int32(n.Line), int32(n.Column)} }

var (
	ruleKeys     = []string{"name", "allow", "deny", "mode"}
	operatorKeys = []string{"and", "or", "not", "nor"}
)

// body reads what stands under allow or deny.
func (p *parser) body(n *yaml.Node, action string) (condition, bool) {
	entries, ok := p.mapping(n, "what follows "+action, operatorKeys)
	if !ok {
		return condition{}, false
	}
	if len(entries) > 1 {
		p.fail(n, "more than one of and, or, not, nor in one rule can be read in two ways; write\n  %s\nor\n  %s",
			reading(action, "and", entries), reading(action, "or", entries))
		return condition{}, false
	}
	return p.block(entries[0], 1)
}

// reading rewrites a body with several operator blocks as one block op of them.
// Of long blocks it shows the form only.
func reading(action, op string, body []entry) string {
	blocks := &yaml.Node{Kind: yaml.SequenceNode}
	for _, e := range body {
		list := e.value
		if size(list) > 16*maxShown {
			list = &yaml.Node{Kind: yaml.SequenceNode, Content: []*yaml.Node{textNode("…")}}
		}
		blocks.Content = append(blocks.Content, mapNode(e.key, bare(list)))
	}
	return flow(mapNode(action, mapNode(op, blocks)))
}

// size is how many nodes n has.
func size(n *yaml.Node) int {
	count := 1
	for _, child := range n.Content {
		count += size(child)
	}
	return count
}

// bare copies n without comments and anchors.
func bare(n *yaml.Node) *yaml.Node {
	c := &yaml.Node{Kind: n.Kind, Tag: n.Tag, Value: n.Value, Style: n.Style &^ (yaml.LiteralStyle | yaml.FoldedStyle)}
	if n.Kind == yaml.AliasNode {
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: "…"}
	}
	for _, child := range n.Content {
		c.Content = append(c.Content, bare(child))
	}
	return c
}

// block reads an operator and its list.
func (p *parser) block(e entry, depth int) (condition, bool) {
	if depth > maxDepth {
		p.fail(e.at, "more than %d blocks within each other", maxDepth)
		return condition{}, false
	}
	if e.value.Kind != yaml.SequenceNode || len(e.value.Content) == 0 {
		p.fail(e.value, "%s needs a list of at least one criterion", e.key)
		return condition{}, false
	}
	c := condition{op: operators[e.key], at: placeOf(e.at)}
	for _, n := range e.value.Content {
		if p.full() {
			break
		}
		if child, ok := p.condition(n, depth); ok {
			c.of = append(c.of, child)
		}
	}
	return c, len(c.of) == len(e.value.Content)
}

// condition reads {OP: [...]} or {CRITERION: value}.
func (p *parser) condition(n *yaml.Node, depth int) (condition, bool) {
	entries, ok := p.mapping(n, "a criterion", nil)
	if !ok {
		return condition{}, false
	}
	if len(entries) > 1 {
		p.fail(n, "a criterion has one key, this has %d; put a hyphen before each", len(entries))
		return condition{}, false
	}
	e := entries[0]
	if operators[e.key] != leaf {
		return p.block(e, depth+1)
	}
	name, sub, hasSub := strings.Cut(e.key, "/")
	row, known := criteria[name]
	switch {
	case !known:
		p.fail(e.at, "unknown criterion %q%s", name, suggest(name, append(slices.Collect(maps.Keys(criteria)), operatorKeys...)))
	case row.sub && sub == "":
		value := textNode("VALUE")
		if e.value.Kind == yaml.ScalarNode && e.value.Value != "" {
			value = bare(e.value)
		}
		p.fail(e.at, "%s needs a name; write %s", name, flow(mapNode(name+"/NAME", value)))
	case !row.sub && hasSub:
		p.fail(e.at, "%s takes no /%s", name, sub)
	default:
		c, ok := row.parse(p, sub, e.value)
		c.at = placeOf(e.at)
		return c, ok
	}
	return condition{}, false
}

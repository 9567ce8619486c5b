package config

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"go.yaml.in/yaml/v3"

	"sallyport/policyd/policy"
)

const (
	maxFileBytes = 16 << 20
	maxDepth     = 64
)

// decoder reads YAML into Go values and goes on after a fault, so that a person
// sees every fault at once. It is stricter than yaml.Decoder.KnownFields: keys
// are known, unique and plain, values have the type that they look like, and
// anchors, aliases, merge keys and explicit tags are refused.
type decoder struct {
	file     string
	problems Problems
	// lines is where each key path stands; bad holds the paths of faults.
	lines map[string]int
	bad   map[string]bool
}

func newDecoder(file string) *decoder {
	return &decoder{file: file, lines: map[string]int{"": 1}, bad: map[string]bool{}}
}

// decode reads text into v, a pointer to a struct. Faults are collected in d.
func (d *decoder) decode(text []byte, v any) {
	root := d.parse(text)
	if root == nil {
		return
	}
	d.value(root, reflect.ValueOf(v).Elem(), "", 0)
}

func (d *decoder) fault(line int, key, format string, args ...any) {
	d.bad[key] = true
	d.problems = append(d.problems, Problem{File: d.file, Line: line, Key: key, Message: printable(fmt.Sprintf(format, args...))})
}

// printable keeps what a file holds from speaking to the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

// line returns where the key path stands; for a missing key, its nearest parent.
func (d *decoder) line(key string) int {
	for {
		if n, ok := d.lines[key]; ok {
			return n
		}
		i := strings.LastIndexAny(key, ".[")
		if i < 0 {
			return d.lines[""]
		}
		key = key[:i]
	}
}

// isBad reports whether the value at key, or one around or in it, could not be
// read; what a Validate then says of it would only repeat that.
func (d *decoder) isBad(key string) bool {
	for b := range d.bad {
		if b == key || inside(key, b) || inside(b, key) {
			return true
		}
	}
	return false
}

func inside(key, parent string) bool {
	rest, ok := strings.CutPrefix(key, parent)
	return ok && parent != "" && rest != "" && (rest[0] == '.' || rest[0] == '[')
}

// parse returns the root mapping of the only document in text, or nil.
func (d *decoder) parse(text []byte) *yaml.Node {
	switch {
	case len(text) > maxFileBytes:
		d.fault(0, "", "larger than %d MiB", maxFileBytes>>20)
		return nil
	case bytes.HasPrefix(text, []byte("\xef\xbb\xbf")):
		d.fault(1, "", "starts with a byte order mark: save the file as plain UTF-8")
		return nil
	}
	if i := bytes.IndexFunc(text, isControl); i >= 0 {
		d.fault(1+bytes.Count(text[:i], []byte("\n")), "", "holds the control character %q", text[i])
		return nil
	}
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc yaml.Node
	if err := dec.Decode(&doc); err != nil {
		if errors.Is(err, io.EOF) {
			d.fault(1, "", "the file is empty")
		} else {
			d.syntax(err)
		}
		return nil
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		d.fault(doc.Content[0].Line, "", "holds more than one YAML document")
		return nil
	}
	return doc.Content[0]
}

func isControl(r rune) bool {
	return r < ' ' && r != '\n' && r != '\t' && r != '\r' || r == 0x7f
}

var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:unmarshal errors:\s*)?(?:line (\d+): )?`)

// oneLow are the errors that package yaml gives the line before the right one:
// its parser's, which count from 0, unlike its scanner's.
var oneLow = regexp.MustCompile(`^did not find expected (?:'-'|',' or|<|key|node content)`)

// syntax reports an error of the YAML parser with the line it is about.
func (d *decoder) syntax(err error) {
	text := err.Error()
	m := yamlLine.FindStringSubmatch(text)
	line := 0
	if m[1] != "" {
		line, _ = strconv.Atoi(m[1])
	}
	text = text[len(m[0]):]
	if oneLow.MatchString(text) {
		line++
	}
	d.fault(line, "", "not valid YAML: %s", text)
}

var (
	policyType      = reflect.TypeFor[Policy]()
	durationType    = reflect.TypeFor[time.Duration]()
	textUnmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// value reads n into v. Its cases are the types a configuration may be made of.
func (d *decoder) value(n *yaml.Node, v reflect.Value, key string, depth int) {
	d.lines[key] = n.Line
	if !d.plain(n, key, depth) {
		return
	}
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	switch t := v.Type(); {
	case t == policyType:
		d.policy(n, v, key)
	case t == durationType:
		d.duration(n, v, key)
	case reflect.PointerTo(t).Implements(textUnmarshaler):
		d.text(n, v, key)
	case t.Kind() == reflect.Struct:
		d.structure(n, v, key, depth)
	case t.Kind() == reflect.Map:
		d.mapping(n, v, key, depth)
	case t.Kind() == reflect.Slice:
		d.list(n, v, key, depth)
	default:
		d.scalar(n, v, key, depth)
	}
}

// plain refuses what makes YAML ambiguous or unbounded, anywhere.
func (d *decoder) plain(n *yaml.Node, key string, depth int) bool {
	switch {
	case depth > maxDepth:
		d.fault(n.Line, key, "nested deeper than %d levels", maxDepth)
	case n.Kind == yaml.AliasNode, n.Anchor != "":
		d.fault(n.Line, key, "anchors and aliases are not allowed: write the value out")
	case n.Style&yaml.TaggedStyle != 0:
		d.fault(n.Line, key, "the tag %.40s is not allowed", n.Tag)
	case n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null":
		d.fault(n.Line, key, "is empty: give it a value or leave the key out")
	default:
		return true
	}
	return false
}

// walk applies the rules for plain YAML below a value of any form.
func (d *decoder) walk(n *yaml.Node, key string, depth int) {
	switch n.Kind {
	case yaml.MappingNode:
		for name, child := range d.pairs(n, key) {
			d.lines[join(key, name)] = child.Line
			if d.plain(child, join(key, name), depth+1) {
				d.walk(child, join(key, name), depth+1)
			}
		}
	case yaml.SequenceNode:
		for i, child := range n.Content {
			at := index(key, i)
			d.lines[at] = child.Line
			if d.plain(child, at, depth+1) {
				d.walk(child, at, depth+1)
			}
		}
	}
}

// pairs yields the entries of a mapping whose keys are plain and unique.
func (d *decoder) pairs(n *yaml.Node, key string) func(yield func(string, *yaml.Node) bool) {
	return func(yield func(string, *yaml.Node) bool) {
		seen := map[string]int{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			k, v := n.Content[i], n.Content[i+1]
			switch first, twice := seen[k.Value]; {
			case k.Kind != yaml.ScalarNode || k.Anchor != "" || k.Style&yaml.TaggedStyle != 0:
				d.fault(k.Line, key, "a key must be plain text")
				continue
			case k.ShortTag() == "!!merge":
				d.fault(k.Line, key, "merge keys (<<) are not allowed: write the values out")
				continue
			case twice:
				d.fault(k.Line, join(key, k.Value), "stands twice; the first is on line %d", first)
				continue
			}
			seen[k.Value] = k.Line
			if !yield(k.Value, v) {
				return
			}
		}
	}
}

// policy reads a policy, which is as strict itself. The tree of nodes is not kept:
// it is by far the largest thing that reading a file makes.
func (d *decoder) policy(n *yaml.Node, v reflect.Value, key string) {
	parsed, err := policy.ParseNode(n)
	var faults policy.Errors
	if errors.As(err, &faults) {
		for _, e := range faults {
			d.fault(e.Line, key, "%s", e.Message)
			d.problems[len(d.problems)-1].Column = e.Column
		}
	}
	v.Set(reflect.ValueOf(Policy{policy.Text(n), parsed}))
}

func (d *decoder) structure(n *yaml.Node, v reflect.Value, key string, depth int) {
	if !d.kind(n, yaml.MappingNode, key, "a mapping (key: value)") {
		return
	}
	fields := fieldsOf(v.Type())
	for name, child := range d.pairs(n, key) {
		f, ok := fields.find(name)
		if !ok {
			d.unknown(child.Line, join(key, name), name, fields.names())
			continue
		}
		d.value(child, v.FieldByIndex(f.index), join(key, name), depth+1)
	}
}

func (d *decoder) unknown(line int, key, name string, known []string) {
	if meant, ok := nearest(name, known); ok {
		d.fault(line, key, "unknown key %q; did you mean %q?", name, meant)
		return
	}
	d.fault(line, key, "unknown key %.60q; known here: %s", name, strings.Join(known, ", "))
}

func (d *decoder) mapping(n *yaml.Node, v reflect.Value, key string, depth int) {
	if !d.kind(n, yaml.MappingNode, key, "a mapping (key: value)") {
		return
	}
	m := reflect.MakeMap(v.Type())
	for name, child := range d.pairs(n, key) {
		item := reflect.New(v.Type().Elem()).Elem()
		d.value(child, item, join(key, name), depth+1)
		m.SetMapIndex(reflect.ValueOf(name).Convert(v.Type().Key()), item)
	}
	v.Set(m)
}

func (d *decoder) list(n *yaml.Node, v reflect.Value, key string, depth int) {
	if !d.kind(n, yaml.SequenceNode, key, "a list ([a, b] or lines with -)") {
		return
	}
	s := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, child := range n.Content {
		d.value(child, s.Index(i), index(key, i), depth+1)
	}
	v.Set(s)
}

func (d *decoder) kind(n *yaml.Node, want yaml.Kind, key, words string) bool {
	if n.Kind == want {
		return true
	}
	d.fault(n.Line, key, "must be %s, is %s", words, describe(n))
	return false
}

func (d *decoder) scalar(n *yaml.Node, v reflect.Value, key string, depth int) {
	switch v.Kind() {
	case reflect.String:
		if d.isText(n, key) {
			v.SetString(n.Value)
		}
	case reflect.Bool:
		switch {
		case n.Kind == yaml.ScalarNode && n.Value == "true" && n.ShortTag() == "!!bool":
			v.SetBool(true)
		case n.Kind == yaml.ScalarNode && n.Value == "false" && n.ShortTag() == "!!bool":
		default:
			d.fault(n.Line, key, "must be true or false, is %s", describe(n))
		}
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		d.integer(n, v, key)
	case reflect.Float64:
		f, err := strconv.ParseFloat(n.Value, 64)
		if n.Kind != yaml.ScalarNode || n.ShortTag() == "!!str" || err != nil {
			d.fault(n.Line, key, "must be a number, is %s", describe(n))
			return
		}
		v.SetFloat(f)
	case reflect.Interface:
		before := len(d.problems)
		d.walk(n, key, depth)
		if len(d.problems) > before {
			return
		}
		var free any
		if err := n.Decode(&free); err != nil {
			d.fault(n.Line, key, "%s", strings.TrimPrefix(err.Error(), "yaml: "))
			return
		}
		v.Set(reflect.ValueOf(free))
	default:
		panic("config: a field of type " + v.Type().String() + " cannot stand in a configuration")
	}
}

var decimal = regexp.MustCompile(`^-?(0|[1-9][0-9]*)$`)

func (d *decoder) integer(n *yaml.Node, v reflect.Value, key string) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || !decimal.MatchString(n.Value) {
		d.fault(n.Line, key, "must be a whole number in decimal, is %s", describe(n))
		return
	}
	if v.CanUint() {
		u, err := strconv.ParseUint(n.Value, 10, v.Type().Bits())
		if err != nil {
			d.fault(n.Line, key, "%s is out of range", n.Value)
			return
		}
		v.SetUint(u)
		return
	}
	i, err := strconv.ParseInt(n.Value, 10, v.Type().Bits())
	if err != nil {
		d.fault(n.Line, key, "%s is out of range", n.Value)
		return
	}
	v.SetInt(i)
}

func (d *decoder) duration(n *yaml.Node, v reflect.Value, key string) {
	if n.Kind == yaml.ScalarNode && n.Value == "0" {
		v.SetInt(0)
		return
	}
	dur, err := time.ParseDuration(n.Value)
	if n.Kind != yaml.ScalarNode || err != nil {
		d.fault(n.Line, key, "must be a duration such as 30s, 10m or 12h, is %s", describe(n))
		return
	}
	v.SetInt(int64(dur))
}

func (d *decoder) text(n *yaml.Node, v reflect.Value, key string) {
	if !d.isText(n, key) {
		return
	}
	if err := v.Addr().Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(n.Value)); err != nil {
		d.fault(n.Line, key, "%v", err)
	}
}

// isText refuses scalars that YAML reads as something else than text: whoever
// writes them unquoted may not have meant the digits.
func (d *decoder) isText(n *yaml.Node, key string) bool {
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!str" {
		return true
	}
	if n.Kind == yaml.ScalarNode {
		d.fault(n.Line, key, "must be text, is %s; put it in quotes: %q", describe(n), n.Value)
	} else {
		d.fault(n.Line, key, "must be text, is %s", describe(n))
	}
	return false
}

func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	words := map[string]string{"!!int": "the number", "!!float": "the number", "!!bool": "the truth value", "!!timestamp": "the date"}
	if w := words[n.ShortTag()]; w != "" {
		return fmt.Sprintf("%s %.60s", w, n.Value)
	}
	return fmt.Sprintf("%.60q", n.Value)
}

var plainName = regexp.MustCompile(`^[A-Za-z0-9_*-]{1,64}$`)

func join(key, name string) string {
	if !plainName.MatchString(name) {
		name = fmt.Sprintf("%.64q", name)
	}
	if key == "" {
		return name
	}
	return key + "." + name
}

func index(key string, i int) string { return key + "[" + strconv.Itoa(i) + "]" }

// field is one key that a struct takes from YAML.
type field struct {
	name  string
	index []int
	typ   reflect.Type
}

type fields []field

func (fs fields) find(name string) (field, bool) {
	i := slices.IndexFunc(fs, func(f field) bool { return f.name == name })
	if i < 0 {
		return field{}, false
	}
	return fs[i], true
}

func (fs fields) names() []string {
	names := make([]string, len(fs))
	for i, f := range fs {
		names[i] = f.name
	}
	return names
}

// fieldsOf returns the keys of struct type t in the order of its fields, by the
// rules of package yaml: the tag's name, else the field's in lower case.
func fieldsOf(t reflect.Type) fields {
	var fs fields
	for i := range t.NumField() {
		f := t.Field(i)
		name, opts, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch {
		case name == "-" || !f.IsExported():
			continue
		case strings.Contains(opts, "inline"):
			for _, in := range fieldsOf(f.Type) {
				in.index = append([]int{i}, in.index...)
				fs = append(fs, in)
			}
			continue
		case name == "":
			name = strings.ToLower(f.Name)
		}
		fs = append(fs, field{name, []int{i}, f.Type})
	}
	return fs
}

package policy

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport"

	"go.yaml.in/yaml/v3"
)

// knownFact is a fact with a fixed meaning: what type it has, how its texts are
// ordered, and how a person changes it.
type knownFact struct {
	kind  byte // as in scalar
	order func(a, b string) (int, bool)
	hint  string
}

var knownFacts = map[string]knownFact{
	sallyport.FactOS:            {kind: 's', hint: "use another device"},
	sallyport.FactOSVersion:     {kind: 's', order: compareVersions, hint: "update the operating system"},
	sallyport.FactKernel:        {kind: 's', order: compareVersions, hint: "update the kernel and restart"},
	sallyport.FactAgentVersion:  {kind: 's', order: compareSemantic, hint: "update the agent"},
	sallyport.FactDiskEncrypted: {kind: 'b', hint: "turn on disk encryption"},
	sallyport.FactFirewall:      {kind: 'b', hint: "turn on the firewall"},
	sallyport.FactScreenLock:    {kind: 'b', hint: "turn on the screen lock"},
	sallyport.FactSecureBoot:    {kind: 'b', hint: "turn on secure boot in the firmware"},
	sallyport.FactKeyProtection: {kind: 's', hint: "log in with a key in better protection"},
	"managed":                   {kind: 'b', hint: "enrol this device in your organisation's management"},
}

var sources = []string{sallyport.SourceOS, sallyport.SourceFile, sallyport.SourceAttested}

var factName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,63}$`)

// recordFields are the fields of the device's record that stand beside the facts
// under the criterion device.
var recordFields = map[string]struct {
	kind  byte
	value func(*sallyport.Device) any
}{
	"is":       {'s', func(d *sallyport.Device) any { return string(d.ID) }},
	"approved": {'b', func(d *sallyport.Device) any { return d.Approved }},
	"type":     {'s', func(d *sallyport.Device) any { return d.Type }},
}

// parseDevice reads {FACT: matcher, …}; several keys must all hold. max_age and
// source beside the facts count for each that does not bring its own.
func parseDevice(p *parser, _ string, n *yaml.Node) (condition, bool) {
	entries, ok := p.mapping(n, "device", nil)
	if !ok {
		return condition{}, false
	}
	var common bounds
	block := condition{op: and}
	for _, e := range entries {
		if isBound(e.key) {
			ok = p.bound(e, &common) && ok
		}
	}
	for _, e := range entries {
		if isBound(e.key) {
			continue
		}
		c, good := p.deviceEntry(e, common)
		ok = ok && good
		leaf := leafOf(c)
		leaf.at = placeOf(e.at)
		block.of = append(block.of, leaf)
	}
	if len(block.of) == 0 {
		p.fail(n, "device names no fact")
		return condition{}, false
	}
	if len(block.of) == 1 {
		return block.of[0], ok
	}
	return block, ok
}

func (p *parser) deviceEntry(e entry, common bounds) (criterion, bool) {
	if field, is := recordFields[e.key]; is {
		tests, ok := p.textTests(e.value, "device."+e.key, textOperators, p.kind(field.kind))
		if e.key == "type" && ok {
			tests, ok = p.deviceTypes(e.value, tests)
		}
		return &deviceField{e.key, field.value, matcher{tests: tests}}, ok
	}
	return p.fact(e, common)
}

// deviceTypes expands PPL's words for kinds of keys: any is every registered
// device, for which no test is left; enclave_only is a key that hardware of the
// device keeps.
func (p *parser) deviceTypes(n *yaml.Node, tests []test) ([]test, bool) {
	var out []test
	for _, t := range tests {
		if t.op != isAny && t.op != isNone {
			out = append(out, t)
			continue
		}
		every := false
		var of []scalar
		for _, s := range t.of {
			switch s.s {
			case "any":
				every = true
			case "enclave_only":
				of = append(of, scalar{kind: 's', s: "tpm"}, scalar{kind: 's', s: "secure_enclave"})
			default:
				of = append(of, s)
			}
		}
		if every && t.op == isNone {
			p.fail(n, "device.type: no device has a type that is not any; write not: [{device: {type: any}}]")
			return nil, false
		}
		if !every {
			out = append(out, test{t.op, of})
		}
	}
	return out, true
}

// kind reads literals of one type, or (0) of any.
func (p *parser) kind(kind byte) literal {
	return func(n *yaml.Node, what string) (scalar, bool) {
		switch kind {
		case 's':
			s, ok := p.plainText(n, what)
			return scalar{kind: 's', s: s}, ok
		case 'b':
			b, ok := p.boolean(n, what)
			return scalar{kind: 'b', b: b}, ok
		}
		return p.scalar(n, what)
	}
}

// bounds say which facts count.
type bounds struct {
	maxAge  time.Duration // 0: the site's posture_ttl
	sources []string      // nil: the site's posture_sources
}

func isBound(key string) bool { return key == "max_age" || key == "source" }

func (p *parser) bound(e entry, b *bounds) bool {
	if e.key == "max_age" {
		d, ok := p.duration(e.value, "max_age")
		b.maxAge = d
		return ok
	}
	nodes := []*yaml.Node{e.value}
	if e.value.Kind == yaml.SequenceNode && len(e.value.Content) > 0 {
		nodes = e.value.Content
	}
	b.sources = nil
	for _, n := range nodes {
		s, ok := p.plainText(n, "source")
		if !ok {
			return false
		}
		if !slices.Contains(sources, s) {
			p.fail(n, "unknown source %q (os, file or attested)%s", s, suggest(s, sources))
			return false
		}
		b.sources = append(b.sources, s)
	}
	return true
}

// fact is one posture fact.
type fact struct {
	name  string
	match matcher
	bounds
}

func (p *parser) fact(e entry, common bounds) (*fact, bool) {
	known, isKnown := knownFacts[e.key]
	if !isKnown {
		if !factName.MatchString(e.key) {
			p.fail(e.at, "%q is no name of a fact (lower-case letters, digits and underscores)", e.key)
			return nil, false
		}
		if s := suggest(e.key, append(slices.Collect(maps.Keys(knownFacts)), "approved", "max_age", "source")); s != "" {
			p.fail(e.at, "unknown fact %q%s", e.key, s)
			return nil, false
		}
		known.order = compareVersions
	}
	f := &fact{name: e.key, bounds: common, match: matcher{order: known.order}}
	n, ok := p.factBounds(e, &f.bounds)
	if !ok {
		return f, false
	}
	ops := maps.Clone(textOperators)
	if known.kind == 'b' {
		ops = map[string]compare{"is": isAny, "not": isNone}
	}
	if known.order != nil {
		maps.Copy(ops, orderOperators)
	}
	f.match.tests, ok = p.textTests(n, "device."+e.key, ops, p.kind(known.kind))
	return f, ok && p.versions(f, n)
}

// factBounds takes max_age and source out of a fact's matcher and returns the rest.
func (p *parser) factBounds(e entry, b *bounds) (*yaml.Node, bool) {
	if e.value.Kind != yaml.MappingNode {
		return e.value, true
	}
	rest := *e.value
	rest.Content = nil
	ok := true
	seen := map[string]bool{}
	for i := 0; i+1 < len(e.value.Content); i += 2 {
		k, v := e.value.Content[i], e.value.Content[i+1]
		if !isBound(k.Value) {
			rest.Content = append(rest.Content, k, v)
			continue
		}
		if seen[k.Value] {
			p.fail(k, "key %q stands twice", k.Value)
			ok = false
		}
		seen[k.Value] = true
		ok = p.bound(entry{k.Value, k, v}, b) && ok
	}
	return &rest, ok
}

// versions refuses operands that could not be compared.
func (p *parser) versions(f *fact, n *yaml.Node) bool {
	for _, t := range f.match.tests {
		if t.op < less || t.op > greaterOrEqual {
			continue
		}
		switch s := t.of[0]; {
		case s.kind == 'n':
		case s.kind != 's':
			p.fail(n, "device.%s: a truth value has no order", f.name)
			return false
		default:
			if _, ok := f.match.order(s.s, s.s); !ok {
				p.fail(n, "device.%s: %q is no version", f.name, s.s)
				return false
			}
		}
	}
	return true
}

func (f *fact) eval(in *Input) Value {
	got, left, _ := f.lookup(in)
	if left <= 0 {
		return Unknown
	}
	in.lasts(left)
	return f.match.value(got.Value)
}

// lookup returns the fact and how long it still counts; not above zero, with the
// reason, if it does not.
func (f *fact) lookup(in *Input) (got sallyport.Fact, left time.Duration, why string) {
	if in.Person == nil {
		return got, 0, noSession
	}
	if in.Person.Device == nil {
		return got, 0, noDevice
	}
	if in.Person.Posture == nil {
		return got, 0, "unknown (no report)"
	}
	got, ok := in.Person.Posture.Facts[f.name]
	if !ok {
		return got, 0, "unknown (this device did not tell)"
	}
	counted := f.sources
	if counted == nil {
		counted = in.site.Sources
	}
	if !slices.Contains(counted, got.Source) {
		return got, 0, "unknown (its source does not count)"
	}
	limit := in.site.TTL
	if f.maxAge != 0 {
		limit = min(limit, f.maxAge)
	}
	left = limit - in.age(&got)
	if left <= 0 {
		return got, left, "unknown (too old)"
	}
	return got, left, ""
}

func (f *fact) path() string { return "device." + f.name }

func (f *fact) wanted(bool) string {
	w := f.match.words()
	if f.maxAge != 0 {
		w += fmt.Sprintf(", at most %s old", shortDuration(f.maxAge))
	}
	if f.sources != nil {
		w += ", source " + strings.Join(f.sources, " or ")
	}
	return w
}

func (f *fact) found(in *Input) (string, time.Duration) {
	got, left, why := f.lookup(in)
	var age time.Duration
	if got.Source != "" {
		age = in.age(&got)
	}
	if left <= 0 {
		return why, age
	}
	return valueWords(got.Value), age
}

func (f *fact) note(in *Input, to *Inputs) {
	if in.Person == nil {
		return
	}
	noteDevice(in.Person.Device, to)
	if to.Facts == nil {
		to.Facts = make(map[string]*FactInput)
	}
	to.Facts[f.name] = nil
	if got, _, _ := f.lookup(in); got.Source != "" {
		to.Facts[f.name] = &FactInput{got.Value, got.Source, in.age(&got)}
	}
}

func (f *fact) recalled(from *Inputs) bool {
	_, ok := from.Facts[f.name]
	return ok || from.Device != nil && from.Device.ID == ""
}

const noDevice = "unknown (this session has no device)"

// deviceField is a field of the device's record: is, approved, type.
type deviceField struct {
	name  string
	value func(*sallyport.Device) any
	match matcher
}

func (f *deviceField) eval(in *Input) Value {
	if in.Person == nil || in.Person.Device == nil {
		return Unknown
	}
	switch f.name { // not f.value: an interface made of a text would allocate
	case "is":
		return f.match.text(string(in.Person.Device.ID))
	case "type":
		if in.Person.Device.Type == "" && len(f.match.tests) > 0 {
			return Unknown
		}
		return f.match.text(in.Person.Device.Type)
	}
	return f.match.value(f.value(in.Person.Device))
}

func (f *deviceField) path() string { return "device." + f.name }

func (f *deviceField) wanted(bool) string {
	if f.name == "is" {
		return "a device that this rule names"
	}
	if len(f.match.tests) == 0 {
		return "a registered device"
	}
	return f.match.words()
}

func (f *deviceField) found(in *Input) (string, time.Duration) {
	switch {
	case in.Person == nil:
		return noSession, 0
	case in.Person.Device == nil:
		return noDevice, 0
	}
	return valueWords(f.value(in.Person.Device)), 0
}

func (f *deviceField) note(in *Input, to *Inputs) {
	if in.Person != nil {
		noteDevice(in.Person.Device, to)
	}
}

func (f *deviceField) recalled(from *Inputs) bool { return from.Device != nil }

func noteDevice(d *sallyport.Device, to *Inputs) {
	to.Device = &DeviceInput{}
	if d != nil {
		*to.Device = DeviceInput{d.ID, d.Approved, d.Type}
	}
}

func valueWords(v any) string {
	const most = 80
	switch v := v.(type) {
	case bool:
		return strconv.FormatBool(v)
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	case string:
		if v == "" {
			return "empty"
		}
		if len(v) > most {
			return strings.ToValidUTF8(v[:most], "") + "…"
		}
		return v
	}
	return "something that is no single value"
}

// shortDuration prints 5m instead of 5m0s.
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

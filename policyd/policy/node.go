package policy

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// entry is one key of a mapping.
type entry struct {
	key   string
	at    *yaml.Node // the key
	value *yaml.Node
}

// mapping returns the entries of n: at least one, no key twice, all of them
// among keys (nil: any).
func (p *parser) mapping(n *yaml.Node, what string, keys []string) ([]entry, bool) {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		p.fail(n, "anchors and aliases are not allowed")
		return nil, false
	}
	if n.Kind != yaml.MappingNode || n.Style&yaml.TaggedStyle != 0 || len(n.Content) == 0 {
		p.fail(n, "%s must be an object with at least one key", what)
		return nil, false
	}
	var out []entry
	lines := make(map[string]int, len(n.Content)/2)
	ok := true
	for i := 0; i+1 < len(n.Content) && !p.full(); i += 2 {
		k := n.Content[i]
		first, twice := lines[k.Value]
		switch {
		case k.Kind != yaml.ScalarNode || k.Style&yaml.TaggedStyle != 0 || k.Anchor != "" || k.Tag == "!!merge" || k.Tag == "!!null":
			p.fail(k, "a key must be plain text")
			ok = false
		case twice:
			p.fail(k, "key %q stands twice, first in line %d", k.Value, first)
			ok = false
		case keys != nil && !slices.Contains(keys, k.Value):
			p.fail(k, "unknown key %q%s", k.Value, suggest(k.Value, keys))
			ok = false
		}
		if !twice {
			lines[k.Value] = k.Line
		}
		out = append(out, entry{k.Value, k, n.Content[i+1]})
	}
	return out, ok && !p.full()
}

// scalar is a literal of a policy: text, a number or a truth value.
type scalar struct {
	kind byte // 's', 'n', 'b'
	s    string
	n    float64
	b    bool
}

// equal compares without conversion: 5 is not "5".
func (s scalar) equal(v any) bool {
	switch v := v.(type) {
	case string:
		return s.kind == 's' && v == s.s
	case float64:
		return s.kind == 'n' && v == s.n
	case int:
		return s.kind == 'n' && float64(v) == s.n
	case bool:
		return s.kind == 'b' && v == s.b
	}
	return false
}

func (s scalar) String() string {
	switch s.kind {
	case 'n':
		return strconv.FormatFloat(s.n, 'f', -1, 64)
	case 'b':
		return strconv.FormatBool(s.b)
	}
	return s.s
}

// number is how a number may be written: no exponents, no octal, no underscores.
var number = regexp.MustCompile(`^-?(0|[1-9][0-9]*)(\.[0-9]+)?$`)

// truthWords are words that some YAML reader takes for truth values, and for
// which: those of YAML 1.1, and true and false in quotes.
var truthWords = map[string]bool{
	"y": true, "n": false, "yes": true, "no": false, "on": true, "off": false, "true": true, "false": false,
}

// truthWord returns what n means if it is such a word that is no truth value here.
func truthWord(n *yaml.Node) (meant, is bool) {
	meant, is = truthWords[strings.ToLower(n.Value)]
	return meant, is && n.Kind == yaml.ScalarNode && n.Tag == "!!str" && n.Style&yaml.TaggedStyle == 0 && n.Anchor == ""
}

// scalar reads a literal. What another YAML reader could take for something else
// is refused.
func (p *parser) scalar(n *yaml.Node, what string) (scalar, bool) {
	quoted := n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) != 0
	_, ambiguous := truthWord(n)
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		p.fail(n, "anchors and aliases are not allowed")
	case n.Kind != yaml.ScalarNode:
		p.fail(n, "%s must be a single value", what)
	case n.Style&yaml.TaggedStyle != 0:
		p.fail(n, "tags like %s are not allowed", n.Tag)
	case n.Tag == "!!null" || n.Value == "":
		p.fail(n, "%s is empty", what)
	case quoted || n.Tag == "!!str" && !ambiguous:
		return scalar{kind: 's', s: n.Value}, true
	case n.Tag == "!!bool":
		return scalar{kind: 'b', b: strings.EqualFold(n.Value, "true")}, true
	case (n.Tag == "!!int" || n.Tag == "!!float") && number.MatchString(n.Value):
		f, err := strconv.ParseFloat(n.Value, 64)
		if err == nil {
			return scalar{kind: 'n', n: f}, true
		}
		p.fail(n, "number %s is out of range", n.Value)
	default:
		p.fail(n, "%s could be read as text, number or truth value; put quotes around it: %q", n.Value, n.Value)
	}
	return scalar{}, false
}

// plainText reads a literal that must be text without controls.
func (p *parser) plainText(n *yaml.Node, what string) (string, bool) {
	s, ok := p.scalar(n, what)
	switch {
	case !ok:
		return "", false
	case s.kind != 's':
		p.fail(n, "%s must be text; put quotes around it: %q", what, n.Value)
		return "", false
	case strings.ContainsFunc(s.s, unicode.IsControl):
		p.fail(n, "%s has a control character", what)
		return "", false
	}
	return s.s, true
}

// nameText reads the name of a user, group, e-mail address or domain. Blanks and
// separators are refused: "dba,sre" is meant as two names and would match none.
func (p *parser) nameText(n *yaml.Node, what string) (string, bool) {
	s, ok := p.plainText(n, what)
	separates := func(r rune) bool { return r == ',' || r == ';' || unicode.IsSpace(r) }
	if !ok || !strings.ContainsFunc(s, separates) {
		return s, ok
	}
	var names []*yaml.Node
	for name := range strings.FieldsFuncSeq(s, separates) {
		if len(names) < maxShown {
			names = append(names, textNode(name))
		}
	}
	write := "one name"
	switch list := what == "groups" || what == "auth_method"; {
	case !list && what != "user" && what != "email" && what != "domain", len(names) == 0:
	case len(names) == 1:
		write = flow(mapNode(what, names[0]))
	case list:
		write = "one (of groups the id), or for several " + eitherOf(what, names)
	default:
		write = "one name, or for several " + flow(mapNode(what, mapNode("in", &yaml.Node{Kind: yaml.SequenceNode, Content: names})))
	}
	p.fail(n, "%s %.80q has a blank or a separator; write %s", what, s, write)
	return "", false
}

// boolean reads true or false.
func (p *parser) boolean(n *yaml.Node, what string) (value, ok bool) {
	if meant, is := truthWord(n); is {
		p.fail(n, "%s must be true or false; write %t", what, meant)
		return false, false
	}
	s, ok := p.scalar(n, what)
	if ok && s.kind != 'b' {
		p.fail(n, "%s must be true or false", what)
		return false, false
	}
	return s.b, ok
}

// duration reads "5m", "1h30m", "7d12h": above zero. A day is 24 hours.
func (p *parser) duration(n *yaml.Node, what string) (time.Duration, bool) {
	s, ok := p.scalar(n, what)
	if !ok {
		return 0, false
	}
	hours, days := s.s, time.Duration(0)
	if count, rest, ok := strings.Cut(s.s, "d"); ok && allDigits(count) && len(count) < 6 { // no overflow
		n, _ := strconv.Atoi(count)
		hours, days = rest, time.Duration(n)*24*time.Hour
	}
	d := time.Duration(0)
	var err error
	if hours != "" || days == 0 {
		d, err = time.ParseDuration(hours)
	}
	if d += days; s.kind != 's' || err != nil || d <= 0 || d < days {
		p.fail(n, "%s must be a duration like 30s, 5m or 1h", what)
		return 0, false
	}
	return d, true
}

func textNode(s string) *yaml.Node { return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: s} }

func mapNode(key string, value *yaml.Node) *yaml.Node {
	return &yaml.Node{Kind: yaml.MappingNode, Content: []*yaml.Node{textNode(key), value}}
}

// eitherOf writes {or: [{KEY: VALUE}, …]}.
func eitherOf(key string, values []*yaml.Node) string {
	list := &yaml.Node{Kind: yaml.SequenceNode}
	for _, v := range values[:min(len(values), maxShown)] {
		if size(v) > maxShown {
			v = textNode("…")
		}
		list.Content = append(list.Content, mapNode(key, bare(v)))
	}
	return flow(mapNode("or", list))
}

// flow writes n in one line, for an error to show.
func flow(n *yaml.Node) string {
	n.Style = yaml.FlowStyle
	text, err := yaml.Marshal(n)
	if err != nil {
		return "…"
	}
	return strings.Join(strings.Fields(string(text)), " ")
}

// suggest returns `; did you mean "x"?` for the known word nearest to word, or "".
func suggest(word string, known []string) string {
	best, distance := "", min(2, len(word)/2)+1
	for _, k := range slices.Sorted(slices.Values(known)) {
		if max(len(word), len(k))-min(len(word), len(k)) >= distance {
			continue
		}
		if d := editDistance(word, k); d < distance {
			best, distance = k, d
		}
	}
	if best == "" {
		return ""
	}
	return "; did you mean " + strconv.Quote(best) + "?"
}

// editDistance is Levenshtein's, with a swap of neighbours as one step; words
// longer than 64 bytes are far from everything.
func editDistance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			change := rows[i-1][j-1]
			if a[i-1] != b[j-1] {
				change++
			}
			d := min(rows[i-1][j]+1, rows[i][j-1]+1, change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d = min(d, rows[i-2][j-2]+1)
			}
			rows[i][j] = d
		}
	}
	return rows[len(a)][len(b)]
}

package policy

import (
	"strconv"

	"go.yaml.in/yaml/v3"
)

// Text writes a policy that ParseNode accepts in few words, without comments: the
// form in which it is stored. Parse reads it as the same policy, but for lines and
// columns.
//
// Line breaks make it quick to read: as far as a line goes, YAML must expect that
// what it has read so far is the key of a mapping, and keep it.
func Text(n *yaml.Node) string {
	if n.Kind == yaml.DocumentNode && len(n.Content) == 1 {
		n = n.Content[0]
	}
	return string(appendText(nil, n))
}

func appendText(b []byte, n *yaml.Node) []byte {
	switch n.Kind {
	case yaml.MappingNode:
		b = append(b, '{')
		for i, child := range n.Content {
			switch {
			case i%2 == 1:
				b = append(b, ": "...)
			case i > 0:
				b = append(b, ",\n"...)
			}
			b = appendText(b, child)
		}
		return append(b, '}')
	case yaml.SequenceNode:
		b = append(b, "[\n"...)
		for i, child := range n.Content {
			if i > 0 {
				b = append(b, ",\n"...)
			}
			b = appendText(b, child)
		}
		return append(b, ']')
	}
	return appendScalar(b, n)
}

// appendScalar keeps what YAML takes for a number or a truth value without quotes,
// and nothing else but plain words.
func appendScalar(b []byte, n *yaml.Node) []byte {
	const quoted = yaml.SingleQuotedStyle | yaml.DoubleQuotedStyle | yaml.LiteralStyle | yaml.FoldedStyle
	if n.Style&quoted == 0 && (isWord(n.Value) || n.ShortTag() != "!!str") {
		return append(b, n.Value...)
	}
	return strconv.AppendQuote(b, n.Value) // its escapes are YAML's, too
}

// isWord reports whether plain text means the same wherever it stands.
func isWord(s string) bool {
	for i := range len(s) {
		c := s[i]
		letter := c|0x20 >= 'a' && c|0x20 <= 'z'
		if !letter && (i == 0 || (c < '-' || c > '9') && c != '_') { // "-./" and digits
			return false
		}
	}
	return s != ""
}

package scenario

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// reader reads one file's nodes and collects what is wrong with them.
type reader struct {
	file string
	text []byte
	errs []error

	policies map[string]*Policy // those of policy_file, so that coverage sees each once
}

func (r *reader) fail(n *yaml.Node, format string, args ...any) {
	r.errs = append(r.errs, &Error{r.file, max(n.Line, 1), max(n.Column, 1), fmt.Sprintf(format, args...)})
}

func (r *reader) err() error { return errors.Join(r.errs...) }

// fields are the keys that an object may have, with what reads their values.
type fields map[string]func(*yaml.Node)

// object reads a mapping whose keys are among known, none of them twice.
func (r *reader) object(n *yaml.Node, what string, known fields) {
	n = plain(n)
	if n.Kind != yaml.MappingNode {
		r.fail(n, "%s must be an object", what)
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		read, ok := known[k.Value]
		switch {
		case k.Kind != yaml.ScalarNode || !ok:
			r.fail(k, "%s has no key %q; known are %s", what, k.Value, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		case seen[k.Value]:
			r.fail(k, "key %q stands twice", k.Value)
		default:
			read(v)
		}
		seen[k.Value] = true
	}
}

// plain follows an alias: a test file may use anchors, a policy may not.
func plain(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func absent(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

// list calls each for the elements of a list; null is an empty one.
func (r *reader) list(n *yaml.Node, what string, each func(*yaml.Node)) {
	n = plain(n)
	switch {
	case absent(n):
	case n.Kind != yaml.SequenceNode:
		r.fail(n, "%s must be a list", what)
	default:
		for _, e := range n.Content {
			each(plain(e))
		}
	}
}

// scalar returns the text of a single value, also of a number.
func (r *reader) scalar(n *yaml.Node) (string, bool) {
	n = plain(n)
	if n.Kind != yaml.ScalarNode {
		r.fail(n, "must be a single value")
		return "", false
	}
	if absent(n) {
		return "", true
	}
	return n.Value, true
}

// text reads a single value into to, as it is written.
func text[T ~string](r *reader, to *T) func(*yaml.Node) {
	return func(n *yaml.Node) {
		if s, ok := r.scalar(n); ok {
			*to = T(s)
		}
	}
}

// parsed reads a single value with parse; an empty one stays what it is.
func parsed[T any](r *reader, to *T, parse func(string) (T, error)) func(*yaml.Node) {
	return func(n *yaml.Node) {
		s, ok := r.scalar(n)
		if !ok || s == "" {
			return
		}
		v, err := parse(s)
		if err != nil {
			r.fail(n, "%v", err)
			return
		}
		*to = v
	}
}

func truth(s string) (bool, error) {
	switch s {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, fmt.Errorf("%.40q is neither true nor false", s)
}

// moments are how a time may be written; without a zone it is UTC.
var moments = []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02 15:04:05Z07:00", "2006-01-02 15:04:05", time.DateOnly}

func moment(s string) (time.Time, error) {
	for _, layout := range moments {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%.40q is no time like 2026-01-02T15:04:05Z", s)
}

// values reads an object of any values.
func (r *reader) values(to *map[string]any) func(*yaml.Node) {
	return func(n *yaml.Node) {
		n = plain(n)
		if absent(n) {
			return
		}
		if m, ok := r.value(n).(map[string]any); ok {
			*to = m
		} else {
			r.fail(n, "must be an object")
		}
	}
}

// value reads what JSON can say. A time stays the text that it is.
func (r *reader) value(n *yaml.Node) any {
	n = plain(n)
	switch n.Kind {
	case yaml.MappingNode:
		m := make(map[string]any, len(n.Content)/2)
		for i := 0; i+1 < len(n.Content); i += 2 {
			m[n.Content[i].Value] = r.value(n.Content[i+1])
		}
		return m
	case yaml.SequenceNode:
		list := make([]any, len(n.Content))
		for i, e := range n.Content {
			list[i] = r.value(e)
		}
		return list
	}
	switch n.Tag {
	case "!!null":
		return nil
	case "!!bool":
		return strings.EqualFold(n.Value, "true")
	case "!!int", "!!float":
		var f float64
		if err := n.Decode(&f); err != nil {
			r.fail(n, "%s is out of range", n.Value)
		}
		return f
	}
	return n.Value
}

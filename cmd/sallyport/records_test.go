package main

import (
	"strings"
	"testing"
)

// What is put must mean the same to every reader, or is refused.
func TestParseFields(t *testing.T) {
	for _, c := range []struct {
		text, refused string
	}{
		{`{}`, ""},
		{`{"score": 5, "level": 1.5, "tags": ["a", {"b": null}], "ok": true}`, ""},
		{` {"a": 1} ` + "\n", ""},
		{`{"a": {"b": 1, "b": 2}}`, `key "b" stands twice`},
		{`{"a": [[[[[[[[1]]]]]]]]}`, "nested deeper"},
		{`{"a": 1}}`, "something follows"},
		{`{"a": 01}`, "not JSON"},
		{`{"a": NaN}`, "not JSON"},
		{`{1: 2}`, "not JSON"},
		{"{\"a\": \"\xff\"}", "not UTF-8"},
		{`{"": 1}`, "no name of a field"},
		{`{"1a": 1}`, "no name of a field"},
		{`"text"`, "not an object"},
		{`null`, "not an object"},
		{``, "not JSON"},
		{`{"a": "` + strings.Repeat("x", maxFields) + `"}`, "more than 65536 bytes"},
	} {
		_, err := parseFields([]byte(c.text))
		if c.refused == "" && err != nil || c.refused != "" && (err == nil || !strings.Contains(err.Error(), c.refused)) {
			t.Errorf("%.60s: got %v; want %q", c.text, err, c.refused)
		}
	}
}

func FuzzParseFields(f *testing.F) {
	f.Add([]byte(`{"score": 5, "tags": ["a", {"b": null}]}`))
	f.Add([]byte(`{"a": {"b": 1, "b": 2}}`))
	f.Add([]byte(`[[[[[[[[[`))
	f.Fuzz(func(t *testing.T, text []byte) {
		fields, err := parseFields(text)
		if (fields == nil) == (err == nil) {
			t.Errorf("%q: got %v and %v", text, fields, err)
		}
	})
}

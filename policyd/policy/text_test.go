package policy

import (
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"go.yaml.in/yaml/v3"
)

// Every policy that the golden files know is the same policy in one line.
func TestTextIsTheSamePolicy(t *testing.T) {
	files, err := filepath.Glob("testdata/*/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, file := range files {
		a, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text := section(a, "policy")
		n, fault := document([]byte(text))
		if text == "" || fault != nil {
			continue
		}
		if _, err := ParseNode(n); err != nil {
			continue
		}
		seen++
		want := runGolden(t, text, section(a, "ask"), section(a, "site"))
		if diff := cmp.Diff(want, runGolden(t, Text(n), section(a, "ask"), section(a, "site"))); diff != "" {
			t.Errorf("%s: %s\n%s", file, Text(n), diff)
		}
	}
	if seen < 20 {
		t.Errorf("saw %d policies only", seen)
	}
}

// What could be read as something else keeps its quotes, or its lack of them.
func TestTextKeepsTypes(t *testing.T) {
	const text = `
# comment
- claim/a b: "5"
  'yes': 5
  x: [yes, "true", true, 1.50, 2026-01-02, "2026-01-02", 'a: b', "\u2028\x7f\ufeff\U0001F600é", null, ~, "", a-b/c.d_1, -x, .5, <<]
- |
  one
  two
`
	n, fault := document([]byte(text))
	if fault != nil {
		t.Fatal(fault)
	}
	line := Text(n)
	again, fault := document([]byte(line))
	if fault != nil {
		t.Fatalf("%s: %v", line, fault)
	}
	if diff := cmp.Diff(shape(n), shape(again)); diff != "" {
		t.Errorf("%s\n-want +got:\n%s", line, diff)
	}
}

// shape is what of a tree decides about its meaning.
func shape(n *yaml.Node) any {
	if n.Kind == yaml.ScalarNode {
		return n.ShortTag() + " " + n.Value
	}
	out := []any{n.Kind}
	for _, c := range n.Content {
		out = append(out, shape(c))
	}
	return out
}

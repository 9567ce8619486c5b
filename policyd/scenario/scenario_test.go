package scenario

import (
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestFiles runs the rehearsal of Pomerium's documented behaviour and the
// examples of the manual as `sallyport policy test` does.
func TestFiles(t *testing.T) {
	for _, dir := range []string{filepath.Join("testdata", "ppl"), filepath.Join("..", "..", "docs", "examples")} {
		files, err := Find([]string{dir})
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			f, err := Read(name)
			if err != nil {
				t.Error(err)
				continue
			}
			for _, r := range f.Run(Site{Now: time.Now()}) {
				if !r.Passed() {
					t.Errorf("%s:%d: %s: expected %s %s, got %s %s (%v)", name, r.Test.Line, r.Test.Name, r.Test.Expect, r.Test.Rule, r.Got, r.Decision.Rule, r.Err)
				}
			}
		}
	}
}

// TestParseNamesPlaces: whoever wrote a test file wrong learns where.
func TestParseNamesPlaces(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"", "f:1:1: the file is empty"},
		{"tests: [}", "f:1:1: no YAML"},
		{"test: []", `f:1:1: a test file has no key "test"`},
		{"tests: {}", "f:1:8: tests must be a list"},
		{"tests:\n- name: a", "f:2:3: a test without expect"},
		{"tests:\n- expect: allow\n  request: {ip: 10.0.0}", "f:3:17: "},
		{"tests:\n- expect: allow\n  expect: deny", `f:3:3: key "expect" stands twice`},
		{"given: {sessions: [{id: S, created: soon}]}", `f:1:37: "soon" is no time`},
		{"policy_file: none.yaml", "f:1:14: policy_file: "},
	} {
		_, err := Parse("f", []byte(c.text))
		if err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%q: got %v; want %s…", c.text, err, c.want)
		}
	}
}

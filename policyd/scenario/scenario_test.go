package scenario

import (
	"os"
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

// The manual shows the examples as they are, and their tests leave nothing out.
func TestExamplesAreThoseOfTheManual(t *testing.T) {
	manual, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	examples, err := filepath.Glob("../../docs/examples/*.yaml")
	if err != nil || len(examples) == 0 {
		t.Fatalf("no examples (%v)", err)
	}
	for _, name := range examples {
		if strings.HasSuffix(name, suffix) {
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		rules := string(text)
		for strings.HasPrefix(rules, "#") {
			_, rules, _ = strings.Cut(rules, "\n")
		}
		if !strings.Contains(string(manual), "```yaml\n"+rules+"```\n") {
			t.Errorf("docs/policy.md does not show %s as it is", name)
		}
		f, err := Read(strings.TrimSuffix(name, ".yaml") + suffix)
		if err != nil {
			t.Fatal(err)
		}
		var cover Coverage
		f.Run(Site{Now: time.Now(), Coverage: &cover})
		for _, gap := range cover.Gaps() {
			t.Error(gap)
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

package policy

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
)

// What errors show: something to put in quotes, or to write.
var (
	quotesShown = regexp.MustCompile(`put quotes around it: ("(?:[^"\\]|\\.)*")`)
	keyBefore   = regexp.MustCompile(`(?:write|or) ([a-z_/]+): $`)
	valueShown  = regexp.MustCompile(`must be true or false; write (true|false)`)
)

// rewrites returns the policies that a fault's message shows, made whole.
func rewrites(message string) []string {
	var out []string
	if m := quotesShown.FindStringSubmatch(message); m != nil {
		out = append(out, "allow: {and: [{claim/x: "+m[1]+"}]}")
	}
	if m := valueShown.FindStringSubmatch(message); m != nil {
		out = append(out, "allow: {and: [{device: {firewall: "+m[1]+"}}]}")
	}
	for rest := message; ; {
		start := strings.IndexByte(rest, '{')
		if start < 0 || !strings.Contains(message, "write") {
			return out
		}
		end := closing(rest, start)
		text := rest[start : end+1]
		if m := keyBefore.FindStringSubmatch(rest[:start]); m != nil {
			text = "{" + m[1] + ": " + text + "}"
		}
		if !strings.HasPrefix(text, "{allow") && !strings.HasPrefix(text, "{deny") {
			text = "allow: {and: [" + text + "]}"
		}
		out = append(out, text)
		rest = rest[end+1:]
	}
}

// closing is where the brace that opens at i closes; the end if it does not.
func closing(s string, i int) int {
	depth := 0
	for ; i < len(s); i++ {
		switch s[i] {
		case '{':
			depth++
		case '}':
			if depth--; depth == 0 {
				return i
			}
		}
	}
	return len(s) - 1
}

// Every fault that stands in testdata/differences under 5, 6 and 7 shows a
// rewrite, and every rewrite that any golden file shows loads.
func TestDifferencesShowValidRewrites(t *testing.T) {
	files, err := filepath.Glob("testdata/*/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	shown := 0
	for _, file := range files {
		a, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, err = Parse([]byte(section(a, "policy")))
		errs, _ := err.(Errors)
		for _, e := range errs {
			texts := rewrites(e.Message)
			for _, text := range texts {
				shown++
				if _, err := Parse([]byte(text)); err != nil {
					t.Errorf("%s: %v\nshows %s, which does not load: %v", file, e, text, err)
				}
			}
			number := filepath.Base(file)[0]
			if filepath.Base(filepath.Dir(file)) == "differences" && number >= '5' && len(texts) == 0 {
				t.Errorf("%s: %v\nshows no rewrite", file, e)
			}
		}
	}
	if shown < 30 {
		t.Errorf("%d rewrites are shown; want at least 30", shown)
	}
}

func TestCase_I14_removedGroupDenies(t *testing.T) { golden(t, "testdata/groups/removed.txtar") }

func TestCase_I4_confusables(t *testing.T) {
	golden(t, "testdata/groups/confusables.txtar")
	golden(t, "testdata/groups/literal_star.txtar")
	golden(t, "testdata/email/confusables.txtar")
}

func TestCase_K8_versionsInPolicies(t *testing.T) {
	golden(t, "testdata/device/version_above.txtar")
	golden(t, "testdata/device/version_at_least.txtar")
	golden(t, "testdata/device/bad_versions.txtar")
}

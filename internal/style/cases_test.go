package style

import (
	"io/fs"
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	testFunc = regexp.MustCompile(`(?m)^func (Test[A-Za-z0-9_]*)\(`)
	testWord = regexp.MustCompile(`\bTest[A-Z][A-Za-z0-9_]*[A-Za-z0-9]`)
)

// TestSecurityCasesAreListed holds docs/security-cases.md and the tests together:
// a test that stands there exists, and each TestCase_ test stands there.
func TestSecurityCasesAreListed(t *testing.T) {
	root := os.DirFS("../..")
	const document = "docs/security-cases.md"
	text, err := fs.ReadFile(root, document)
	if err != nil {
		t.Fatal(err)
	}
	listed := make(map[string]bool)
	for _, name := range testWord.FindAllString(string(text), -1) {
		listed[name] = true
	}
	exist, err := testsIn(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Sorted(maps.Keys(listed)) {
		if exist[name] == "" {
			t.Errorf("%s: there is no test %s", document, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(exist)) {
		if strings.HasPrefix(name, "TestCase_") && !listed[name] {
			t.Errorf("%s: %s: give it a row in %s", exist[name], name, document)
		}
	}
}

// testsIn returns the names of all tests in the tree, each with a file that has it.
func testsIn(root fs.FS) (map[string]string, error) {
	names := make(map[string]string)
	err := fs.WalkDir(root, ".", func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "testdata" || d.Name() != "." && strings.HasPrefix(d.Name(), ".")):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(path.Base(p), "_test.go"):
			return nil
		}
		text, err := fs.ReadFile(root, p)
		if err != nil {
			return err
		}
		for _, m := range testFunc.FindAllSubmatch(text, -1) {
			names[string(m[1])] = p
		}
		return nil
	})
	return names, err
}

package style

import (
	"os"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
)

// TestTree holds the whole project to its rules.
func TestTree(t *testing.T) {
	faults, err := Check(os.DirFS("../.."), House())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range faults {
		t.Error(f)
	}
}

// TestBrokenTree breaks every rule once, in testdata/broken.txtar, beside what
// must not be taken for a fault.
func TestBrokenTree(t *testing.T) {
	archive, err := txtar.ParseFile("testdata/broken.txtar")
	if err != nil {
		t.Fatal(err)
	}
	tree := fstest.MapFS{}
	var want string
	for _, f := range archive.Files {
		if f.Name == "want" {
			want = string(f.Data)
			continue
		}
		tree[f.Name] = &fstest.MapFile{Data: f.Data}
	}
	got, err := Check(tree, House())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(strings.TrimSpace(want), "\n"), got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Every prefix of the tables is written as Check compares it.
func TestRulesAreWellFormed(t *testing.T) {
	for _, l := range layers {
		for _, p := range append(l.May, l.Prefix) {
			if p == "" || strings.HasPrefix(p, "/") || strings.HasSuffix(p, "/") || strings.HasPrefix(p, "sallyport") {
				t.Errorf("layer %q: prefix %q", l.Prefix, p)
			}
		}
	}
	servers := strings.Fields("agent gateway authd policyd cached")
	rules := &checker{rules: House()}
	for _, a := range servers {
		for _, b := range servers {
			if a != b && rules.mayImport(a, b) {
				t.Errorf("%s may import %s", a, b)
			}
		}
		if rules.mayImport(".", a) || rules.mayImport("internal/x", a) || !rules.mayImport("cmd/x", a) {
			t.Errorf("the wrong packages may import %s", a)
		}
	}
}

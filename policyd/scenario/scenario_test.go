package scenario

import (
	"path/filepath"
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

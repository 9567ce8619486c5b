package sqlite_test

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"testing"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/sqlite"
)

// A store is a database, a log and a marker, and each may be lost, empty, garbage
// or an older one. No combination may pass for a store in which nobody was ever
// revoked, or in which there is nobody: only where none of the three exists is a
// new one made.
func TestCase_L5_NoCombinationOfDamagedPartsStartsEmpty(t *testing.T) {
	files, want := allInTheLog(t)
	garbage := bytes.Repeat([]byte("garbage "), 600)
	states := map[string]func(name string) []byte{ // nil: the file is missing
		"whole":   func(name string) []byte { return files[name] },
		"missing": func(string) []byte { return nil },
		"empty":   func(string) []byte { return []byte{} },
		"garbage": func(string) []byte { return garbage },
		"cut":     func(name string) []byte { return files[name][:len(files[name])/3] },
	}
	names := slices.Sorted(maps.Keys(states))
	for _, database := range names {
		for _, log := range names {
			for _, marker := range names {
				t.Run(fmt.Sprintf("database %s, log %s, marker %s", database, log, marker), func(t *testing.T) {
					image := map[string][]byte{}
					for name, state := range map[string]string{"cached.db": database, "cached.db-wal": log, "cached.db.lock": marker} {
						if text := states[state](name); text != nil {
							image[name] = text
						}
					}
					want := want
					if len(image) == 0 {
						want = content{} // there never was a store
					}
					path := lay(t, t.TempDir(), image)
					for range 2 { // and a second start finds no other state
						store, err := sqlite.Open(path, sqlite.Small())
						if err != nil {
							if c := sallyport.CodeOf(err); c != "storage.corrupt" && c != "storage.rolled_back" && c != "schema.too_new" {
								t.Errorf("refused with %v", err)
							}
							continue
						}
						got, _ := contentOf(t, store)
						_, err = cached.New(cached.Config{}, cached.Deps{Store: store, KEK: key})
						if err == nil && !maps.Equal(got, want) {
							t.Errorf("started with %d rows, not the %d that were written", len(got), len(want))
						}
						if err := store.Close(); err != nil {
							t.Error(err)
						}
					}
				})
			}
		}
	}
}

// allInTheLog returns the files of a store that was not closed, and what it holds:
// the database alone has nothing but the tables.
func allInTheLog(t *testing.T) (map[string][]byte, content) {
	t.Helper()
	path := filled(t, 0)
	store := open(t, path)
	s, err := cached.New(cached.Config{}, cached.Deps{Store: store, KEK: key})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		if _, err := s.Apply(t.Context(), []sallyport.Op{sessionOp(i)}); err != nil {
			t.Fatal(err)
		}
	}
	want, _ := contentOf(t, store)
	return imageOf(t, path), want
}

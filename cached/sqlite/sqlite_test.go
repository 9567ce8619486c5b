package sqlite_test

import (
	"path/filepath"
	"testing"

	"sallyport/cached"
	"sallyport/cached/sqlite"
	"sallyport/cached/storetest"
)

func open(t testing.TB, path string) *sqlite.Store {
	t.Helper()
	s, err := sqlite.Open(path, sqlite.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

func TestStore(t *testing.T) {
	storetest.Store(t, func(t *testing.T) cached.Store { return open(t, filepath.Join(t.TempDir(), "odd #?%20 name.db")) })
}

func TestRecords(t *testing.T) {
	storetest.Records(t, func(t *testing.T) storetest.API {
		return storetest.Serve(t, open(t, filepath.Join(t.TempDir(), "cached.db")))
	})
}

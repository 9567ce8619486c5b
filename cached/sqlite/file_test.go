package sqlite_test

import (
	"bytes"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/sqlite"
	"sallyport/cached/storetest"
)

var key = storetest.KEK()

// serve returns a server over the file and what ends both.
func serve(t testing.TB, path string) (*cached.Server, func()) {
	t.Helper()
	store, err := sqlite.Open(path, sqlite.Small())
	if err != nil {
		t.Fatal(err)
	}
	s, err := cached.New(cached.Config{}, cached.Deps{Store: store, KEK: key})
	if err != nil {
		t.Fatal(err)
	}
	return s, func() {
		t.Helper()
		if err := errors.Join(s.Close(), store.Close()); err != nil {
			t.Error(err)
		}
	}
}

func sessionOp(i int) sallyport.Op {
	id := fmt.Sprint("s", i)
	return sallyport.Put(sallyport.KindSession, id, sallyport.Session{
		ID: sallyport.SessionID(id), User: sallyport.UserID(fmt.Sprint("u", i)), Address: strings.Repeat("a", 200),
	})
}

// filled returns a closed file with n sessions.
func filled(t testing.TB, n int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "cached.db")
	s, end := serve(t, path)
	defer end()
	for i := range n {
		if _, err := s.Apply(t.Context(), []sallyport.Op{sessionOp(i)}); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// inSQL runs a statement behind the store's back.
func inSQL(t testing.TB, path, text string, args ...any) {
	t.Helper()
	db, err := sql.Open("sqlite3", "file:"+path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(text, args...); err != nil {
		t.Fatal(err)
	}
}

func epochOf(t testing.TB, path string) (sallyport.Epoch, sallyport.Revision) {
	t.Helper()
	store, err := sqlite.Open(path, sqlite.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	state, err := store.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return state.Epoch, state.Revision
}

func TestAStoreOpensAsItWasClosed(t *testing.T) {
	path := filled(t, 3)
	epoch, rev := epochOf(t, path)
	if again, _ := epochOf(t, path); again != epoch || rev != 3 {
		t.Errorf("got epoch %s then %s, revision %d; want the same, 3", epoch, again, rev)
	}
	s, end := serve(t, path)
	defer end()
	if _, err := s.Apply(t.Context(), []sallyport.Op{sessionOp(9)}); err != nil {
		t.Fatal(err)
	}
	// A watch from before the restart goes on: the store has what the ring lost.
	var got []string
	stop := errors.New("stop")
	err := s.Watch(t.Context(), sallyport.WatchRequest{Epoch: epoch, Since: 1}, func(ev sallyport.WatchEvent) error {
		for _, r := range ev.Records {
			got = append(got, r.ID)
		}
		if ev.Revision == 4 && ev.Type == sallyport.WatchChange {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || strings.Join(got, " ") != "s1 s2 s9" {
		t.Errorf("got %v, %v; want s1 s2 s9", got, err)
	}
	for _, suffix := range []string{"", "-wal", "-shm", ".lock", ".journal"} {
		info, err := os.Stat(path + suffix)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: got %v, %v; want mode 0600", suffix, info, err)
		}
	}
}

func TestRevisionsAreNeverReused(t *testing.T) {
	path := filled(t, 2)
	store, err := sqlite.Open(path, sqlite.Config{})
	if err != nil {
		t.Fatal(err)
	}
	err = store.Update(t.Context(), func(tx cached.Tx) (cached.Change, error) {
		head := tx.Head()
		head.Revision, head.Compacted = 3, 3
		return cached.Change{Forget: []cached.Key{{Kind: sallyport.KindSession, ID: "s1"}}, Head: head}, nil
	})
	if err := errors.Join(err, store.Close()); err != nil {
		t.Fatal(err)
	}
	if _, rev := epochOf(t, path); rev != 3 {
		t.Errorf("got revision %d after the last row was forgotten; want 3", rev)
	}
}

// Who was revoked since the backup would be let in again.
func TestAnOlderFileIsRefused(t *testing.T) {
	path := filled(t, 3)
	backup := filepath.Join(t.TempDir(), "backup.db")
	inSQL(t, path, `VACUUM INTO ?`, backup)
	s, end := serve(t, path)
	if _, err := s.Revoke(t.Context(), sallyport.Revocation{Subjects: []sallyport.Subject{{Kind: sallyport.SubjectSession, ID: "s0"}}}); err != nil {
		t.Fatal(err)
	}
	end()
	move(t, backup, path)
	refused := func(what string) {
		t.Helper()
		if _, err := sqlite.Open(path, sqlite.Config{}); sallyport.CodeOf(err) != "storage.rolled_back" {
			t.Errorf("%s: got %v; want storage.rolled_back", what, err)
		}
	}
	refused("an older file")
	refused("an older file, a second time")
	move(t, filled(t, 9), path)
	refused("another store's file")
}

func move(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestCase_L5_ADamagedFileIsRefusedAndLeftAlone(t *testing.T) {
	for name, damage := range map[string]func(text []byte) []byte{
		"empty":           func([]byte) []byte { return nil },
		"garbage":         func([]byte) []byte { return bytes.Repeat([]byte("garbage "), 1000) },
		"header only":     func(b []byte) []byte { return b[:100] },
		"first page only": func(b []byte) []byte { return b[:4096] },
		"half":            func(b []byte) []byte { return b[:len(b)/2] },
		"a page less":     func(b []byte) []byte { return b[:len(b)-4096] },
		"a byte":          func([]byte) []byte { return []byte{'S'} },
		"zeros":           func(b []byte) []byte { return make([]byte, len(b)) },
		"middle zeroed":   func(b []byte) []byte { clear(b[len(b)/4 : len(b)/2]); return b },
	} {
		t.Run(name, func(t *testing.T) {
			path := filled(t, 100)
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			damaged := damage(text)
			if err := os.WriteFile(path, damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			for range 2 { // and it does not heal by trying again
				if store, err := sqlite.Open(path, sqlite.Config{}); sallyport.CodeOf(err) != "storage.corrupt" {
					t.Fatalf("got %v, %v; want storage.corrupt", store, err)
				}
			}
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, damaged) {
				t.Errorf("the file was changed (%v)", err)
			}
		})
	}
}

func TestCase_L5_AMissingFileIsRefused(t *testing.T) {
	path := filled(t, 1)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	_, err := sqlite.Open(path, sqlite.Config{})
	var e *sallyport.Error
	if !errors.As(err, &e) || e.Code != "storage.corrupt" || !strings.Contains(e.Hint, path) {
		t.Errorf("got %v; want storage.corrupt with a hint", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v; want no file made", err)
	}
	for _, part := range []string{".lock", ".journal"} { // what the hint says
		if err := os.Remove(path + part); err != nil {
			t.Fatal(err)
		}
	}
	if _, rev := epochOf(t, path); rev != 0 {
		t.Errorf("got revision %d; want a new store", rev)
	}
}

func TestCase_L8_ContentOfAnotherRowDoesNotVerify(t *testing.T) {
	for name, c := range map[string]struct {
		text    string
		refused bool // a code went or came: the sum of the rows does not fit
	}{
		"exchanged":    {`UPDATE record SET (payload, mac) = (SELECT payload, mac FROM record WHERE id = 's1') WHERE id = 's0'`, true},
		"removed":      {`DELETE FROM record WHERE id = 's0'`, true},
		"renamed":      {`UPDATE record SET id = 's7' WHERE id = 's0'`, false},
		"owner hidden": {`UPDATE record SET of_user = '' WHERE id = 's0'`, false},
		"prolonged":    {`UPDATE record SET expires = 1 << 62 WHERE id = 's0'`, false},
		"set back":     {`UPDATE record SET revision = 0 WHERE id = 's0'`, false},
	} {
		t.Run(name, func(t *testing.T) {
			path := filled(t, 2)
			inSQL(t, path, c.text)
			store := open(t, path)
			s, err := cached.New(cached.Config{}, cached.Deps{Store: store, KEK: key})
			if c.refused {
				if sallyport.CodeOf(err) != "storage.rolled_back" {
					t.Errorf("got %v; want storage.rolled_back", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			list, err := s.List(t.Context(), sallyport.KindSession)
			if err != nil || len(list) != 1 || list[0].ID != "s1" {
				t.Errorf("got %v, %v; want s1 alone", list, err)
			}
		})
	}
}

// A row with its code as it stood before it was replaced is genuine: only the
// head knows better.
func TestCase_L8_ARowThatWasPutBackIsRefused(t *testing.T) {
	path := filled(t, 2)
	inSQL(t, path, `CREATE TABLE kept AS SELECT * FROM record WHERE id = 's0'`)
	s, end := serve(t, path)
	if _, err := s.Revoke(t.Context(), sallyport.Revocation{Subjects: []sallyport.Subject{{Kind: sallyport.SubjectSession, ID: "s0"}}}); err != nil {
		t.Fatal(err)
	}
	end()
	inSQL(t, path, `REPLACE INTO record SELECT * FROM kept`)
	if _, err := cached.New(cached.Config{}, cached.Deps{Store: open(t, path), KEK: key}); sallyport.CodeOf(err) != "storage.rolled_back" {
		t.Errorf("got %v; want storage.rolled_back", err)
	}
}

func TestCase_L10_ASecondProcessIsRefused(t *testing.T) {
	path := filled(t, 1)
	_, end := serve(t, path)
	if _, err := sqlite.Open(path, sqlite.Config{}); sallyport.CodeOf(err) != "storage.in_use" {
		t.Errorf("got %v; want storage.in_use", err)
	}
	end()
	epochOf(t, path)
}

func TestCase_J10_ANewerSchemaIsLeftUntouched(t *testing.T) {
	path := filled(t, 1)
	inSQL(t, path, `PRAGMA user_version = 99`)
	sum := func() [32]byte {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return sha256.Sum256(text)
	}
	before := sum()
	_, err := sqlite.Open(path, sqlite.Config{})
	if sallyport.CodeOf(err) != "schema.too_new" || sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
		t.Errorf("got %v; want schema.too_new", err)
	}
	if sum() != before {
		t.Error("the file was changed")
	}
}

func TestAnUnfinishedMakingIsMadeAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cached.db")
	if err := os.WriteFile(path+".new", []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, rev := epochOf(t, path); rev != 0 {
		t.Errorf("got revision %d; want a new store", rev)
	}
	if _, err := os.Stat(path + ".new"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v; want nothing left behind", err)
	}
}

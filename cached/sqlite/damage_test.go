package sqlite_test

import (
	"bytes"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/sqlite"
)

// What somebody who can write to the files may do, or a disk that goes bad: the
// store is refused, or a session counts as revoked. Nobody is let in whom the
// server did not let in, and nothing that is let in differs from what was written.

const damageSessions = 60

// authorised is what policyd would go by: each live session with its payload.
type authorised map[string]string

// damageable returns the files of a store as a process that was killed leaves them,
// half of it in the log, and whom it authorises. A third of the sessions was
// revoked since it had the older files, and some have expired.
func damageable(t *testing.T) (files, older map[string][]byte, want authorised) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "cached.db")
	s, end := serve(t, path)
	defer end()
	want = authorised{}
	for i := range damageSessions {
		op := sessionOp(i)
		switch i % 6 {
		case 0:
			op.Expires = time.Now().Add(time.Millisecond)
		case 1:
			op.Expires = time.Now().Add(time.Hour)
			fallthrough
		default:
			if i%3 != 2 {
				want[op.ID] = string(op.Payload)
			}
		}
		if _, err := s.Apply(t.Context(), []sallyport.Op{op}); err != nil {
			t.Fatal(err)
		}
	}
	inSQL(t, path, `PRAGMA wal_checkpoint`)
	older = imageOf(t, path)
	for i := 2; i < damageSessions; i += 3 {
		subject := sallyport.Subject{Kind: sallyport.SubjectSession, ID: fmt.Sprint("s", i)}
		if _, err := s.Revoke(t.Context(), sallyport.Revocation{Subjects: []sallyport.Subject{subject}}); err != nil {
			t.Fatal(err)
		}
	}
	return imageOf(t, path), older, want
}

// imageOf returns the files of a store, without the one that nobody trusts after a
// crash.
func imageOf(t *testing.T, path string) map[string][]byte {
	t.Helper()
	image := diskOf(t, path).image()
	delete(image, filepath.Base(path)+"-shm")
	return image
}

// judge opens the files and says whom they authorise by each way of reading, and
// whether they were refused.
func judge(t *testing.T, path string) (seen []authorised, refused bool) {
	t.Helper()
	store, err := sqlite.Open(path, sqlite.Small())
	if err != nil {
		if c := sallyport.CodeOf(err); c != "storage.corrupt" && c != "schema.too_new" && c != "storage.rolled_back" {
			t.Errorf("refused with %v; want storage.corrupt or storage.rolled_back", err)
		}
		return nil, true
	}
	defer store.Close() // may find the damage, too
	s, err := cached.New(cached.Config{}, cached.Deps{Store: store, KEK: key})
	if err != nil {
		return nil, true
	}
	got, listed, watched := authorised{}, authorised{}, authorised{}
	for i := range damageSessions {
		if r, err := s.Get(t.Context(), sallyport.KindSession, fmt.Sprint("s", i)); err == nil {
			got[r.ID] = string(r.Payload)
		}
	}
	if list, err := s.List(t.Context(), sallyport.KindSession); err == nil {
		listed.add(list)
	}
	whole := errors.New("whole")
	part := authorised{} // counts only if the snapshot comes to its end
	err = s.Watch(t.Context(), sallyport.WatchRequest{}, func(ev sallyport.WatchEvent) error {
		part.add(ev.Records)
		if ev.Type == sallyport.WatchEnd {
			return whole
		}
		return nil
	})
	if errors.Is(err, whole) {
		watched = part
	}
	return []authorised{got, listed, watched}, false
}

func (a authorised) add(records []sallyport.Record) {
	for _, r := range records {
		if r.Kind == sallyport.KindSession {
			a[r.ID] = string(r.Payload)
		}
	}
}

// outcomes counts what became of damaged stores.
type outcomes struct {
	mu                      sync.Mutex
	refused, shorter, whole int
}

// check judges one damaged store.
func (o *outcomes) check(t *testing.T, what, path string, want authorised) {
	t.Helper()
	seen, refused := judge(t, path)
	shorter := false
	for _, a := range seen {
		for id, payload := range a {
			if want[id] != payload {
				t.Errorf("%s: %s is authorised with %s; want %q", what, id, payload, want[id])
			}
		}
		shorter = shorter || len(a) < len(want)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case refused:
		o.refused++
	case shorter:
		o.shorter++
	default:
		o.whole++
	}
}

func (o *outcomes) String() string {
	return fmt.Sprintf("%d refused, %d with sessions missing, %d whole; no outcome changed", o.refused, o.shorter, o.whole)
}

// eachDamaged checks n copies of the files, each laid into a directory by damage.
func eachDamaged(t *testing.T, n int, files map[string][]byte, want authorised, damage func(i int, dir string) (what string)) {
	t.Helper()
	var o outcomes
	if o.check(t, "undamaged", lay(t, t.TempDir(), files), want); o.whole != 1 {
		t.Fatalf("undamaged: %v", &o)
	}
	var workers sync.WaitGroup
	for w := range 2 {
		workers.Go(func() {
			for i := w; i < n; i += 2 {
				dir, err := os.MkdirTemp(memoryDir(), "damage")
				if err != nil {
					t.Error(err)
					return
				}
				what := damage(i, dir)
				o.check(t, what, filepath.Join(dir, "cached.db"), want)
				if err := os.RemoveAll(dir); err != nil {
					t.Error(err)
				}
			}
		})
	}
	workers.Wait()
	t.Log(&o)
}

func TestCase_L5_AFlippedBitChangesNoOutcome(t *testing.T) {
	files, _, want := damageable(t)
	names := slices.Sorted(maps.Keys(files))
	eachDamaged(t, 1000, files, want, func(i int, dir string) string {
		image, name := maps.Clone(files), names[i%len(names)]
		text := bytes.Clone(image[name])
		if strings.HasSuffix(name, "-wal") {
			text = bytes.TrimRight(text, "\x00") // the room that is reserved holds nothing
		}
		bit := rand.IntN(8 * len(text))
		text[bit/8] ^= 1 << (bit % 8)
		image[name] = text
		lay(t, dir, image)
		return fmt.Sprintf("bit %d of %s", bit, name)
	})
}

// rowColumns are what a row says.
var rowColumns = []string{
	"kind", "id", "version", "revision", "deleted", "expires", "of_login", "of_user", "of_device", "payload", "mac",
}

func TestCase_L8_ExchangedRowsChangeNoOutcome(t *testing.T) {
	files, older, want := damageable(t)
	old := lay(t, t.TempDir(), older)
	inSQL(t, old, `PRAGMA journal_mode = DELETE`) // all in one file, to be attached
	eachDamaged(t, 100, files, want, func(i int, dir string) string {
		path := lay(t, dir, files)
		one, other := rand.IntN(damageSessions), rand.IntN(damageSessions)
		if i%4 == 0 {
			putBack(t, path, old, one)
			return fmt.Sprintf("s%d as it was", one)
		}
		columns := slices.DeleteFunc(slices.Clone(rowColumns), func(string) bool { return rand.IntN(2) == 0 })
		exchange(t, path, one, other, columns)
		return fmt.Sprintf("s%d and s%d exchanged %v", one, other, columns)
	})
}

// putBack replaces a row by what it was in an older file.
func putBack(t *testing.T, path, old string, n int) {
	t.Helper()
	db, err := sql.Open("sqlite3", "file:"+path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	db.SetMaxOpenConns(1) // the attached file belongs to a connection
	if _, err := db.Exec(`ATTACH ? AS old`, old); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec(`REPLACE INTO record SELECT * FROM old.record WHERE kind = 'session' AND id = ?`, fmt.Sprint("s", n)); err != nil {
		t.Fatal(err)
	}
}

// exchange lets two sessions' rows exchange what stands in the columns.
func exchange(t *testing.T, path string, one, other int, columns []string) {
	t.Helper()
	if one == other || len(columns) == 0 {
		return
	}
	both := fmt.Sprintf(`kind = 'session' AND id IN ('s%d', 's%d')`, one, other)
	all, some := strings.Join(rowColumns, ", "), strings.Join(columns, ", ")
	inSQL(t, path, `CREATE TEMP TABLE old AS SELECT * FROM record WHERE `+both+`;
		CREATE TEMP TABLE new AS SELECT * FROM old;
		UPDATE new SET (`+some+`) = (SELECT `+some+` FROM old WHERE old.rowid <> new.rowid);
		DELETE FROM record WHERE `+both+`;
		INSERT INTO record (`+all+`) SELECT `+all+` FROM new`)
}

package sqlite_test

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/memory"
	"sallyport/cached/sqlite"
	"sallyport/internal/keyring"
)

// traceOps is how many operations the traced process has acknowledged.
const traceOps = 100

// traceOp carries out the n-th operation, which makes revision n: each writes a
// pair and a session, and each fourth one revokes the session of the one before.
func traceOp(s *cached.Server, n int) error {
	ctx := context.Background()
	if n%4 == 0 {
		_, err := s.Revoke(ctx, sallyport.Revocation{Subjects: []sallyport.Subject{{Kind: sallyport.SubjectSession, ID: fmt.Sprint("s", n-1)}}})
		return err
	}
	p := pair{n, strings.Repeat("x", n*67%6000)}
	_, err := s.Apply(ctx, []sallyport.Op{
		sallyport.Put(sallyport.KindRecord, fmt.Sprint("left/", n%7), p),
		sallyport.Put(sallyport.KindRecord, fmt.Sprint("right/", n%7), p),
		sessionOp(n),
	})
	return err
}

// writeTrace makes a store, carries the operations out, opening it again in the
// middle, and tells each one that is acknowledged.
func writeTrace(path string) error {
	for n := 1; n <= traceOps; {
		store, err := sqlite.Open(path, sqlite.Small())
		if err != nil {
			return err
		}
		sqlite.CheckpointAt(store, 60) // several times in a hundred operations
		s, err := cached.New(cached.Config{}, cached.Deps{Store: store, KEK: crashKey()})
		if err != nil {
			return err
		}
		for end := n + traceOps*2/3; n <= min(end, traceOps); n++ {
			if err := traceOp(s, n); err != nil {
				return err
			}
			fmt.Println(n)
			if n%9 == 0 {
				if err := store.Maintain(context.Background()); err != nil {
					return err
				}
			}
		}
		if err := store.Close(); err != nil {
			return err
		}
	}
	return nil
}

// content is what a store holds, but for its keys and the codes of its rows, by key.
type content map[cached.Key]string

func contentOf(t testing.TB, store cached.Store) (c content, head cached.Head) {
	t.Helper()
	c = content{}
	err := store.Scan(context.Background(), cached.Query{Tombstones: true}, func(h cached.Head) error {
		head = h
		return nil
	}, func(row cached.Row) error {
		if row.Kind == sallyport.KindKeyring {
			return nil // the server's own, made before the first write
		}
		c[row.Key()] = fmt.Sprintf("%+v %s %+v", row.Record.Revision, row.Payload, row.Deleted)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return c, head
}

// tracedContents returns what a store holds after each number of operations.
func tracedContents(t *testing.T) []content {
	t.Helper()
	store := memory.New()
	s, err := cached.New(cached.Config{}, cached.Deps{Store: store, KEK: crashKey()})
	if err != nil {
		t.Fatal(err)
	}
	after := []content{{}}
	for n := 1; n <= traceOps; n++ {
		if err := traceOp(s, n); err != nil {
			t.Fatal(err)
		}
		c, _ := contentOf(t, store)
		after = append(after, c)
	}
	return after
}

// The power fails at any moment of a hundred operations, of the making of the
// store, of checkpoints and of a restart, and any part of what was not flushed is
// lost: the store opens, everything acknowledged is there, and no operation in part.
func TestCase_L1_L15_EveryCrashImageOpensWhole(t *testing.T) {
	after := tracedContents(t)
	images := replay(t, newDisk(), record(t, "trace", filepath.Join(t.TempDir(), "cached.db")), func(t *testing.T, path string, acked int) error {
		if err := journalHas(path, acked); err != nil {
			return err
		}
		store, err := sqlite.Open(path, sqlite.Small())
		if err != nil {
			return err
		}
		defer store.Close()
		got, head := contentOf(t, store)
		n := int(head.Revision)
		if n < acked || n > min(acked+1, traceOps) {
			return fmt.Errorf("revision is %d; %d was acknowledged", n, acked)
		}
		if !maps.Equal(got, after[n]) {
			return fmt.Errorf("at revision %d there is %v; want %v", n, slices.Sorted(maps.Values(got)), slices.Sorted(maps.Values(after[n])))
		}
		_, err = cached.New(cached.Config{}, cached.Deps{Store: store, KEK: crashKey()})
		return err
	})
	t.Logf("%d images", images)
}

// journalHas checks that every acknowledged operation that ended something is in the
// journal.
func journalHas(path string, acked int) error {
	if acked == 0 {
		return nil // it may not be there yet
	}
	j, err := sqlite.ReadJournal(path, keyring.KEK{})
	if err != nil {
		return err
	}
	for n := 4; n <= acked; n += 4 {
		want := cached.Ending{Key: cached.Key{Kind: sallyport.KindSession, ID: fmt.Sprint("s", n-1)}, Revision: sallyport.Revision(n)}
		if j.After != 0 || !slices.Contains(j.Ended, want) {
			return fmt.Errorf("the journal has %+v; want %+v in it", j, want)
		}
	}
	return nil
}

// A store of the first schema is migrated, and the power fails at any moment of it:
// whoever opens it next finds everything that was there, in today's schema.
func TestCase_L15_AnInterruptedMigrationIsCompleted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cached.db")
	const rows = 50
	oldStore(t, path, rows)
	began := diskOf(t, path)
	images := replay(t, began, record(t, "migrate", path), func(t *testing.T, path string, _ int) error {
		store, err := sqlite.Open(path, sqlite.Small())
		if err != nil {
			return err
		}
		defer store.Close()
		got, head := contentOf(t, store)
		if len(got) != rows || head.Epoch != "e1" || head.Revision != rows || head.Compacted != 7 {
			return fmt.Errorf("got %d rows, %+v", len(got), head)
		}
		return nil
	})
	t.Logf("%d images", images)
}

// openAndClose brings a store to today's schema.
func openAndClose(path string) error {
	store, err := sqlite.Open(path, sqlite.Small())
	if err != nil {
		return err
	}
	return store.Close()
}

// oldStore makes a store as the first version left it.
func oldStore(t *testing.T, path string, rows int) {
	t.Helper()
	db, err := sql.Open("sqlite3", "file:"+path+"?_journal_mode=WAL")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, text := range append(sqlite.Migration(0), fmt.Sprintf(`PRAGMA application_id = %d`, sqlite.ApplicationID),
		`INSERT INTO meta VALUES ('store', 'x'), ('epoch', 'e1'), ('compacted', 7)`) {
		if _, err := db.Exec(text); err != nil {
			t.Fatal(err)
		}
	}
	for n := 1; n <= rows; n++ {
		_, err := db.Exec(`INSERT INTO record (kind, id, version, revision, deleted, expires, of_login, of_user, of_device, payload, mac)
			VALUES ('session', ?, 1, ?, ?, 0, '', ?, '', x'7b7d', x'00')`, fmt.Sprint("s", n), n, n%5 == 0, fmt.Sprint("u", n%3))
		if err != nil {
			t.Fatal(err)
		}
	}
	marker := fmt.Sprintf(`{"store":"x","revision":%d}`, rows)
	if err := os.WriteFile(path+".lock", fmt.Appendf(nil, "%-255s\n", marker), 0o600); err != nil {
		t.Fatal(err)
	}
}

// diskOf is the disk with what lies beside path.
func diskOf(t *testing.T, path string) disk {
	t.Helper()
	d := newDisk()
	names, err := filepath.Glob(path + "*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		n := &node{}
		d.names[name], d.files[n] = n, text
	}
	return d
}

// image is a disk after a crash.
type image struct {
	what  string
	files map[string][]byte
	acked int
}

// replay has each image of a trace that began with a disk checked, those that are
// the same once.
func replay(t *testing.T, began disk, trace []change, check func(t *testing.T, path string, acked int) error) (images int) {
	t.Helper()
	m := machine{seen: began.clone(), durable: began.clone()}
	todo := make(chan image)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for i := range todo {
				checkImage(t, i, check)
			}
		})
	}
	acked, known := 0, map[[sha256.Size]byte]bool{}
	crash := func(what string) {
		m.crashes(func(state string, d disk) {
			i := image{what + ", " + state, d.image(), acked}
			sum := i.sum()
			if known[sum] || t.Failed() {
				return
			}
			if known[sum] = true; len(known)%oneIn == 0 {
				todo <- i
			}
		})
	}
	for n, c := range trace {
		switch c.kind {
		case ack:
			if _, err := fmt.Sscan(c.name, &acked); err != nil {
				t.Error(err)
			}
		case flush: // until here, nothing that was pending had to be on the disk
			crash(fmt.Sprintf("step %d, after %d acknowledged", n, acked))
			m.settle(c.name)
		default:
			m.do(c)
		}
	}
	crash("at the end")
	close(todo)
	workers.Wait()
	return len(known) / oneIn
}

func checkImage(t *testing.T, i image, check func(t *testing.T, path string, acked int) error) {
	dir, err := os.MkdirTemp(memoryDir(), "image")
	if err != nil {
		t.Error(err)
		return
	}
	defer os.RemoveAll(dir)
	if err := check(t, lay(t, dir, i.files), i.acked); err != nil {
		t.Errorf("%s: %v", i.what, err)
	}
}

func (i image) sum() [sha256.Size]byte {
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(i.files)) {
		fmt.Fprintf(h, "%s %d\n", name, len(i.files[name]))
		h.Write(i.files[name])
	}
	return sha256.Sum256(fmt.Appendf(nil, "%d %x", i.acked, h.Sum(nil)))
}

// memoryDir is a directory that needs no disk, if there is one.
func memoryDir() string {
	const shm = "/dev/shm"
	if info, err := os.Stat(shm); errors.Is(err, os.ErrNotExist) || !info.IsDir() {
		return ""
	}
	return shm
}

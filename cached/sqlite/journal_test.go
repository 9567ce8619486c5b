package sqlite_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/sqlite"
	"sallyport/internal/keyring"
)

// smallJournal opens a store whose journal has two halves of 32 KiB.
func smallJournal(t testing.TB, path string, key keyring.KEK) *sqlite.Store {
	t.Helper()
	cfg := sqlite.Small()
	cfg.JournalKey = key
	s, err := sqlite.Open(path, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// end has the store take a change, the next revision, that ends sessions.
func end(t testing.TB, s *sqlite.Store, ids ...string) error {
	t.Helper()
	return s.Update(t.Context(), func(tx cached.Tx) (cached.Change, error) {
		c := cached.Change{Head: tx.Head()}
		c.Head.Revision++
		for _, id := range ids {
			c.Ended = append(c.Ended, ending(id, c.Head.Revision))
		}
		return c, nil
	})
}

func ending(id string, rev sallyport.Revision) cached.Ending {
	return cached.Ending{Key: cached.Key{Kind: sallyport.KindSession, ID: id}, Revision: rev, Marked: rev%2 == 0}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func readJournal(t testing.TB, path string, key keyring.KEK) cached.Journal {
	t.Helper()
	j, err := sqlite.ReadJournal(path, key)
	must(t, err)
	return j
}

func TestCase_L13_TheJournalOutlivesTheDatabase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cached.db")
	var want []cached.Ending
	for round := range 3 { // a restart goes on where the last one ended
		s := smallJournal(t, path, key)
		for range 5 {
			must(t, end(t, s))
			must(t, end(t, s, "a\xff", "b"))
			head, _ := s.Head(t.Context())
			want = append(want, ending("a\xff", head.Revision), ending("b", head.Revision))
		}
		if round < 2 {
			must(t, s.Close())
			continue
		}
		for _, part := range []string{"", "-wal", "-shm", ".lock"} { // not even closed
			must(t, os.Remove(path+part))
		}
		j := readJournal(t, path, key)
		if head, _ := s.Head(t.Context()); !j.Covers(cached.Head{Epoch: head.Epoch}) || j.Reached != head.Revision || !slices.Equal(j.Ended, want) {
			t.Errorf("got %+v; want %v up to %d", j, want, head.Revision)
		}
	}
}

// The journal never grows: what it covers begins later and later, and it has every
// ending since.
func TestTheJournalGoesRound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cached.db")
	s := smallJournal(t, path, key)
	defer s.Close()
	size := func() int64 {
		info, err := os.Stat(path + ".journal")
		must(t, err)
		return info.Size()
	}
	began, turns := size(), map[sallyport.Revision]bool{}
	for n := 1; n <= 1500; n++ {
		must(t, end(t, s, fmt.Sprint("s", n)))
		if n%50 != 0 {
			continue
		}
		j := readJournal(t, path, key)
		turns[j.After] = true
		if j.Reached != sallyport.Revision(n) || len(j.Ended) != n-int(j.After) {
			t.Fatalf("after %d endings: got %d, after %d to %d", n, len(j.Ended), j.After, j.Reached)
		}
		for i, e := range j.Ended {
			if rev := j.After + sallyport.Revision(i) + 1; e != ending(fmt.Sprint("s", rev), rev) {
				t.Fatalf("after %d endings: got %+v in place %d", n, e, i)
			}
		}
	}
	if len(turns) < 3 || size() != began {
		t.Errorf("got %d beginnings, %d bytes of %d; want some, and no more bytes", len(turns), size(), began)
	}
}

// More endings than the journal has room for: it says that it has none of them.
func TestAChangeThatIsTooLargeForTheJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cached.db")
	s := smallJournal(t, path, key)
	defer s.Close()
	must(t, end(t, s, "first"))
	var many []string
	for n := range 3000 {
		many = append(many, fmt.Sprint("session", n))
	}
	must(t, end(t, s, many...))
	must(t, end(t, s, "last"))
	if j := readJournal(t, path, key); j.After != 2 || j.Reached != 3 || len(j.Ended) != 1 {
		t.Errorf("got %+v; want the last one alone", j)
	}
}

func TestTheJournalFollowsTheRecordsKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cached.db")
	next := key.Rotated()
	for _, kek := range []keyring.KEK{key, next} {
		s := smallJournal(t, path, kek)
		must(t, end(t, s, "s"))
		must(t, s.Close())
	}
	if j := readJournal(t, path, next); j.After != 0 || len(j.Ended) != 2 {
		t.Errorf("got %+v; want both endings", j)
	}
	for what, kek := range map[string]keyring.KEK{"another key": keyring.NewKEK(), "no key": {}} {
		if j, err := sqlite.ReadJournal(path, kek); sallyport.CodeOf(err) != "journal.damaged" || len(j.Ended) > 0 {
			t.Errorf("%s: got %+v, %v; want journal.damaged", what, j, err)
		}
	}
}

// A new records key is taken over while the store is open: the old one may go before
// the next start.
func TestTheJournalFollowsANewKeyAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cached.db")
	next := key.Rotated()
	s := smallJournal(t, path, key)
	must(t, end(t, s, "before"))
	must(t, s.SetJournalKey(next))
	must(t, end(t, s, "after"))
	if j := readJournal(t, path, next); j.After != 0 || len(j.Ended) != 2 {
		t.Errorf("got %+v; want both endings", j)
	}
	if j := readJournal(t, path, next.Newest()); j.After == 0 || len(j.Ended) != 1 {
		t.Errorf("without the old key: got %+v; want what came after it", j)
	}
	must(t, s.Close())
}

// Half a group at the end was never acknowledged. Anything else that cannot be read
// makes the journal worth nothing.
func TestADamagedJournalCoversNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cached.db")
	s := smallJournal(t, path, key)
	for n := range 20 {
		must(t, end(t, s, fmt.Sprint("s", n)))
	}
	head, _ := s.Head(t.Context())
	must(t, s.Close())
	whole, err := os.ReadFile(path + ".journal")
	must(t, err)
	last := bytes.LastIndex(whole, []byte("SLPG"))
	ends := len(bytes.TrimRight(whole, "\x00"))
	damage := func(at int) (cached.Journal, error) {
		text := bytes.Clone(whole)
		text[at] ^= 0x20
		must(t, os.WriteFile(path+".journal", text, 0o600))
		return sqlite.ReadJournal(path, key)
	}
	for at := 0; at < ends; at += 1 + at%5 {
		j, err := damage(at)
		switch {
		case at < 8192: // one of the two copies of the header
			if err != nil || len(j.Ended) != 20 {
				t.Fatalf("byte %d: got %d endings, %v; want all", at, len(j.Ended), err)
			}
		case at < last:
			if sallyport.CodeOf(err) != "journal.damaged" || j.Covers(head) {
				t.Fatalf("byte %d: got %+v, %v; want journal.damaged", at, j, err)
			}
		case err != nil || len(j.Ended) != 19:
			t.Fatalf("byte %d of the last group: got %d endings, %v", at, len(j.Ended), err)
		}
	}
	if _, err := damage(last - 1); err == nil {
		t.Fatal("damage went unnoticed")
	}
	s = smallJournal(t, path, key) // and it begins anew
	defer s.Close()
	if j := readJournal(t, path, key); j.After != head.Revision || len(j.Ended) != 0 {
		t.Errorf("got %+v; want nothing, after %d", j, head.Revision)
	}
}

func TestAMissingJournalBeginsAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cached.db")
	s := smallJournal(t, path, key)
	must(t, end(t, s, "s"))
	must(t, s.Close())
	must(t, os.Remove(path+".journal"))
	if _, err := sqlite.ReadJournal(path, key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v; want ErrNotExist", err)
	}
	s = smallJournal(t, path, key)
	defer s.Close()
	must(t, end(t, s, "t"))
	if j := readJournal(t, path, key); j.After != 1 || len(j.Ended) != 1 {
		t.Errorf("got %+v; want one ending after 1", j)
	}
}

// A revocation must happen. Then the journal must not claim to have it.
func TestARevocationHappensWithoutTheJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cached.db")
	s := smallJournal(t, path, key)
	must(t, end(t, s, "s"))
	sqlite.BreakJournal(s)
	must(t, end(t, s, "t"))
	must(t, end(t, s, "u"))
	if _, err := sqlite.ReadJournal(path, key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v; want the journal gone", err)
	}
	must(t, s.Close())
	s = smallJournal(t, path, key)
	defer s.Close()
	if j := readJournal(t, path, key); j.After != 3 || j.Covers(cached.Head{Epoch: j.Epoch, Revision: 2}) {
		t.Errorf("got %+v; want nothing before 3", j)
	}
	sqlite.BreakJournal(s)
	must(t, os.Remove(path+".journal"))
	must(t, os.MkdirAll(path+".journal/in the way", 0o700))
	if err := end(t, s, "v"); !errors.Is(err, cached.ErrBroken) {
		t.Errorf("got %v; want %v", err, cached.ErrBroken)
	}
	must(t, os.RemoveAll(path+".journal"))
}

func TestANewHistoryBeginsANewJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cached.db")
	s := smallJournal(t, path, key)
	defer s.Close()
	must(t, end(t, s, "s"))
	must(t, s.Update(t.Context(), func(cached.Tx) (cached.Change, error) {
		return cached.Change{Head: cached.Head{Epoch: "e2", Revision: 100, Seal: []byte{}}}, nil
	}))
	must(t, end(t, s, "t"))
	if j := readJournal(t, path, key); j.Epoch != "e2" || j.After != 100 || len(j.Ended) != 1 {
		t.Errorf("got %+v; want one ending of e2 after 100", j)
	}
}

func FuzzReadJournal(f *testing.F) {
	path := filepath.Join(f.TempDir(), "cached.db")
	s := smallJournal(f, path, keyring.KEK{})
	for n := range 3 {
		must(f, end(f, s, fmt.Sprint("s", n)))
	}
	must(f, s.Close())
	whole, err := os.ReadFile(path + ".journal")
	must(f, err)
	f.Add(0, []byte("SLPTJRN1"))
	f.Add(8192, []byte("SLPG\x00\x00\x00\x01"))
	f.Add(8192+300, []byte("SLPG\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, at int, patch []byte) {
		text := bytes.Clone(whole)
		if at < 0 || at > len(text) {
			return
		}
		copy(text[at:], patch)
		path := filepath.Join(t.TempDir(), "cached.db")
		must(t, os.WriteFile(path+".journal", text, 0o600))
		j, err := sqlite.ReadJournal(path, keyring.KEK{})
		if err != nil {
			return
		}
		// Nothing stands in it that nobody has written.
		for i, e := range j.Ended {
			if e != ending(fmt.Sprint("s", i), sallyport.Revision(i+1)) {
				t.Errorf("got %+v in place %d", e, i)
			}
		}
	})
}

// What the journal costs a revocation.
func BenchmarkRevocation(b *testing.B) {
	for _, c := range []struct {
		name string
		cfg  sqlite.Config
	}{
		{"Journal", sqlite.Config{JournalKey: key}},
		{"NoJournal", sqlite.NoJournal()},
	} {
		b.Run(c.name, func(b *testing.B) {
			s, err := sqlite.Open(filepath.Join(b.TempDir(), "cached.db"), c.cfg)
			must(b, err)
			defer s.Close()
			for b.Loop() {
				must(b, end(b, s, "s_0123456789abcdefghij"))
			}
		})
	}
}

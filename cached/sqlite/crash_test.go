package sqlite_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/sqlite"
	"sallyport/internal/keyring"
)

var kills = flag.Int("kills", 200/oneIn, "how often TestCase_L1 kills the writing process; `make crash` says 1000")

const crashWriters = 4

// crashKey is the same in the process that writes and in the one that looks.
func crashKey() keyring.KEK {
	kek, err := keyring.ParseKEK([]byte("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"))
	if err != nil {
		panic(err)
	}
	return kek
}

// writeForever writes from several goroutines and tells each acknowledged
// operation on standard output, in one line, after it was acknowledged.
func writeForever(path string) error {
	_, s, end, err := openServed(path)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	tell := func(format string, args ...any) error {
		mu.Lock()
		defer mu.Unlock()
		_, err := fmt.Printf(format+"\n", args...)
		return err
	}
	errs := make(chan error)
	for w := range crashWriters {
		go func() { errs <- crashWriter(s, w, tell) }()
	}
	return errors.Join(<-errs, end())
}

// pair is the payload of two records that are only ever written together.
type pair struct {
	N      int    `json:"n"`
	Filler string `json:"filler"`
}

// crashWriter writes a pair with a rising number again and again, makes a
// session each time, and revokes the one of the time before.
func crashWriter(s *cached.Server, w int, tell func(string, ...any) error) error {
	ctx := context.Background()
	start := 0
	if r, err := s.Get(ctx, sallyport.KindRecord, fmt.Sprint("left/", w)); err == nil {
		p, err := sallyport.Decode[pair](r)
		if err != nil {
			return err
		}
		start = p.N
	} else if !errors.Is(err, sallyport.ErrNotFound) {
		return err
	}
	revoke := func(n int) error {
		id := fmt.Sprintf("s-%d-%d", w, n)
		if _, err := s.Revoke(ctx, sallyport.Revocation{Subjects: []sallyport.Subject{{Kind: sallyport.SubjectSession, ID: id}}}); err != nil {
			return err
		}
		return tell("revoked %d %d", w, n)
	}
	if err := revoke(start - 1); err != nil { // what the process before may not have come to
		return err
	}
	for n := start + 1; ; n++ {
		p := pair{n, strings.Repeat("x", rand.IntN(6000))}
		id := fmt.Sprintf("s-%d-%d", w, n)
		if _, err := s.Apply(ctx, []sallyport.Op{
			sallyport.Put(sallyport.KindRecord, fmt.Sprint("left/", w), p),
			sallyport.Put(sallyport.KindRecord, fmt.Sprint("right/", w), p),
			sallyport.Put(sallyport.KindSession, id, sallyport.Session{ID: sallyport.SessionID(id)}),
		}); err != nil {
			return err
		}
		if err := tell("put %d %d", w, n); err != nil {
			return err
		}
		if err := revoke(n - 1); err != nil {
			return err
		}
	}
}

// ledger is what was acknowledged, as the process that outlives the crashes
// knows it: the last number of each writer.
type ledger struct {
	put, revoked [crashWriters]int
	total        int
}

func TestCase_L1_NothingAcknowledgedIsLostWhenKilled(t *testing.T) {
	var path string
	var l ledger
	var slowest time.Duration
	for i := range *kills {
		if i%100 == 0 { // another store: reading a ledger's all takes longer with each kill
			path, l = filepath.Join(t.TempDir(), "cached.db"), ledger{total: l.total}
		}
		l.run(t, path)
		start := time.Now()
		store, err := sqlite.Open(path, sqlite.Config{})
		took := time.Since(start)
		if err != nil {
			t.Fatalf("kill %d: %v", i, err)
		}
		if slowest = max(slowest, took); took > 2*time.Second {
			t.Errorf("kill %d: opening again took %v; want at most 2 s", i, took)
		}
		l.check(t, store)
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			t.Fatalf("after kill %d", i)
		}
	}
	t.Logf("%d kills, %d operations acknowledged, none lost; opening again took at most %v", *kills, l.total, slowest)
}

// run lets a process write until it has acknowledged a random number of
// operations, kills it, and notes everything it acknowledged.
func (l *ledger) run(t *testing.T, path string) {
	t.Helper()
	left := 1 + rand.IntN(200)
	cmd := helper(t, "write-forever", path)
	_ = l.follow(t, cmd, func() {
		if left--; left == 0 {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	})
	if left > 0 {
		t.Fatalf("the writer ended by itself, %d operations short", left)
	}
}

// follow runs a writer to its end, notes everything it acknowledges, and calls
// each after each operation. It returns how the process ended.
func (l *ledger) follow(t *testing.T, cmd *exec.Cmd, each func()) error {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var what string
		var w, n int
		if _, err := fmt.Sscan(lines.Text(), &what, &w, &n); err != nil {
			break // cut by the kill
		}
		if what == "put" {
			l.put[w] = n
		} else {
			l.revoked[w] = n
		}
		l.total++
		each()
	}
	return cmd.Wait()
}

// check compares the store with what was acknowledged: each writer is at most
// one operation further.
func (l *ledger) check(t *testing.T, store *sqlite.Store) {
	t.Helper()
	s, err := cached.New(cached.Config{}, cached.Deps{Store: store, KEK: crashKey()})
	if err != nil {
		t.Fatal(err)
	}
	list, err := s.List(t.Context(), sallyport.KindSession)
	if err != nil {
		t.Fatal(err)
	}
	sessions := map[string]bool{}
	for _, r := range list {
		sessions[r.ID] = true
	}
	for w := range crashWriters {
		left, right := crashPair(t, s, "left", w), crashPair(t, s, "right", w)
		if left != right {
			t.Errorf("writer %d: a batch is half there: %d and %d", w, left.N, right.N)
		}
		if n := l.put[w]; left.N < n || left.N > n+1 {
			t.Errorf("writer %d: acknowledged %d, stored %d", w, n, left.N)
		}
		l.put[w] = left.N // seen now: the next process goes on from here, and may not lose it either
		for n := 1; n <= left.N; n++ {
			if there := sessions[fmt.Sprintf("s-%d-%d", w, n)]; there && n <= l.revoked[w] {
				t.Errorf("writer %d: session %d was revoked, and is back", w, n)
			} else if !there && n > l.revoked[w]+1 {
				t.Errorf("writer %d: session %d was acknowledged, and is lost", w, n)
			}
		}
	}
}

func crashPair(t *testing.T, s *cached.Server, side string, w int) (p pair) {
	t.Helper()
	r, err := s.Get(t.Context(), sallyport.KindRecord, fmt.Sprintf("%s/%d", side, w))
	if errors.Is(err, sallyport.ErrNotFound) {
		return p
	}
	if err == nil {
		err = json.Unmarshal(r.Payload, &p)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

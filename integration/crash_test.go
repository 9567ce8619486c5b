package integration

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyport"
	"sallyport/integration/stack"
	"sallyport/internal/logging"
	"sallyport/proto/control"
)

var kills = flag.Int("kills", 25, "how often TestCrash kills cached")

// ledger is what cached has acknowledged, kept by this process. Each writer has
// slots, of perBatch records that are only ever written together, which it writes
// again and again; with each batch it makes a session, and then revokes the one of
// the batch before.
type ledger struct {
	mu      sync.Mutex
	slots   map[string]slot
	revoked map[string]bool // sessions: true once that was acknowledged
	writes  int             // batches acknowledged
	maybe   int             // batches sent, and not acknowledged when cached died
	newest  sallyport.Revision
	floor   sallyport.Revision // newest at the last start: every later one is above
}

// slot is what its records may hold.
type slot struct {
	acked, sent string             // batches; sent is empty if acked is the last one
	revision    sallyport.Revision // of acked
}

const (
	perBatch = 3
	slots    = 64 // of each writer
)

// TestCrash_NothingAcknowledgedIsLost kills cached under load again and again.
// After each start, every acknowledged batch is there, whole and as it was
// written, of those that were not acknowledged none is there in part, and no
// session that was revoked is back. After
// the last one, policyd follows and people connect and log in as before.
func TestCrash_NothingAcknowledgedIsLost(t *testing.T) {
	w := newWorld(t, stack.Apart)
	socket := "unix:" + w.Ready("cached").Cached.Socket
	alice := w.loggedIn(t, "alice")
	l := &ledger{slots: map[string]slot{}, revoked: map[string]bool{}}
	for n := range *kills {
		ctx, stop := context.WithCancel(t.Context())
		var writers sync.WaitGroup
		for writer := range 4 {
			writers.Go(func() { l.write(ctx, t, socket, writer, n) })
		}
		before := l.count()
		stack.Eventually(t, 20*time.Second, func() error { // load, before it is killed in the midst of it
			if l.count() < before+20+n%50 {
				return errors.New("too few writes")
			}
			return nil
		})
		w.Daemon("cached").Signal(syscall.SIGKILL)
		stop()
		writers.Wait()
		w.Daemon("cached").Wait(10 * time.Second)
		began := time.Now()
		w.StartDaemon("cached")
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("kill %d: cached was back after %s; want at most 2 s", n, took)
		}
		l.check(t, socket, n)
	}
	t.Logf("%d kills, %d batches of %d and %d revocations acknowledged, %d not; none lost", *kills, l.writes, perBatch+1, len(l.revoked), l.maybe)

	recovers(t, alice) // without a new login
	_, live := openConn(t, alice)
	began := time.Now()
	w.Operator("sessions", "revoke", "--config", w.File, "--user", "alice")
	if took := stack.CutWithin(t, live, 10*time.Second).Sub(began); took > bound {
		t.Errorf("cut %s after a revocation; want less than %s", took, bound)
	}
	c := w.loggedIn(t, "bob").Connect("reply.internal:7").Dial(t)
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(c); err != nil || len(answer) == 0 {
		t.Errorf("bob, who has just logged in, got %q, %v", answer, err)
	}
}

func (l *ledger) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.writes
}

// write applies batches until ctx ends or cached is gone.
func (l *ledger) write(ctx context.Context, t *testing.T, socket string, writer, kill int) {
	client, err := control.Dial([]string{socket}, nil, logging.Discard())
	if err != nil {
		t.Error(err)
		return
	}
	defer client.Close()
	before := ""
	for i := 0; ctx.Err() == nil; i++ {
		name, batch := fmt.Sprintf("%d-%d", writer, i%slots), fmt.Sprintf("crash-%d-%d-%d", kill, writer, i)
		l.send(name, batch)
		ops := []sallyport.Op{sallyport.Put(sallyport.KindSession, batch, sallyport.Session{ID: sallyport.SessionID(batch)})}
		for part := range perBatch {
			ops = append(ops, sallyport.Put(sallyport.KindRecord, fmt.Sprintf("crash/%s/%d", name, part), crashed{name, batch}))
		}
		revision, err := client.Records().Apply(ctx, ops)
		l.note(t, name, batch, revision, err)
		if err == nil && before != "" {
			_, err = client.Records().Revoke(ctx, sallyport.Revocation{Subjects: []sallyport.Subject{{Kind: sallyport.SubjectSession, ID: before}}})
			l.noteRevoked(before, err)
		}
		if err != nil {
			return
		}
		before = batch
	}
}

// crashed is the payload of each record of a batch.
type crashed struct {
	Slot  string `json:"slot"`
	Batch string `json:"batch"`
}

// send enters that a batch is on its way.
func (l *ledger) send(name, batch string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.slots[name]
	s.sent = batch
	l.slots[name] = s
}

// note enters what became of it.
func (l *ledger) note(t *testing.T, name, batch string, revision sallyport.Revision, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.maybe++
		return
	}
	if revision <= l.floor {
		t.Errorf("revision %d was given out again; %d was before the last start", revision, l.floor)
	}
	l.writes++
	l.newest = max(l.newest, revision)
	l.slots[name] = slot{acked: batch, revision: revision}
}

func (l *ledger) noteRevoked(session string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.revoked[session] = err == nil
}

// check compares what is there with the ledger.
func (l *ledger) check(t *testing.T, socket string, n int) {
	t.Helper()
	client, err := control.Dial([]string{socket}, nil, logging.Discard())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	records, err := client.Records().List(ctx, sallyport.KindRecord)
	if err != nil {
		t.Fatalf("kill %d: %v", n, err)
	}
	sessions, err := client.Records().List(ctx, sallyport.KindSession)
	if err != nil {
		t.Fatalf("kill %d: %v", n, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.floor = l.newest
	l.checkSlots(t, n, records)
	live := map[string]bool{}
	for _, r := range sessions {
		if live[r.ID] = true; l.revoked[r.ID] {
			t.Fatalf("kill %d: session %s was revoked, and is back", n, r.ID)
		}
	}
	for name, s := range l.slots {
		if _, touched := l.revoked[s.acked]; s.acked != "" && !touched && !live[s.acked] {
			t.Fatalf("kill %d: session %s of slot %s was acknowledged, and is lost", n, s.acked, name)
		}
	}
}

// checkSlots finds out which batch each slot holds: the last one acknowledged, or
// the one that was sent after it, and that one from now on.
func (l *ledger) checkSlots(t *testing.T, n int, records []sallyport.Record) {
	t.Helper()
	there := map[string]map[slot]int{} // slot → what stands there → how many records
	for _, r := range records {
		p, err := sallyport.Decode[crashed](r)
		if err != nil {
			t.Fatalf("kill %d: %s holds %q", n, r.ID, r.Payload)
		}
		if there[p.Slot] == nil {
			there[p.Slot] = map[slot]int{}
		}
		there[p.Slot][slot{acked: p.Batch, revision: r.Revision}]++
	}
	for name, want := range l.slots {
		last, held := slot{acked: want.acked, revision: want.revision}, there[name]
		if want.acked == "" && len(held) == 0 || held[last] == perBatch {
			l.slots[name] = last
			continue
		}
		for got, parts := range held {
			if got.acked != want.sent || parts != perBatch {
				t.Fatalf("kill %d: slot %s holds %v; want %d of %+v", n, name, held, perBatch, want)
			}
			l.slots[name] = got
		}
		if len(held) == 0 {
			t.Fatalf("kill %d: slot %s is empty; want %+v", n, name, want)
		}
	}
}

// One flush of cached's log fails, and would succeed if it was tried again: cached
// ends at once, and whoever starts it again finds everything acknowledged.
func TestCase_L4_AFailedFlushEndsCached(t *testing.T) {
	w := newWorld(t, stack.Apart)
	cached := w.Daemon("cached")
	socket := w.Ready("cached").Cached.Socket
	l := &ledger{slots: map[string]slot{}, revoked: map[string]bool{}}
	strace := stack.StartProcess(t, stack.Command{Program: "strace", Args: []string{
		"-f", "-p", strconv.Itoa(cached.Pid), "-e", "signal=none", "-P", filepath.Join(filepath.Dir(socket), "cached.db-wal"),
		"-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO:when=20",
	}})
	stack.Eventually(t, 10*time.Second, func() error {
		if !strings.Contains(strace.Stderr(), "attached") {
			return errors.New("strace is not attached")
		}
		return nil
	})
	l.write(t.Context(), t, "unix:"+socket, 0, 0) // until cached is gone
	if code := cached.Wait(20 * time.Second); code != 1 {
		t.Errorf("cached ended with exit code %d; want 1\n%s", code, cached.Stderr())
	}
	strace.Wait(10 * time.Second)
	if _, after, injected := strings.Cut(strace.Stderr(), "(INJECTED)"); !injected || strings.Contains(after, "sync(") {
		t.Errorf("the log was flushed again after the error:\n%s", strace.Stderr())
	}
	if !strings.Contains(cached.Stderr(), "storage.failed") && !strings.Contains(cached.Stderr(), "the record store failed") {
		t.Errorf("cached did not say why it ended:\n%s", cached.Stderr())
	}
	w.StartDaemon("cached")
	l.check(t, "unix:"+socket, 0)
}

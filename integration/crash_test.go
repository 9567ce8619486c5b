package integration

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
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

// ledger is what cached has acknowledged, kept by this process.
type ledger struct {
	mu     sync.Mutex
	acked  map[string]written // by id: what must be there
	maybe  int                // batches sent, and not acknowledged when cached died
	writes int                // batches acknowledged
	newest sallyport.Revision // of them
	floor  sallyport.Revision // newest at the last start: every later one is above
}

type written struct {
	payload  string
	revision sallyport.Revision
}

const perBatch = 3

// TestCrash_NothingAcknowledgedIsLost kills cached under load again and again.
// After each start, every acknowledged batch is there, whole and as it was
// written, and of those that were not acknowledged none is there in part. After
// the last one, policyd follows and people connect and log in as before.
func TestCrash_NothingAcknowledgedIsLost(t *testing.T) {
	w := newWorld(t, stack.Apart)
	socket := "unix:" + w.Ready("cached").Cached.Socket
	alice := w.loggedIn(t, "alice")
	l := &ledger{acked: map[string]written{}}
	for n := range *kills {
		ctx, stop := context.WithCancel(t.Context())
		var writers sync.WaitGroup
		for writer := range 4 {
			writers.Go(func() { l.write(ctx, t, socket, fmt.Sprintf("%d-%d", n, writer)) })
		}
		before := l.count()
		stack.Eventually(t, 20*time.Second, func() error { // load, before it is killed in the midst of it
			if l.count() < before+20+n {
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
	t.Logf("%d kills, %d batches of %d acknowledged, %d not; none lost", *kills, l.writes, perBatch, l.maybe)

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
func (l *ledger) write(ctx context.Context, t *testing.T, socket, name string) {
	client, err := control.Dial([]string{socket}, nil, logging.Discard())
	if err != nil {
		t.Error(err)
		return
	}
	defer client.Close()
	for i := 0; ctx.Err() == nil; i++ {
		var batch []sallyport.Op
		sent := map[string]string{}
		for part := range perBatch {
			id := fmt.Sprintf("crash/%s-%d-%d", name, i, part)
			op := sallyport.Put(sallyport.KindRecord, id, map[string]string{"batch": fmt.Sprintf("%s-%d", name, i)})
			batch, sent[id] = append(batch, op), string(op.Payload)
		}
		revision, err := client.Records().Apply(ctx, batch)
		l.note(t, sent, revision, err)
		if err != nil {
			return
		}
	}
}

// note enters what became of a batch.
func (l *ledger) note(t *testing.T, sent map[string]string, revision sallyport.Revision, err error) {
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
	for id, payload := range sent {
		l.acked[id] = written{payload, revision}
	}
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
	there, batches := map[string]written{}, map[string]int{}
	for _, r := range records {
		there[r.ID] = written{string(r.Payload), r.Revision}
		var p struct{ Batch string }
		if err := json.Unmarshal(r.Payload, &p); err != nil {
			t.Fatalf("kill %d: %s holds %q", n, r.ID, r.Payload)
		}
		batches[p.Batch]++
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.floor = l.newest
	for id, want := range l.acked {
		if got := there[id]; got != want {
			t.Fatalf("kill %d: %s was acknowledged and is %+v; want %+v", n, id, got, want)
		}
	}
	for batch, parts := range batches {
		if parts != perBatch {
			t.Fatalf("kill %d: %d of %d records of batch %s are there", n, parts, perBatch, batch)
		}
	}
}

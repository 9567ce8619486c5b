package storetest

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
)

// Cases of a server over the engine, where what the server promises rests on what
// the engine keeps.

// clock is a server's that a test may put forward.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

func (c *clock) add(d time.Duration) { c.ahead.Add(int64(d)) }

// forgotten puts the clock forward until tombstones up to rev are gone.
func (c *clock) forgotten(t *testing.T, s cached.Store, rev sallyport.Revision) {
	t.Helper()
	eventually(t, "old tombstones are forgotten", func() bool {
		c.add(time.Minute)
		head, err := s.Head(t.Context())
		return err == nil && head.Compacted >= rev
	})
}

func servedCompacted(t *testing.T, e *engine) {
	var ahead clock
	deps := cached.Deps{Store: e.Store, MACKey: Key(), Now: ahead.now}
	s, stop := start(t, deps)
	awaitCurrent(t, s)
	c := &client{t, s}
	put := c.apply(user("a"), user("b"))
	deleted := c.apply(remove(sallyport.KindUser, "a"))
	epoch := e.head().Epoch
	ahead.forgotten(t, e.Store, deleted)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Get(t.Context(), sallyport.KindUser, "a"); !errors.Is(err, sallyport.ErrNotFound) {
		t.Errorf("got %v; want no trace of what was forgotten", err)
	}
	again := Run(t, deps) // one that remembers nothing
	err := again.Watch(t.Context(), sallyport.WatchRequest{Epoch: epoch, Since: put}, func(ev sallyport.WatchEvent) error {
		return fmt.Errorf("got event %d", ev.Type)
	})
	if !errors.Is(err, sallyport.ErrCompacted) {
		t.Errorf("got %v; want ErrCompacted", err)
	}
	records, _ := (&client{t, again}).watch(sallyport.WatchRequest{}).snapshot()
	same(t, names(records), []string{"b"})
}

func servedCloses(t *testing.T, e *engine) {
	s, stop := start(t, cached.Deps{Store: e.Store, MACKey: Key()})
	awaitCurrent(t, s)
	c := &client{t, s}
	w := c.watch(sallyport.WatchRequest{})
	w.snapshot()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-w.done:
		w.done <- err
		if sallyport.CodeOf(err) != "storage.closed" {
			t.Errorf("got %v; want storage.closed", err)
		}
	case <-time.After(within):
		t.Error("the watch goes on")
	}
	if _, err := s.Apply(t.Context(), []sallyport.Op{user("a")}); sallyport.CodeOf(err) != "storage.closed" {
		t.Errorf("got %v; want storage.closed", err)
	}
}

func servedLosesLease(t *testing.T, e *engine) {
	s, stop := start(t, cached.Deps{Store: e.Store, MACKey: Key()})
	err := s.Lease(t.Context(), "x", time.Minute, func(held context.Context) error {
		if err := stop(); err != nil {
			return err
		}
		select {
		case <-held.Done():
			return nil
		case <-time.After(within):
			return errors.New("the holder goes on")
		}
	})
	if err != nil {
		t.Error(err)
	}
}

// What clients send becomes ids and owners, whatever bytes it has.
func storeAnyBytes(t *testing.T, s *engine) {
	odd := "\x80\xff\u0000\u2028'\\"
	want := row(sallyport.KindSession, odd, 1, owned(cached.Owner{Login: sallyport.LoginID(odd), User: "\x00", Device: "\xc3("}))
	s.write(want)
	got, err := s.Get(t.Context(), sallyport.KindSession, odd)
	if err != nil {
		t.Fatal(err)
	}
	same(t, got, want)
	if _, err := s.Get(t.Context(), sallyport.KindSession, "\x80"); !errors.Is(err, sallyport.ErrNotFound) {
		t.Errorf("got %v; want ErrNotFound", err)
	}
	s.update(func(tx cached.Tx) cached.Change {
		rows, err := tx.Owned(cached.Owner{User: "\x00"})
		if err != nil {
			t.Fatal(err)
		}
		same(t, ids(rows), []string{odd})
		return cached.Change{}
	})
}

func storeManyRows(t *testing.T, s *engine) {
	const n = 10_000
	rows := make([]cached.Row, n)
	keys := make([]cached.Key, n)
	for i := range rows {
		rows[i] = row(sallyport.KindUser, fmt.Sprint("u", i), sallyport.Revision(i+1))
		keys[i] = rows[i].Key()
	}
	s.write(rows...)
	if got := len(s.scan()); got != n {
		t.Errorf("got %d rows; want %d", got, n)
	}
	s.update(func(tx cached.Tx) cached.Change {
		found, err := tx.Rows(keys...)
		if err != nil || len(found) != n {
			t.Errorf("got %d rows, %v; want %d", len(found), err, n)
		}
		return cached.Change{Forget: keys, Head: tx.Head()}
	})
	same(t, s.scan(), []cached.Row{})
}

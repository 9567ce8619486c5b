package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"sallyport"
)

var watchCases = []recordsCase{
	{"a watch of an empty store begins and ends", watchEmpty},
	{"a snapshot has the live records in parts, then come changes", watchSnapshot},
	{"secrets are never streamed", watchSecrets},
	{"a watch sees the kinds it asked for", watchKinds},
	{"kinds that are not streamed cannot be watched", watchRefused},
	{"a batch comes in one piece", watchPieces},
	{"a waiting watch is woken at once", watchWakes},
	{"heartbeats come each second", watchHeartbeats},
	{"a watch goes on where it was", watchContinues},
	{"a watch cannot go on from elsewhere", watchCompacted},
	{"a watch ends with its context or its receiver", watchEnds},
	{"snapshot and changes under load have no gap and no double", watchUnderLoad},
}

// watcher runs a watch and hands over its events.
type watcher struct {
	t      *testing.T
	events chan sallyport.WatchEvent
	cancel context.CancelFunc
	done   chan error
}

func (c *client) watch(q sallyport.WatchRequest) *watcher {
	ctx, cancel := context.WithCancel(context.Background())
	w := &watcher{c.t, make(chan sallyport.WatchEvent), cancel, make(chan error, 1)}
	go func() {
		w.done <- c.Watch(ctx, q, func(ev sallyport.WatchEvent) error {
			select {
			case w.events <- ev:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	c.t.Cleanup(func() { w.stop() })
	return w
}

// stop ends the watch and returns its error.
func (w *watcher) stop() error {
	w.t.Helper()
	w.cancel()
	select {
	case err := <-w.done:
		w.done <- err
		return err
	case <-time.After(within):
		w.t.Error("the watch does not end with its context")
		return nil
	}
}

func (w *watcher) next() sallyport.WatchEvent {
	w.t.Helper()
	select {
	case ev := <-w.events:
		return ev
	case err := <-w.done:
		w.done <- err
		w.t.Fatalf("the watch ended: %v", err)
	case <-time.After(within):
		w.t.Fatal("no event")
	}
	panic("unreachable")
}

// until skips events until ok says yes to one, and returns that.
func (w *watcher) until(ok func(sallyport.WatchEvent) bool) sallyport.WatchEvent {
	w.t.Helper()
	deadline := time.Now().Add(within)
	for time.Now().Before(deadline) {
		if ev := w.next(); ok(ev) {
			return ev
		}
	}
	w.t.Fatal("the event does not come")
	panic("unreachable")
}

// change skips heartbeats.
func (w *watcher) change() sallyport.WatchEvent {
	w.t.Helper()
	ev := w.until(func(ev sallyport.WatchEvent) bool { return ev.Type != sallyport.WatchHeartbeat })
	if ev.Type != sallyport.WatchChange {
		w.t.Fatalf("got event %+v; want a change", ev)
	}
	return ev
}

func isType(typ sallyport.WatchEventType) func(sallyport.WatchEvent) bool {
	return func(ev sallyport.WatchEvent) bool { return ev.Type == typ }
}

// snapshot reads Begin, Items and End.
func (w *watcher) snapshot() (records []sallyport.Record, end sallyport.WatchEvent) {
	w.t.Helper()
	begin := w.next()
	if begin.Type != sallyport.WatchBegin || begin.Epoch == "" {
		w.t.Fatalf("got %+v; want the begin of a snapshot", begin)
	}
	for {
		ev := w.next()
		if ev.Epoch != begin.Epoch || ev.Revision != begin.Revision {
			w.t.Fatalf("got %+v in the snapshot that began with %+v", ev, begin)
		}
		switch {
		case ev.Type == sallyport.WatchItems && len(ev.Records) > 0 && len(ev.Records) <= 500:
			records = append(records, ev.Records...)
		case ev.Type == sallyport.WatchEnd && ev.Count == len(records):
			return records, ev
		default:
			w.t.Fatalf("got event %d with %d records and count %d after %d items", ev.Type, len(ev.Records), ev.Count, len(records))
		}
	}
}

func names(records []sallyport.Record) []string {
	list := []string{}
	for _, r := range records {
		list = append(list, r.ID)
	}
	slices.Sort(list)
	return list
}

func watchEmpty(t *testing.T, c *client) {
	w := c.watch(sallyport.WatchRequest{})
	records, _ := w.snapshot()
	same(t, names(records), []string{})
	rev := c.apply(user("a"))
	if ev := w.change(); ev.Revision != rev || len(ev.Records) != 1 || ev.Records[0].ID != "a" {
		t.Errorf("got %+v; want a at %d", ev, rev)
	}
}

func watchSnapshot(t *testing.T, c *client) {
	want := []string{}
	var batch []sallyport.Op
	for i := range 1234 {
		id := fmt.Sprintf("u%04d", i)
		batch, want = append(batch, user(id)), append(want, id)
	}
	c.apply(batch...)
	c.apply(user("deleted"), ending(user("past"), time.Now().Add(-time.Minute)))
	last := c.apply(remove(sallyport.KindUser, "deleted"))
	w := c.watch(sallyport.WatchRequest{})
	records, end := w.snapshot()
	same(t, names(records), want)
	if end.Revision < last {
		t.Errorf("got a snapshot at %d; want at least %d", end.Revision, last)
	}
	rev := c.apply(remove(sallyport.KindUser, "u0000"))
	ev := w.until(func(ev sallyport.WatchEvent) bool {
		return ev.Type == sallyport.WatchChange && ev.Records[0].ID != "past" // swept meanwhile
	})
	if r := ev.Records[0]; ev.Revision != rev || r.ID != "u0000" || !r.Deleted || len(r.Payload) > 0 || r.Revision != rev {
		t.Errorf("got %+v; want the tombstone of u0000 at %d", ev, rev)
	}
}

func watchSecrets(t *testing.T, c *client) {
	secrets := func(id string) []sallyport.Op {
		return []sallyport.Op{
			{Kind: sallyport.KindCode, ID: id, Payload: []byte(`"secret"`)},
			{Kind: sallyport.KindIDPToken, ID: id, Payload: []byte("secret")},
			{Kind: sallyport.KindAuditHead, ID: id, Payload: []byte("{}")},
		}
	}
	c.apply(append(secrets("before"), user("u"))...)
	w := c.watch(sallyport.WatchRequest{})
	records, _ := w.snapshot()
	same(t, names(records), []string{"u"})
	c.apply(secrets("alone")...)
	rev := c.apply(append(secrets("mixed"), user("v"))...)
	if ev := w.change(); ev.Revision != rev || len(ev.Records) != 1 || ev.Records[0].ID != "v" {
		t.Errorf("got %+v; want v alone at %d", ev, rev)
	}
}

func watchKinds(t *testing.T, c *client) {
	device := func(id string) sallyport.Op { return sallyport.Put(sallyport.KindDevice, id, sallyport.Device{}) }
	c.apply(user("u1"), device("d1"))
	w := c.watch(sallyport.WatchRequest{Kinds: []sallyport.Kind{sallyport.KindDevice, sallyport.KindTrust}})
	records, _ := w.snapshot()
	same(t, names(records), []string{"d1"})
	c.apply(user("u2"))
	rev := c.apply(user("u3"), device("d2"))
	if ev := w.change(); ev.Revision != rev || len(ev.Records) != 1 || ev.Records[0].ID != "d2" {
		t.Errorf("got %+v; want d2 alone at %d", ev, rev)
	}
}

func watchRefused(t *testing.T, c *client) {
	for _, kind := range []sallyport.Kind{sallyport.KindCode, sallyport.KindIDPToken, sallyport.KindLease, ""} {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		err := c.Watch(ctx, sallyport.WatchRequest{Kinds: []sallyport.Kind{sallyport.KindUser, kind}},
			func(ev sallyport.WatchEvent) error { return fmt.Errorf("got event %d", ev.Type) })
		if err == nil || ctx.Err() != nil || err.Error() == "got event 1" {
			t.Errorf("%q: got %v; want it refused", kind, err)
		}
		cancel()
	}
}

func watchPieces(t *testing.T, c *client) {
	w := c.watch(sallyport.WatchRequest{})
	w.snapshot()
	var batch []sallyport.Op
	for i := range 700 { // more than a part of a snapshot
		batch = append(batch, user(fmt.Sprint("u", i)))
	}
	rev := c.apply(batch...)
	if ev := w.change(); ev.Revision != rev || len(ev.Records) != len(batch) {
		t.Errorf("got %d records at %d; want %d at %d", len(ev.Records), ev.Revision, len(batch), rev)
	}
}

func watchWakes(t *testing.T, c *client) {
	w := c.watch(sallyport.WatchRequest{})
	w.snapshot()
	best := within
	for i := range 5 {
		start := time.Now()
		c.apply(user(fmt.Sprint("u", i)))
		w.change()
		best = min(best, time.Since(start))
	}
	if best > 500*time.Millisecond {
		t.Errorf("the quickest of five changes took %v; want it at once, not with the next heartbeat", best)
	}
}

func watchHeartbeats(t *testing.T, c *client) {
	rev := c.apply(user("a"))
	w := c.watch(sallyport.WatchRequest{})
	w.snapshot()
	start := time.Now()
	for range 2 {
		if ev := w.next(); ev.Type != sallyport.WatchHeartbeat || ev.Revision < rev || ev.Epoch == "" {
			t.Errorf("got %+v; want a heartbeat at %d", ev, rev)
		}
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("two heartbeats took %v; want one each second", took)
	}
	// What nobody sees counts, too.
	rev = c.apply(sallyport.Op{Kind: sallyport.KindCode, ID: "c"})
	w.until(func(ev sallyport.WatchEvent) bool { return ev.Type == sallyport.WatchHeartbeat && ev.Revision >= rev })
}

func watchContinues(t *testing.T, c *client) {
	c.apply(user("a"))
	_, end := c.watch(sallyport.WatchRequest{}).snapshot()
	var want []sallyport.Revision
	for i := range 5 {
		want = append(want, c.apply(user(fmt.Sprint("u", i)), user("again")))
	}
	w := c.watch(sallyport.WatchRequest{Epoch: end.Epoch, Since: end.Revision})
	if ev := w.next(); ev.Type != sallyport.WatchEnd || ev.Revision != end.Revision || ev.Epoch != end.Epoch || ev.Count != 0 {
		t.Fatalf("got %+v; want an end at %d", ev, end.Revision)
	}
	for _, rev := range want {
		if ev := w.change(); ev.Revision != rev || len(ev.Records) != 2 {
			t.Errorf("got %d records at %d; want 2 at %d", len(ev.Records), ev.Revision, rev)
		}
	}
}

func watchCompacted(t *testing.T, c *client) {
	rev := c.apply(user("a"))
	_, end := c.watch(sallyport.WatchRequest{}).snapshot()
	for name, q := range map[string]sallyport.WatchRequest{
		"another epoch": {Epoch: "e-OTHER", Since: rev},
		"no epoch":      {Since: rev},
		"the future":    {Epoch: end.Epoch, Since: end.Revision + 1000},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		err := c.Watch(ctx, q, func(sallyport.WatchEvent) error { return nil })
		if !errors.Is(err, sallyport.ErrCompacted) {
			t.Errorf("%s: got %v; want ErrCompacted", name, err)
		}
		cancel()
	}
}

func watchEnds(t *testing.T, c *client) {
	c.apply(user("a"))
	for _, at := range []sallyport.WatchEventType{sallyport.WatchBegin, sallyport.WatchItems, sallyport.WatchEnd, sallyport.WatchHeartbeat} {
		stop := errors.New("stop")
		err := c.Watch(t.Context(), sallyport.WatchRequest{}, func(ev sallyport.WatchEvent) error {
			if ev.Type == at {
				return stop
			}
			return nil
		})
		if !errors.Is(err, stop) {
			t.Errorf("at event %d: got %v; want the receiver's error", at, err)
		}
	}
	w := c.watch(sallyport.WatchRequest{})
	w.snapshot()
	if err := w.stop(); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v; want context.Canceled", err)
	}
}

// Writers go on while watches start at different moments; each must come to the
// same state as the store.
func watchUnderLoad(t *testing.T, c *client) {
	const writers, batches, watches = 4, 48, 6
	final := make(chan sallyport.Revision)
	var writing, watching sync.WaitGroup
	for g := range writers {
		writing.Go(func() {
			for i := range batches {
				c.loadBatch(g, i)
				if g == 0 && i%(batches/watches) == 0 {
					watching.Go(func() {
						if err := c.follow(t, final); err != nil {
							t.Error(err)
						}
					})
				}
			}
		})
	}
	writing.Wait()
	rev := c.apply(user("final"))
	for range watches {
		select {
		case final <- rev:
		case <-time.After(within):
			t.Fatal("a watch does not go on")
		}
	}
	watching.Wait()
}

// loadBatch writes pairs that must always be seen together, and deletes some.
func (c *client) loadBatch(g, i int) {
	c.t.Helper()
	n := fmt.Sprintf("%d/%d", g, i%7)
	ops := []sallyport.Op{
		sallyport.Put(sallyport.KindRecord, "left/"+n, i),
		sallyport.Put(sallyport.KindRecord, "right/"+n, i),
	}
	if i%3 == 2 {
		ops = []sallyport.Op{remove(sallyport.KindRecord, "left/"+n), remove(sallyport.KindRecord, "right/"+n)}
	}
	if _, err := c.Apply(c.t.Context(), ops); err != nil {
		c.t.Error(err)
	}
}

// follow watches until the revision that comes through final and compares what
// it has then with what the store has.
func (c *client) follow(t *testing.T, final <-chan sallyport.Revision) error {
	have := map[string]string{}
	var at, last sallyport.Revision
	err := c.Watch(t.Context(), sallyport.WatchRequest{Kinds: []sallyport.Kind{sallyport.KindRecord, sallyport.KindUser}},
		func(ev sallyport.WatchEvent) error {
			if ev.Revision < at || ev.Type == sallyport.WatchChange && ev.Revision == at {
				return fmt.Errorf("revision %d after %d", ev.Revision, at)
			}
			if ev.Type == sallyport.WatchChange && countOf(ev.Records, sallyport.KindRecord)%2 != 0 {
				return fmt.Errorf("half a batch: %v", names(ev.Records))
			}
			at = ev.Revision
			for _, r := range ev.Records {
				if have[r.ID] = string(r.Payload); r.Deleted {
					delete(have, r.ID)
				}
			}
			if last == 0 { // once only: the next one is another watch's
				select {
				case last = <-final:
				default:
				}
			}
			if last != 0 && at >= last && ev.Type >= sallyport.WatchEnd {
				return errFollowed
			}
			return nil
		})
	if !errors.Is(err, errFollowed) {
		return err
	}
	return c.compare(have)
}

func countOf(records []sallyport.Record, kind sallyport.Kind) (n int) {
	for _, r := range records {
		if r.Kind == kind {
			n++
		}
	}
	return n
}

var errFollowed = errors.New("followed to the end")

func (c *client) compare(have map[string]string) error {
	delete(have, "final")
	records, err := c.List(c.t.Context(), sallyport.KindRecord)
	if err != nil {
		return err
	}
	if len(records) != len(have) {
		return fmt.Errorf("the watch has %d records, the store %d", len(have), len(records))
	}
	for _, r := range records {
		if have[r.ID] != string(r.Payload) {
			return fmt.Errorf("%s: the watch has %q, the store %q", r.ID, have[r.ID], r.Payload)
		}
	}
	return nil
}

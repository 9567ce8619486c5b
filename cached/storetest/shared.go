package storetest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/internal/keyring"
)

// Shared runs the suite of the engines whose store several servers write. open
// returns two of one empty store, which live until the (sub)test ends.
func Shared(t *testing.T, open func(t *testing.T) (a, b cached.Shared)) {
	for _, c := range sharedCases {
		t.Run(c.name, func(t *testing.T) {
			p := &pair{t: t, key: KEK()}
			p.stores[0], p.stores[1] = open(t)
			c.run(t, p)
		})
	}
}

var sharedCases = []struct {
	name string
	run  func(*testing.T, *pair)
}{
	{"both servers tell every change once, in the order of revisions", sharedOrder},
	{"patches through both servers lose nothing", sharedPatches},
	{"a change at one server wakes a watch at the other at once", sharedWakes},
	{"a change that is acknowledged at one server is read at the other", sharedReads},
	{"a lease excludes across servers", sharedLease},
	{"a lease that ends passes on, and its holder learns of it", sharedLeaseLost},
	{"both servers forget tombstones", sharedTombstones},
	{"a watch goes on at the other server when its own is closed", sharedContinues},
	{"another history ends both servers", sharedReplaced},
	{"a store that went back ends the server", sharedRolledBack},
	{"without a confirmation there is no heartbeat and nothing to read", sharedUnconfirmed},
}

// pair is two servers over one store.
type pair struct {
	t      *testing.T
	key    keyring.KEK
	stores [2]cached.Shared
}

func (p *pair) deps(i int) cached.Deps { return cached.Deps{Store: p.stores[i], KEK: p.key} }

// serve returns both servers, running until the test ends.
func (p *pair) serve() (a, b *client) {
	p.t.Helper()
	return &client{p.t, Run(p.t, p.deps(0))}, &client{p.t, Run(p.t, p.deps(1))}
}

func sharedOrder(t *testing.T, p *pair) {
	const writers, each = 4, 50
	a, b := p.serve()
	final := make(chan sallyport.Revision)
	var watching, writing sync.WaitGroup
	servers := []*client{a, b}
	for i := range 2 * len(servers) {
		watching.Go(func() {
			if err := servers[i%2].follow(t, final); err != nil {
				t.Errorf("watch at server %d: %v", i%2, err)
			}
		})
	}
	var revisions sync.Map
	for g := range writers {
		writing.Go(func() {
			for i := range each {
				rev, err := servers[g%2].Apply(t.Context(), []sallyport.Op{
					sallyport.Put(sallyport.KindRecord, fmt.Sprintf("left/%d/%d", g, i%7), i),
					sallyport.Put(sallyport.KindRecord, fmt.Sprintf("right/%d/%d", g, i%7), i),
				})
				if _, twice := revisions.LoadOrStore(rev, true); err != nil || twice {
					t.Errorf("got revision %d (given before: %t), %v", rev, twice, err)
				}
			}
		})
	}
	writing.Wait()
	last := a.apply(user("final"))
	for rev := sallyport.Revision(1); rev < last; rev++ {
		if _, ok := revisions.Load(rev); !ok {
			t.Errorf("nobody has revision %d of %d", rev, last)
		}
	}
	for range 2 * len(servers) {
		select {
		case final <- last:
		case <-time.After(within):
			t.Fatal("a watch does not go on")
		}
	}
	watching.Wait()
}

func sharedPatches(t *testing.T, p *pair) {
	const writers, each = 10, 100 // together 1,000
	a, b := p.serve()
	a.apply(sallyport.Put(sallyport.KindRecord, "n", 0))
	var wg sync.WaitGroup
	for g := range writers {
		server := []*client{a, b}[g%2]
		wg.Go(func() {
			for range each {
				if err := increment(t.Context(), server.API); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	for _, c := range []*client{a, b} {
		got, err := c.Get(t.Context(), sallyport.KindRecord, "n")
		if err != nil || string(got.Payload) != strconv.Itoa(writers*each) {
			t.Errorf("got %s, %v; want %d", got.Payload, err, writers*each)
		}
	}
}

func sharedWakes(t *testing.T, p *pair) {
	a, b := p.serve()
	w := b.watch(sallyport.WatchRequest{})
	w.snapshot()
	best := within
	for i := range 10 {
		start := time.Now()
		rev := a.apply(user(fmt.Sprint("u", i)))
		if ev := w.change(); ev.Revision != rev {
			t.Fatalf("got %+v; want the change at %d", ev, rev)
		}
		best = min(best, time.Since(start))
	}
	// A look each 250 ms would bring one of ten in 25 ms now and then, but no
	// engine writes and tells in less time than that by accident alone.
	if best > 100*time.Millisecond {
		t.Errorf("the quickest of ten changes took %v; want it told, not found", best)
	}
}

func sharedReads(t *testing.T, p *pair) {
	a, b := p.serve()
	for i := range 100 {
		id := fmt.Sprint("u", i)
		rev := a.apply(user(id))
		got, err := b.Get(t.Context(), sallyport.KindUser, id)
		if err != nil || got.Revision != rev {
			t.Fatalf("got revision %d, %v; want %d", got.Revision, err, rev)
		}
		b.apply(cond(remove(sallyport.KindUser, id), sallyport.Condition{Revision: rev}))
		if a.has(sallyport.KindUser, id) {
			t.Fatal("deleted at one server, there at the other")
		}
	}
}

func sharedLease(t *testing.T, p *pair) {
	a, b := p.serve()
	held := func(c *client) error {
		return c.Lease(t.Context(), "x", time.Minute, func(context.Context) error { return nil })
	}
	err := a.Lease(t.Context(), "x", time.Minute, func(context.Context) error {
		if err := held(b); !errors.Is(err, sallyport.ErrLeaseHeld) {
			t.Errorf("got %v; want ErrLeaseHeld", err)
		}
		return nil
	})
	if err = errors.Join(err, held(b), held(a)); err != nil {
		t.Errorf("given back, the lease is not free: %v", err)
	}
}

func sharedLeaseLost(t *testing.T, p *pair) {
	const ttl = 3 * time.Second
	a := &client{t, Run(t, p.deps(0))}
	deps := p.deps(1) // of a machine whose clock is ahead: for it the lease ends early
	deps.Now = func() time.Time { return time.Now().Add(2 * ttl) }
	b := &client{t, Run(t, deps)}
	err := a.Lease(t.Context(), "x", ttl, func(held context.Context) error {
		return b.Lease(t.Context(), "x", ttl, func(context.Context) error {
			select {
			case <-held.Done():
				return nil
			case <-time.After(within):
				return errors.New("two hold the lease")
			}
		})
	})
	if err != nil {
		t.Error(err)
	}
}

func sharedTombstones(t *testing.T, p *pair) {
	var servers [2]*client
	for i := range servers {
		deps := p.deps(i)
		deps.TombstoneAge = soonForgotten
		servers[i] = &client{t, Run(t, deps)}
	}
	for round := range 2 {
		var last sallyport.Revision
		for i, c := range servers {
			id := fmt.Sprint("u", round, i)
			c.apply(user(id))
			last = servers[1-i].apply(remove(sallyport.KindUser, id))
		}
		forgotten(t, p.stores[round], last)
	}
	for i := range servers {
		servers[i].apply(user(fmt.Sprint("after", i)))
	}
	// A server checks the sum of all rows when it starts.
	Run(t, p.deps(0))
}

func sharedContinues(t *testing.T, p *pair) {
	s, stop := start(t, p.deps(0))
	awaitCurrent(t, s)
	a, b := &client{t, s}, &client{t, Run(t, p.deps(1))}
	w := a.watch(sallyport.WatchRequest{})
	_, end := w.snapshot()
	first := a.apply(user("first"))
	if ev := w.change(); ev.Revision != first {
		t.Fatalf("got %+v; want the change at %d", ev, first)
	}
	second := b.apply(user("second"))
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	third := b.apply(user("third"))
	w = b.watch(sallyport.WatchRequest{Epoch: end.Epoch, Since: first})
	if ev := w.next(); ev.Type != sallyport.WatchEnd || ev.Epoch != end.Epoch {
		t.Fatalf("got %+v; want an end", ev)
	}
	for at := first; at < third; {
		ev := w.change()
		if ev.Revision <= at || at < second && ev.Records[0].ID != "second" {
			t.Fatalf("got %+v after %d; want second at %d and third at %d", ev, at, second, third)
		}
		at = ev.Revision
	}
}

func sharedReplaced(t *testing.T, p *pair) {
	ends := p.startBoth()
	p.edit(func(head *cached.Head) { head.Epoch = "e-RESTORED" })
	for i, end := range ends {
		if code := sallyport.CodeOf(end()); code != "storage.replaced" {
			t.Errorf("server %d: got %q; want storage.replaced", i, code)
		}
	}
}

func sharedRolledBack(t *testing.T, p *pair) {
	ends := p.startBoth()
	p.edit(func(head *cached.Head) { head.Revision = 0 }) // both have seen more
	for i, end := range ends {
		if code := sallyport.CodeOf(end()); code != "storage.rolled_back" {
			t.Errorf("server %d: got %q; want storage.rolled_back", i, code)
		}
	}
}

// startBoth returns what waits for the servers to end by themselves.
func (p *pair) startBoth() (ends [2]func() error) {
	for i := range ends {
		s, stop := start(p.t, p.deps(i))
		awaitCurrent(p.t, s)
		(&client{p.t, s}).apply(user("a"))
		p.t.Cleanup(func() { stop() })
		ends[i] = func() error {
			eventually(p.t, "the server ends", func() bool {
				err := s.Ready() // an unconfirmed store is waited for
				return err != nil && sallyport.CodeOf(err) != "storage.not_current"
			})
			return stop()
		}
	}
	return ends
}

// edit changes the head behind the servers' backs.
func (p *pair) edit(change func(*cached.Head)) {
	p.t.Helper()
	(&engine{p.t, p.stores[0]}).update(func(tx cached.Tx) cached.Change {
		head := tx.Head()
		change(&head)
		return cached.Change{Head: head}
	})
}

// cutOff is a store that cannot prove that it is the one.
type cutOff struct {
	cached.Shared
	cut chan struct{} // closed when it is
}

func (c cutOff) Confirm(ctx context.Context) error {
	select {
	case <-c.cut:
		return errors.New("cut off")
	default:
		return c.Shared.Confirm(ctx)
	}
}

func sharedUnconfirmed(t *testing.T, p *pair) {
	deps := p.deps(0)
	cut := make(chan struct{})
	deps.Store = cutOff{p.stores[0], cut}
	server := Run(t, deps)
	c := &client{t, server}
	c.apply(user("u"))
	w := c.watch(sallyport.WatchRequest{})
	w.snapshot()
	w.until(isType(sallyport.WatchHeartbeat))
	close(cut)
	eventually(t, "new watches are refused", func() bool {
		err := c.Watch(t.Context(), sallyport.WatchRequest{}, func(sallyport.WatchEvent) error { return errFollowed })
		return sallyport.CodeOf(err) == "storage.not_current"
	})
	_, err := c.Get(t.Context(), sallyport.KindUser, "u")
	for what, err := range map[string]error{"get": err, "ready": server.Ready()} {
		if sallyport.CodeOf(err) != "storage.not_current" {
			t.Errorf("%s: got %v; want storage.not_current", what, err)
		}
	}
	for { // what was sent before
		select {
		case <-w.events:
			continue
		default:
		}
		break
	}
	select {
	case ev := <-w.events:
		t.Errorf("got %+v; want silence", ev)
	case <-time.After(2500 * time.Millisecond):
	}
}

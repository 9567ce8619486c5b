package storetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"sallyport"
)

var recordsCases = []recordsCase{
	{"what was applied can be read", readBack},
	{"a record that is not there is not found", notFound},
	{"a batch has one revision, the next a higher one", revisions},
	{"a deleted record is gone", deletes},
	{"preconditions", preconditions},
	{"a batch is written whole or not at all", wholeBatches},
	{"what no store should hold is refused", refusals},
	{"concurrent patches of one record lose nothing", counter},
	{"1,000 gets beside 1,000 puts", getsBesidePuts},
	{"a call with an ended context changes nothing", endedContext},
	{"an expired record is missing at once", expiry},
	{"an expired record is swept into a tombstone", sweep},
	{"list", list},
	{"a lease has one holder", leaseExclusive},
	{"a lease is given back with hold's error", leaseReturned},
	{"a lease is longer than its ttl if its holder is", leaseRenewed},
	{"leases that cannot be", leaseRefused},
}

// client is an API with the few moves that the cases need.
type client struct {
	t *testing.T
	API
}

// within is how long anything may take that should happen at once; it is long
// because the machine may be busy, not because it ever takes that long.
const within = 20 * time.Second

func (c *client) apply(ops ...sallyport.Op) sallyport.Revision {
	c.t.Helper()
	rev, err := c.Apply(c.t.Context(), ops)
	if err != nil {
		c.t.Fatal(err)
	}
	return rev
}

func (c *client) has(kind sallyport.Kind, id string) bool {
	c.t.Helper()
	_, err := c.Get(c.t.Context(), kind, id)
	if err != nil && !errors.Is(err, sallyport.ErrNotFound) {
		c.t.Fatal(err)
	}
	return err == nil
}

func user(id string) sallyport.Op {
	return sallyport.Put(sallyport.KindUser, id, sallyport.User{ID: sallyport.UserID(id), Email: id + "@corp.example"})
}

func remove(kind sallyport.Kind, id string) sallyport.Op {
	return sallyport.Op{Kind: kind, ID: id, Delete: true}
}

func cond(op sallyport.Op, c sallyport.Condition) sallyport.Op {
	op.If = c
	return op
}

func ending(op sallyport.Op, at time.Time) sallyport.Op {
	op.Expires = at
	return op
}

func readBack(t *testing.T, c *client) {
	ends := time.Now().Add(time.Hour)
	put := ending(user("u1"), ends)
	token := sallyport.Op{Kind: sallyport.KindIDPToken, ID: "t", Version: 7, Payload: []byte{0, 1, 255}}
	code := sallyport.Op{Kind: sallyport.KindCode, ID: "c"}
	rev := c.apply(put, token, code)
	for _, want := range []sallyport.Record{
		{Kind: put.Kind, ID: put.ID, Version: 1, Payload: put.Payload, Revision: rev, Expires: ends.UTC().Round(0)},
		{Kind: token.Kind, ID: token.ID, Version: 7, Payload: token.Payload, Revision: rev},
		{Kind: code.Kind, ID: code.ID, Version: 1, Revision: rev},
	} {
		got, err := c.Get(t.Context(), want.Kind, want.ID)
		if err != nil {
			t.Fatal(err)
		}
		got.Expires = got.Expires.UTC()
		if len(got.Payload) == 0 {
			got.Payload = nil
		}
		same(t, got, want)
	}
}

func notFound(t *testing.T, c *client) {
	c.apply(user("u"))
	for _, k := range [][2]string{{"user", "v"}, {"device", "u"}, {"user", ""}, {"user", "U"}} {
		if _, err := c.Get(t.Context(), sallyport.Kind(k[0]), k[1]); !errors.Is(err, sallyport.ErrNotFound) {
			t.Errorf("%s %q: got %v; want ErrNotFound", k[0], k[1], err)
		}
	}
}

func revisions(t *testing.T, c *client) {
	first := c.apply(user("a"), user("b"))
	second := c.apply(user("b"), user("c"))
	if first == 0 || second <= first {
		t.Errorf("got revisions %d, then %d; want them to rise", first, second)
	}
	for id, want := range map[string]sallyport.Revision{"a": first, "b": second, "c": second} {
		if got, err := c.Get(t.Context(), sallyport.KindUser, id); err != nil || got.Revision != want {
			t.Errorf("%s: got revision %d, %v; want %d", id, got.Revision, err, want)
		}
	}
}

func deletes(t *testing.T, c *client) {
	put := c.apply(user("a"), user("b"))
	if rev := c.apply(remove(sallyport.KindUser, "a")); rev <= put {
		t.Errorf("got revision %d after %d; want a higher one", rev, put)
	}
	if c.has(sallyport.KindUser, "a") || !c.has(sallyport.KindUser, "b") {
		t.Error("want a gone and b there")
	}
	c.apply(remove(sallyport.KindUser, "a"), remove(sallyport.KindUser, "never"))
	c.apply(user("a"))
	if !c.has(sallyport.KindUser, "a") {
		t.Error("a deleted record cannot be written again")
	}
}

func preconditions(t *testing.T, c *client) {
	for i, x := range []struct {
		state string // of the record before
		cond  func(rev sallyport.Revision) sallyport.Condition
		holds bool
	}{
		{"there", func(sallyport.Revision) sallyport.Condition { return sallyport.Condition{} }, true},
		{"there", func(sallyport.Revision) sallyport.Condition { return sallyport.Condition{Exists: true} }, true},
		{"there", func(sallyport.Revision) sallyport.Condition { return sallyport.Condition{Absent: true} }, false},
		{"there", func(r sallyport.Revision) sallyport.Condition { return sallyport.Condition{Revision: r} }, true},
		{"there", func(r sallyport.Revision) sallyport.Condition { return sallyport.Condition{Revision: r - 1} }, false},
		{"there", func(r sallyport.Revision) sallyport.Condition { return sallyport.Condition{Revision: r + 1} }, false},
		{"there", func(r sallyport.Revision) sallyport.Condition {
			return sallyport.Condition{Exists: true, Revision: r - 1}
		}, false},
		{"never", func(sallyport.Revision) sallyport.Condition { return sallyport.Condition{} }, true},
		{"never", func(sallyport.Revision) sallyport.Condition { return sallyport.Condition{Absent: true} }, true},
		{"never", func(sallyport.Revision) sallyport.Condition { return sallyport.Condition{Exists: true} }, false},
		{"never", func(r sallyport.Revision) sallyport.Condition { return sallyport.Condition{Revision: r} }, false},
		{"deleted", func(sallyport.Revision) sallyport.Condition { return sallyport.Condition{Absent: true} }, true},
		{"deleted", func(sallyport.Revision) sallyport.Condition { return sallyport.Condition{Exists: true} }, false},
		{"deleted", func(r sallyport.Revision) sallyport.Condition { return sallyport.Condition{Revision: r} }, false},
		{"expired", func(sallyport.Revision) sallyport.Condition { return sallyport.Condition{Absent: true} }, true},
		{"expired", func(sallyport.Revision) sallyport.Condition { return sallyport.Condition{Exists: true} }, false},
		{"expired", func(r sallyport.Revision) sallyport.Condition { return sallyport.Condition{Revision: r} }, false},
	} {
		id := fmt.Sprint("u", i)
		rev := c.apply(user("other"))
		switch x.state {
		case "there":
			c.apply(user("before"))
			rev = c.apply(user(id))
			c.apply(user("after"))
		case "deleted":
			c.apply(user(id))
			rev = c.apply(remove(sallyport.KindUser, id))
		case "expired":
			rev = c.apply(ending(user(id), time.Now().Add(-time.Minute)))
		}
		condition := x.cond(rev)
		for _, op := range []sallyport.Op{user(id), remove(sallyport.KindUser, id)} {
			if op.Delete && condition.Revision != 0 {
				continue // the put before changed it
			}
			if op.Delete && x.holds && condition.Absent {
				continue // the put before made it
			}
			_, err := c.Apply(t.Context(), []sallyport.Op{cond(op, condition)})
			if x.holds && err != nil || !x.holds && !errors.Is(err, sallyport.ErrConflict) {
				t.Errorf("%s, %+v, delete %t: got %v; want holds %t", x.state, condition, op.Delete, err, x.holds)
			}
		}
	}
}

func wholeBatches(t *testing.T, c *client) {
	c.apply(user("a"))
	before := c.apply(user("b"))
	_, err := c.Apply(t.Context(), []sallyport.Op{
		remove(sallyport.KindUser, "a"),
		user("new"),
		cond(user("b"), sallyport.Condition{Absent: true}),
	})
	if !errors.Is(err, sallyport.ErrConflict) {
		t.Fatalf("got %v; want ErrConflict", err)
	}
	got, err := c.Get(t.Context(), sallyport.KindUser, "b")
	if err != nil || got.Revision != before || !c.has(sallyport.KindUser, "a") || c.has(sallyport.KindUser, "new") {
		t.Errorf("got %+v, %v; want nothing of the batch", got, err)
	}
}

func refusals(t *testing.T, c *client) {
	before := c.apply(user("before"))
	for name, batch := range map[string][]sallyport.Op{
		"no ops":                 {},
		"a record twice":         {user("a"), remove(sallyport.KindUser, "a")},
		"no kind":                {{ID: "x"}},
		"a kind like a path":     {{Kind: "../user", ID: "x"}},
		"no id":                  {{Kind: sallyport.KindUser}},
		"an id with a newline":   {{Kind: sallyport.KindUser, ID: "a\nb"}},
		"an id with a NUL":       {{Kind: sallyport.KindUser, ID: "a\x00"}},
		"a long id":              {{Kind: sallyport.KindUser, ID: string(make([]byte, 1000))}},
		"a payload that is text": {{Kind: sallyport.KindUser, ID: "a", Payload: []byte("alice")}},
		"a delete with payload":  {{Kind: sallyport.KindUser, ID: "a", Payload: []byte("{}"), Delete: true}},
		"absent and existing":    {cond(user("a"), sallyport.Condition{Absent: true, Exists: true})},
		"expiry in 2500":         {ending(user("a"), time.Date(2500, 1, 1, 0, 0, 0, 0, time.UTC))},
		"a lease":                {{Kind: sallyport.KindLease, ID: "a", Payload: []byte("{}")}},
	} {
		rev, err := c.Apply(t.Context(), append([]sallyport.Op{}, batch...))
		if err == nil || errors.Is(err, sallyport.ErrConflict) || errors.Is(err, sallyport.ErrNotFound) {
			t.Errorf("%s: got %d, %v; want it refused", name, rev, err)
		}
	}
	if after := c.apply(user("after")); c.has(sallyport.KindUser, "a") || after < before {
		t.Error("something of the refused is there")
	}
}

func counter(t *testing.T, c *client) {
	const writers, each = 4, 10
	c.apply(sallyport.Put(sallyport.KindRecord, "n", 0))
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				if err := increment(t.Context(), c.API); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	got, err := c.Get(t.Context(), sallyport.KindRecord, "n")
	if err != nil || string(got.Payload) != strconv.Itoa(writers*each) {
		t.Errorf("got %s, %v; want %d", got.Payload, err, writers*each)
	}
}

// getsBesidePuts reads a pair that is only ever written together: whoever sees
// the second at a revision finds the first at that one, or a later.
func getsBesidePuts(t *testing.T, c *client) {
	const workers, each = 4, 250
	pair := func(n int) []sallyport.Op {
		return []sallyport.Op{sallyport.Put(sallyport.KindRecord, "first", n), sallyport.Put(sallyport.KindRecord, "second", n)}
	}
	c.apply(pair(0)...)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for n := range each {
				if _, err := c.Apply(t.Context(), pair(n)); err != nil {
					t.Error(err)
					return
				}
			}
		})
		wg.Go(func() {
			for range each {
				second, err := c.Get(t.Context(), sallyport.KindRecord, "second")
				first, err2 := c.Get(t.Context(), sallyport.KindRecord, "first")
				if err = errors.Join(err, err2); err != nil || first.Revision < second.Revision {
					t.Errorf("got the first at %d after the second at %d, %v", first.Revision, second.Revision, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// increment adds one to record n, again and again until nobody was in between.
func increment(ctx context.Context, c API) error {
	for {
		got, err := c.Get(ctx, sallyport.KindRecord, "n")
		if err != nil {
			return err
		}
		n, err := sallyport.Decode[int](got)
		if err != nil {
			return err
		}
		op := cond(sallyport.Put(sallyport.KindRecord, "n", n+1), sallyport.Condition{Revision: got.Revision})
		if _, err = c.Apply(ctx, []sallyport.Op{op}); !errors.Is(err, sallyport.ErrConflict) {
			return err
		}
	}
}

func endedContext(t *testing.T, c *client) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Apply(ctx, []sallyport.Op{user("a")}); err == nil {
		if !c.has(sallyport.KindUser, "a") {
			t.Error("acknowledged, but not there")
		}
	} else if c.has(sallyport.KindUser, "a") {
		t.Errorf("got %v, but it was written", err)
	}
}

func expiry(t *testing.T, c *client) {
	at := time.Now().Add(300 * time.Millisecond)
	c.apply(ending(user("a"), at))
	for c.has(sallyport.KindUser, "a") {
		if time.Since(at) > time.Second { // the clocks are the same, the answer takes a moment
			t.Fatal("still there after its end")
		}
	}
	if time.Now().Before(at) {
		t.Error("gone before its end")
	}
	c.apply(cond(user("a"), sallyport.Condition{Absent: true}))
	if !c.has(sallyport.KindUser, "a") {
		t.Error("what expired cannot be written again")
	}
	ended := ending(user("b"), time.Now().Add(-time.Second))
	c.apply(ended)
	if c.has(sallyport.KindUser, "b") {
		t.Error("what ended before it was written is there")
	}
}

func sweep(t *testing.T, c *client) {
	w := c.watch(sallyport.WatchRequest{})
	w.until(isType(sallyport.WatchEnd))
	put := c.apply(ending(user("a"), time.Now().Add(100*time.Millisecond)))
	ev := w.until(func(ev sallyport.WatchEvent) bool { return len(ev.Records) > 0 && ev.Records[0].Deleted })
	r := ev.Records[0]
	if r.ID != "a" || r.Revision <= put || len(r.Payload) > 0 {
		t.Errorf("got %+v; want a tombstone of a above revision %d", r, put)
	}
}

func list(t *testing.T, c *client) {
	same(t, c.list(sallyport.KindUser), []string{})
	c.apply(user("a"), user("b"), user("c"), remove(sallyport.KindDevice, "none"),
		ending(user("past"), time.Now().Add(-time.Minute)), sallyport.Put(sallyport.KindDevice, "d", sallyport.Device{}))
	c.apply(remove(sallyport.KindUser, "b"))
	same(t, c.list(sallyport.KindUser), []string{"a", "c"})
	same(t, c.list(sallyport.KindDevice), []string{"d"})
	for _, kind := range []sallyport.Kind{sallyport.KindCode, sallyport.KindIDPToken, ""} {
		if got, err := c.List(t.Context(), kind); err == nil {
			t.Errorf("%q: got %v; want it refused", kind, got)
		}
	}
}

func (c *client) list(kind sallyport.Kind) []string {
	c.t.Helper()
	records, err := c.List(c.t.Context(), kind)
	if err != nil {
		c.t.Fatal(err)
	}
	names := []string{}
	for _, r := range records {
		if r.Kind != kind || !json.Valid(r.Payload) {
			c.t.Errorf("got %+v in a list of %s", r, kind)
		}
		names = append(names, r.ID)
	}
	slices.Sort(names)
	return names
}

func leaseExclusive(t *testing.T, c *client) {
	ctx := t.Context()
	err := c.Lease(ctx, "refresh", time.Minute, func(context.Context) error {
		inner := c.Lease(ctx, "refresh", time.Minute, func(context.Context) error {
			t.Error("two hold the lease")
			return nil
		})
		if !errors.Is(inner, sallyport.ErrLeaseHeld) {
			t.Errorf("got %v; want ErrLeaseHeld", inner)
		}
		return c.Lease(ctx, "other", time.Minute, func(context.Context) error { return nil })
	})
	if err != nil {
		t.Error(err)
	}
}

func leaseReturned(t *testing.T, c *client) {
	stop := errors.New("stop")
	for range 2 {
		if err := c.Lease(t.Context(), "x", time.Minute, func(context.Context) error { return stop }); !errors.Is(err, stop) {
			t.Errorf("got %v; want hold's error", err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	err := c.Lease(ctx, "x", time.Minute, func(held context.Context) error {
		cancel()
		<-held.Done()
		return held.Err()
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v; want context.Canceled", err)
	}
	eventually(t, "the lease is free again", func() bool {
		return c.Lease(t.Context(), "x", time.Minute, func(context.Context) error { return nil }) == nil
	})
}

func leaseRenewed(t *testing.T, c *client) {
	const ttl = time.Second
	err := c.Lease(t.Context(), "x", ttl, func(held context.Context) error {
		over := time.After(2 * ttl)
		for {
			select {
			case <-over:
				return nil
			case <-held.Done():
				return fmt.Errorf("the lease is lost: %w", context.Cause(held))
			default:
			}
			if err := c.Lease(t.Context(), "x", ttl, func(context.Context) error { return nil }); !errors.Is(err, sallyport.ErrLeaseHeld) {
				return fmt.Errorf("got %v; want ErrLeaseHeld", err)
			}
		}
	})
	if err != nil {
		t.Error(err)
	}
}

func leaseRefused(t *testing.T, c *client) {
	for _, x := range []struct {
		name string
		ttl  time.Duration
	}{{"", time.Minute}, {"x", 0}, {"x", time.Millisecond}, {"x", -time.Hour}, {"x", 1000 * time.Hour}, {"a\nb", time.Minute}} {
		err := c.Lease(t.Context(), x.name, x.ttl, func(context.Context) error { return nil })
		if err == nil || errors.Is(err, sallyport.ErrLeaseHeld) {
			t.Errorf("%q for %v: got %v; want it refused", x.name, x.ttl, err)
		}
	}
}

// eventually fails the test unless ok becomes true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			t.Fatalf("not within %v: %s", within, what)
		case <-tick.C:
		}
	}
}

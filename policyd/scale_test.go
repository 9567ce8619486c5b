package policyd

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached/storetest"
)

// crowd is a snapshot of a population, and what each kind of record takes in it.
type crowd struct {
	storetest.Population
	*snapshot
	bytes map[sallyport.Kind]int64
}

// newCrowd takes in the kinds of records of p, in this order.
func newCrowd(tb testing.TB, p storetest.Population, kinds ...sallyport.Kind) *crowd {
	tb.Helper()
	c := &crowd{Population: p, snapshot: &snapshot{epoch: "e", revision: 1}, bytes: map[sallyport.Kind]int64{}}
	for _, kind := range kinds {
		before := heap()
		c.add(tb, kind)
		c.bytes[kind] = heap() - before
	}
	return c
}

// add takes in all records of a kind.
func (c *crowd) add(tb testing.TB, kind sallyport.Kind) {
	tb.Helper()
	draft := c.edit(Config{}.withDefaults(), c.Now)
	draft.silent = true
	err := c.Kind(kind, func(op sallyport.Op) error {
		draft.apply(recordOf(op))
		return nil
	})
	if err != nil || len(draft.faults) > 0 {
		tb.Fatal(err, draft.faults)
	}
	c.snapshot = draft.finish()
}

func recordOf(op sallyport.Op) sallyport.Record {
	return sallyport.Record{Kind: op.Kind, ID: op.ID, Version: 1, Payload: op.Payload, Revision: 1, Expires: op.Expires}
}

// perSession is how many bytes the kinds take for each session.
func (c *crowd) perSession(kinds ...sallyport.Kind) (bytes float64) {
	for _, kind := range kinds {
		bytes += float64(c.bytes[kind]) / float64(c.Sessions)
	}
	return bytes
}

// heap is how many bytes are in use.
func heap() int64 {
	runtime.GC()
	runtime.GC() // what the first one found unreachable is cleaned up meanwhile
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// maxPerSession is the bar: bytes of a session together with its login.
const maxPerSession = 500

func TestCase_L16_MemoryOfASession(t *testing.T) {
	c := newCrowd(t, storetest.Population{Sessions: 20_000, Now: time.Now()}, sallyport.KindUser, sallyport.KindLogin, sallyport.KindSession)
	got := c.perSession(sallyport.KindSession, sallyport.KindLogin)
	t.Logf("%.0f bytes a session", got)
	if got > maxPerSession {
		t.Errorf("a session takes %.0f bytes with its login; at most %d", got, maxPerSession)
	}
	runtime.KeepAlive(c)
}

// end ends the session i and returns the snapshot without it.
func (c *crowd) end(i int) *snapshot {
	draft := c.edit(Config{}, c.Now)
	draft.apply(sallyport.Record{Kind: sallyport.KindSession, ID: string(c.Session(i)), Deleted: true, Revision: 2})
	return draft.finish()
}

func TestCase_L16_AChangeCopiesItsWayOnly(t *testing.T) {
	c := newCrowd(t, storetest.Population{Sessions: 10_000, Now: time.Now()}, sallyport.KindSession)
	const changes, most = 1_000, 6 << 10
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i := range changes {
		c.end(i)
	}
	runtime.ReadMemStats(&after)
	if got := (after.TotalAlloc - before.TotalAlloc) / changes; got > most {
		t.Errorf("a change among %d sessions allocates %d bytes; at most %d", c.Sessions, got, most)
	}
	next := c.end(7)
	if _, ok := next.sessions.get(string(c.Session(7))); ok {
		t.Error("the session is still there")
	}
	if _, ok := c.sessions.get(string(c.Session(7))); !ok {
		t.Error("the change shows in the snapshot before")
	}
}

// BenchmarkMemory is what -sessions sessions take, and what the garbage collector
// has to do for them.
func BenchmarkMemory(b *testing.B) {
	for _, perLogin := range []bool{false, true} {
		b.Run(fmt.Sprintf("claims-of-their-own=%t", perLogin), func(b *testing.B) {
			for b.Loop() {
				c := newCrowd(b, storetest.Population{Sessions: storetest.Sessions(), Now: time.Now(), PerLogin: perLogin}, storetest.Kinds...)
				began := time.Now()
				runtime.GC()
				b.ReportMetric(float64(time.Since(began).Milliseconds()), "gc-ms")
				for _, kind := range storetest.Kinds {
					b.ReportMetric(c.perSession(kind), "B/"+string(kind))
				}
				both := c.perSession(sallyport.KindSession, sallyport.KindLogin)
				b.ReportMetric(both, "B/session+login")
				if !perLogin && both > maxPerSession {
					b.Fatalf("a session takes %.0f bytes with its login; at most %d", both, maxPerSession)
				}
				runtime.KeepAlive(c)
			}
		})
	}
}

// BenchmarkChangeAtScale is one change among -sessions sessions.
func BenchmarkChangeAtScale(b *testing.B) {
	c := newCrowd(b, storetest.Population{Sessions: storetest.Sessions(), Now: time.Now()}, sallyport.KindSession)
	b.ReportAllocs()
	for b.Loop() {
		c.end(rand.IntN(c.Sessions))
	}
}

// BenchmarkDifference compares two snapshots of -sessions sessions that share
// nothing, as after a stream that could not be continued.
func BenchmarkDifference(b *testing.B) {
	p := storetest.Population{Sessions: storetest.Sessions(), Now: time.Now()}
	old, next := newCrowd(b, p, storetest.Kinds...), newCrowd(b, p, storetest.Kinds...)
	gone := next.end(7)
	b.ReportAllocs()
	for b.Loop() {
		if got := difference(old.snapshot, gone, p.Now); len(got) != 1 || got[0].Why != "session revoked" {
			b.Fatalf("got %d changes: %.3v", len(got), got)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N), "ms/difference")
}

// BenchmarkAuthorizeAtScale asks for a random one of -sessions sessions.
func BenchmarkAuthorizeAtScale(b *testing.B) {
	c := newCrowd(b, storetest.Population{Sessions: storetest.Sessions(), Now: time.Now()}, storetest.Kinds...)
	s := answering(b, c.snapshot, sallyport.Route{
		From: "tcp://db.internal:5432", To: "tcp://10.0.3.7:5432",
		Policy: "- {name: staff, allow: {and: [{groups: {has: staff}}, {device: {type: tpm}}]}}",
	})
	q := []sallyport.Request{{Target: sallyport.Target{Network: sallyport.TCP, Host: "db.internal", Port: 5432}}}
	b.ReportAllocs()
	for b.Loop() {
		s.confirm()
		q[0].Session = c.Session(rand.IntN(c.Sessions))
		ds, err := s.Authorize(b.Context(), q)
		if err != nil || !ds[0].Allowed() {
			b.Fatal(ds, err)
		}
	}
}

// answering is a server that answers from a snapshot with one route, without cached
// or an audit log.
func answering(tb testing.TB, snap *snapshot, route sallyport.Route) *Server {
	tb.Helper()
	s := &Server{audit: &nowhere{}, done: make(chan struct{}), advance: make(chan struct{}), start: time.Now()}
	s.cfg = Config{}.withDefaults()
	s.revoked.Store(&overrides{})
	d := snap.edit(s.cfg, time.Now())
	d.apply(recordOf(sallyport.Put(sallyport.KindConfig, "current", sallyport.Config{Domain: "corp.example", Routes: []sallyport.Route{route}})))
	if d.broken != nil {
		tb.Fatal(d.broken)
	}
	s.snap.Store(d.finish())
	return s
}

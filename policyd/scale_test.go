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


// heap is how many bytes are in use.
func heap() int64 {
	runtime.GC()
	runtime.GC() // what the first one found unreachable is cleaned up meanwhile
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// crowd is a snapshot of a population, and what each kind of record takes in it.
type crowd struct {
	storetest.Population
	*snapshot
	bytes map[sallyport.Kind]int64
	took  map[sallyport.Kind]time.Duration
}

func newCrowd(tb testing.TB, p storetest.Population) *crowd {
	tb.Helper()
	c := &crowd{
		Population: p, snapshot: &snapshot{epoch: "e", revision: 1},
		bytes: map[sallyport.Kind]int64{}, took: map[sallyport.Kind]time.Duration{},
	}
	for _, kind := range storetest.Kinds {
		before := heap()
		draft := c.edit(Config{}.withDefaults(), p.Now)
		draft.silent = true
		err := p.Kind(kind, func(op sallyport.Op) error {
			began := time.Now()
			draft.apply(sallyport.Record{Kind: op.Kind, ID: op.ID, Version: 1, Payload: op.Payload, Revision: 1, Expires: op.Expires})
			c.took[kind] += time.Since(began)
			return nil
		})
		if err != nil || len(draft.faults) > 0 {
			tb.Fatal(err, draft.faults)
		}
		c.snapshot = draft.finish()
		c.bytes[kind] = heap() - before
	}
	return c
}

// perSession is how many bytes a session takes with its login.
func (c *crowd) perSession() float64 {
	return float64(c.bytes[sallyport.KindSession]+c.bytes[sallyport.KindLogin]) / float64(c.Sessions)
}

func BenchmarkCrowd(b *testing.B) {
	for b.Loop() {
		c := newCrowd(b, storetest.Population{Sessions: storetest.Sessions(), Now: time.Now()})
		for _, kind := range storetest.Kinds {
			fmt.Printf("%s %d bytes a session, %v\n", kind, c.bytes[kind]/int64(c.Sessions), c.took[kind])
		}
		b.ReportMetric(c.perSession(), "B/session")
		r := sallyport.Record{Kind: sallyport.KindSession, Deleted: true, Revision: 2}
		began := time.Now()
		for range 1000 {
			r.ID = string(c.Session(rand.IntN(storetest.Sessions())))
			d := c.edit(Config{}, time.Now())
			d.apply(r)
			d.finish()
		}
		fmt.Println("change", time.Since(began)/1000)
		runtime.KeepAlive(c)
	}
}

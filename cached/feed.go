package cached

import (
	"sync"

	"sallyport"
)

// Bounds of the ring: how far a watch may fall behind before it reads from the
// store.
const (
	feedBatches = 8_192
	feedBytes   = 32 << 20
)

// feed is the ring of the last batches, of streamed records only. Watches pull
// from it, so a slow one holds nobody up.
type feed struct {
	maxBatches, maxBytes int

	mu      sync.Mutex // guards what follows
	batches []change   // in order of revision
	bytes   int
	base    sallyport.Revision // every change after base is in batches
	last    sallyport.Revision // reached, streamed or not
	wake    chan struct{}      // closed and replaced by publish
}

// change is one batch.
type change struct {
	revision sallyport.Revision
	records  []sallyport.Record // never changed once published
	bytes    int
}

func newFeed(at sallyport.Revision) *feed {
	return &feed{maxBatches: feedBatches, maxBytes: feedBytes, base: at, last: at, wake: make(chan struct{})}
}

// publish appends the rows, which are in order of revision, and wakes everybody.
func (f *feed) publish(rows []Row) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range rows {
		row := &rows[i]
		f.last = row.Revision
		if !row.Kind.Streamed() {
			continue
		}
		if n := len(f.batches); n == 0 || f.batches[n-1].revision != row.Revision {
			f.batches = append(f.batches, change{revision: row.Revision})
		}
		c := &f.batches[len(f.batches)-1]
		c.records = append(c.records, row.Record)
		size := len(row.Payload) + len(row.ID) + 128
		c.bytes += size
		f.bytes += size
	}
	f.trim()
	close(f.wake)
	f.wake = make(chan struct{})
}

func (f *feed) trim() {
	n := 0
	for n < len(f.batches) && (len(f.batches)-n > f.maxBatches || f.bytes > f.maxBytes) {
		f.bytes -= f.batches[n].bytes
		f.base = f.batches[n].revision
		n++
	}
	if n > 0 {
		clear(f.batches[:n])
		f.batches = f.batches[n:]
	}
}

// after returns at most limit batches above rev and the revision reached with
// them. If there are none, wake is closed at the next publish. ok is false if
// the ring does not reach back to rev.
func (f *feed) after(rev sallyport.Revision, limit int) (batches []change, reached sallyport.Revision, wake <-chan struct{}, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if rev < f.base {
		return nil, rev, nil, false
	}
	i := len(f.batches)
	for i > 0 && f.batches[i-1].revision > rev {
		i--
	}
	todo := f.batches[i:]
	if len(todo) > limit {
		todo = todo[:limit]
		return append(batches, todo...), todo[limit-1].revision, f.wake, true
	}
	return append(batches, todo...), max(f.last, rev), f.wake, true
}

// reaches reports whether the ring has every change above rev.
func (f *feed) reaches(rev sallyport.Revision) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return rev >= f.base
}

// reached returns the last revision.
func (f *feed) reached() sallyport.Revision {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last
}

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

// publish appends what one group of batches wrote after from, and wakes everybody.
// If the ring stands elsewhere (somebody else has written, too) it does nothing:
// whoever follows the store will bring it.
func (f *feed) publish(from, to sallyport.Revision, rows []Row) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.last != from {
		return
	}
	for i := range rows {
		row := &rows[i]
		if !row.Kind.Streamed() {
			continue
		}
		if n := len(f.batches); n == 0 || f.batches[n-1].revision != row.Revision {
			f.batches = append(f.batches, change{revision: row.Revision})
		}
		f.put(row.Record)
	}
	f.reach(to)
}

// merge appends records that were read from the store as one change: everything
// after from. It reports whether the ring stood there.
func (f *feed) merge(from, to sallyport.Revision, records []sallyport.Record) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.last != from {
		return false
	}
	if len(records) > 0 {
		f.batches = append(f.batches, change{revision: to})
	}
	for _, r := range records {
		f.put(r)
	}
	f.reach(to)
	return true
}

// skip starts the ring again at a revision: what lies before it has to be read
// from the store.
func (f *feed) skip(to sallyport.Revision) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.batches, f.bytes, f.base = nil, 0, to
	f.reach(to)
}

// put adds a record to the last batch.
func (f *feed) put(r sallyport.Record) {
	c := &f.batches[len(f.batches)-1]
	c.records = append(c.records, r)
	size := len(r.Payload) + len(r.ID) + 128
	c.bytes += size
	f.bytes += size
}

func (f *feed) reach(to sallyport.Revision) {
	f.last = to
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

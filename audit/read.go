package audit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"slices"
	"time"

	"sallyport"
)

// Entry is a record with its place in the chain.
type Entry struct {
	Sequence uint64 `json:"seq"`
	// Up is how long the daemon had been up, by a clock that nobody sets.
	Up     time.Duration         `json:"up"`
	Record sallyport.AuditRecord `json:"record"`
}

// pollEvery is how often Tail looks for more.
const pollEvery = 200 * time.Millisecond

// Read yields the records in dir from a sequence number on (0: all), in order,
// up to the present end. It checks that each line is whole and in its place, not
// the signatures: Verify does. The first error ends it; a chain that starts
// behind from is no error.
func Read(dir string, from uint64) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		r := &reader{dir: dir, from: from, yield: yield}
		r.run(func() bool { return false })
	}
}

// Tail is Read that waits at the end for more until ctx ends.
func Tail(ctx context.Context, dir string, from uint64) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		poll := time.NewTicker(pollEvery)
		defer poll.Stop()
		r := &reader{dir: dir, from: from, yield: yield}
		r.run(func() bool {
			select {
			case <-ctx.Done():
				return false
			case <-poll.C:
				return true
			}
		})
	}
}

// reader yields records of one directory.
type reader struct {
	dir   string
	from  uint64
	yield func(Entry, error) bool
	w     walker
}

var errStop = errors.New("the reader wants no more")

// run reads until there is no more and wait says no.
func (r *reader) run(wait func() bool) {
	r.w = walker{genuine: func(*Head) bool { return true }}
	err := r.segments(wait)
	if err != nil && !errors.Is(err, errStop) {
		r.yield(Entry{}, fmt.Errorf("read audit log %s: %w", r.dir, err))
	}
}

// segments reads one segment after the other, from the one that holds from.
func (r *reader) segments(wait func() bool) error {
	start, err := r.first(wait)
	if err != nil || start == 0 {
		return err
	}
	r.w.sequence = start - 1
	for start != 0 {
		if start, err = r.segment(start, wait); err != nil {
			return err
		}
	}
	return nil
}

// first returns the start of the segment that holds from, or 0 if wait says no
// before there is one.
func (r *reader) first(wait func() bool) (uint64, error) {
	for {
		starts, err := segments(r.dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
		if len(starts) > 0 {
			i, found := slices.BinarySearch(starts, r.from)
			if !found && i > 0 {
				i--
			}
			return starts[i], nil
		}
		if !wait() {
			return 0, nil
		}
	}
}

// segment yields a segment's records and returns the start of the next one; 0
// if there is none and wait says no.
func (r *reader) segment(start uint64, wait func() bool) (uint64, error) {
	c, err := openSegment(r.dir, start)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if start != r.w.sequence+1 {
		return 0, r.w.fault("its segment is gone")
	}
	for {
		next, err := r.after(start) // before reading on: its making ends this one
		if err != nil {
			return 0, err
		}
		if err := r.lines(c); err != nil {
			return 0, err
		}
		if next != 0 || !wait() {
			_, err := r.w.endSegment(c, next == 0)
			return next, err
		}
	}
}

// lines yields what is there of a segment.
func (r *reader) lines(c *cursor) error {
	for {
		text, offset, err := c.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		l, err := r.w.line(text, offset)
		if err != nil {
			return err
		}
		if l == nil || l.Record == nil || l.Sequence < r.from {
			continue
		}
		e := Entry{Sequence: l.Sequence, Up: time.Duration(l.UpMS) * time.Millisecond, Record: *l.Record}
		if !r.yield(e, nil) {
			return errStop
		}
	}
}

// after returns the start of the segment behind the one that starts at start.
func (r *reader) after(start uint64) (uint64, error) {
	starts, err := segments(r.dir)
	if err != nil {
		return 0, err
	}
	for _, s := range starts {
		if s > start {
			return s, nil
		}
	}
	return 0, nil
}

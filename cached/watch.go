package cached

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport"
)

const (
	heartbeatEvery = time.Second

	// A snapshot goes out in parts of at most itemsMax records or about
	// itemsBytes, so that a part fits into one message of any transport.
	itemsMax   = 500
	itemsBytes = 1 << 20

	// snapshotTime bounds how long a snapshot may hold the store's history back
	// (in SQLite the write-ahead log grows meanwhile). A million sessions took 48 s
	// on a busy machine; whoever needs longer than this would start over for ever.
	snapshotTime = 5 * time.Minute

	// A watch that fell further behind than this starts again with a snapshot.
	catchUpMax   = 4_096
	catchUpBytes = 16 << 20
)

// Watch implements sallyport.Records.
func (s *Server) Watch(ctx context.Context, q sallyport.WatchRequest, each func(sallyport.WatchEvent) error) error {
	if err := s.Ready(); err != nil {
		return err
	}
	for _, kind := range q.Kinds {
		if !validKind(kind) || !kind.Streamed() {
			return refuse("%q is not a kind that can be watched", kind)
		}
	}
	w := &watch{server: s, kinds: q.Kinds, each: each}
	if err := w.start(ctx, q); err != nil {
		return err
	}
	return w.follow(ctx)
}

// watch is one stream: where it stands and to whom it goes.
type watch struct {
	server *Server
	kinds  []sallyport.Kind // empty: all
	each   func(sallyport.WatchEvent) error
	at     sallyport.Revision
}

func (w *watch) send(typ sallyport.WatchEventType, records []sallyport.Record, count int) error {
	return w.each(sallyport.WatchEvent{
		Type: typ, Epoch: w.server.epoch, Revision: w.at, Records: records, Count: count,
	})
}

func (w *watch) wants(kind sallyport.Kind) bool {
	return kind.Streamed() && (len(w.kinds) == 0 || slices.Contains(w.kinds, kind))
}

// start brings the receiver to a revision: by a snapshot, or by its own word.
func (w *watch) start(ctx context.Context, q sallyport.WatchRequest) error {
	if q.Since == 0 {
		return w.snapshot(ctx)
	}
	if q.Since > w.server.feed.reached() && w.server.shared != nil {
		// What another server told already is a moment away from here.
		if err := w.server.catchUp(ctx); err != nil {
			return fmt.Errorf("watch: %w", err)
		}
	}
	if q.Epoch != w.server.epoch || q.Since > w.server.feed.reached() {
		return fmt.Errorf("watch: %w", sallyport.ErrCompacted)
	}
	w.at = q.Since
	if !w.server.feed.reaches(w.at) {
		head, err := w.server.store.Head(ctx)
		if err != nil {
			return fmt.Errorf("watch: %w", w.server.check(err))
		}
		if w.at < head.Compacted {
			return fmt.Errorf("watch: %w", sallyport.ErrCompacted)
		}
	}
	return w.send(sallyport.WatchEnd, nil, 0)
}

var errSlow = &sallyport.Error{
	Outcome: sallyport.OutcomeUnavailable,
	Code:    "watch.too_slow",
	Message: "the snapshot was not taken within five minutes",
}

// snapshot sends Begin, the live records in parts, and End. The store is read on
// while earlier parts are checked and sent: either takes about as long.
func (w *watch) snapshot(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, snapshotTime, errSlow)
	defer cancel()
	parts := make(chan []Row, 2)
	g, reading := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(parts)
		return w.scan(reading, parts)
	})
	count := 0
	g.Go(func() (err error) {
		count, err = w.sendParts(parts)
		return err
	})
	if err := g.Wait(); err != nil {
		if errors.Is(context.Cause(ctx), errSlow) {
			return errSlow
		}
		return w.server.check(err)
	}
	return w.send(sallyport.WatchEnd, nil, count)
}

// scan reads the rows that the receiver wants into parts.
func (w *watch) scan(ctx context.Context, parts chan<- []Row) error {
	part, bytes := make([]Row, 0, itemsMax), 0
	flush := func() error {
		select {
		case parts <- part:
		case <-ctx.Done():
			return ctx.Err()
		}
		part, bytes = make([]Row, 0, itemsMax), 0
		return nil
	}
	err := w.server.store.Scan(ctx, Query{Kinds: w.kinds},
		func(head Head) error {
			if err := w.server.follows(head, 0); err != nil {
				return err
			}
			if err := w.server.keysFor(head, w.server.storedRing(ctx)); err != nil {
				return err
			}
			w.at = head.Revision
			return w.send(sallyport.WatchBegin, nil, 0)
		},
		func(row Row) error {
			if !w.wants(row.Kind) {
				return nil
			}
			part = append(part, row)
			if bytes += len(row.Payload); len(part) < itemsMax && bytes < itemsBytes {
				return nil
			}
			return flush()
		})
	if err != nil {
		return err
	}
	return flush()
}

// sendParts sends those rows that count, and returns how many they were. Begin has
// been sent by the time the first part is there.
func (w *watch) sendParts(parts <-chan []Row) (count int, err error) {
	now := w.server.clock.now()
	for part := range parts {
		records := make([]sallyport.Record, 0, len(part))
		for i := range part {
			if w.server.live(&part[i], now) {
				records = append(records, part[i].Record)
			}
		}
		if len(records) == 0 {
			continue
		}
		if err := w.send(sallyport.WatchItems, records, 0); err != nil {
			return 0, err
		}
		count += len(records)
	}
	return count, nil
}

// follow sends changes and heartbeats until something ends the watch.
func (w *watch) follow(ctx context.Context) error {
	beat := time.NewTicker(heartbeatEvery)
	defer beat.Stop()
	for {
		batches, reached, wake, ok := w.server.feed.after(w.at, 64)
		if !ok {
			if err := w.catchUp(ctx); err != nil {
				return err
			}
			continue
		}
		for i := range batches {
			if err := w.change(&batches[i]); err != nil {
				return err
			}
		}
		w.at = reached
		if len(batches) > 0 {
			wake = closed // there may be more at once
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-w.server.ended:
			return w.server.alive()
		case <-beat.C:
			if !w.server.current() {
				continue // to say nothing is to say that this may be old
			}
			if err := w.send(sallyport.WatchHeartbeat, nil, 0); err != nil {
				return err
			}
		case <-wake:
		}
	}
}

var closed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// change sends what the receiver wants of one batch, in one piece. What was merged
// from several batches may begin with some that the receiver has.
func (w *watch) change(c *change) error {
	var records []sallyport.Record
	for _, r := range c.records {
		if w.wants(r.Kind) && r.Revision > w.at {
			r.Payload = slices.Clone(r.Payload)
			records = append(records, r)
		}
	}
	w.at = c.revision
	if len(records) == 0 {
		return nil
	}
	return w.send(sallyport.WatchChange, records, 0)
}

// catchUp reads from the store what the ring no longer has, and sends it as one
// change: the store keeps the last row of each record only, so a single batch
// of the past may be incomplete, but all of them together are not.
func (w *watch) catchUp(ctx context.Context) error {
	rows, head, err := w.server.store.Changed(ctx, w.at, catchUpMax+1)
	if err == nil {
		err = w.server.follows(head, w.at)
	}
	if err == nil {
		err = w.server.keysFor(head, w.server.storedRing(ctx))
	}
	if err != nil {
		return fmt.Errorf("watch: %w", w.server.check(err))
	}
	if w.at < head.Compacted || len(rows) > catchUpMax {
		return fmt.Errorf("watch: %w", sallyport.ErrCompacted)
	}
	var records []sallyport.Record
	bytes := 0
	for i := range rows {
		row := &rows[i]
		if !w.wants(row.Kind) {
			continue
		}
		if bytes += len(row.Payload); bytes > catchUpBytes {
			return fmt.Errorf("watch: %w", sallyport.ErrCompacted)
		}
		records = append(records, w.server.tell(row))
	}
	w.at = head.Revision
	if len(records) == 0 {
		return nil
	}
	return w.send(sallyport.WatchChange, records, 0)
}

// tell returns the record of a row, or a tombstone for one that does not verify:
// whoever holds an earlier version must let go of it.
func (s *Server) tell(row *Row) sallyport.Record {
	if s.trusted(row) {
		return row.Record
	}
	return sallyport.Record{Kind: row.Kind, ID: row.ID, Version: row.Version, Revision: row.Revision, Deleted: true}
}

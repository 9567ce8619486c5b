package cached

import (
	"context"
	"time"

	"sallyport"
)

const (
	sweepEvery = time.Second
	sweepMax   = 1_000 // records of one batch

	tombstoneAge  = time.Hour
	tombstoneStep = 6     // by so much of it the age of a tombstone may be off
	purgeMax      = 5_000 // tombstones at once
)

// sweep does a second's housekeeping. Its failures are not its callers': the
// next second tries again.
func (s *Server) sweep(ctx context.Context) {
	if now, doubt := s.clock.look(); !doubt {
		s.throwAway(ctx, now)
	}
	if err := s.check(s.store.Maintain(ctx)); err != nil && ctx.Err() == nil {
		s.log.Warn("store is not maintained", "error", err)
	}
}

// throwAway removes what has ended.
func (s *Server) throwAway(ctx context.Context, now reading) {
	err := s.sweepExpired(ctx, s.clock.ended(now))
	if err == nil {
		s.clock.accept(now)
	} else if ctx.Err() == nil {
		s.log.Warn("expired records are not swept", "error", err)
	}
	if err := s.sweepTombstones(ctx, now.steady); err != nil && ctx.Err() == nil {
		s.log.Warn("tombstones are not purged", "error", err)
	}
}

// sweepExpired turns records that have ended into tombstones, so that watches
// hear of it and the store does not grow. They have ended all the same: what is
// left of a full disk is kept for revocations.
func (s *Server) sweepExpired(ctx context.Context, now time.Time) error {
	if err := s.store.Room(ctx); err != nil {
		return s.check(err)
	}
	for ctx.Err() == nil {
		rows, err := s.store.Expired(ctx, now, sweepMax)
		if err != nil {
			return s.check(err)
		}
		if len(rows) == 0 {
			return nil
		}
		j := &job{why: "expired", touches: keysOf(rows), plan: func(v *view) ([]sallyport.Op, error) { return v.stillThere(rows) }}
		if _, err := s.submit(ctx, j); err != nil {
			return err
		}
		if len(rows) < sweepMax {
			return nil
		}
	}
	return nil
}

// stillThere returns the deletion of those rows that nobody wrote meanwhile.
func (v *view) stillThere(rows []Row) ([]sallyport.Op, error) {
	var ops []sallyport.Op
	for i := range rows {
		now, err := v.get(rows[i].Key())
		if err != nil {
			return nil, err
		}
		if now != nil && !now.Deleted && now.Revision == rows[i].Revision {
			ops = append(ops, sallyport.Op{Kind: now.Kind, ID: now.ID, Delete: true})
		}
	}
	return ops, nil
}

// purgeClock remembers which revision was reached when.
type purgeClock struct {
	age   time.Duration // of a tombstone that nobody needs any more
	marks []purgeMark
	upTo  sallyport.Revision // tombstones up to here are old enough
}

type purgeMark struct {
	at       time.Time
	revision sallyport.Revision
}

// tick returns up to which revision tombstones are old enough at now.
func (c *purgeClock) tick(now time.Time, reached sallyport.Revision) sallyport.Revision {
	if n := len(c.marks); n == 0 || now.Sub(c.marks[n-1].at) >= c.age/tombstoneStep {
		c.marks = append(c.marks, purgeMark{now, reached})
	}
	for len(c.marks) > 0 && now.Sub(c.marks[0].at) >= c.age {
		c.upTo = c.marks[0].revision
		c.marks = c.marks[1:]
	}
	return c.upTo
}

// sweepTombstones forgets some old tombstones, between two rounds of writes.
func (s *Server) sweepTombstones(ctx context.Context, now time.Time) error {
	upTo := s.purge.tick(now, s.feed.reached())
	if upTo == 0 {
		return nil
	}
	select {
	case s.queue.busy <- struct{}{}:
	case <-ctx.Done():
		return nil
	}
	defer func() { <-s.queue.busy }()
	var n int
	err := s.update(ctx, func(tx Tx) (c Change, err error) {
		c, n, err = s.forget(tx, upTo)
		return c, err
	})
	if err == nil && n < purgeMax {
		s.purge.upTo = 0
	}
	return err
}

// forget plans to drop the oldest tombstones: nobody can catch up from below them
// any more.
func (s *Server) forget(tx Tx, upTo sallyport.Revision) (Change, int, error) {
	v, err := s.view(tx)
	if err != nil {
		return Change{}, 0, err
	}
	rows, err := tx.Tombstones(upTo, purgeMax)
	if err != nil {
		return Change{}, 0, err
	}
	for i := range rows {
		v.sum.sub(v.seal.term(&rows[i]))
	}
	head := v.base
	head.Compacted = max(head.Compacted, upTo)
	return Change{Forget: keysOf(rows), Head: v.seal.sealHead(head, v.sum)}, len(rows), nil
}

func keysOf(rows []Row) []Key {
	keys := make([]Key, len(rows))
	for i := range rows {
		keys[i] = rows[i].Key()
	}
	return keys
}

package cached

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sallyport"
)

// Following a store that other servers write, too.
const (
	// pollEvery is how long a change of another server may stay unseen when no
	// notification tells of it.
	pollEvery = 250 * time.Millisecond
	// confirmEvery is how often the store must prove that it is still the one.
	confirmEvery = time.Second
	// confirmedFor is how long a proof lasts. Watches hear nothing afterwards, so
	// that policyd and the gateways count the age of what they go by.
	confirmedFor = 2 * time.Second
	// confirmWait bounds the wait for a proof: a standby that is away holds up
	// commits for as long as it is.
	confirmWait = 5 * time.Second
)

// codeReplaced: the store has another history than the one this server began with.
const codeReplaced = "storage.replaced"

var errNotCurrent = &sallyport.Error{
	Outcome: sallyport.OutcomeUnavailable,
	Code:    "storage.not_current",
	Message: "the record store does not confirm that it is the one in use",
	Hint:    "check PostgreSQL: cached goes on by itself",
}

// follow keeps the ring at what the store holds, and confirms the store, until ctx
// ends.
func (s *Server) follow(ctx context.Context) {
	var proved time.Time
	for ctx.Err() == nil && s.alive() == nil {
		begun := time.Now()
		err := s.catchUp(ctx)
		if err == nil && begun.Sub(proved) >= confirmEvery-pollEvery {
			if err = s.confirm(ctx); err == nil {
				proved = begun
				s.confirmed.Store(&begun)
			}
		}
		if err == nil {
			err = s.shared.Wait(ctx, pollEvery)
		}
		if err == nil || ctx.Err() != nil {
			continue
		}
		s.log.Warn("store cannot be followed", "error", s.check(err))
		select {
		case <-ctx.Done():
		case <-time.After(pollEvery):
		}
	}
}

// confirm asks the store for its proof, and then reads what others wrote before:
// only both together say that nothing is missing.
func (s *Server) confirm(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, confirmWait)
	defer cancel()
	if err := s.shared.Confirm(ctx); err != nil {
		return fmt.Errorf("confirm: %w", err)
	}
	return s.catchUp(ctx)
}

// current reports whether what this server tells is not older than a moment.
func (s *Server) current() bool {
	if s.shared == nil {
		return true // nobody else writes
	}
	at := s.confirmed.Load()
	return at != nil && time.Since(*at) < confirmedFor
}

// catchUp brings the ring to where the store is.
func (s *Server) catchUp(ctx context.Context) error {
	for {
		from := s.feed.reached()
		rows, head, err := s.store.Changed(ctx, from, catchUpMax+1)
		if err == nil {
			err = s.follows(head, from)
		}
		if err == nil {
			err = s.keysFor(head, s.storedRing(ctx))
		}
		if err != nil {
			return fmt.Errorf("follow: %w", s.check(err))
		}
		if head.Revision == from {
			return nil
		}
		if len(rows) > catchUpMax || from < head.Compacted {
			s.feed.skip(head.Revision)
			return nil
		}
		var records []sallyport.Record
		for i := range rows {
			if rows[i].Kind.Streamed() {
				records = append(records, s.tell(&rows[i]))
			}
		}
		if s.feed.merge(from, head.Revision, records) {
			return nil
		}
	}
}

// follows returns an error unless head belongs to the history that this server
// began with, and has at least what was known before it was read.
func (s *Server) follows(head Head, known sallyport.Revision) error {
	switch {
	case head.Epoch != s.epoch:
		return s.check(&sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable,
			Code:    codeReplaced,
			Message: "the record store was replaced by another one (a restored backup)",
			Hint:    "start cached again",
		})
	case head.Revision < known:
		return s.check(rolledBack("the record store has lost what was written last", fmt.Errorf("revision %d after %d", head.Revision, known)))
	}
	return nil
}

// verifyLate is verify for a store that was too large for the start.
func (s *Server) verifyLate(ctx context.Context) {
	began := time.Now()
	err := s.verify(ctx)
	for errors.Is(err, ErrScanTooLong) && ctx.Err() == nil { // so much is written meanwhile
		err = s.verify(ctx)
	}
	if err := s.check(err); err != nil {
		if ctx.Err() == nil {
			s.log.Error("record store is not verified", "error", err)
		}
		return
	}
	s.log.Info("record store is verified", "took", time.Since(began))
}

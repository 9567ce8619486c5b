package cached

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sallyport"
	"sallyport/internal/keyring"
)

// Replacing the key of the rows' codes. The new key codes what is written from now
// on; then every row gets a new code, in small steps that hold nobody up, keep the
// sum of the head right and leave revisions alone, so that no watch hears of it.
// Only then does the old key go. Whatever kills the server between two steps, the
// ring still holds both keys and the next server goes on.

const (
	recodeMax   = 500 // rows of one step
	recodeLease = "row-keys"
	recodeTTL   = 30 * time.Second
	// keysEvery is how often a server looks whether it has to go on where another
	// stopped.
	keysEvery = 10 * time.Second
	// retireAfter is how long the old key stays once no row needs it: longer than
	// the longest look at the store as it was before.
	retireAfter = 2 * snapshotTime
)

// RowKeys implements sallyport.KeyKeeper.
func (s *Server) RowKeys(ctx context.Context) (sallyport.KeyRing, error) {
	row, err := s.storedRing(ctx)()
	if err != nil {
		return sallyport.KeyRing{}, fmt.Errorf("row keys: %w", s.check(err))
	}
	about, err := keyring.Describe(row.Payload, ringPurpose)
	if err != nil {
		return sallyport.KeyRing{}, fmt.Errorf("row keys: %w", err)
	}
	rows, err := s.rowsByKey(ctx)
	if err != nil {
		return sallyport.KeyRing{}, fmt.Errorf("row keys: %w", err)
	}
	ring := sallyport.KeyRing{KEK: about.KEK.String()}
	for _, k := range about.Keys {
		ring.Keys = append(ring.Keys, sallyport.DataKey{ID: k.ID.String(), Created: k.Created, Rows: rows[k.ID]})
	}
	return ring, nil
}

// rowsByKey counts the rows that each key codes, the ring's own left out.
func (s *Server) rowsByKey(ctx context.Context) (map[keyring.ID]uint64, error) {
	rows := map[keyring.ID]uint64{}
	err := s.store.Scan(ctx, Query{Tombstones: true}, func(Head) error { return nil }, func(row Row) error {
		if len(row.MAC) >= keyIDSize && row.Key() != ringKey {
			rows[keyring.ID(row.MAC)]++
		}
		return nil
	})
	return rows, s.check(err)
}

// RotateRowKey implements sallyport.KeyKeeper.
func (s *Server) RotateRowKey(ctx context.Context) error {
	if err := s.auditKeys(ctx, "rotate the key of the rows"); err != nil {
		return err
	}
	return s.changeRing(ctx, func(r keyring.Ring) (keyring.Ring, error) {
		if len(r.Keys()) > 1 {
			return r, &sallyport.Error{
				Outcome: sallyport.OutcomeUnavailable, Code: "keys.busy",
				Message: "the key of the records is being replaced already",
				Hint:    "see how far it is with: sallyport keys ls",
			}
		}
		return r.Rotate(s.clock.now()), nil
	})
}

// RetireRowKeys implements sallyport.KeyKeeper.
func (s *Server) RetireRowKeys(ctx context.Context) error {
	rows, err := s.rowsByKey(ctx)
	if err != nil {
		return err
	}
	active := s.sealer.Load().active.id
	var left uint64
	for id, n := range rows {
		if id != active && id != (keyring.ID{}) {
			left += n
		}
	}
	if left > 0 {
		return &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable, Code: "keys.busy",
			Message: fmt.Sprintf("%d records still have a code by an older key", left),
			Hint:    "wait until `sallyport keys ls` shows none; old keys then go by themselves",
		}
	}
	if err := s.auditKeys(ctx, "retire older keys of the rows"); err != nil {
		return err
	}
	return s.retire(ctx)
}

func (s *Server) retire(ctx context.Context) error {
	return s.changeRing(ctx, func(r keyring.Ring) (keyring.Ring, error) { return r.Retire(), nil })
}

func (s *Server) auditKeys(ctx context.Context, what string) error {
	if s.audit == nil {
		return nil
	}
	return s.append(ctx, sallyport.AuditRecord{Type: sallyport.AuditChange, Detail: what})
}

// keepKeys replaces older keys of the ring, one server at a time, until ctx ends.
// On a shared store it also notices what others made of the ring.
func (s *Server) keepKeys(ctx context.Context) {
	tick := time.NewTicker(keysEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.ended:
			return
		case <-s.replaced:
		case <-tick.C:
		}
		if err := s.replaceKeys(ctx); err != nil && ctx.Err() == nil && !errors.Is(err, sallyport.ErrLeaseHeld) {
			s.log.Warn("older keys of the records are not replaced", "error", err)
		}
	}
}

func (s *Server) replaceKeys(ctx context.Context) error {
	if s.shared != nil {
		if err := s.readRing(s.storedRing(ctx)); err != nil {
			return err
		}
	}
	if len(s.sealer.Load().keys) == 1 {
		return nil
	}
	return s.Lease(ctx, recodeLease, recodeTTL, func(ctx context.Context) error {
		began := time.Now()
		n, err := s.recode(ctx)
		if err != nil {
			return err
		}
		s.log.Info("records have codes by the new key", "records", n, "took", time.Since(began))
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(retireAfter):
		}
		if n, err = s.recode(ctx); err != nil || n > 0 {
			return err // somebody was late: the next round looks again
		}
		return s.retire(ctx)
	})
}

// recode gives every row that an older key codes a new code, and says how many
// there were.
func (s *Server) recode(ctx context.Context) (done int, err error) {
	var after sallyport.Revision
	for limit := recodeMax; ; {
		rows, head, err := s.store.Changed(ctx, after, limit)
		if err == nil {
			err = s.keysFor(head, s.storedRing(ctx))
		}
		if err != nil {
			return done, fmt.Errorf("recode: %w", s.check(err))
		}
		n, err := s.recodeRows(ctx, rows)
		if done += n; err != nil {
			return done, fmt.Errorf("recode: %w", err)
		}
		if len(rows) < limit {
			return done, nil
		}
		if last := rows[len(rows)-1].Revision; rows[0].Revision < last {
			after = last - 1 // of the last batch there may be more
		} else {
			limit *= 2 // it alone is larger than a step
		}
	}
}

// recodeRows is one step of recode, between two rounds of writes.
func (s *Server) recodeRows(ctx context.Context, rows []Row) (done int, err error) {
	var keys []Key
	for i := range rows {
		if s.sealer.Load().outdated(&rows[i]) {
			keys = append(keys, rows[i].Key())
		}
	}
	if len(keys) == 0 {
		return 0, nil
	}
	select {
	case s.queue.busy <- struct{}{}:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	defer func() { <-s.queue.busy }()
	if err := s.alive(); err != nil {
		return 0, err
	}
	err = s.update(ctx, func(tx Tx) (Change, error) {
		v, err := s.view(tx)
		if err != nil {
			return Change{}, err
		}
		now, err := tx.Rows(keys...)
		if err != nil {
			return Change{}, err
		}
		again := v.recode(now)
		if done = len(again); done == 0 {
			return Change{}, nil
		}
		return Change{Rows: again, Head: v.seal.sealHead(v.base, v.sum)}, nil
	})
	return done, err
}

// outdated reports whether an older key of ours codes the row.
func (s *sealer) outdated(row *Row) bool {
	k := s.keyOf(row.MAC)
	return k != nil && k != s.active
}

// recode returns those rows that an older key codes with their new codes. What
// does not verify under the older key must not do so under the new one.
func (v *view) recode(rows []Row) []Row {
	var again []Row
	for _, row := range rows {
		if !v.seal.outdated(&row) {
			continue
		}
		v.sum.sub(v.seal.term(&row))
		if v.server.trusted(&row) {
			row.MAC = v.seal.code(v.seal.active, &row, nil)
			v.sum.add(v.seal.term(&row))
		} else {
			row.MAC = make([]byte, codeSize) // no key's: it has no share in the sum
		}
		again = append(again, row)
	}
	return again
}

package cached

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sallyport"
	"sallyport/internal/keyring"
)

// The keys of the rows' codes lie in the store itself, as one row that no request
// reaches, wrapped by the key-encryption key that the server was given. The row has
// no revision: it is no record, and a change of it is nobody's news.
//
// Whoever writes it seals the head with the newest key in the same transaction.
// So a head whose key is known says that all keys of its rows are, and a server
// that meets an unknown one reads the ring again before it judges any row.

const ringPurpose = "cached rows"

var ringKey = Key{sallyport.KindKeyring, "cached"}

// codeWrongKey: the store's keys are wrapped by another key-encryption key.
const codeWrongKey = "keys.wrong"

func wrongKey(cause error) *sallyport.Error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUsage,
		Code:    codeWrongKey,
		Message: "the records key is not the one that protects this record store",
		Hint:    "nothing was changed; put back the key that belongs to it (docs/configuration.md, keys), from a backup if need be",
		Err:     cause,
	}
}

// reachable refuses requests for the ring.
func reachable(kind sallyport.Kind, id string) error {
	if (Key{kind, id}) == ringKey {
		return refuse("the keys of the records are nobody's record")
	}
	return nil
}

// storedRing reads the ring's row as it is now.
func (s *Server) storedRing(ctx context.Context) func() (Row, error) {
	return func() (Row, error) { return s.store.Get(ctx, ringKey.Kind, ringKey.ID) }
}

// ringOf reads the ring's row of a store that stands still.
func ringOf(tx Tx) func() (Row, error) {
	return func() (Row, error) {
		rows, err := tx.Rows(ringKey)
		if err != nil {
			return Row{}, err
		}
		if len(rows) == 0 {
			return Row{}, sallyport.ErrNotFound
		}
		return rows[0], nil
	}
}

// keysFor makes sure that the keys of a head's rows are known, reading the ring
// again if need be.
func (s *Server) keysFor(head Head, read func() (Row, error)) error {
	if len(head.Seal) == 0 || s.sealer.Load().keyOf(head.Seal) != nil {
		return nil
	}
	if err := s.readRing(read); err != nil {
		return err
	}
	if s.sealer.Load().keyOf(head.Seal) == nil {
		return s.check(rolledBack(untrusted, errors.New("its head is sealed by a key that is not among its keys")))
	}
	return nil
}

// keyOf is keysFor a row that was read without its head. One whose key nobody
// knows does not verify.
func (s *Server) keyOf(ctx context.Context, row *Row) error {
	if s.sealer.Load().keyOf(row.MAC) != nil {
		return nil
	}
	return s.readRing(s.storedRing(ctx))
}

// readRing takes over the ring that read returns.
func (s *Server) readRing(read func() (Row, error)) error {
	s.ringMu.Lock()
	defer s.ringMu.Unlock()
	row, err := read()
	if errors.Is(err, sallyport.ErrNotFound) {
		return s.check(rolledBack(untrusted, errors.New("its ring of keys is missing")))
	}
	if err != nil {
		return fmt.Errorf("read ring of keys: %w", s.check(err))
	}
	seal, _, err := openRing(&row, s.kek)
	switch {
	case err == nil:
		s.use(seal)
	case s.sealer.Load().wrappedAnew(&row):
		s.log.Warn("keys of the records are wrapped by a key-encryption key that is not here: a restart would fail", "error", err)
	default:
		return s.check(err)
	}
	return nil
}

// wrappedAnew reports whether the ring's row holds the keys that are known, under
// another wrapping: another server got the new key-encryption key first.
func (s *sealer) wrappedAnew(row *Row) bool {
	if !s.genuine(row) {
		return false
	}
	about, err := keyring.Describe(row.Payload, ringPurpose)
	return err == nil && about.Keys[0].ID == s.active.id
}

// use makes seal the server's, and has older keys replaced if it has a new one.
func (s *Server) use(seal *sealer) {
	old := s.sealer.Swap(seal)
	if len(seal.keys) > 1 && (old == nil || old.active.id != seal.active.id) {
		select {
		case s.replaced <- struct{}{}:
		default:
		}
	}
}

// openRing opens the ring's row; see keyring.Open.
func openRing(row *Row, kek keyring.KEK) (seal *sealer, stale bool, err error) {
	ring, stale, err := keyring.Open(row.Payload, ringPurpose, kek)
	if errors.Is(err, keyring.ErrWrongKEK) {
		return nil, false, wrongKey(err)
	}
	if err != nil {
		return nil, false, rolledBack(untrusted, err)
	}
	if seal, err = newSealer(ring); err != nil {
		return nil, false, err
	}
	if !seal.genuine(row) {
		return nil, false, rolledBack(untrusted, errors.New("its ring of keys was changed"))
	}
	return seal, stale, nil
}

// CheckKEK returns keys.wrong if another key-encryption key wraps the store's keys. It
// writes nothing, and says nothing of what else may be wrong with them.
func CheckKEK(ctx context.Context, store Store, kek keyring.KEK) error {
	row, err := store.Get(ctx, ringKey.Kind, ringKey.ID)
	if errors.Is(err, sallyport.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if _, _, err = openRing(&row, kek); sallyport.CodeOf(err) == codeWrongKey {
		return err
	}
	return nil
}

// openRing finds the keys of the rows at start. An empty store gets some.
func (s *Server) openRing(ctx context.Context) error {
	row, err := s.storedRing(ctx)()
	if errors.Is(err, sallyport.ErrNotFound) {
		return s.makeRing(ctx)
	}
	if err != nil {
		return err
	}
	seal, stale, err := openRing(&row, s.kek)
	if err != nil {
		return err
	}
	s.use(seal)
	if stale {
		return s.rewrap(ctx)
	}
	return nil
}

// makeRing gives a store that has none its keys.
func (s *Server) makeRing(ctx context.Context) error {
	var made *sealer
	err := s.store.Update(ctx, func(tx Tx) (Change, error) {
		row, err := ringOf(tx)()
		if err == nil { // another server was faster
			made, _, err = openRing(&row, s.kek)
			return Change{}, err
		}
		if !errors.Is(err, sallyport.ErrNotFound) {
			return Change{}, err
		}
		var total sum
		if made, total, err = firstKeys(tx.Head(), s.kek, s.clock.now()); err != nil {
			return Change{}, err
		}
		return putRing(tx.Head(), total, made, made, s.kek, nil)
	})
	if err == nil {
		s.use(made)
	}
	return err
}

// firstKeys returns keys for a store without a ring, and the sum of its rows. One
// from before there were rings has used the key-encryption key itself.
func firstKeys(head Head, kek keyring.KEK, now time.Time) (*sealer, sum, error) {
	if len(head.Seal) == 0 && head.Revision == 0 && head.Compacted == 0 {
		made, err := newSealer(keyring.New(ringPurpose, now))
		return made, sum{}, err
	}
	for _, secret := range kek.Legacy() {
		id := keyring.ID(secret.Derive("sallyport cached id v1"))
		old, err := newSealer(keyring.Adopt(ringPurpose, keyring.Key{ID: id, Created: now.UTC(), Secret: secret}))
		if err != nil {
			return nil, sum{}, err
		}
		if total, err := old.openHead(head); err == nil {
			next, err := newSealer(old.ring.Rotate(now))
			return next, total, err
		}
	}
	return nil, sum{}, rolledBack(untrusted, errors.New("its ring of keys is missing"))
}

// putRing is the change that makes next the keys of the rows: the ring's row in the
// place of old, if there was one, and the head under the newest of them.
func putRing(head Head, total sum, now, next *sealer, kek keyring.KEK, old *Row) (Change, error) {
	doc, err := next.ring.Seal(kek)
	if err != nil {
		return Change{}, err
	}
	if old != nil {
		total.sub(now.term(old))
	}
	row := next.seal(sallyport.Record{Kind: ringKey.Kind, ID: ringKey.ID, Version: 1, Payload: doc})
	total.add(next.term(&row))
	return Change{Rows: []Row{row}, Head: next.sealHead(head, total)}, nil
}

// changeRing replaces the ring, between two rounds of writes.
func (s *Server) changeRing(ctx context.Context, edit func(keyring.Ring) (keyring.Ring, error)) error {
	select {
	case s.queue.busy <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-s.queue.busy }()
	if err := s.alive(); err != nil {
		return err
	}
	var next *sealer
	err := s.update(ctx, func(tx Tx) (Change, error) {
		if err := s.readRing(ringOf(tx)); err != nil {
			return Change{}, err
		}
		v, err := s.view(tx)
		if err != nil {
			return Change{}, err
		}
		old, err := ringOf(tx)()
		if err != nil {
			return Change{}, err
		}
		if _, _, err := openRing(&old, s.currentKEK()); err != nil {
			return Change{}, err // we must not wrap it by a key of the past
		}
		ring, err := edit(v.seal.ring)
		if err != nil {
			return Change{}, err
		}
		if next, err = newSealer(ring); err != nil {
			return Change{}, err
		}
		return putRing(v.base, v.sum, v.seal, next, s.currentKEK(), &old)
	})
	if err != nil {
		return fmt.Errorf("change ring of keys: %w", err)
	}
	s.ringMu.Lock()
	defer s.ringMu.Unlock()
	s.use(next)
	return nil
}

func (s *Server) currentKEK() keyring.KEK {
	s.ringMu.Lock()
	defer s.ringMu.Unlock()
	return s.kek
}

// rewrap wraps the same keys by the newest key of the KEK.
func (s *Server) rewrap(ctx context.Context) error {
	err := s.changeRing(ctx, func(r keyring.Ring) (keyring.Ring, error) { return r, nil })
	if err == nil {
		s.log.Info("keys of the records are wrapped anew", "key", s.currentKEK().IDs()[0].String())
	}
	return err
}

// SetKEK takes over another key-encryption key, and wraps the ring by it if an
// older key of it does so far. One that does not open the ring is refused, and the
// one before stays.
func (s *Server) SetKEK(ctx context.Context, kek keyring.KEK) error {
	row, err := s.storedRing(ctx)()
	if err != nil {
		return s.check(err)
	}
	_, stale, err := openRing(&row, kek)
	if err != nil {
		return err
	}
	s.ringMu.Lock()
	s.kek = kek
	s.ringMu.Unlock()
	if stale {
		return s.rewrap(ctx)
	}
	return nil
}

// Package memory is the engine of cached that keeps rows in a map. It is for
// tests and for trying things out: what it holds ends with the process. It
// passes the same suite as the engines that keep their promise (storetest).
package memory

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"sallyport"
	"sallyport/cached"
)

// Store implements cached.Store.
type Store struct {
	epoch sallyport.Epoch

	mu        sync.RWMutex
	rows      map[key]cached.Row // payloads are never changed in place
	revision  sallyport.Revision
	compacted sallyport.Revision
}

type key struct {
	kind sallyport.Kind
	id   string
}

// New returns an empty store with an epoch of its own.
func New() *Store {
	return &Store{epoch: sallyport.Epoch(sallyport.NewID("e")), rows: map[key]cached.Row{}}
}

var _ cached.Store = (*Store)(nil)

// State implements cached.Store.
func (s *Store) State(context.Context) (cached.State, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state(), nil
}

func (s *Store) state() cached.State {
	return cached.State{Epoch: s.epoch, Revision: s.revision, Compacted: s.compacted}
}

// Get implements cached.Store.
func (s *Store) Get(_ context.Context, kind sallyport.Kind, id string) (cached.Row, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	row, ok := s.rows[key{kind, id}]
	if !ok {
		return cached.Row{}, sallyport.ErrNotFound
	}
	return clone(row), nil
}

// Write implements cached.Store.
func (s *Store) Write(_ context.Context, rows []cached.Row) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.revision
	for i := range rows {
		if rows[i].Revision <= s.revision || rows[i].Revision < last {
			return fmt.Errorf("write %s %s: revision %d after %d: %w", rows[i].Kind, rows[i].ID, rows[i].Revision, last, cached.ErrBroken)
		}
		last = rows[i].Revision
	}
	for i := range rows {
		s.rows[key{rows[i].Kind, rows[i].ID}] = clone(rows[i])
	}
	s.revision = last
	return nil
}

// Room implements cached.Store.
func (s *Store) Room(context.Context) error { return nil }

// Scan implements cached.Store.
func (s *Store) Scan(ctx context.Context, kinds []sallyport.Kind, begin func(cached.State) error, each func(cached.Row) error) error {
	rows, state := s.pick(func(r *cached.Row) bool {
		return !r.Deleted && (len(kinds) == 0 || slices.Contains(kinds, r.Kind))
	})
	if err := begin(state); err != nil {
		return err
	}
	for _, row := range rows {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := each(row); err != nil {
			return err
		}
	}
	return nil
}

// Changed implements cached.Store.
func (s *Store) Changed(_ context.Context, after sallyport.Revision, limit int) ([]cached.Row, cached.State, error) {
	rows, state := s.pick(func(r *cached.Row) bool { return r.Revision > after })
	return rows[:min(limit, len(rows))], state, nil
}

// Owned implements cached.Store.
func (s *Store) Owned(_ context.Context, owner cached.Owner) ([]cached.Row, error) {
	rows, _ := s.pick(func(r *cached.Row) bool {
		return !r.Deleted && (owner.Login != "" && r.Owner.Login == owner.Login ||
			owner.User != "" && r.Owner.User == owner.User ||
			owner.Device != "" && r.Owner.Device == owner.Device)
	})
	return rows, nil
}

// Expired implements cached.Store.
func (s *Store) Expired(_ context.Context, now time.Time, limit int) ([]cached.Row, error) {
	rows, _ := s.pick(func(r *cached.Row) bool {
		return !r.Deleted && !r.Expires.IsZero() && !r.Expires.After(now)
	})
	slices.SortStableFunc(rows, func(a, b cached.Row) int { return a.Expires.Compare(b.Expires) })
	return rows[:min(limit, len(rows))], nil
}

// Purge implements cached.Store.
func (s *Store) Purge(_ context.Context, upTo sallyport.Revision, limit int) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.compacted = max(s.compacted, upTo)
	n := 0
	for k, row := range s.rows {
		if n < limit && row.Deleted && row.Revision <= upTo {
			delete(s.rows, k)
			n++
		}
	}
	return n, nil
}

// Maintain implements cached.Store.
func (s *Store) Maintain(context.Context) error { return nil }

// pick returns copies of the rows that ok says yes to, in order of revision, and
// the state they belong to.
func (s *Store) pick(ok func(*cached.Row) bool) ([]cached.Row, cached.State) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	rows := []cached.Row{}
	for _, row := range s.rows {
		if ok(&row) {
			rows = append(rows, clone(row))
		}
	}
	slices.SortFunc(rows, func(a, b cached.Row) int {
		return cmp.Or(cmp.Compare(a.Revision, b.Revision), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.ID, b.ID))
	})
	return rows, s.state()
}

func clone(row cached.Row) cached.Row {
	row.Payload = bytes.Clone(row.Payload)
	row.MAC = bytes.Clone(row.MAC)
	return row
}

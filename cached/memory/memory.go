// Package memory is the engine of cached that keeps rows in a map. It is for
// tests and for trying things out: what it holds ends with the process. It
// passes the same suite as the engines that keep their promise (storetest).
package memory

import (
	"bytes"
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"sallyport"
	"sallyport/cached"
)

// Store implements cached.Store.
type Store struct {
	writing sync.Mutex // held from a plan to its end

	mu    sync.RWMutex              // guards what follows
	rows  map[cached.Key]cached.Row // payloads are never changed in place
	head  cached.Head
	views []chan struct{} // told of each write
}

// New returns an empty store with an epoch of its own.
func New() *Store {
	return &Store{head: cached.Head{Epoch: sallyport.Epoch(sallyport.NewID("e"))}, rows: map[cached.Key]cached.Row{}}
}

var _ cached.Store = (*Store)(nil)

// Head implements cached.Store.
func (s *Store) Head(context.Context) (cached.Head, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.head, nil
}

// Get implements cached.Store.
func (s *Store) Get(_ context.Context, kind sallyport.Kind, id string) (cached.Row, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	row, ok := s.rows[cached.Key{Kind: kind, ID: id}]
	if !ok {
		return cached.Row{}, sallyport.ErrNotFound
	}
	return clone(row), nil
}

// Update implements cached.Store.
func (s *Store) Update(_ context.Context, plan func(cached.Tx) (cached.Change, error)) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	change, err := plan(tx{s})
	if err != nil || change.Empty() {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range change.Rows {
		s.rows[change.Rows[i].Key()] = clone(change.Rows[i])
	}
	for _, k := range change.Forget {
		delete(s.rows, k)
	}
	s.head = change.Head
	for _, wake := range s.views {
		select {
		case wake <- struct{}{}:
		default: // it is awake
		}
	}
	return nil
}

// tx is the store while nobody else writes.
type tx struct{ *Store }

// Head implements cached.Tx.
func (t tx) Head() cached.Head {
	head, _ := t.Store.Head(context.Background()) // a map does not fail
	return head
}

// Rows implements cached.Tx.
func (t tx) Rows(keys ...cached.Key) ([]cached.Row, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	rows := []cached.Row{}
	for _, k := range keys {
		if row, ok := t.rows[k]; ok {
			rows = append(rows, clone(row))
		}
	}
	return rows, nil
}

// Owned implements cached.Tx.
func (t tx) Owned(owner cached.Owner) ([]cached.Row, error) {
	rows, _ := t.pick(func(r *cached.Row) bool {
		return !r.Deleted && (owner.Login != "" && r.Owner.Login == owner.Login ||
			owner.User != "" && r.Owner.User == owner.User ||
			owner.Device != "" && r.Owner.Device == owner.Device)
	})
	return rows, nil
}

// Tombstones implements cached.Tx.
func (t tx) Tombstones(upTo sallyport.Revision, limit int) ([]cached.Row, error) {
	rows, _ := t.pick(func(r *cached.Row) bool { return r.Deleted && r.Revision <= upTo })
	return rows[:min(limit, len(rows))], nil
}

// Room implements cached.Store.
func (s *Store) Room(context.Context) error { return nil }

// Scan implements cached.Store.
func (s *Store) Scan(ctx context.Context, q cached.Query, begin func(cached.Head) error, each func(cached.Row) error) error {
	rows, head := s.pick(func(r *cached.Row) bool {
		return (q.Tombstones || !r.Deleted) && (len(q.Kinds) == 0 || slices.Contains(q.Kinds, r.Kind))
	})
	if err := begin(head); err != nil {
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
func (s *Store) Changed(_ context.Context, after sallyport.Revision, limit int) ([]cached.Row, cached.Head, error) {
	rows, head := s.pick(func(r *cached.Row) bool { return r.Revision > after })
	return rows[:min(limit, len(rows))], head, nil
}

// Expired implements cached.Store.
func (s *Store) Expired(_ context.Context, now time.Time, limit int) ([]cached.Row, error) {
	rows, _ := s.pick(func(r *cached.Row) bool {
		return !r.Deleted && !r.Expires.IsZero() && !r.Expires.After(now)
	})
	slices.SortStableFunc(rows, func(a, b cached.Row) int { return a.Expires.Compare(b.Expires) })
	return rows[:min(limit, len(rows))], nil
}

// Maintain implements cached.Store.
func (s *Store) Maintain(context.Context) error { return nil }

// pick returns copies of the rows that ok says yes to, in order of revision, and
// the head they belong to.
func (s *Store) pick(ok func(*cached.Row) bool) ([]cached.Row, cached.Head) {
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
	return rows, s.head
}

func clone(row cached.Row) cached.Row {
	row.Payload = bytes.Clone(row.Payload)
	row.MAC = bytes.Clone(row.MAC)
	return row
}

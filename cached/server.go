package cached

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"sallyport"
	"sallyport/internal/keyring"
	"sallyport/internal/logging"
)

// Deps is what a Server works with.
type Deps struct {
	// Store is the engine, opened; whoever opened it closes it, after Run.
	// Required.
	Store Store
	// KEK opens the keys of the rows' codes, which lie in the store. A store that
	// another one opens is refused with keys.wrong. Required.
	KEK keyring.KEK
	// Audit gets every change before it is made; nil: changes are not audited.
	Audit sallyport.Auditor
	// Log; nil: nothing is logged.
	Log logging.Logger
	// TombstoneAge is how long a watch may be away and still catch up; 0: an hour.
	TombstoneAge time.Duration
	// Now is the wall clock, which decides together with the steady one what has
	// expired; nil: time.Now.
	Now func() time.Time
}

// Server implements sallyport.Records, sallyport.Lister and sallyport.Revoker.
type Server struct {
	store  Store
	shared Shared // the store, if others write it, too; else nil
	audit  sallyport.Auditor
	log    logging.Logger
	clock  *clock
	epoch  sallyport.Epoch

	queue queue
	feed  *feed

	sealer   atomic.Pointer[sealer] // of the ring of row keys, as it was read last
	ringMu   sync.Mutex             // one reads the ring at a time; guards kek
	kek      keyring.KEK
	replaced chan struct{} // room for one: there is a row key to replace

	// ended is closed with reason set, once, when the server takes no more
	// requests: it was closed or its store broke.
	ended   chan struct{}
	endOnce sync.Once
	reason  atomic.Pointer[sallyport.Error]

	verified bool       // the whole store; touched by New and Run alone
	purge    purgeClock // touched by Run alone

	confirmed atomic.Pointer[time.Time] // when a shared store was last known to be the one; nil: never
}

// New returns a server over the store. It answers at once; Run sweeps what has
// expired.
func New(cfg Config, deps Deps) (*Server, error) {
	if err := cfg.Validate().Err(); err != nil {
		return nil, err
	}
	if deps.Store == nil {
		return nil, errors.New("cached: no store")
	}
	if deps.KEK.IsZero() {
		return nil, errors.New("cached: no key-encryption key")
	}
	head, err := deps.Store.Head(context.Background())
	if err != nil {
		return nil, fmt.Errorf("cached: %w", err)
	}
	if isUnfinished(head) {
		return nil, fmt.Errorf("cached: %w", unfinished())
	}
	s := &Server{
		store: deps.Store,
		audit: deps.Audit,
		log:   deps.Log,
		epoch: head.Epoch,
		feed:  newFeed(head.Revision),
		ended: make(chan struct{}),
		purge: purgeClock{age: cmp.Or(deps.TombstoneAge, tombstoneAge)},
		kek:   deps.KEK,

		replaced: make(chan struct{}, 1),
	}
	s.queue.busy = make(chan struct{}, 1)
	if s.log == nil {
		s.log = logging.Discard()
	}
	s.clock = newClock(deps.Now, s.log)
	s.shared, _ = deps.Store.(Shared)
	if err := s.openRing(context.Background()); err != nil {
		return nil, fmt.Errorf("cached: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), verifyFirst)
	defer cancel()
	if err := s.verify(ctx); err == nil {
		s.verified = true
	} else if !errors.Is(err, context.DeadlineExceeded) {
		return nil, fmt.Errorf("cached: %w", err)
	}
	return s, nil
}

// Run sweeps expired records and old tombstones until ctx ends (nil) or the
// store breaks (its error). The server takes no requests afterwards: waiting
// watches end, writes under way are finished first.
func (s *Server) Run(ctx context.Context) error {
	defer s.Close()
	ctx, cancel := context.WithCancel(ctx)
	var others sync.WaitGroup
	defer others.Wait()
	defer cancel()
	if s.shared != nil {
		others.Go(func() { s.follow(ctx) })
	}
	if !s.verified {
		others.Go(func() { s.verifyLate(ctx) })
	}
	others.Go(func() { s.keepKeys(ctx) })
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.ended:
			if e := s.reason.Load(); e.Code != codeClosed {
				return e
			}
			return nil
		case <-tick.C:
			s.sweep(ctx)
		}
	}
}

// Close ends waiting watches and refuses further requests; it returns once no
// write is under way. It does not close the store.
func (s *Server) Close() error {
	s.end(&sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable,
		Code:    codeClosed,
		Message: "the record store is shutting down",
	})
	s.queue.busy <- struct{}{}
	<-s.queue.busy
	return nil
}

// Ready returns nil while the server takes requests and what its store holds may be
// gone by.
func (s *Server) Ready() error {
	if err := s.alive(); err != nil {
		return err
	}
	if !s.current() {
		return errNotCurrent
	}
	return nil
}

// alive returns nil until the server is closed or its store broke.
func (s *Server) alive() error {
	if e := s.reason.Load(); e != nil {
		return e
	}
	return nil
}

const (
	codeBroken = "storage.failed"
	codeClosed = "storage.closed"
)

// end lets e be the answer to everything from now on.
func (s *Server) end(e *sallyport.Error) {
	s.endOnce.Do(func() {
		if e.Code != codeClosed {
			s.log.Error("store failed", "error", e)
		}
		s.reason.Store(e)
		close(s.ended)
	})
}

// check passes err on, and ends the server if the store broke or is not the one
// that it was.
func (s *Server) check(err error) error {
	if err == nil {
		return nil
	}
	var e *sallyport.Error
	switch {
	case errors.Is(err, ErrBroken):
		e = &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable,
			Code:    codeBroken,
			Message: "the record store failed",
			Hint:    "check the disk, then start cached again: everything acknowledged is on it",
			Err:     err,
		}
	case errors.As(err, &e) && (e.Code == codeRolledBack || e.Code == codeReplaced || e.Code == codeWrongKey):
	default:
		return err
	}
	s.end(e)
	return e
}

// Get implements sallyport.Records.
func (s *Server) Get(ctx context.Context, kind sallyport.Kind, id string) (sallyport.Record, error) {
	if err := s.Ready(); err != nil {
		return sallyport.Record{}, err
	}
	if err := reachable(kind, id); err != nil {
		return sallyport.Record{}, err
	}
	row, err := s.store.Get(ctx, kind, id)
	if err == nil {
		err = s.keyOf(ctx, &row)
	}
	if err == nil && !s.live(&row, s.clock.now()) {
		err = sallyport.ErrNotFound
	}
	if err != nil {
		return sallyport.Record{}, fmt.Errorf("get %s: %w", kind, s.check(err))
	}
	return row.Record, nil
}

// List implements sallyport.Lister. Kinds that are never streamed are refused,
// but for the history of the configuration, which holds no secret.
func (s *Server) List(ctx context.Context, kind sallyport.Kind) ([]sallyport.Record, error) {
	if err := s.Ready(); err != nil {
		return nil, err
	}
	if !validKind(kind) || !kind.Streamed() && kind != sallyport.KindConfigHistory {
		return nil, refuse("%q is not a kind that can be listed", kind)
	}
	list := []sallyport.Record{}
	now := s.clock.now()
	err := s.store.Scan(ctx, Query{Kinds: []sallyport.Kind{kind}},
		func(h Head) error { return s.keysFor(h, s.storedRing(ctx)) },
		func(row Row) error {
			if s.live(&row, now) {
				list = append(list, row.Record)
			}
			return nil
		})
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", kind, s.check(err))
	}
	return list, nil
}

// live reports whether the row is a record that counts: neither deleted nor
// expired, and as it was written.
func (s *Server) live(row *Row, now time.Time) bool {
	return s.trusted(row) && !row.Deleted && !expired(&row.Record, now)
}

// trusted reports whether the row is as it was written. One that is not counts
// as missing everywhere: what cannot be proved authorises nobody.
func (s *Server) trusted(row *Row) bool {
	if s.sealer.Load().genuine(row) {
		return true
	}
	id := row.ID
	if !row.Kind.Streamed() {
		id = "[redacted]" // the id of a code may be a secret
	}
	s.log.Warn("stored record does not verify, it counts as missing", "kind", row.Kind, "id", id, "revision", uint64(row.Revision))
	return false
}

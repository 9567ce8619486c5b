package policyd

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport"
)

const (
	noticeEvery = time.Second

	// A watcher that is further behind than this many subjects is told to ask
	// again for everything.
	maxPending = 50_000

	maxWhy = 200 // bytes of one change's words
)

// fanout collects changes for each watcher until it takes them.
type fanout struct {
	mu       sync.Mutex
	watchers map[*watcher]struct{}
}

// watcher is one gateway's stream.
type watcher struct {
	wake chan struct{} // capacity 1: something is pending

	// guarded by fanout.mu
	pending map[sallyport.Subject]int // index in changes
	changes []sallyport.SubjectChange
}

func (f *fanout) join() *watcher {
	w := &watcher{wake: make(chan struct{}, 1), pending: map[sallyport.Subject]int{}}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.watchers == nil {
		f.watchers = make(map[*watcher]struct{})
	}
	f.watchers[w] = struct{}{}
	return w
}

func (f *fanout) leave(w *watcher) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.watchers, w)
}

// tell gives changes to every watcher. The snapshot that has them must be in
// force before.
func (f *fanout) tell(changes []sallyport.SubjectChange) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for w := range f.watchers {
		for _, c := range changes {
			w.add(c)
		}
	}
	f.wakeAll()
}

// wake has every watcher send a notice now.
func (f *fanout) wake() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wakeAll()
}

// wakeAll is wake with mu held.
func (f *fanout) wakeAll() {
	for w := range f.watchers {
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

// add merges c into what is pending.
func (w *watcher) add(c sallyport.SubjectChange) {
	if i, ok := w.pending[c.Subject]; ok {
		old := &w.changes[i]
		old.Revision = max(old.Revision, c.Revision)
		old.Why = joinWords(old.Why, c.Why)
		return
	}
	if len(w.changes) >= maxPending {
		everything := sallyport.Subject{Kind: sallyport.SubjectPolicy} // every decision depends on it
		clear(w.pending)
		w.changes = []sallyport.SubjectChange{{Subject: everything, Revision: c.Revision, Why: "too much changed at once"}}
		w.pending[everything] = 0
		return
	}
	w.pending[c.Subject] = len(w.changes)
	w.changes = append(w.changes, c)
}

// joinWords puts the newer words behind the older ones, as far as there is room.
func joinWords(old, new string) string {
	switch {
	case old == "":
		return new
	case new == "" || old == new || strings.HasSuffix(old, "; "+new):
		return old
	case len(old)+len(new) > maxWhy:
		return new
	}
	return old + "; " + new
}

func (f *fanout) take(w *watcher) []sallyport.SubjectChange {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := w.changes
	w.changes = nil
	clear(w.pending)
	return out
}

// Watch implements sallyport.Changes. Before the first complete snapshot the
// notices have no epoch and a SourceAge below zero.
func (s *Server) Watch(ctx context.Context, each func(sallyport.Notice) error) error {
	w := s.fanout.join()
	defer s.fanout.leave(w)
	beat := time.NewTicker(noticeEvery)
	defer beat.Stop()
	last := sallyport.Notice{First: true}
	for {
		next, trust, forbidden := s.notice(w, &last)
		if err := each(next); err != nil {
			return err
		}
		last = sallyport.Notice{Trust: trust, Forbidden: forbidden}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.done:
			return unavailable("policyd.stopping", "policyd is stopping")
		case <-w.wake:
		case <-beat.C:
		}
	}
}

// notice makes the next notice; last holds what trust and forbidden addresses
// the watcher knows, and First before its first one. Changes are taken before the
// snapshot is read, so the revision covers them.
func (s *Server) notice(w *watcher, last *sallyport.Notice) (n sallyport.Notice, trust *sallyport.Trust, forbidden []string) {
	n = sallyport.Notice{First: last.First, MaxStale: s.cfg.MaxStale, Changes: s.fanout.take(w), SourceAge: s.sourceAge()}
	trust, forbidden = last.Trust, last.Forbidden
	snap := s.snap.Load()
	if snap == nil {
		return n, trust, forbidden
	}
	n.Epoch, n.Revision = snap.epoch, snap.revision
	if next := snap.believed(trust, time.Now()); next != trust {
		n.Trust, trust = next, next
	}
	if snap.rules != nil {
		n.PolicyRevision = snap.rules.revision
		if n.First || !slices.Equal(snap.rules.forbidden, forbidden) {
			n.Forbidden, forbidden = snap.rules.forbidden, snap.rules.forbidden
		}
	}
	return n, trust, forbidden
}

// believed returns what gateways are to believe at now: told itself where that is
// what they have been told. Retirement needs no record: policyd's clock decides it,
// as it decides everything else.
func (s *snapshot) believed(told *sallyport.Trust, now time.Time) *sallyport.Trust {
	if s.trust == nil {
		return told
	}
	bundle := s.trust.Believed(now)
	if told != nil && told.SessionCAs == bundle {
		return told
	}
	return &sallyport.Trust{SessionCAs: bundle}
}

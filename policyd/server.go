package policyd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"sallyport"
	"sallyport/internal/logging"
	"sallyport/internal/telemetry"
	"sallyport/policyd/policy"

	"golang.org/x/sync/errgroup"
)

// Cached is what policyd needs of cached.
type Cached interface {
	sallyport.Records
	sallyport.Revoker
}

// Deps is what a Server works with.
type Deps struct {
	// Records is cached: watched for everything, written for posture reports, and
	// told of direct revocations. Required.
	Records Cached
	// Audit gets every decision before it is answered. Required.
	Audit sallyport.Auditor
	// Known finds policies that this process has read already, by their text; nil:
	// there are none.
	Known func(text string) *policy.Policy
	// Log; nil: nothing is logged.
	Log logging.Logger
	// Metrics takes policyd's figures; nil: nobody counts.
	Metrics *telemetry.Registry
}

// Server implements sallyport.Authorizer, Explainer, Changes, PostureSink and
// Revoker. Its methods may be called at any time; they answer once Run has a
// complete snapshot.
type Server struct {
	cfg     Config
	records Cached
	audit   sallyport.Auditor
	log     logging.Logger
	metrics metrics
	known   func(text string) *policy.Policy // Deps.Known

	snap    atomic.Pointer[snapshot]  // nil before the first complete one
	revoked atomic.Pointer[overrides] // direct revocations; never nil
	refused atomic.Pointer[error]     // why the newest configuration file was not applied; nil: it was

	start     time.Time    // of the monotonic clock behind confirmed
	confirmed atomic.Int64 // nanoseconds since start when cached last confirmed; -1: never

	asking atomic.Int64 // batches of questions under way

	fanout fanout
	desk   desk
	replay replay

	doneOnce sync.Once
	done     chan struct{} // closed when Run ends

	advanceMu sync.Mutex
	advance   chan struct{} // closed and replaced when a snapshot is published
}

// New returns a server that knows nothing yet; Run feeds it.
func New(cfg Config, deps Deps) (*Server, error) {
	if faults := cfg.Validate(); faults != nil {
		return nil, faults
	}
	if deps.Records == nil || deps.Audit == nil {
		return nil, errors.New("policyd: records and audit are required")
	}
	if deps.Log == nil {
		deps.Log = logging.Discard()
	}
	s := &Server{
		cfg: cfg.withDefaults(), records: deps.Records, audit: deps.Audit, log: deps.Log,
		start: time.Now(), done: make(chan struct{}), advance: make(chan struct{}),
	}
	s.known = deps.Known
	s.revoked.Store(&overrides{})
	s.replay.kick = make(chan struct{}, 1)
	s.confirmed.Store(-1)
	s.metrics = newMetrics(deps.Metrics, s)
	return s, nil
}

// Run follows cached until ctx ends, and returns nil then. Watches end with it.
func (s *Server) Run(ctx context.Context) error {
	defer s.doneOnce.Do(func() { close(s.done) })
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.follow(ctx) })
	g.Go(func() error { return s.replayAll(ctx) })
	g.Go(func() error { return s.desk.tidy(ctx, s.postureTTL) })
	return g.Wait()
}

// Ready returns nil while questions are answered from a fresh snapshot and the
// newest policy. Its errors are *sallyport.Error with the codes policy.none,
// policy.stale and policy.source.
func (s *Server) Ready() error {
	v, err := s.view()
	if err != nil {
		return err
	}
	if err := s.broken(v.snapshot); err != nil {
		return &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable, Code: codeStale,
			Message: fmt.Sprintf("policy.stale: policy revision %d stays in force", v.rules.revision), Err: err,
		}
	}
	return nil
}

// codeStale stands where an older policy is in force than the newest one.
const codeStale = "policy.stale"

// Refuse tells that a configuration file could not be applied at all, so that no
// record of it will come: the policy in force stays, and Ready, the figures and the
// audit log say so until Refuse(ctx, nil).
func (s *Server) Refuse(ctx context.Context, err error) {
	if err == nil {
		s.refused.Store(nil)
		return
	}
	old := s.refused.Swap(&err)
	if old == nil || (*old).Error() != err.Error() {
		s.auditBroken(ctx, err)
	}
}

// broken is why the policy in force is not the newest one; nil if it is.
func (s *Server) broken(snap *snapshot) error {
	if err := s.refused.Load(); err != nil {
		return *err
	}
	return snap.broken
}

func (s *Server) auditBroken(ctx context.Context, why error) {
	rec := sallyport.AuditRecord{Type: sallyport.AuditPolicyBroken, Time: time.Now(), Code: codeStale, Detail: clip(why.Error(), 200)}
	if err := s.audit.Append(ctx, rec); err != nil {
		s.log.Error("audit record lost", "type", rec.Type, "error", err)
	}
}

// sourceAge is how long ago cached last confirmed the snapshot; below zero: never.
func (s *Server) sourceAge() time.Duration {
	at := s.confirmed.Load()
	if at < 0 {
		return -1
	}
	return time.Since(s.start) - time.Duration(at)
}

func (s *Server) confirm() { s.confirmed.Store(int64(time.Since(s.start))) }

// view is what one batch of questions is answered from.
type view struct {
	*snapshot
	revoked *overrides
	now     time.Time
}

// view returns the state to decide from, or why nothing can be decided.
func (s *Server) view() (view, error) {
	revoked := s.revoked.Load() // before the snapshot: an override leaves only after the snapshot has it
	v := view{s.snap.Load(), revoked, time.Now()}
	switch age := s.sourceAge(); {
	case v.snapshot == nil:
		return v, unavailable("policy.source", "policyd has no complete snapshot yet")
	case age < 0 || age > s.cfg.MaxStale:
		return v, unavailable("policy.stale", "policyd cannot confirm that its snapshot is current")
	case v.rules == nil && v.broken != nil:
		e := unavailable("policy.none", "no configuration loads")
		e.Err = v.broken
		return v, e
	case v.rules == nil:
		return v, unavailable("policy.none", "no configuration has been applied yet")
	}
	return v, nil
}

func unavailable(code, message string) *sallyport.Error {
	return &sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: code, Message: message}
}

// publish puts next in force and tells everybody who waits for changes.
func (s *Server) publish(next *snapshot, changes []sallyport.SubjectChange) {
	s.snap.Store(next)
	s.settle(next)
	s.advanceMu.Lock()
	close(s.advance)
	s.advance = make(chan struct{})
	s.advanceMu.Unlock()
	if len(changes) > 0 {
		s.fanout.tell(changes)
	}
}

// await returns when the snapshot has reached rev of epoch, or when ctx ends. A
// new epoch ends the wait too: what was written before may be gone.
func (s *Server) await(ctx context.Context, epoch sallyport.Epoch, rev sallyport.Revision) error {
	for {
		s.advanceMu.Lock()
		changed := s.advance
		s.advanceMu.Unlock()
		if snap := s.snap.Load(); snap != nil {
			if snap.epoch != epoch {
				return unavailable("policy.source", "the records were replaced meanwhile")
			}
			if snap.revision >= rev {
				return nil
			}
		}
		select {
		case <-changed:
		case <-s.done:
			return unavailable("policyd.stopping", "policyd is stopping")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *Server) postureTTL() time.Duration {
	if snap := s.snap.Load(); snap != nil && snap.rules != nil {
		return snap.rules.ttl
	}
	return s.cfg.PostureTTL
}

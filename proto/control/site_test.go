package control_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport"
)

// site is a small cached and policyd in memory: real enough that the suite can
// tell whether a call arrived whole.
type site struct {
	mu       sync.Mutex // guards what follows
	records  map[string]sallyport.Record
	revision sallyport.Revision
	leases   map[string]bool
	reports  []string
	changed  chan struct{} // closed and replaced at each change
	history  []sallyport.WatchEvent

	backup    []byte
	backupErr error // instead of its second half
}

const epoch = sallyport.Epoch("e1")

func newSite() *site {
	return &site{records: map[string]sallyport.Record{}, leases: map[string]bool{}, changed: make(chan struct{})}
}

func key(kind sallyport.Kind, id string) string { return string(kind) + "/" + id }

func (s *site) Get(ctx context.Context, kind sallyport.Kind, id string) (sallyport.Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.records[key(kind, id)]
	if !ok {
		return r, sallyport.ErrNotFound
	}
	return r, ctx.Err()
}

func (s *site) Apply(_ context.Context, batch []sallyport.Op) (sallyport.Revision, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, op := range batch {
		r, ok := s.records[key(op.Kind, op.ID)]
		if op.If.Absent && ok || op.If.Exists && !ok || op.If.Revision != 0 && op.If.Revision != r.Revision {
			return 0, sallyport.ErrConflict
		}
	}
	s.revision++
	event := sallyport.WatchEvent{Type: sallyport.WatchChange, Epoch: epoch, Revision: s.revision}
	for _, op := range batch {
		r := sallyport.Record{Kind: op.Kind, ID: op.ID, Version: 1, Payload: op.Payload, Expires: op.Expires, Revision: s.revision, Deleted: op.Delete}
		s.records[key(op.Kind, op.ID)] = r
		if op.Delete {
			delete(s.records, key(op.Kind, op.ID))
		}
		event.Records = append(event.Records, r)
	}
	s.history = append(s.history, event)
	close(s.changed)
	s.changed = make(chan struct{})
	return s.revision, nil
}

func (s *site) live() (all []sallyport.Record) {
	for _, r := range s.records {
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b sallyport.Record) int {
		return strings.Compare(key(a.Kind, a.ID), key(b.Kind, b.ID))
	})
	return all
}

func (s *site) Watch(ctx context.Context, q sallyport.WatchRequest, each func(sallyport.WatchEvent) error) error {
	s.mu.Lock()
	if q.Since > s.revision || q.Since > 0 && q.Epoch != epoch {
		s.mu.Unlock()
		return sallyport.ErrCompacted
	}
	next, snapshot := int(s.revision), s.live()
	s.mu.Unlock()
	at := sallyport.Revision(next)
	if q.Since > 0 {
		next = int(q.Since)
		if err := each(sallyport.WatchEvent{Type: sallyport.WatchEnd, Epoch: epoch, Revision: q.Since}); err != nil {
			return err
		}
	} else {
		for _, e := range []sallyport.WatchEvent{
			{Type: sallyport.WatchBegin, Epoch: epoch, Revision: at},
			{Type: sallyport.WatchItems, Epoch: epoch, Revision: at, Records: snapshot},
			{Type: sallyport.WatchEnd, Epoch: epoch, Revision: at, Count: len(snapshot)},
		} {
			if err := each(e); err != nil {
				return err
			}
		}
	}
	for {
		s.mu.Lock()
		events, changed := s.history[next:], s.changed
		s.mu.Unlock()
		for _, e := range events {
			if err := each(e); err != nil {
				return err
			}
			next++
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

func (s *site) Lease(ctx context.Context, name string, _ time.Duration, hold func(context.Context) error) error {
	s.mu.Lock()
	if s.leases[name] {
		s.mu.Unlock()
		return sallyport.ErrLeaseHeld
	}
	s.leases[name] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.leases, name)
	}()
	return hold(ctx)
}

// watchers wait for changes of the set of held leases only in tests.
func (s *site) held(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leases[name]
}

func (s *site) Revoke(ctx context.Context, r sallyport.Revocation) (sallyport.Revoked, error) {
	var batch []sallyport.Op
	for _, subject := range r.Subjects {
		batch = append(batch, sallyport.Op{Kind: sallyport.Kind(subject.Kind), ID: subject.ID, Delete: true})
	}
	rev, err := s.Apply(ctx, batch)
	return sallyport.Revoked{Sessions: len(batch), Durable: true, Revision: rev}, err
}

func (s *site) Backup(_ context.Context, w io.Writer) error {
	for _, half := range [][]byte{s.backup[:len(s.backup)/2], s.backup[len(s.backup)/2:]} {
		if _, err := w.Write(half); err != nil {
			return err
		}
		if s.backupErr != nil {
			return s.backupErr
		}
	}
	return nil
}

// lister has a List of its own, as policy below has: the interfaces share names.
type lister struct{ *site }

func (l lister) List(_ context.Context, kind sallyport.Kind) (of []sallyport.Record, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.live() {
		if r.Kind == kind {
			of = append(of, r)
		}
	}
	return of, nil
}

// policy answers by target: port 22 is allowed, 443 with everything that policyd
// tells, "slow.internal" answers never, "broken.internal" not at all.
type policy struct{ *site }

func (p policy) Authorize(ctx context.Context, questions []sallyport.Request) ([]sallyport.Decision, error) {
	var answers []sallyport.Decision
	for _, q := range questions {
		switch q.Target.Host {
		case "slow.internal":
			<-ctx.Done()
			return nil, ctx.Err()
		case "late.internal":
			return nil, &sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: "policy.slow", Message: "took too long", Err: context.DeadlineExceeded}
		case "broken.internal":
			return nil, errors.New("engine on fire")
		}
		d := sallyport.Decision{ID: sallyport.DecisionID("d-" + q.Target.Host), Rule: "ssh", Epoch: epoch, AsOf: 7}
		if q.Target.Port == 443 {
			d = fullAllow(q)
		} else if q.Target.Port == 22 {
			d.Verdict = sallyport.VerdictAllow
			d.Upstream = sallyport.Upstream{Network: sallyport.TCP, Host: q.Target.Host, Port: 22, Literal: true}
			d.ValidFor = time.Hour
		} else {
			d.Reasons = []sallyport.Reason{{Rule: "ssh", Condition: "port", Wanted: "is 22", Found: q.Peer.String() + q.Headers["Origin"][0], Result: "false"}}
			d.WouldAllowIf = [][]sallyport.Remedy{{{Condition: "port", Want: "22"}}, {{Condition: "groups", Want: "x"}, {Condition: "y"}}}
		}
		answers = append(answers, d)
	}
	return answers, nil
}

// fullAllow is an allow of the usual size.
func fullAllow(q sallyport.Request) sallyport.Decision {
	return sallyport.Decision{
		ID: "d-0123456789ABCDEF", Verdict: sallyport.VerdictAllow, Rule: "dba", Route: "tcp://db.internal:443",
		Upstream: sallyport.Upstream{Network: sallyport.TCP, Host: "10.0.3.7", Port: q.Target.Port, Literal: true},
		DependsOn: []sallyport.Subject{
			{Kind: sallyport.SubjectSession, ID: string(q.Session)},
			{Kind: sallyport.SubjectLogin, ID: "l-0123456789ABCDEF"},
			{Kind: sallyport.SubjectUser, ID: "alice"},
			{Kind: sallyport.SubjectPolicy},
		},
		ValidFor: time.Hour, Epoch: epoch, AsOf: 214, PolicyRevision: 7,
		Who: sallyport.Identity{Session: q.Session, User: "alice", Email: "alice@corp.example"},
	}
}

func (p policy) Explain(ctx context.Context, q sallyport.Request) (sallyport.Decision, error) {
	answers, err := p.Authorize(ctx, []sallyport.Request{q})
	if err != nil {
		return sallyport.Decision{}, err
	}
	return answers[0], nil
}

func (p policy) List(_ context.Context, q sallyport.ListRequest) (sallyport.Listing, error) {
	if q.Session == "" {
		return sallyport.Listing{}, &sallyport.Error{Outcome: sallyport.OutcomeLogin, Code: "login_required", Message: "who are you", Hint: "run: agent login"}
	}
	return sallyport.Listing{
		Me:      sallyport.Identity{Session: q.Session, Groups: []string{"dba"}},
		Facts:   map[string]sallyport.Fact{"firewall": {Value: true, Source: sallyport.SourceOS}, "os": {Value: "linux"}},
		Targets: []sallyport.ListedTarget{{From: "tcp://*.internal:22", Verdict: sallyport.VerdictAllow}},
	}, nil
}

// Watch tells every record's change as a subject's.
func (p policy) Watch(ctx context.Context, each func(sallyport.Notice) error) error {
	first := true
	return p.site.Watch(ctx, sallyport.WatchRequest{}, func(e sallyport.WatchEvent) error {
		n := sallyport.Notice{Epoch: e.Epoch, Revision: e.Revision, First: first, SourceAge: -1, Trust: &sallyport.Trust{SessionCAs: "pem"}}
		first = false
		for _, r := range e.Records {
			subject, _ := sallyport.SubjectOf(r.Kind, r.ID)
			n.Changes = append(n.Changes, sallyport.SubjectChange{Subject: subject, Revision: r.Revision, Why: "changed"})
		}
		return each(n)
	})
}

func (p policy) ReportPosture(_ context.Context, session sallyport.SessionID, jws string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !strings.HasPrefix(jws, "ey") {
		return &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: "posture.bad_signature", Message: "not signed"}
	}
	p.reports = append(p.reports, string(session)+" "+jws)
	return nil
}

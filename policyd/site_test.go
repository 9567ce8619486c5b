package policyd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/memory"
	"sallyport/internal/keyring"
	"sallyport/internal/logging"
	"sallyport/internal/telemetry"
	"sallyport/proto/proof"
)

// site is a policyd over a real cached in a synctest bubble: the clock is the
// bubble's, and settled() means that every goroutine waits.
type site struct {
	*Server
	t      *testing.T
	cached *cached.Server
	link   *link // between policyd and cached
	audit  *ledger
	key    *ecdsa.PrivateKey
	device sallyport.DeviceID
}

// inSite runs f in a bubble with a site that has alice (u1) with a live session
// s1 of login l1 on device d, and the routes.
func inSite(t *testing.T, cfg Config, routes []sallyport.Route, f func(*testing.T, *site)) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, cfg)
		if routes != nil {
			s.put(sallyport.KindConfig, "current", sallyport.Config{Routes: routes, Forbidden: []string{"10.9.9.9:1"}})
		}
		s.put(sallyport.KindTrust, "current", sallyport.Trust{SessionCAs: "pem"})
		s.signIn("u1", "l1", "s1", s.device)
		f(t, s)
	})
}

func newSite(t *testing.T, cfg Config) *site {
	t.Helper()
	store, err := cached.New(cached.Config{}, cached.Deps{Store: memory.New(), KEK: keyring.NewKEK()})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id, err := proof.KeyOf(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, cached: store, link: newLink(store), audit: &ledger{}, key: key, device: id.ID}
	s.Server = startPolicyd(t, cfg, s.link, s.audit)
	run(t, store.Run)
	return s
}

func startPolicyd(t *testing.T, cfg Config, records Cached, audit sallyport.Auditor) *Server {
	t.Helper()
	s, err := New(cfg, Deps{Records: records, Audit: audit, Log: logging.Discard(), Metrics: telemetry.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	run(t, s.Run)
	return s
}

// run runs f until the test ends.
func run(t *testing.T, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
}

// put writes a record into cached and waits until policyd has it, if it can.
func (s *site) put(kind sallyport.Kind, id string, v any) sallyport.Revision {
	s.t.Helper()
	return s.apply(sallyport.Put(kind, id, v))
}

func (s *site) remove(kind sallyport.Kind, id string) {
	s.t.Helper()
	s.apply(sallyport.Op{Kind: kind, ID: id, Delete: true})
}

func (s *site) apply(ops ...sallyport.Op) sallyport.Revision {
	s.t.Helper()
	rev, err := s.cached.Apply(s.t.Context(), ops)
	if err != nil {
		s.t.Fatal(err)
	}
	synctest.Wait()
	return rev
}

// signIn makes a live session of 8 hours with all that stands behind it.
func (s *site) signIn(user sallyport.UserID, login sallyport.LoginID, session sallyport.SessionID, device sallyport.DeviceID) {
	s.t.Helper()
	now := time.Now()
	ops := []sallyport.Op{
		sallyport.Put(sallyport.KindUser, string(user), sallyport.User{ID: user, Email: string(user) + "@corp.example", Name: "Name " + string(user)}),
		sallyport.Put(sallyport.KindDirectoryUser, string(user), sallyport.DirectoryUser{User: user, Groups: []sallyport.Group{{ID: "g1", Name: "dba"}}}),
		sallyport.Put(sallyport.KindLogin, string(login), sallyport.Login{ID: login, User: user, Created: now, Expires: now.Add(12 * time.Hour)}),
		sallyport.Put(sallyport.KindSession, string(session), sallyport.Session{
			ID: session, Login: login, User: user, Device: device, Kind: sallyport.AgentSession, Created: now, Expires: now.Add(8 * time.Hour),
		}),
	}
	if _, err := s.cached.Get(s.t.Context(), sallyport.KindDevice, string(device)); err != nil {
		ops = append(ops, sallyport.Put(sallyport.KindDevice, string(device), sallyport.Device{ID: device, Type: "file"}))
	}
	s.apply(ops...)
}

func (s *site) groups(user sallyport.UserID, names ...string) {
	s.t.Helper()
	u := sallyport.DirectoryUser{User: user}
	for _, n := range names {
		u.Groups = append(u.Groups, sallyport.Group{ID: n})
	}
	s.put(sallyport.KindDirectoryUser, string(user), u)
}

func question(session sallyport.SessionID, to string) sallyport.Request {
	q := sallyport.Request{Session: session, Flow: "f-1", Peer: netip.MustParseAddrPort("192.0.2.7:4711")}
	if to != "" {
		var err error
		if q.Target, err = sallyport.ParseTarget(to); err != nil {
			panic(err)
		}
	}
	return q
}

// decide asks one question.
func (s *site) decide(session sallyport.SessionID, to string) sallyport.Decision {
	s.t.Helper()
	ds, err := s.Authorize(s.t.Context(), []sallyport.Request{question(session, to)})
	if err != nil {
		s.t.Fatalf("%s asks for %s: %v", session, to, err)
	}
	return ds[0]
}

func (s *site) want(session sallyport.SessionID, to string, want sallyport.Verdict) sallyport.Decision {
	s.t.Helper()
	d := s.decide(session, to)
	if d.Verdict != want {
		s.t.Fatalf("%s asks for %s: got %v %v; want %v", session, to, d.Verdict, d.Reasons, want)
	}
	return d
}

// refused asks one question that must not be answered.
func (s *site) refused(code string) {
	s.t.Helper()
	ds, err := s.Authorize(s.t.Context(), []sallyport.Request{question("s1", db)})
	if sallyport.CodeOf(err) != code || sallyport.OutcomeOf(err) != sallyport.OutcomeUnavailable || ds != nil {
		s.t.Fatalf("got %v, %v; want no answer and the code %s", ds, err, code)
	}
}

// report signs and sends a report of facts made now.
func (s *site) report(session sallyport.SessionID, facts map[string]any) error {
	return s.ReportPosture(s.t.Context(), session, s.signed(s.key, session, time.Now(), facts))
}

func (s *site) signed(key *ecdsa.PrivateKey, session sallyport.SessionID, at time.Time, facts map[string]any) string {
	s.t.Helper()
	r := sallyport.PostureReport{Device: s.device, Session: session, Sequence: at.UnixMilli(), Facts: map[string]sallyport.Fact{}}
	for name, v := range facts {
		r.Facts[name] = sallyport.Fact{Value: v, At: at, Source: sallyport.SourceOS}
	}
	jws, err := proof.Sign(key, proof.TypePosture, r)
	if err != nil {
		s.t.Fatal(err)
	}
	return jws
}

// link stands between policyd and cached and can be cut and frozen.
type link struct {
	records Cached

	mu      sync.Mutex
	down    bool
	frozen  chan struct{} // not nil: streams wait until it is closed
	cut     chan struct{} // closed when down
	watches []sallyport.WatchRequest
	applied int
	stuck   bool // streams, and does not write
}

func newLink(r Cached) *link { return &link{records: r, cut: make(chan struct{})} }

var errCut = errors.New("the link is cut")

func (l *link) setDown(down bool) {
	l.mu.Lock()
	if down && !l.down {
		close(l.cut)
	} else if !down {
		l.cut = make(chan struct{})
	}
	l.down = down
	l.mu.Unlock()
	synctest.Wait()
}

func (l *link) setStuck(stuck bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stuck = stuck
}

func (l *link) freeze() (thaw func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := make(chan struct{})
	l.frozen = c
	return func() {
		l.mu.Lock()
		l.frozen = nil
		l.mu.Unlock()
		close(c)
		synctest.Wait()
	}
}

func (l *link) state() (down bool, frozen, cut chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.down, l.frozen, l.cut
}

func (l *link) Get(ctx context.Context, kind sallyport.Kind, id string) (sallyport.Record, error) {
	if down, _, _ := l.state(); down {
		return sallyport.Record{}, errCut
	}
	return l.records.Get(ctx, kind, id)
}

func (l *link) Apply(ctx context.Context, batch []sallyport.Op) (sallyport.Revision, error) {
	if down, _, _ := l.state(); down {
		return 0, errCut
	}
	l.mu.Lock()
	stuck := l.stuck
	l.applied++
	l.mu.Unlock()
	if stuck {
		return 0, errCut
	}
	return l.records.Apply(ctx, batch)
}

func (l *link) Revoke(ctx context.Context, r sallyport.Revocation) (sallyport.Revoked, error) {
	if down, _, _ := l.state(); down {
		return sallyport.Revoked{}, errCut
	}
	l.mu.Lock()
	stuck := l.stuck
	l.mu.Unlock()
	if stuck {
		return sallyport.Revoked{}, errCut
	}
	return l.records.Revoke(ctx, r)
}

func (l *link) writes() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.applied
}

func (l *link) Watch(ctx context.Context, q sallyport.WatchRequest, each func(sallyport.WatchEvent) error) error {
	down, _, cut := l.state()
	if down {
		return errCut
	}
	l.mu.Lock()
	l.watches = append(l.watches, q)
	l.mu.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-cut:
			cancel(errCut)
		case <-stop:
		}
	}()
	err := l.records.Watch(ctx, q, func(e sallyport.WatchEvent) error {
		if _, frozen, _ := l.state(); frozen != nil {
			select {
			case <-frozen:
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return each(e)
	})
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

func (l *link) Lease(ctx context.Context, name string, ttl time.Duration, hold func(context.Context) error) error {
	return l.records.Lease(ctx, name, ttl, hold)
}

func (l *link) lastWatch() sallyport.WatchRequest {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.watches[len(l.watches)-1]
}

// ledger is an audit log in memory.
type ledger struct {
	mu      sync.Mutex
	records []sallyport.AuditRecord
	broken  error
	hang    bool
}

func (l *ledger) Append(ctx context.Context, r sallyport.AuditRecord) error {
	l.mu.Lock()
	broken, hang := l.broken, l.hang
	if broken == nil && !hang {
		l.records = append(l.records, r)
	}
	l.mu.Unlock()
	if hang {
		<-ctx.Done()
		return ctx.Err()
	}
	return broken
}

func (l *ledger) of(typ string) []sallyport.AuditRecord {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []sallyport.AuditRecord
	for _, r := range l.records {
		if r.Type == typ {
			out = append(out, r)
		}
	}
	return out
}

func (l *ledger) set(broken error, hang bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.broken, l.hang = broken, hang
}

// notices collects what a gateway is told.
type notices struct {
	mu   sync.Mutex
	all  []sallyport.Notice
	hold chan struct{} // not nil: the gateway is slow until it is closed
}

// watch starts a gateway that collects notices until the test ends.
func (s *site) watch() *notices {
	n := &notices{}
	run(s.t, func(ctx context.Context) error {
		err := s.Server.Watch(ctx, func(m sallyport.Notice) error {
			n.mu.Lock()
			n.all = append(n.all, m)
			hold := n.hold
			n.mu.Unlock()
			if hold != nil {
				<-hold
			}
			return nil
		})
		if errors.Is(err, context.Canceled) || sallyport.CodeOf(err) == "policyd.stopping" {
			return nil
		}
		return err
	})
	synctest.Wait()
	return n
}

// take returns the notices since the last take.
func (n *notices) take() []sallyport.Notice {
	synctest.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	out := n.all
	n.all = nil
	return out
}

// words returns the changes since the last take, subject and words.
func (n *notices) words() []string {
	var out []string
	for _, m := range n.take() {
		for _, c := range m.Changes {
			out = append(out, c.Subject.String()+": "+c.Why)
		}
	}
	slices.Sort(out)
	return out
}

// pass lets the clock run and everything settle.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

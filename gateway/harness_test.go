package gateway

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyport"
	"sallyport/internal/relay"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// policy is a small policyd: it has a revision, knows which sessions live and
// which targets they may reach, and tells of changes.
type policy struct {
	mu        sync.Mutex
	epoch     sallyport.Epoch
	revision  sallyport.Revision
	policy    sallyport.Revision
	dead      map[sallyport.SessionID]bool
	upstreams map[string]sallyport.Upstream // by target
	denied    map[string]bool               // by target
	from      netip.Addr                    // the only address flows may come from; zero: any
	validFor  time.Duration
	err       error         // what Authorize fails with
	age       time.Duration // of the source
	maxStale  time.Duration
	silent    bool               // sends no heartbeats
	lag       sallyport.Revision // how far answers are behind what the stream tells
	asked     []sallyport.Request

	// before runs before the n-th call (from 1) reads the state, after runs
	// between reading it and answering. Both may change the policy.
	before, after func(ctx context.Context, n int)
	calls         int
	watchers      map[chan sallyport.Notice]struct{}
	broken        chan struct{} // closed: streams break
	hold          chan struct{} // not nil: streams start once it is closed
	trust         *sallyport.Trust
}

func newPolicy() *policy {
	return &policy{
		epoch: "e1", revision: 10, policy: 1,
		dead: map[sallyport.SessionID]bool{}, upstreams: map[string]sallyport.Upstream{}, denied: map[string]bool{},
		watchers: map[chan sallyport.Notice]struct{}{}, broken: make(chan struct{}),
	}
}

// set changes the policy without telling anybody.
func (p *policy) set(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

// change does what set does as a new revision, and tells that subject changed.
func (p *policy) change(subject sallyport.Subject, why string, f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.revision++
	f()
	p.tell(sallyport.SubjectChange{Subject: subject, Revision: p.revision, Why: why})
}

func (p *policy) tell(changes ...sallyport.SubjectChange) {
	for w := range p.watchers {
		n := p.notice()
		n.Changes = changes
		w <- n
	}
}

func (p *policy) notice() sallyport.Notice {
	return sallyport.Notice{Epoch: p.epoch, Revision: p.revision, PolicyRevision: p.policy, SourceAge: p.age, MaxStale: p.maxStale}
}

// breakStreams ends every stream; new ones can be opened at once.
func (p *policy) breakStreams() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.broken)
	p.broken = make(chan struct{})
}

func (p *policy) Watch(ctx context.Context, each func(sallyport.Notice) error) error {
	w := make(chan sallyport.Notice, 1<<14)
	p.mu.Lock()
	broken, hold := p.broken, p.hold
	p.watchers[w] = struct{}{}
	hello := p.notice()
	p.mu.Unlock()
	defer p.set(func() { delete(p.watchers, w) })
	hello.First, hello.Trust = true, p.trust
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err := each(hello); err != nil {
		return err
	}
	beat := time.NewTicker(time.Second)
	defer beat.Stop()
	for {
		var n sallyport.Notice
		select {
		case n = <-w:
		case <-beat.C:
			p.mu.Lock()
			n = p.notice()
			silent := p.silent
			p.mu.Unlock()
			if silent || len(w) > 0 { // a heartbeat must not overtake a change
				continue
			}
		case <-broken:
			return errors.New("stream broke")
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := each(n); err != nil {
			return err
		}
	}
}

func (p *policy) Authorize(ctx context.Context, questions []sallyport.Request) ([]sallyport.Decision, error) {
	p.mu.Lock()
	p.calls++
	n := p.calls
	before, after := p.before, p.after
	p.mu.Unlock()
	if before != nil {
		before(ctx, n)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p.mu.Lock()
	err := p.err
	p.asked = append(p.asked, questions...)
	answers := make([]sallyport.Decision, len(questions))
	for i, q := range questions {
		answers[i] = p.decide(q)
	}
	p.mu.Unlock()
	if after != nil {
		after(ctx, n)
	}
	return answers, err
}

func (p *policy) decide(q sallyport.Request) sallyport.Decision {
	d := sallyport.Decision{
		ID: sallyport.DecisionID(sallyport.NewID("d")), Epoch: p.epoch, AsOf: p.revision - p.lag, PolicyRevision: p.policy,
		ValidFor: p.validFor,
		DependsOn: []sallyport.Subject{
			{Kind: sallyport.SubjectSession, ID: string(q.Session)},
			{Kind: sallyport.SubjectUser, ID: "u-" + string(q.Session)},
		},
		Who: sallyport.Identity{Session: q.Session, User: sallyport.UserID("u-" + string(q.Session))},
	}
	switch {
	case p.dead[q.Session]:
		d.Verdict = sallyport.VerdictLogin
		return d
	case q.Target.IsZero():
		d.Verdict = sallyport.VerdictAllow
		return d
	}
	d.DependsOn = append(d.DependsOn, sallyport.Subject{Kind: sallyport.SubjectRecord, ID: q.Target.Host})
	d.DependsOnPeer = p.from.IsValid()
	up, ok := p.upstreams[q.Target.String()]
	switch {
	case !ok:
		d.Verdict = sallyport.VerdictNoRoute
	case p.denied[q.Target.String()] || p.from.IsValid() && p.from != q.Peer.Addr():
		d.Verdict, d.Rule = sallyport.VerdictDeny, "dba"
		d.Reasons = []sallyport.Reason{{Rule: "dba", Condition: "device.disk_encrypted", Wanted: "is true", Found: "false", Result: "false"}}
	default:
		d.Verdict, d.Rule, d.Upstream = sallyport.VerdictAllow, "dba", up
	}
	return d
}

func (p *policy) Explain(_ context.Context, q sallyport.Request) (sallyport.Decision, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.decide(q), p.err
}

func (p *policy) List(_ context.Context, q sallyport.ListRequest) (sallyport.Listing, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := sallyport.Listing{Me: sallyport.Identity{Session: q.Session, User: sallyport.UserID("u-" + string(q.Session))}, PolicyRevision: p.policy}
	for t := range p.upstreams {
		if p.denied[t] && !q.All {
			continue
		}
		l.Targets = append(l.Targets, sallyport.ListedTarget{From: t})
	}
	return l, p.err
}

func (p *policy) ReportPosture(_ context.Context, session sallyport.SessionID, jws string) error {
	switch jws {
	case "good":
		return nil
	case "unstored":
		return &sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: "posture.unavailable", Message: "the report could not be stored"}
	}
	return &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: "posture.malformed", Message: "the report is malformed"}
}

// journal keeps audit records.
type journal struct {
	mu   sync.Mutex
	recs []sallyport.AuditRecord
	err  error

	before func(sallyport.AuditRecord) // runs before a record is written
}

func (j *journal) Append(_ context.Context, r sallyport.AuditRecord) error {
	if j.before != nil {
		j.before(r)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err != nil {
		return j.err
	}
	j.recs = append(j.recs, r)
	return nil
}

func (j *journal) records(kind string) []sallyport.AuditRecord {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(j.recs), func(r sallyport.AuditRecord) bool { return r.Type != kind })
}

// bench is a gateway with a policy, and agents in the same process.
type bench struct {
	*Server
	t       testing.TB
	policy  *policy
	journal *journal
	dials   atomic.Int64
	stop    func()
}

// newBench starts a gateway whose upstreams echo, without a network, and waits
// until it is ready.
func newBench(t testing.TB, limits Limits) *bench {
	t.Helper()
	b := idleBench(t, limits)
	b.start()
	return b
}

func idleBench(t testing.TB, limits Limits) *bench {
	t.Helper()
	b := &bench{t: t, policy: newPolicy(), journal: new(journal)}
	s, err := New(Config{PublicURL: "https://gw.test", Limits: limits}, Deps{
		Domain: "corp.example", Authorizer: b.policy, Explainer: b.policy, Changes: b.policy, Posture: b.policy, Audit: b.journal,
		Certificate: func() *tls.Certificate { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	s.dialUpstream = b.dialEcho
	b.Server = s
	b.policy.upstreams[db.String()] = sallyport.Upstream{Network: sallyport.TCP, Host: "10.0.3.7", Port: 5432}
	return b
}

var db = sallyport.Target{Network: sallyport.TCP, Host: "db.internal", Port: 5432}

// start serves until the test ends or stop is called.
func (b *bench) start() {
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- b.Serve(ctx, nil, nil) }()
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			b.t.Errorf("Serve: %v", err)
		}
	})
	b.t.Cleanup(func() { b.stop() })
	b.until("policyd heard", func() bool {
		b.table.mu.Lock()
		defer b.table.mu.Unlock()
		return !b.table.fresh.heard.IsZero()
	})
}

// until polls for a condition that another goroutine brings about.
func (b *bench) until(what string, ok func() bool) {
	b.t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			b.t.Fatalf("waited 10 s for: %s", what)
		}
	}
}

func (b *bench) dialEcho(ctx context.Context, u sallyport.Upstream) (relay.Conn, error) {
	b.dials.Add(1)
	near, far := memPipe()
	go func() {
		io.Copy(far, far)
		far.CloseWrite()
	}()
	return near, nil
}

// agent is the other end of one connection.
type agent struct {
	b        *bench
	conn     *fakeConn
	released func()
}

// connect brings a connection of session to the gateway.
func (b *bench) connect(session sallyport.SessionID) *agent {
	b.t.Helper()
	a, err := b.tryConnect(session, "quic")
	if err != nil {
		b.t.Fatalf("Admit: %v", err)
	}
	return a
}

func (b *bench) tryConnect(session sallyport.SessionID, carrier string) (*agent, error) {
	ctx, cancel := context.WithCancel(context.Background())
	c := &fakeConn{peer: tunnel.Peer{Session: session, Carrier: carrier}, ctx: ctx, cancel: cancel, closed: make(chan struct{})}
	c.move("192.0.2.7:4711")
	released, err := b.Admit(ctx, c)
	if err != nil {
		cancel()
		return nil, err
	}
	a := &agent{b: b, conn: c, released: sync.OnceFunc(func() { cancel(); released() })}
	context.AfterFunc(ctx, a.released) // as a carrier does when its connection ends
	b.t.Cleanup(a.released)
	return a, nil
}

// fakeConn is a ServerConn without a network.
type fakeConn struct {
	peer   tunnel.Peer
	addr   atomic.Pointer[netip.AddrPort]
	ctx    context.Context
	cancel context.CancelFunc

	once     sync.Once
	code     uint64
	reason   string
	closedAt time.Time
	closed   chan struct{}
}

func (c *fakeConn) Peer() tunnel.Peer          { return c.peer }
func (c *fakeConn) RemoteAddr() netip.AddrPort { return *c.addr.Load() }
func (c *fakeConn) move(to string)             { ap := netip.MustParseAddrPort(to); c.addr.Store(&ap) }

func (c *fakeConn) Close(code uint64, reason string) {
	c.once.Do(func() {
		c.code, c.reason, c.closedAt = code, reason, time.Now()
		close(c.closed)
		c.cancel()
	})
}

// fakeStream is one CONNECT without a network.
type fakeStream struct {
	conn   *fakeConn
	target sallyport.Target

	answer chan answer
	over   chan struct{} // closed when Connect has returned
}

type answer struct {
	conn    *memConn // the agent's end, after Accept
	header  http.Header
	refusal *sallyport.Error
}

func (s *fakeStream) Conn() tunnel.ServerConn  { return s.conn }
func (s *fakeStream) Target() sallyport.Target { return s.target }
func (s *fakeStream) Header() http.Header      { return http.Header{} }
func (s *fakeStream) Accept(h http.Header) (tunnel.Conn, error) {
	near, far := memPipe()
	s.answer <- answer{conn: far, header: h}
	return near, nil
}
func (s *fakeStream) Refuse(e *sallyport.Error) error { s.answer <- answer{refusal: e}; return nil }

// ask sends CONNECT and does not wait.
func (a *agent) ask(target sallyport.Target) *fakeStream {
	st := &fakeStream{conn: a.conn, target: target, answer: make(chan answer, 2), over: make(chan struct{})}
	go func() {
		defer close(st.over)
		a.b.Connect(a.conn.ctx, st)
	}()
	return st
}

// open opens a flow and checks that it carries bytes.
func (a *agent) open(target sallyport.Target) (*fakeStream, *memConn) {
	a.b.t.Helper()
	st := a.ask(target)
	got := <-st.answer
	if got.refusal != nil {
		a.b.t.Fatalf("CONNECT %s: refused: %v", target, got.refusal)
	}
	if err := got.conn.echo(); err != nil {
		a.b.t.Fatalf("CONNECT %s: %v", target, err)
	}
	return st, got.conn
}

// refused asks for a flow and returns the refusal.
func (a *agent) refused(target sallyport.Target) *sallyport.Error {
	a.b.t.Helper()
	st := a.ask(target)
	got := <-st.answer
	<-st.over
	if got.refusal == nil {
		a.b.t.Fatalf("CONNECT %s: accepted; want a refusal", target)
	}
	return got.refusal
}

// memConn is one end of a stream without a network: half-close, reset with a
// code. Deadlines are not needed by what is tested with it.
type memConn struct {
	r *io.PipeReader
	w *io.PipeWriter
}

func memPipe() (a, b *memConn) {
	ar, bw := io.Pipe()
	br, aw := io.Pipe()
	return &memConn{ar, aw}, &memConn{br, bw}
}

func (c *memConn) Read(p []byte) (int, error)  { return c.r.Read(p) }
func (c *memConn) Write(p []byte) (int, error) { return c.w.Write(p) }
func (c *memConn) CloseWrite() error           { return c.w.Close() }
func (c *memConn) Close() error {
	c.w.Close()
	return c.r.CloseWithError(net.ErrClosed)
}

func (c *memConn) Reset(code uint64) {
	c.w.CloseWithError(&tunnel.ResetError{Code: code})
	c.r.CloseWithError(&tunnel.ResetError{Code: code})
}
func (c *memConn) LocalAddr() net.Addr              { return memAddr{} }
func (c *memConn) RemoteAddr() net.Addr             { return memAddr{} }
func (c *memConn) SetDeadline(time.Time) error      { return nil }
func (c *memConn) SetReadDeadline(time.Time) error  { return nil }
func (c *memConn) SetWriteDeadline(time.Time) error { return nil }

type memAddr struct{}

func (memAddr) Network() string { return "mem" }
func (memAddr) String() string  { return "mem" }

// echo sends four bytes and reads them back.
func (c *memConn) echo() error {
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write([]byte("ping"))
		sent <- err
	}()
	var b [4]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return err
	}
	return <-sent
}

// cutWith waits until the stream ends and returns the code it was reset with.
func (c *memConn) cutWith(t testing.TB) uint64 {
	t.Helper()
	late := time.AfterFunc(2*time.Minute, func() { c.r.CloseWithError(os.ErrDeadlineExceeded) })
	defer late.Stop()
	_, err := c.Read(make([]byte, 1))
	var reset *tunnel.ResetError
	if !errors.As(err, &reset) {
		t.Fatalf("read: got %v; want a reset", err)
	}
	return reset.Code
}

// events reads the agent's event stream until the connection ends; the first,
// hello, is checked and left out.
func (a *agent) events() <-chan connect.Event {
	a.b.t.Helper()
	r, w := io.Pipe()
	req := httptest.NewRequestWithContext(a.conn.ctx, http.MethodGet, "https://gw.test"+connect.PathEvents, nil)
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.b.ServeAPI(&streamWriter{w: w}, req, a.conn)
		w.Close()
	}()
	context.AfterFunc(a.conn.ctx, func() { w.Close() })
	events := make(chan connect.Event, 1<<14)
	ready := make(chan struct{})
	go func() {
		defer close(events)
		defer func() { <-done }()
		dec := json.NewDecoder(r)
		for first := true; ; first = false {
			var e connect.Event
			if dec.Decode(&e) != nil {
				if first {
					close(ready)
				}
				r.Close()
				return
			}
			if first {
				if e.Type != connect.EventHello {
					a.b.t.Errorf("first event: got %q; want hello", e.Type)
				}
				close(ready)
				continue
			}
			events <- e
		}
	}()
	<-ready
	return events
}

// streamWriter is a ResponseWriter over a pipe.
type streamWriter struct {
	w      io.Writer
	header http.Header
	status int
}

func (s *streamWriter) Header() http.Header {
	if s.header == nil {
		s.header = http.Header{}
	}
	return s.header
}
func (s *streamWriter) WriteHeader(status int)           { s.status = status }
func (s *streamWriter) Write(p []byte) (int, error)      { return s.w.Write(p) }
func (s *streamWriter) Flush()                           {}
func (s *streamWriter) SetWriteDeadline(time.Time) error { return nil }

// next returns the next event that is no ping.
func next(t testing.TB, events <-chan connect.Event) connect.Event {
	t.Helper()
	late := time.After(2 * time.Minute)
	for {
		select {
		case e, ok := <-events:
			if !ok {
				t.Fatal("the event stream ended")
			}
			if e.Type != connect.EventPing {
				return e
			}
		case <-late:
			t.Fatal("no event for two minutes")
		}
	}
}

// seen waits until the gateway has taken the policy's revision.
func (b *bench) seen() {
	b.t.Helper()
	b.policy.mu.Lock()
	rev := b.policy.revision
	b.policy.mu.Unlock()
	b.until("the notice taken", func() bool {
		b.table.mu.Lock()
		defer b.table.mu.Unlock()
		return b.table.fresh.revision >= rev
	})
}

func dbRecord() sallyport.Subject {
	return sallyport.Subject{Kind: sallyport.SubjectRecord, ID: db.Host}
}

func sessionSubject(id string) sallyport.Subject {
	return sallyport.Subject{Kind: sallyport.SubjectSession, ID: id}
}

// denyDB makes the policy deny db from the next revision on.
func (b *bench) denyDB() {
	b.policy.change(dbRecord(), `group "dba" removed`, func() { b.policy.denied[db.String()] = true })
}

// tryOpen opens a flow, or returns the refusal.
func (a *agent) tryOpen(target sallyport.Target) (*memConn, error) {
	st := a.ask(target)
	got := <-st.answer
	if got.refusal != nil {
		return nil, got.refusal
	}
	return got.conn, got.conn.echo()
}

package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport"
	"sallyport/internal/relay"
	"sallyport/internal/telemetry"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

func TestFlowCarriesBytesAndIsAudited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		st, c := b.connect("s1").open(db)
		c.CloseWrite()
		if rest, err := io.ReadAll(c); len(rest) != 0 || err != nil {
			t.Errorf("after half-close: got %q, %v; want the end", rest, err)
		}
		<-st.over
		opened, closed := b.journal.records(sallyport.AuditFlowOpen), b.journal.records(sallyport.AuditFlowClose)
		if len(opened) != 1 || len(closed) != 1 {
			t.Fatalf("audit: %d opens, %d closes; want one of each", len(opened), len(closed))
		}
		if o, c := opened[0], closed[0]; o.Flow != c.Flow || o.DecisionID != c.DecisionID || o.DecisionID == "" || o.User != "u-s1" {
			t.Errorf("audit: open %+v, close %+v are not joined", o, c)
		}
		if c := closed[0]; c.Code != "eof" || c.BytesUp != 4 || c.BytesDown != 4 {
			t.Errorf("audit: close %+v; want eof and 4 bytes each way", c)
		}
		if n := b.table.flowCount(); n != 0 {
			t.Errorf("%d flows left in the table", n)
		}
	})
}

func TestFlowAnswerHeaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		b.policy.set(func() { b.policy.validFor = 90*time.Second + time.Millisecond })
		st := b.connect("s1").ask(db)
		got := <-st.answer
		want := map[string]string{connect.HeaderRule: "dba", connect.HeaderValidFor: "91"}
		for k, v := range want {
			if got.header.Get(k) != v {
				t.Errorf("%s: got %q; want %q", k, got.header.Get(k), v)
			}
		}
		if got.header.Get(connect.HeaderFlow) == "" || got.header.Get(connect.HeaderDecision) == "" {
			t.Errorf("header %v lacks flow or decision", got.header)
		}
		got.conn.Close()
	})
}

func TestFlowRefusals(t *testing.T) {
	tests := []struct {
		name    string
		setup   func(b *bench)
		target  sallyport.Target
		outcome sallyport.Outcome
		code    string
	}{
		{"denied", func(b *bench) { b.policy.denied[db.String()] = true }, db, sallyport.OutcomeDenied, connect.ProblemDenied},
		{"no route", func(*bench) {}, sallyport.Target{Network: sallyport.TCP, Host: "x.internal", Port: 1}, sallyport.OutcomeUsage, connect.ProblemNotFound},
		{"audit fails", func(b *bench) { b.journal.err = io.ErrShortWrite }, db, sallyport.OutcomeUnavailable, "audit.unavailable"},
		{"policyd fails", func(b *bench) { b.policy.err = io.ErrUnexpectedEOF }, db, sallyport.OutcomeUnavailable, connect.ProblemUnavailable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, Limits{})
				a := b.connect("s1")
				tt.setup(b)
				e := a.refused(tt.target)
				if e.Outcome != tt.outcome || e.Code != tt.code {
					t.Errorf("got outcome %d, code %s; want %d, %s", e.Outcome, e.Code, tt.outcome, tt.code)
				}
				if n := b.dials.Load(); n != 0 {
					t.Errorf("the upstream was dialled %d times", n)
				}
			})
		})
	}
}

// TestCase_G3_UDPToProhibitedAddress: UDP to an address that is never dialled
// says so; a name without a route does not.
func TestCase_G3_UDPToProhibitedAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		for _, host := range []string{"127.0.0.1", "::1", "169.254.169.254", "0.0.0.0"} {
			e := a.refused(sallyport.Target{Network: sallyport.UDP, Host: host, Port: 53})
			if p := connect.ProblemOf(e); p.Status != 403 || p.ProxyError() != "destination_ip_prohibited" {
				t.Errorf("%s: got %d %s; want 403 destination_ip_prohibited", host, p.Status, p.ProxyError())
			}
		}
		e := a.refused(sallyport.Target{Network: sallyport.UDP, Host: "dns.internal", Port: 53})
		if e.Outcome != sallyport.OutcomeUsage {
			t.Errorf("a name: got outcome %d; want no such target", e.Outcome)
		}
	})
}

// TestCase_G9_RawAddress: an address is a target like any other: without a
// route there is none.
func TestCase_G9_RawAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		e := b.connect("s1").refused(sallyport.Target{Network: sallyport.TCP, Host: "10.0.3.7", Port: 5432})
		if p := connect.ProblemOf(e); p.Status != 404 {
			t.Errorf("got %d; want 404", p.Status)
		}
		if n := b.dials.Load(); n != 0 {
			t.Errorf("dialled %d times", n)
		}
	})
}

func TestCase_E6_RevokedSessionIsNotAdmitted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		b.policy.set(func() { b.policy.dead["s1"] = true })
		_, err := b.tryConnect("s1", "quic")
		if code := admitCode(t, err); code != connect.CodeSessionRevoked {
			t.Errorf("got %#x; want session_revoked", code)
		}
		if sallyport.OutcomeOf(err) != sallyport.OutcomeLogin {
			t.Errorf("a lane would answer outcome %d; want login", sallyport.OutcomeOf(err))
		}
		b.table.mu.Lock()
		defer b.table.mu.Unlock()
		if len(b.table.grants)+len(b.table.carriers)+len(b.table.sessions) != 0 {
			t.Error("the refused connection left something in the table")
		}
	})
}

func TestCase_E12_LimitsRefuseTheNewOne(t *testing.T) {
	for _, tt := range []struct {
		carrier string
		limit   int
	}{{"quic", 64}, {"tls", 512}} {
		t.Run(tt.carrier, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, Limits{})
				var agents []*agent
				for range tt.limit {
					a, err := b.tryConnect("s1", tt.carrier)
					if err != nil {
						t.Fatal(err)
					}
					agents = append(agents, a)
				}
				_, err := b.tryConnect("s1", tt.carrier)
				if code := admitCode(t, err); code != connect.CodeTooMany {
					t.Errorf("got %#x; want too_many", code)
				}
				if _, err := b.tryConnect("s2", tt.carrier); err != nil {
					t.Errorf("another session: %v", err)
				}
				agents[0].open(db)
				agents[1].released()
				if _, err := b.tryConnect("s1", tt.carrier); err != nil {
					t.Errorf("after one went: %v", err)
				}
			})
		})
	}
}

func TestFlowLimitOfASession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{Flows: 2})
		a := b.connect("s1")
		a.open(db)
		a.open(db)
		if e := a.refused(db); e.Code != connect.ProblemTooMany {
			t.Errorf("got %s; want too_many", e.Code)
		}
		b.connect("s2").open(db)
	})
}

// TestCase_M3_SlowPolicyd: past the decision timeout a flow is refused, and
// beyond the limit of waiting flows the next one at once.
func TestCase_M3_SlowPolicyd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{Pending: 3})
		a := b.connect("s1")
		var agents []*agent
		for i := range 3 {
			agents = append(agents, b.connect(sallyport.SessionID(fmt.Sprint("w", i))))
		}
		b.policy.set(func() { b.policy.before = func(ctx context.Context, _ int) { <-ctx.Done() } })
		began := time.Now()
		var waiting []*fakeStream
		for _, a := range agents {
			waiting = append(waiting, a.ask(db))
		}
		synctest.Wait()
		e := a.refused(db)
		if took := time.Since(began); took != 0 || e.Outcome != sallyport.OutcomeUnavailable {
			t.Errorf("one too many: got %v after %s; want unavailable at once", e, took)
		}
		for _, st := range waiting {
			got := <-st.answer
			if took := time.Since(began); took != 2*time.Second || got.refusal == nil || got.refusal.Outcome != sallyport.OutcomeUnavailable {
				t.Errorf("waiting: got %+v after %s; want unavailable after 2 s", got, took)
			}
			<-st.over
		}
		b.policy.set(func() { b.policy.before = nil })
		a.open(db)
		if n := b.dials.Load(); n != 1 {
			t.Errorf("dialled %d times; want 1", n)
		}
	})
}

// TestWaitingShareOfASession: one session cannot take every place to wait.
func TestWaitingShareOfASession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{Pending: 8})
		a, other := b.connect("s1"), b.connect("s2")
		block := make(chan struct{})
		b.dialUpstream = func(context.Context, sallyport.Upstream) (relay.Conn, error) {
			<-block
			return nil, io.ErrUnexpectedEOF
		}
		greedy := []*fakeStream{a.ask(db), a.ask(db)}
		synctest.Wait()
		if e := a.refused(db); e.Outcome != sallyport.OutcomeUnavailable {
			t.Errorf("the third of one session: outcome %d; want unavailable", e.Outcome)
		}
		patient := other.ask(db)
		synctest.Wait()
		select {
		case got := <-patient.answer:
			t.Errorf("another session's flow was answered: %+v", got)
		default:
		}
		close(block)
		for _, st := range append(greedy, patient) {
			<-st.answer
			<-st.over
		}
		b.table.mu.Lock()
		defer b.table.mu.Unlock()
		if b.table.waiting != 0 || b.table.sessions["s1"].waiting != 0 {
			t.Errorf("%d flows still count as waiting", b.table.waiting)
		}
	})
}

func TestIdleLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{Idle: time.Minute})
		a := b.connect("s1")
		events := a.events()
		st, c := a.open(db)
		began := time.Now()
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("bytes from nowhere")
		}
		if took := time.Since(began); took < time.Minute || took > 80*time.Second {
			t.Errorf("idle for %s; want a minute, up to a quarter longer", took)
		}
		if e := next(t, events); e.Code != "idle" {
			t.Errorf("event %+v; want idle", e)
		}
		<-st.over
	})
}

func TestCarrierGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		st, _ := a.open(db)
		a.conn.cancel()
		<-st.over
		if c := b.journal.records(sallyport.AuditFlowClose); len(c) != 1 || c[0].Code != "carrier_gone" {
			t.Errorf("audit: got %+v; want carrier_gone", c)
		}
	})
}

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := idleBench(t, Limits{})
		reg := telemetry.NewRegistry()
		b.metrics = newMetrics(reg, b.table)
		b.start()
		a := b.connect("s1")
		st, c := a.open(db)
		b.denyDB()
		c.cutWith(t)
		<-st.over
		a.refused(db)
		w := httptest.NewRecorder()
		telemetry.Handler(reg, b.Ready).ServeHTTP(w, httptest.NewRequest("GET", "http://127.0.0.1/metrics", nil))
		for _, want := range []string{
			"sallyport_gateway_carriers 1", "sallyport_gateway_flows 0",
			`sallyport_gateway_cuts_total{code="policy"} 1`, `sallyport_gateway_decisions_total{verdict="allow"} 2`,
			`sallyport_gateway_refusals_total{code="denied"} 1`, `sallyport_gateway_bytes_total{direction="up"} 4`,
		} {
			if !strings.Contains(w.Body.String(), want) {
				t.Errorf("no %s in the figures", want)
			}
		}
	})
}

func admitCode(t *testing.T, err error) uint64 {
	t.Helper()
	var e *tunnel.AdmitError
	if !errors.As(err, &e) {
		t.Fatalf("Admit: got %v; want an AdmitError", err)
	}
	return e.Code
}

func TestPeerAddressIsAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		b.connect("s1").open(db)
		b.policy.mu.Lock()
		defer b.policy.mu.Unlock()
		for _, q := range b.policy.asked {
			if q.Peer != netip.MustParseAddrPort("192.0.2.7:4711") || q.Session != "s1" {
				t.Errorf("question %+v has another peer or session", q)
			}
		}
	})
}

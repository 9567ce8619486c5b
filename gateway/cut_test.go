package gateway

import (
	"context"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"sallyport"
	"sallyport/internal/relay"
	"sallyport/proto/connect"
)

var web = sallyport.Target{Network: sallyport.TCP, Host: "web.internal", Port: 80}

// TestCase_N5_OnlyAffectedFlowsAreCut: a change ends the flows that rest on what
// changed, tells why, and leaves the others alone.
func TestCase_N5_OnlyAffectedFlowsAreCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		b.policy.set(func() {
			b.policy.upstreams[web.String()] = sallyport.Upstream{Network: sallyport.TCP, Host: "10.0.3.9", Port: 80}
		})
		a := b.connect("s1")
		events := a.events()
		st, cut := a.open(db)
		_, spared := a.open(web)
		began := time.Now()
		b.denyDB()
		if code := cut.cutWith(t); code != connect.CodeFlowWithdrawn {
			t.Errorf("cut with %#x; want flow withdrawn", code)
		}
		if took := time.Since(began); took > 10*time.Millisecond {
			t.Errorf("cut after %s of a clock that only waits", took)
		}
		e := next(t, events)
		if e.Type != connect.EventWithdrawn || e.Code != "policy" || e.Reason != `group "dba" removed` || e.Target != db.String() ||
			e.Flow == "" || e.Decision == "" || len(e.Reasons) != 1 || e.Reasons[0].Condition != "device.disk_encrypted" {
			t.Errorf("event %+v does not tell why", e)
		}
		<-st.over
		if c := b.journal.records(sallyport.AuditFlowClose); len(c) != 1 || c[0].Code != "policy" || c[0].Flow != e.Flow {
			t.Errorf("audit: got %+v; want one close with code policy", c)
		}
		if err := spared.echo(); err != nil {
			t.Errorf("the other flow: %v", err)
		}
		select {
		case <-a.conn.closed:
			t.Error("the carrier was closed too")
		default:
		}
	})
}

// TestRecheckNamesTheDecision: policyd is told which decision is asked about
// again, so that it can leave an unchanged answer out of its audit.
func TestRecheckNamesTheDecision(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		b.connect("s1").open(db)
		var decision sallyport.DecisionID
		for _, o := range b.journal.records(sallyport.AuditFlowOpen) {
			decision = o.DecisionID
		}
		b.policy.set(func() { b.policy.asked = nil })
		b.policy.change(dbRecord(), "", func() {})
		b.seen()
		synctest.Wait()
		b.policy.mu.Lock()
		defer b.policy.mu.Unlock()
		if len(b.policy.asked) != 1 || b.policy.asked[0].Recheck != decision || b.policy.asked[0].Target != db {
			t.Errorf("asked %+v; want one question about %s", b.policy.asked, decision)
		}
	})
}

// TestCase_N1_RevokedSession: flows are cut first, the agent learns why, then
// its carriers close with session_revoked.
func TestCase_N1_RevokedSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a, other := b.connect("s1"), b.connect("s1")
		stranger := b.connect("s2")
		_, strangers := stranger.open(db)
		events := a.events()
		_, c1 := a.open(db)
		_, c2 := other.open(db)
		began := time.Now()
		b.policy.change(sessionSubject("s1"), "session revoked by admin", func() { b.policy.dead["s1"] = true })
		for _, c := range []*memConn{c1, c2} {
			if code := c.cutWith(t); code != connect.CodeSessionRevoked {
				t.Errorf("flow cut with %#x; want session revoked", code)
			}
		}
		got := map[string]int{}
		for e := range events {
			got[e.Type]++
			if e.Type == connect.EventSession && (e.Code != "session_revoked" || e.Reason != "session revoked by admin") {
				t.Errorf("session event %+v", e)
			}
		}
		if got[connect.EventWithdrawn] != 2 || got[connect.EventSession] != 1 {
			t.Errorf("events %v; want two withdrawn and one session", got)
		}
		for _, a := range []*agent{a, other} {
			<-a.conn.closed
			if a.conn.code != connect.CodeSessionRevoked {
				t.Errorf("carrier closed with %#x; want session revoked", a.conn.code)
			}
			if took := a.conn.closedAt.Sub(began); took > 150*time.Millisecond {
				t.Errorf("carrier closed after %s", took)
			}
		}
		if err := strangers.echo(); err != nil {
			t.Errorf("another session's flow: %v", err)
		}
	})
}

// TestCase_N9_OldSessionStaysDead: after a revocation a new session works and
// the old one never does again.
func TestCase_N9_OldSessionStaysDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		b.policy.change(sessionSubject("s1"), "", func() { b.policy.dead["s1"] = true })
		<-a.conn.closed
		b.connect("s1-new").open(db)
		if _, err := b.tryConnect("s1", "quic"); err == nil {
			t.Error("the old session was admitted")
		}
	})
}

// TestCase_M1_PolicydGone: new flows are refused once policyd is silent for 3 s,
// live ones are cut at max_stale, carriers stay, and all works again within 2 s
// of its return.
func TestCase_M1_PolicydGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		events := a.events()
		_, c := a.open(db)
		began := time.Now()
		b.policy.set(func() { b.policy.silent = true })
		timer := time.AfterFunc(2900*time.Millisecond, func() {
			if _, err := a.tryOpen(db); err != nil {
				t.Errorf("silent for less than 3 s: %v", err)
			}
		})
		defer timer.Stop()
		after(t, 4100*time.Millisecond) // the last heartbeat may have come a second in
		if e := a.refused(db); e.Outcome != sallyport.OutcomeUnavailable {
			t.Errorf("silent: got outcome %d; want unavailable", e.Outcome)
		}
		if err := c.echo(); err != nil {
			t.Errorf("the live flow before max_stale: %v", err)
		}
		if code := c.cutWith(t); code != connect.CodePolicyStale {
			t.Errorf("cut with %#x; want policy stale", code)
		}
		if took := time.Since(began); took < 30*time.Second || took > 31*time.Second+2*tickEvery {
			t.Errorf("cut after %s; want 30 s after the last heartbeat", took)
		}
		for e := range events {
			if e.Type == connect.EventWithdrawn {
				if e.Code != "policy_stale" {
					t.Errorf("event %+v", e)
				}
				break
			}
		}
		if e := a.refused(db); e.Outcome != sallyport.OutcomeUnavailable {
			t.Errorf("stale: got outcome %d; want unavailable", e.Outcome)
		}
		dials := b.dials.Load()
		b.policy.set(func() { b.policy.silent = false })
		back := time.Now()
		b.until("flows again", func() bool { _, err := a.tryOpen(db); return err == nil })
		if took := time.Since(back); took > 2*time.Second {
			t.Errorf("recovered after %s; want 2 s at most", took)
		}
		if n := b.dials.Load() - dials; n != 1 {
			t.Errorf("%d dials for one allowed flow", n)
		}
	})
}

// TestCase_M1_NoAllowInAMillion: without a live policyd nothing gets past the
// question, however often it is tried, and nothing is left behind.
func TestCase_M1_NoAllowInAMillion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		b.policy.set(func() { b.policy.silent = true })
		after(t, 5*time.Second)
		asked := b.policy.calls
		for i := range 1_000_000 {
			g, refusal := b.table.register(a.conn, db, func(cut) {})
			if refusal != nil {
				t.Fatalf("attempt %d: not even registered: %v", i, refusal)
			}
			if _, _, refusal := b.table.ask(g, time.Now(), a.conn.RemoteAddr()); refusal == nil || refusal.Outcome != sallyport.OutcomeUnavailable {
				t.Fatalf("attempt %d: got %v; want unavailable", i, refusal)
			}
			b.table.drop(g)
		}
		for range 100 { // the same through the front
			if e := a.refused(db); e.Outcome != sallyport.OutcomeUnavailable {
				t.Fatalf("CONNECT: got %v; want unavailable", e)
			}
		}
		if b.policy.calls != asked || b.dials.Load() != 0 || b.table.flowCount() != 0 {
			t.Errorf("%d questions, %d dials, %d flows left; want none", b.policy.calls-asked, b.dials.Load(), b.table.flowCount())
		}
	})
}

// TestSourceAgeIsCountedFromCached: policyd lives and heartbeats, but cached has
// been silent; live flows end at max_stale all the same.
func TestSourceAgeIsCountedFromCached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		_, c := b.connect("s1").open(db)
		began := time.Now()
		cachedDied := began
		age := func() {
			b.policy.set(func() { b.policy.age = time.Since(cachedDied); b.policy.maxStale = 3 * time.Second })
		}
		stop := every(50*time.Millisecond, age)
		defer stop()
		if code := c.cutWith(t); code != connect.CodePolicyStale {
			t.Errorf("cut with %#x; want policy stale", code)
		}
		if took := time.Since(began); took < 2500*time.Millisecond || took > 3500*time.Millisecond {
			t.Errorf("cut after %s; want about 3 s", took)
		}
	})
}

func TestReconnectAsksForEverythingAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		_, c := a.open(db)
		_, kept := b.connect("s2").open(web2(b))
		// What changes in the gap between two streams is told by no notice.
		b.policy.set(func() { b.policy.revision++; b.policy.denied[db.String()] = true })
		b.policy.breakStreams()
		if code := c.cutWith(t); code != connect.CodeFlowWithdrawn {
			t.Errorf("cut with %#x; want flow withdrawn", code)
		}
		if err := kept.echo(); err != nil {
			t.Errorf("a flow that is still allowed: %v", err)
		}
	})
}

func web2(b *bench) sallyport.Target {
	b.policy.set(func() {
		b.policy.upstreams[web.String()] = sallyport.Upstream{Network: sallyport.TCP, Host: "10.0.3.9", Port: 80}
	})
	return web
}

// TestCase_M12_SplitBrain: the stream of a policyd that is behind is dropped, and
// while there is no other, nothing new is let in.
func TestCase_M12_SplitBrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		a.open(db)
		b.policy.set(func() { b.policy.revision-- })
		b.policy.breakStreams()
		after(t, 4*time.Second)
		if e := a.refused(db); e.Outcome != sallyport.OutcomeUnavailable {
			t.Errorf("got outcome %d; want unavailable", e.Outcome)
		}
		b.policy.set(func() { b.policy.revision++ })
		b.until("flows again", func() bool { _, err := a.tryOpen(db); return err == nil })
	})
}

func TestValidFor(t *testing.T) {
	const valid = 10 * time.Second
	tests := []struct {
		name  string
		atEnd func(b *bench)
		cut   time.Duration // 0: never
		code  uint64
		word  string
	}{
		{"still allowed", func(b *bench) {}, 0, 0, ""},
		{"denied", func(b *bench) { b.policy.denied[db.String()] = true }, valid, connect.CodeFlowWithdrawn, "valid_for"},
		{"session ended", func(b *bench) { b.policy.dead["s1"] = true }, valid, connect.CodeSessionRevoked, "session_expired"},
		{"no answer", func(b *bench) { b.policy.err = io.ErrUnexpectedEOF }, valid + time.Second, connect.CodePolicyStale, "valid_for"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, Limits{})
				a := b.connect("s1")
				events := a.events()
				b.policy.set(func() { b.policy.validFor = valid })
				began := time.Now()
				_, c := a.open(db)
				timer := time.AfterFunc(valid-time.Second, func() { b.policy.set(func() { b.policy.validFor = time.Hour; tt.atEnd(b) }) })
				defer timer.Stop()
				if tt.cut == 0 {
					after(t, valid+2*time.Second)
					if err := c.echo(); err != nil {
						t.Errorf("cut: %v", err)
					}
					return
				}
				if code := c.cutWith(t); code != tt.code {
					t.Errorf("cut with %#x; want %#x", code, tt.code)
				}
				if took := time.Since(began); took < tt.cut || took > tt.cut+3*tickEvery {
					t.Errorf("cut after %s; want %s", took, tt.cut)
				}
				if e := next(t, events); e.Code != tt.word {
					t.Errorf("event %+v; want code %s", e, tt.word)
				}
			})
		})
	}
}

// TestUnconfirmedChange: a change of its subjects makes a flow doubtful; if
// nobody answers, it is cut though the source is fresh.
func TestUnconfirmedChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		_, doubtful := a.open(db)
		_, other := a.open(web2(b))
		b.policy.set(func() { b.policy.err = io.ErrUnexpectedEOF })
		began := time.Now()
		b.policy.change(dbRecord(), "record changed", func() {})
		if code := doubtful.cutWith(t); code != connect.CodePolicyStale {
			t.Errorf("cut with %#x; want policy stale", code)
		}
		if took := time.Since(began); took < confirmGrace || took > confirmGrace+3*tickEvery {
			t.Errorf("cut after %s; want %s", took, confirmGrace)
		}
		if err := other.echo(); err != nil {
			t.Errorf("a flow that nothing touched: %v", err)
		}
	})
}

func TestPeerMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		_, indifferent := a.open(web2(b))
		b.policy.set(func() { b.policy.from = a.conn.RemoteAddr().Addr() })
		_, c := a.open(db)
		a.conn.move("192.0.2.7:9999") // another port of the same address is the same peer
		after(t, 2*time.Second)
		if err := c.echo(); err != nil {
			t.Fatalf("same address: %v", err)
		}
		began := time.Now()
		a.conn.move("198.51.100.1:4711")
		if code := c.cutWith(t); code != connect.CodeFlowWithdrawn {
			t.Errorf("cut with %#x; want flow withdrawn", code)
		}
		if took := time.Since(began); took > peersEvery+2*tickEvery {
			t.Errorf("cut after %s", took)
		}
		if err := indifferent.echo(); err != nil {
			t.Errorf("a flow whose decision does not look at the address: %v", err)
		}
	})
}

func TestRouteLeadsElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		_, c := b.connect("s1").open(db)
		b.policy.change(policySubject, "", func() {
			b.policy.upstreams[db.String()] = sallyport.Upstream{Network: sallyport.TCP, Host: "10.0.3.8", Port: 5432}
		})
		if code := c.cutWith(t); code != connect.CodeFlowWithdrawn {
			t.Errorf("cut with %#x; want flow withdrawn", code)
		}
	})
}

// TestOutdatedAnswerCutsNothing: an answer from a policyd that is behind neither
// ends a live flow nor confirms it.
func TestOutdatedAnswerCutsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		_, c := b.connect("s1").open(db)
		b.policy.set(func() { b.policy.lag = 1; b.policy.denied[db.String()] = true })
		b.policy.change(dbRecord(), "", func() {})
		after(t, time.Second)
		if err := c.echo(); err != nil {
			t.Fatalf("cut by an outdated answer: %v", err)
		}
		b.policy.set(func() { b.policy.lag = 0; delete(b.policy.denied, db.String()) })
		after(t, 3*time.Second)
		if err := c.echo(); err != nil {
			t.Errorf("cut though the current answer is an allow: %v", err)
		}
	})
}

// TestUpstreamReset: the service's reset is passed on with its own code, and the
// event says so on carriers that have no code.
func TestUpstreamReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		var far *memConn
		b.dialUpstream = func(context.Context, sallyport.Upstream) (relay.Conn, error) {
			near, f := memPipe()
			far = f
			return near, nil
		}
		a := b.connect("s1")
		events := a.events()
		st := a.ask(db)
		got := <-st.answer
		far.Reset(0)
		if code := got.conn.cutWith(t); code != connect.CodeUpstreamReset {
			t.Errorf("reset with %#x; want upstream reset", code)
		}
		if e := next(t, events); e.Code != "upstream_reset" || e.Flow == "" {
			t.Errorf("event %+v", e)
		}
		<-st.over
	})
}

// TestCase_G11_ServiceEndsFirst: the service's half-close reaches the agent, and
// the agent's bytes still reach the service.
func TestCase_G11_ServiceEndsFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		service := make(chan []byte, 1)
		b.dialUpstream = func(context.Context, sallyport.Upstream) (relay.Conn, error) {
			near, far := memPipe()
			go func() {
				far.Write([]byte("bye"))
				far.CloseWrite()
				all, _ := io.ReadAll(far)
				service <- all
				far.Close()
			}()
			return near, nil
		}
		st := b.connect("s1").ask(db)
		c := (<-st.answer).conn
		if all, err := io.ReadAll(c); string(all) != "bye" || err != nil {
			t.Fatalf("read %q, %v", all, err)
		}
		want := make([]byte, 1<<20)
		for i := range want {
			want[i] = byte(i * 7)
		}
		if _, err := c.Write(want); err != nil {
			t.Fatal(err)
		}
		c.CloseWrite()
		if got := <-service; string(got) != string(want) {
			t.Errorf("the service got %d bytes; want %d intact", len(got), len(want))
		}
		<-st.over
	})
}

func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		events := a.events()
		_, c := a.open(db)
		began := time.Now()
		stopped := make(chan struct{})
		go func() { b.stop(); close(stopped) }()
		if e := next(t, events); e.Type != connect.EventDrain {
			t.Errorf("got %+v; want drain", e)
		}
		if e := a.refused(db); e.Outcome != sallyport.OutcomeUnavailable {
			t.Errorf("new flow while draining: outcome %d", e.Outcome)
		}
		if _, err := b.tryConnect("s1", "quic"); admitCode(t, err) != connect.CodeDraining {
			t.Errorf("new carrier while draining: %v", err)
		}
		if err := c.echo(); err != nil {
			t.Errorf("live flow while draining: %v", err)
		}
		if code := c.cutWith(t); code != connect.CodeDraining {
			t.Errorf("cut with %#x; want draining", code)
		}
		<-stopped
		if took := time.Since(began); took < 5*time.Second || took > 6*time.Second {
			t.Errorf("drained in %s; want the default of 5 s", took)
		}
		if a.conn.code != connect.CodeDraining {
			t.Errorf("carrier closed with %#x", a.conn.code)
		}
	})
}

func TestDrainWithoutFlowsIsQuick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		began := time.Now()
		b.stop()
		if took := time.Since(began); took > 100*time.Millisecond {
			t.Errorf("took %s", took)
		}
		<-a.conn.closed
	})
}

// after lets d pass.
func after(t *testing.T, d time.Duration) {
	t.Helper()
	<-time.After(d)
}

// every runs f now and then until stopped.
func every(d time.Duration, f func()) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(d)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				f()
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}

// BenchmarkCut measures how long it takes from a notice that ends everything to
// the last reset.
func BenchmarkCut(b *testing.B) {
	for _, n := range []int{1000, 5000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for range b.N {
				b.StopTimer()
				bench := newBench(b, Limits{})
				var conns []*memConn
				for i := range n {
					_, c := bench.connect(sallyport.SessionID(fmt.Sprint("s", i))).open(db)
					conns = append(conns, c)
				}
				b.StartTimer()
				bench.denyDB()
				for _, c := range conns {
					c.cutWith(b)
				}
				b.StopTimer()
				bench.stop()
			}
		})
	}
}

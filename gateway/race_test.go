package gateway

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"sallyport"
	"sallyport/internal/relay"
	"sallyport/proto/connect"
)

// The races of DESIGN section 5: at every step of a flow a change comes in that
// denies it (or does not), and the flow must never carry a byte it may not.

// onCall runs f once, at the n-th question from now on, after policyd has read
// its state and before the gateway has the answer.
func (b *bench) onCall(n int, f func()) {
	b.policy.set(func() {
		at := b.policy.calls + n
		b.policy.after = func(_ context.Context, call int) {
			if call == at {
				f()
				b.seen()
			}
		}
	})
}

// onDial runs f while the upstream is being dialled, before it answers.
func (b *bench) onDial(f func()) {
	dial := b.dialUpstream
	b.dialUpstream = func(ctx context.Context, u sallyport.Upstream) (relay.Conn, error) {
		c, err := dial(ctx, u)
		if b.dials.Load() == 1 {
			f()
			b.seen()
		}
		return c, err
	}
}

func TestRace_ChangeBetweenQuestionAndAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		b.onCall(1, b.denyDB)
		if e := a.refused(db); e.Outcome != sallyport.OutcomeDenied {
			t.Errorf("got outcome %d; want denied", e.Outcome)
		}
		if n := b.dials.Load(); n != 0 {
			t.Errorf("dialled %d times; want none", n)
		}
	})
}

func TestRace_UnrelatedChangeAsksNobodyAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		b.onCall(1, func() {
			b.policy.change(sallyport.Subject{Kind: sallyport.SubjectUser, ID: "somebody"}, "", func() {})
		})
		before := b.policy.calls
		a.open(db)
		if n := b.policy.calls - before; n != 1 {
			t.Errorf("asked %d times; want once", n)
		}
	})
}

func TestRace_ChangeBetweenDecisionAndDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		// flow.open is written between the decision and the dial.
		b.journal.before = func(r sallyport.AuditRecord) {
			if r.Type == sallyport.AuditFlowOpen {
				b.denyDB()
				b.seen()
			}
		}
		if e := a.refused(db); e.Outcome != sallyport.OutcomeDenied {
			t.Errorf("got outcome %d; want denied", e.Outcome)
		}
		if n := b.dials.Load(); n != 0 {
			t.Errorf("dialled %d times; want none", n)
		}
		if n := len(b.journal.records(sallyport.AuditFlowClose)); n != 1 {
			t.Errorf("%d flow.close after a flow.open; want one", n)
		}
	})
}

func TestRace_ChangeBetweenDialAndAccept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		b.onDial(b.denyDB)
		e := a.refused(db)
		if e.Outcome != sallyport.OutcomeDenied || e.Decision == nil || len(e.Decision.Reasons) == 0 {
			t.Errorf("got %+v; want a denial with its reasons", e)
		}
		synctest.Wait() // the echo's goroutine ends only if its connection was closed
		if n := len(b.journal.records(sallyport.AuditFlowClose)); n != 1 {
			t.Errorf("%d flow.close; want one", n)
		}
	})
}

func TestRace_HarmlessChangeBetweenDialAndAccept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		b.onDial(func() { b.policy.change(dbRecord(), "posture refreshed", func() {}) })
		a.open(db)
		if n := b.dials.Load(); n != 1 {
			t.Errorf("dialled %d times; want once: the same upstream is allowed still", n)
		}
	})
}

func TestRace_RouteMovedBetweenDialAndAccept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		moved := sallyport.Upstream{Network: sallyport.TCP, Host: "10.0.3.8", Port: 5432}
		var dialled []sallyport.Upstream
		dial := b.dialUpstream
		b.dialUpstream = func(ctx context.Context, u sallyport.Upstream) (relay.Conn, error) {
			dialled = append(dialled, u)
			return dial(ctx, u)
		}
		b.onDial(func() { b.policy.change(policySubject, "", func() { b.policy.upstreams[db.String()] = moved }) })
		a.open(db)
		if len(dialled) != 2 || dialled[1] != moved {
			t.Errorf("dialled %v; want the new upstream last", dialled)
		}
	})
}

func TestRace_RevokedWhileDialHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		b.dialUpstream = func(ctx context.Context, _ sallyport.Upstream) (relay.Conn, error) {
			<-ctx.Done()
			return nil, &sallyport.Error{Outcome: sallyport.OutcomeUpstream, Code: connect.ProblemTimeout}
		}
		st := a.ask(db)
		synctest.Wait()
		began := time.Now()
		b.denyDB()
		got := <-st.answer
		if took := time.Since(began); took > 50*time.Millisecond || got.refusal.Outcome != sallyport.OutcomeDenied {
			t.Errorf("got %v after %s; want denied at once", got.refusal, took)
		}
		<-st.over
	})
}

// TestRace_DirectRevocation: a revocation that policyd took while cached was out
// of reach has the revision of the snapshot that the answer came from.
func TestRace_DirectRevocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		taken := func() stamp {
			b.table.mu.Lock()
			defer b.table.mu.Unlock()
			return b.table.fresh.last[sessionSubject("s1")].at
		}
		b.onCall(1, func() {
			b.policy.set(func() {
				b.policy.dead["s1"] = true
				b.policy.tell(sallyport.SubjectChange{Subject: sessionSubject("s1"), Revision: b.policy.revision, Why: "session revoked"})
			})
			b.until("the revocation taken", func() bool { return taken() != 0 })
		})
		if e := a.refused(db); e.Outcome != sallyport.OutcomeLogin {
			t.Errorf("got outcome %d; want login", e.Outcome)
		}
		if n := b.dials.Load(); n != 0 {
			t.Errorf("dialled %d times; want none", n)
		}
	})
}

func TestRace_ChangeWhileTheAnswerIsWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		st := &fakeStream{conn: a.conn, target: db, answer: make(chan answer), over: make(chan struct{})} // Accept blocks
		go func() {
			defer close(st.over)
			b.Connect(a.conn.ctx, st)
		}()
		synctest.Wait() // accepted in the table, not yet on the wire
		b.denyDB()
		b.seen()
		synctest.Wait()
		got := <-st.answer
		if got.refusal != nil {
			t.Fatalf("refused: %v; the stream was being accepted already", got.refusal)
		}
		if code := got.conn.cutWith(t); code != connect.CodeFlowWithdrawn {
			t.Errorf("cut with %#x; want flow withdrawn", code)
		}
		<-st.over
	})
}

func TestRace_StreamReconnectsWhileDeciding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		// The change falls into the gap between two streams: no notice tells of it.
		b.onCall(1, func() {
			b.policy.set(func() { b.policy.revision++; b.policy.denied[db.String()] = true })
			b.policy.breakStreams()
		})
		if e := a.refused(db); e.Outcome != sallyport.OutcomeDenied {
			t.Errorf("got outcome %d; want denied", e.Outcome)
		}
	})
}

func TestRace_NewEpochWhileDeciding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		b.onCall(1, func() {
			b.policy.set(func() {
				b.policy.epoch, b.policy.revision = "e2", 10
				b.policy.denied[db.String()] = true
				b.policy.tell()
			})
			b.until("the new epoch taken", func() bool {
				b.table.mu.Lock()
				defer b.table.mu.Unlock()
				return b.table.fresh.epoch == "e2"
			})
		})
		if e := a.refused(db); e.Outcome != sallyport.OutcomeDenied {
			t.Errorf("got outcome %d; want denied", e.Outcome)
		}
	})
}

// TestRace_AnswerBehindTheStream: an answer from a policyd that has not seen the
// change yet is not taken, however often it is given (M12).
func TestRace_AnswerBehindTheStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		b.denyDB()
		b.seen()
		b.policy.set(func() { b.policy.lag = 1; delete(b.policy.denied, db.String()) })
		began := time.Now()
		e := a.refused(db)
		if took := time.Since(began); e.Outcome != sallyport.OutcomeUnavailable || took != 2*time.Second {
			t.Errorf("got %v after %s; want unavailable after 2 s", e, took)
		}
		if n := b.dials.Load(); n != 0 {
			t.Errorf("dialled %d times; want none", n)
		}
	})
}

func TestRace_SessionRevokedBetweenAdmitAndConnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		b.policy.change(sessionSubject("s1"), "session revoked", func() { b.policy.dead["s1"] = true })
		<-a.conn.closed
		if e := a.refused(db); e.Outcome != sallyport.OutcomeLogin {
			t.Errorf("got outcome %d; want login", e.Outcome)
		}
	})
}

// TestRace_RevokedDuringAdmit: the session ends between the question about the
// carrier and its answer.
func TestRace_RevokedDuringAdmit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		b.onCall(1, func() {
			b.policy.change(sessionSubject("s1"), "session revoked", func() { b.policy.dead["s1"] = true })
		})
		_, err := b.tryConnect("s1", "quic")
		if code := admitCode(t, err); code != connect.CodeSessionRevoked {
			t.Errorf("got %#x; want session_revoked", code)
		}
	})
}

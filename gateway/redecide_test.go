package gateway

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"fmt"
	"math"
	"net"
	"syscall"
	"testing"
	"time"

	"sallyport"
	"sallyport/audit"
	"sallyport/cached"
	"sallyport/cached/memory"
	"sallyport/internal/keyring"
	"sallyport/internal/logging"
	"sallyport/internal/relay"
	"sallyport/internal/tlsid"
	"sallyport/policyd"
	"sallyport/proto/control"
)

// The site of BenchmarkRedecide: as many people as flows each has, so that a
// session, its device and its groups are shared by a hundred flows.
const (
	redecidePeople  = 100
	redecideFlows   = 100 // of each person
	redecideGroups  = 50  // of each person
	redecideWithin  = 250 * time.Millisecond
	redecideForgive = 2 // a machine with other work
)

// BenchmarkRedecide measures 10,000 live flows after a change of the policy, from
// the moment it is written into cached until each has been decided again and what
// is not allowed any more has been cut. Table, loops and policyd are the real ones,
// and so are the records and the audit log; only the network is missing. With "kept"
// no decision changes, with "half" every second flow is cut.
// "kept/grpc" asks policyd through gRPC with mutual TLS.
func BenchmarkRedecide(b *testing.B) {
	for _, c := range []struct {
		name  string
		cut   int
		reach func(*testing.B, *policyd.Server) decides
	}{
		{"kept", 0, directly},
		{"half", redecidePeople * redecideFlows / 2, directly},
		{"kept/grpc", 0, throughGRPC},
	} {
		b.Run(c.name, func(b *testing.B) {
			r := newRedecide(b, c.reach)
			r.apply("dba", "dba")
			r.openAll()
			var worst, cpu time.Duration
			best := time.Duration(math.MaxInt64)
			b.ReportAllocs()
			for b.Loop() {
				start, busy := time.Now(), processTime(b)
				odd := "dba"
				if c.cut > 0 {
					odd = "nobody"
				}
				r.settled(r.apply("dba", odd), redecidePeople*redecideFlows-c.cut)
				d := time.Since(start)
				best, worst, cpu = min(best, d), max(worst, d), cpu+processTime(b)-busy
				b.StopTimer()
				if c.cut > 0 {
					r.settled(r.apply("dba", "dba"), redecidePeople*redecideFlows-c.cut)
				}
				r.openAll()
				b.StartTimer()
			}
			b.StopTimer()
			b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms/op")
			b.ReportMetric(float64(best.Milliseconds()), "best-ms")
			b.ReportMetric(float64(worst.Milliseconds()), "worst-ms")
			if best > redecideForgive*redecideWithin { // the best of them: the others tell of the machine
				b.Errorf("%d flows were decided again in %s at best; want %s", redecidePeople*redecideFlows, best, redecideWithin)
			}
		})
	}
}

// processTime is how long this process has computed: on a machine with other work
// it says more than the clock.
func processTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// redecide is a gateway over a real policyd over a real cached in memory.
type redecide struct {
	*bench
	records *cached.Server
	decider *policyd.Server
	agents  []*agent
	live    map[*fakeStream]bool
	applied int
}

// decides is what a gateway asks, and what it is told by.
type decides interface {
	sallyport.Authorizer
	sallyport.Explainer
	sallyport.Changes
	sallyport.PostureSink
}

// directly is policyd in the same process.
func directly(_ *testing.B, s *policyd.Server) decides { return s }

// throughGRPC is policyd behind gRPC with mutual TLS on loopback.
func throughGRPC(b *testing.B, s *policyd.Server) decides {
	b.Helper()
	const domain = "corp.example"
	ca, err := tlsid.NewCA("internal", time.Hour)
	if err != nil {
		b.Fatal(err)
	}
	issue := func(kind string) tls.Certificate {
		cert, err := ca.IssueService(domain, kind, "one", nil, time.Hour)
		if err != nil {
			b.Fatal(err)
		}
		return cert
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	server := control.NewServer(tlsid.ServerConfig(issue("policyd"), ca.Pool()), domain,
		control.Services{Authorizer: s, Explainer: s, Changes: s, Posture: s}, logging.Discard())
	background(b, func(ctx context.Context) error { return server.Serve(ctx, l) })
	client, err := control.Dial([]string{l.Addr().String()}, tlsid.ClientConfig(issue("gateway"), ca.Pool(), domain, "policyd"), logging.Discard())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { client.Close() })
	return client.Policy()
}

func newRedecide(b *testing.B, reach func(*testing.B, *policyd.Server) decides) *redecide {
	b.Helper()
	records, err := cached.New(cached.Config{}, cached.Deps{Store: memory.New(), KEK: keyring.NewKEK()})
	if err != nil {
		b.Fatal(err)
	}
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, ed25519.SeedSize))
	log, err := audit.Open(b.TempDir(), "policyd", key, audit.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { log.Close() })
	decider, err := policyd.New(policyd.Config{}, policyd.Deps{Records: records, Audit: log})
	if err != nil {
		b.Fatal(err)
	}
	r := &redecide{bench: &bench{t: b, policy: newPolicy(), journal: new(journal)}, records: records, decider: decider, live: map[*fakeStream]bool{}}
	asked := reach(b, decider)
	r.Server, err = New(Config{PublicURL: "https://gw.test"}, Deps{
		Domain: "corp.example", Authorizer: asked, Explainer: asked, Changes: asked, Posture: asked, Audit: r.journal,
		Certificate: func() *tls.Certificate { return nil },
	})
	if err != nil {
		b.Fatal(err)
	}
	r.dialUpstream = func(context.Context, sallyport.Upstream) (relay.Conn, error) {
		near, _ := memPipe()
		return near, nil
	}
	background(b, records.Run)
	r.people()
	r.apply("dba", "dba")
	background(b, decider.Run)
	r.until("policyd ready", func() bool { return decider.Ready() == nil })
	r.start()
	r.until("gateway fresh", func() bool {
		r.table.mu.Lock()
		defer r.table.mu.Unlock()
		return r.table.fresh.mayOpen(time.Now()) == nil
	})
	for i := range redecidePeople {
		r.agents = append(r.agents, r.connect(sallyport.SessionID(fmt.Sprint("s", i))))
	}
	return r
}

// background runs f until the benchmark ends.
func background(b *testing.B, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Errorf("run: %v", err)
		}
	})
}

// people makes everybody's records: a live session on a device with ten facts.
func (r *redecide) people() {
	r.t.Helper()
	now := time.Now()
	groups := []sallyport.Group{{ID: "g", Name: "dba"}}
	for i := range redecideGroups - 1 {
		groups = append(groups, sallyport.Group{ID: fmt.Sprint("id", i), Name: fmt.Sprint("team", i)})
	}
	facts := map[string]sallyport.Fact{}
	for _, name := range []string{"disk_encrypted", "firewall", "screen_lock", "secure_boot", "managed", "f1", "f2", "f3", "f4", "f5"} {
		facts[name] = sallyport.Fact{Value: true, At: now, Source: sallyport.SourceOS}
	}
	var batch []sallyport.Op
	for i := range redecidePeople {
		user, login, session := sallyport.UserID(fmt.Sprint("u", i)), sallyport.LoginID(fmt.Sprint("l", i)), sallyport.SessionID(fmt.Sprint("s", i))
		device := sallyport.DeviceID(fmt.Sprint("d", i))
		batch = append(batch,
			sallyport.Put(sallyport.KindUser, string(user), sallyport.User{ID: user, Email: string(user) + "@corp.example"}),
			sallyport.Put(sallyport.KindDirectoryUser, string(user), sallyport.DirectoryUser{User: user, Groups: groups}),
			sallyport.Put(sallyport.KindLogin, string(login), sallyport.Login{ID: login, User: user, Created: now, Expires: now.Add(time.Hour)}),
			sallyport.Put(sallyport.KindSession, string(session), sallyport.Session{
				ID: session, Login: login, User: user, Device: device, Kind: sallyport.AgentSession, Created: now, Expires: now.Add(time.Hour),
			}),
			sallyport.Put(sallyport.KindDevice, string(device), sallyport.Device{ID: device}),
			sallyport.Put(sallyport.KindPosture, string(device), sallyport.Posture{Device: device, Session: session, Received: now, Facts: facts}),
		)
	}
	if _, err := r.records.Apply(r.t.Context(), batch); err != nil {
		r.t.Fatal(err)
	}
}

// apply puts a new configuration in force: one route for each flow of a person,
// those with an even number for one group, those with an odd one for another.
func (r *redecide) apply(even, odd string) sallyport.Revision {
	r.t.Helper()
	r.applied++
	c := sallyport.Config{Domain: "corp.example", PostureTTL: time.Hour}
	for i := range redecideFlows {
		group := []string{even, odd}[i%2]
		c.Routes = append(c.Routes, sallyport.Route{
			From: redecideTarget(i).String(), To: "tcp://10.0.3.7:5432",
			Policy: fmt.Sprintf("[{name: v%d, allow: {and: [{groups: {has: %s}}, {device: {disk_encrypted: true, firewall: true}}]}}]", r.applied, group),
		})
	}
	rev, err := r.records.Apply(r.t.Context(), []sallyport.Op{sallyport.Put(sallyport.KindConfig, "current", c)})
	if err != nil {
		r.t.Fatal(err)
	}
	return rev
}

func redecideTarget(i int) sallyport.Target {
	return sallyport.Target{Network: sallyport.TCP, Host: fmt.Sprintf("h%d.internal", i), Port: 5432}
}

// openAll opens what is missing of everybody's flows.
func (r *redecide) openAll() {
	r.t.Helper()
	open := map[*fakeConn]map[sallyport.Target]bool{}
	for st := range r.live {
		select {
		case <-st.over:
			delete(r.live, st)
			continue
		default:
		}
		if open[st.conn] == nil {
			open[st.conn] = map[sallyport.Target]bool{}
		}
		open[st.conn][st.target] = true
	}
	var asked []*fakeStream
	for _, a := range r.agents {
		for i := range redecideFlows {
			if target := redecideTarget(i); !open[a.conn][target] {
				asked = append(asked, a.ask(target))
			}
		}
		for _, st := range asked {
			if got := <-st.answer; got.refusal != nil {
				r.t.Fatalf("CONNECT %s: %v", st.target, got.refusal)
			}
			r.live[st] = true
		}
		asked = asked[:0]
	}
}

// settled waits until all that lives rests on the policy of rev, and wants so many
// flows left.
func (r *redecide) settled(rev sallyport.Revision, flows int) {
	r.t.Helper()
	r.until("everything decided again", func() bool {
		r.table.mu.Lock()
		defer r.table.mu.Unlock()
		return r.table.fresh.policy >= rev && len(r.table.dueNow) == 0 && len(r.table.grants)-len(r.table.carriers) <= flows
	})
	r.table.mu.Lock()
	defer r.table.mu.Unlock()
	if got := len(r.table.grants) - len(r.table.carriers); got != flows {
		r.t.Fatalf("%d flows live; want %d (a flow that nobody confirms within %s is cut, also for want of a processor)", got, flows, confirmGrace)
	}
	for g := range r.table.grants {
		if g.decision.PolicyRevision < rev {
			r.t.Fatalf("a flow rests on policy revision %d; want %d", g.decision.PolicyRevision, rev)
		}
	}
}

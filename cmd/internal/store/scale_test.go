package store_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/postgres"
	"sallyport/cached/postgres/postgrestest"
	"sallyport/cached/sqlite"
	"sallyport/cached/storetest"
	"sallyport/internal/logging"
	"sallyport/internal/tlsid"
	"sallyport/policyd"
	"sallyport/proto/control"
)

// engines are the stores that a large site may have.
var engines = []struct {
	name    string
	open    func(testing.TB) cached.Store
	latency time.Duration // of a change until it decides, in 99 of 100 cases
}{
	{"sqlite", openSQLite, 100 * time.Millisecond},
	{"postgres", openPostgres, 200 * time.Millisecond},
}

func openSQLite(tb testing.TB) cached.Store {
	s, err := sqlite.Open(filepath.Join(tb.TempDir(), "cached.db"), sqlite.Config{})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Errorf("close: %v", err)
		}
	})
	return s
}

func openPostgres(tb testing.TB) cached.Store {
	cluster := postgrestest.Start(tb)
	s, err := postgres.Open(tb.Context(), postgres.Config{
		URL: cluster.URL(cluster.Database(tb)), PasswordFile: cluster.PasswordFile(), Marker: filepath.Join(tb.TempDir(), "postgres.marker"),
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Errorf("close: %v", err)
		}
	})
	return s
}

// site is cached over a filled store, behind mTLS on loopback.
type site struct {
	storetest.Population
	records *cached.Server
	addr    string
	ca      *tlsid.CA
}

const domain = "corp.example"

func newSite(tb testing.TB, store cached.Store, sessions int) *site {
	tb.Helper()
	s := &site{Population: storetest.Population{Sessions: sessions, Now: time.Now()}, records: storetest.Serve(tb, store)}
	storetest.Fill(tb, s.records, s.Population)
	config := sallyport.Config{Domain: domain, Routes: []sallyport.Route{{
		From: "tcp://db.internal:5432", To: "tcp://10.0.3.7:5432", Policy: "- {name: staff, allow: {and: [{groups: {has: staff}}]}}",
	}}}
	if _, err := s.records.Apply(tb.Context(), []sallyport.Op{sallyport.Put(sallyport.KindConfig, "current", config)}); err != nil {
		tb.Fatal(err)
	}
	var err error
	if s.ca, err = tlsid.NewCA("internal", time.Hour); err != nil {
		tb.Fatal(err)
	}
	cert, err := s.ca.IssueService(domain, control.KindCached, "one", nil, 0)
	if err != nil {
		tb.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	s.addr = l.Addr().String()
	server := control.NewServer(tlsid.ServerConfig(cert, s.ca.Pool()), domain,
		control.Services{Records: s.records, Lister: s.records, Revoker: s.records}, logging.Discard())
	during(tb, func(ctx context.Context) error { return server.Serve(ctx, l) })
	return s
}

// during runs a service until the test ends.
func during(tb testing.TB, run func(context.Context) error) { tb.Cleanup(start(tb, run)) }

// start runs a service until end is called.
func start(tb testing.TB, run func(context.Context) error) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			tb.Error(err)
		}
	}
}

// dial is cached as policyd reaches it.
func (s *site) dial(tb testing.TB) *control.Client {
	tb.Helper()
	cert, err := s.ca.IssueService(domain, control.KindPolicyd, "one", nil, 0)
	if err != nil {
		tb.Fatal(err)
	}
	client, err := control.Dial([]string{s.addr}, tlsid.ClientConfig(cert, s.ca.Pool(), domain, control.KindCached), logging.Discard())
	if err != nil {
		tb.Fatal(err)
	}
	return client
}

// policyd starts a fresh one that runs until the test ends, and returns it once it
// answers.
func (s *site) policyd(tb testing.TB) *policyd.Server {
	tb.Helper()
	p, stop := s.startPolicyd(tb)
	tb.Cleanup(stop)
	return p
}

func (s *site) startPolicyd(tb testing.TB) (p *policyd.Server, stop func()) {
	tb.Helper()
	client := s.dial(tb)
	server, err := policyd.New(policyd.Config{}, policyd.Deps{Records: client.Records(), Audit: nowhere{}})
	if err != nil {
		tb.Fatal(err)
	}
	end := start(tb, server.Run)
	poll := time.NewTicker(2 * time.Millisecond)
	defer poll.Stop()
	for deadline := time.Now().Add(5 * time.Minute); server.Ready() != nil; <-poll.C {
		if time.Now().After(deadline) {
			tb.Fatal(server.Ready())
		}
	}
	return server, func() {
		end()
		client.Close()
	}
}

// nowhere is an audit log that costs nothing.
type nowhere struct{}

func (nowhere) Append(context.Context, sallyport.AuditRecord) error { return nil }

// ask returns what policyd answers to the session i.
func (s *site) ask(tb testing.TB, p *policyd.Server, i int) sallyport.Decision {
	tb.Helper()
	ds, err := p.Authorize(tb.Context(), []sallyport.Request{{
		Session: s.Session(i), Target: sallyport.Target{Network: sallyport.TCP, Host: "db.internal", Port: 5432},
	}})
	if err != nil {
		tb.Fatal(err)
	}
	return ds[0]
}

// watch passes on which subjects changed, as a gateway learns it.
func watch(tb testing.TB, p *policyd.Server) <-chan sallyport.SubjectChange {
	changes := make(chan sallyport.SubjectChange, 1_000)
	during(tb, func(ctx context.Context) error {
		err := p.Watch(ctx, func(n sallyport.Notice) error {
			for _, c := range n.Changes {
				select {
				case changes <- c:
				case <-ctx.Done():
				}
			}
			return nil
		})
		if errors.Is(err, context.Canceled) {
			return nil
		}
		return err
	})
	return changes
}

// measure makes n changes, one after the other: half of them end a session, half of
// them take somebody out of a group. It returns how long each took from the call at
// cached to an answer of policyd that denies.
func (s *site) measure(tb testing.TB, p *policyd.Server, n int) (took storetest.Latencies) {
	tb.Helper()
	changes := watch(tb, p)
	for k := range n {
		i := rand.IntN(s.Sessions)
		if d := s.ask(tb, p, i); !d.Allowed() {
			tb.Fatalf("session %d is denied before anything changed: %+v", i, d)
		}
		subject, change := s.revocation(i)
		if k%2 == 1 {
			subject, change = s.exclusion(i)
		}
		began := time.Now()
		if err := change(tb.Context()); err != nil {
			tb.Fatal(err)
		}
		await(tb, changes, subject)
		if s.ask(tb, p, i).Allowed() {
			tb.Fatalf("%s has changed, and session %d is still allowed", subject, i)
		}
		took.Add(began)
		s.restore(tb, p, changes, i)
	}
	return took
}

func (s *site) revocation(i int) (sallyport.Subject, func(context.Context) error) {
	subject := sallyport.Subject{Kind: sallyport.SubjectSession, ID: string(s.Session(i))}
	return subject, func(ctx context.Context) error {
		_, err := s.records.Revoke(ctx, sallyport.Revocation{Subjects: []sallyport.Subject{subject}, By: "test"})
		return err
	}
}

func (s *site) exclusion(i int) (sallyport.Subject, func(context.Context) error) {
	id := s.User(s.UserOf(i))
	return sallyport.Subject{Kind: sallyport.SubjectUser, ID: string(id)}, func(ctx context.Context) error {
		_, err := s.records.Apply(ctx, []sallyport.Op{
			sallyport.Put(sallyport.KindDirectoryUser, string(id), sallyport.DirectoryUser{User: id, Groups: []sallyport.Group{{ID: "leavers"}}}),
		})
		return err
	}
}

// restore undoes a change of measure and waits until policyd knows.
func (s *site) restore(tb testing.TB, p *policyd.Server, changes <-chan sallyport.SubjectChange, i int) {
	tb.Helper()
	if _, err := s.records.Apply(tb.Context(), []sallyport.Op{s.LoginOp(i), s.SessionOp(i), s.DirectoryOp(s.UserOf(i))}); err != nil {
		tb.Fatal(err)
	}
	for deadline := time.After(10 * time.Second); !s.ask(tb, p, i).Allowed(); {
		select {
		case <-changes:
		case <-deadline:
			tb.Fatalf("session %d does not come back", i)
		}
	}
}

func await(tb testing.TB, changes <-chan sallyport.SubjectChange, want sallyport.Subject) {
	tb.Helper()
	deadline := time.After(10 * time.Second)
	for {
		select {
		case c := <-changes:
			if c.Subject == want {
				return
			}
		case <-deadline:
			tb.Fatalf("nobody was told of %s", want)
		}
	}
}

// others write a hundred posture reports a second until the test ends.
func (s *site) others(tb testing.TB) {
	var written atomic.Int64
	during(tb, func(ctx context.Context) error {
		var writers sync.WaitGroup
		defer writers.Wait()
		pace := time.NewTicker(10 * time.Millisecond)
		defer pace.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-pace.C:
			}
			writers.Go(func() {
				op := s.PostureOp(rand.IntN(s.Devices()))
				if _, err := s.records.Apply(ctx, []sallyport.Op{op}); err == nil {
					written.Add(1)
				}
			})
		}
	})
	tb.Cleanup(func() {
		if written.Load() == 0 {
			tb.Error("nobody else wrote meanwhile")
		}
	})
}

// A large site in small: policyd has everything that cached has, and decides by a
// change in time, while others write.
func TestCase_L16_ChangeToDecision(t *testing.T) {
	for _, e := range engines {
		t.Run(e.name, func(t *testing.T) {
			s := newSite(t, e.open(t), 2_000)
			p := s.policyd(t)
			for i := range s.Sessions {
				if d := s.ask(t, p, i); !d.Allowed() {
					t.Fatalf("session %d of %d is denied: %+v", i, s.Sessions, d)
				}
			}
			s.others(t)
			took := s.measure(t, p, 40)
			if got := took.Quantile(.50); got > 5*e.latency {
				t.Errorf("a change decides after %v; want %v", got, e.latency)
			}
		})
	}
}

func TestCase_L16_Lookup(t *testing.T) {
	for _, e := range engines {
		t.Run(e.name, func(t *testing.T) {
			s := newSite(t, e.open(t), 2_000)
			var took storetest.Latencies
			for i := range s.Sessions {
				began := time.Now()
				if _, err := s.records.Get(t.Context(), sallyport.KindSession, string(s.Session(i))); err != nil {
					t.Fatal(err)
				}
				took.Add(began)
			}
			if got := took.Quantile(.50); got > time.Millisecond {
				t.Errorf("the median lookup takes %v; want a millisecond even of 99 of 100", got)
			}
		})
	}
}

// BenchmarkScale is a site of -sessions sessions, filled once for each engine.
func BenchmarkScale(b *testing.B) {
	for _, e := range engines {
		b.Run(e.name, func(b *testing.B) {
			s := newSite(b, e.open(b), storetest.Sessions())
			b.Run("SnapshotToFreshPolicyd", s.benchSnapshot)
			b.Run("ChangeToDecision", func(b *testing.B) { s.benchChanges(b, e.latency) })
		})
	}
}

// benchSnapshot is how long a policyd that knows nothing takes until it answers, and
// how much memory it then has in use.
func (s *site) benchSnapshot(b *testing.B) {
	var bytes int64
	var cpu time.Duration
	for b.Loop() {
		b.StopTimer()
		heap, before := heapInUse(), storetest.CPU(b)
		b.StartTimer()
		_, stop := s.startPolicyd(b)
		b.StopTimer()
		cpu += storetest.CPU(b) - before
		bytes = heapInUse() - heap
		stop()
		b.StartTimer()
	}
	each := b.Elapsed() / time.Duration(b.N)
	b.Logf("%d sessions in %.1f s, %.1f s of CPU", s.Sessions, each.Seconds(), cpu.Seconds()/float64(b.N))
	b.ReportMetric(each.Seconds(), "s/snapshot")
	b.ReportMetric(cpu.Seconds()/float64(b.N), "cpu-s/snapshot")
	b.ReportMetric(float64(bytes)/float64(s.Sessions), "B/session") // users, devices and posture included
	// On a machine with two processors and nothing else to do.
	storetest.WithinForMillion(b, "a snapshot", s.Sessions, min(each, cpu/time.Duration(2*b.N)), 10*time.Second)
}

func heapInUse() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func (s *site) benchChanges(b *testing.B, bar time.Duration) {
	p := s.policyd(b)
	s.others(b)
	const changes = 1_000
	for b.Loop() {
		took := s.measure(b, p, changes)
		took.Report(b)
		b.Logf("%d changes: median %v, 99th percentile %v", changes, took.Quantile(.50), took.Quantile(.99))
		storetest.Within(b, fmt.Sprintf("the 99th percentile of %d changes", changes), took.Quantile(.99), bar)
	}
}

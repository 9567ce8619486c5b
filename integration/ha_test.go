package integration

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dexidp/dex/server"
	"github.com/dexidp/dex/storage"
	"github.com/dexidp/dex/storage/memory"
	"github.com/dexidp/dex/web"

	"sallyport"
	"sallyport/agent"
	"sallyport/agent/keys"
	"sallyport/agent/login"
	"sallyport/agent/state"
	"sallyport/cached/postgres/postgrestest"
	"sallyport/integration/stack"
	"sallyport/internal/browse"
	"sallyport/tunnel"
	"sallyport/tunnel/lane"
)

// Two of everything, on one PostgreSQL: whichever dies, no session is lost, nothing
// is wrongly allowed, and new connections work again within three seconds.

var (
	haRounds = flag.Int("ha.rounds", 1, "how often each process is killed")
	haFreeze = flag.Bool("ha.freeze", false, "freeze every process, too, not only one of each that agents wait for")
)

const (
	haAgents = 10
	haFlows  = 10 // of each agent
	haLogins = 20 // a second
	// haHold is how long a failure lasts at least, and haSilence how long a flow may
	// say nothing before it counts as lost: QUIC does not tell that a gateway was
	// killed.
	haHold    = 2 * time.Second
	haSilence = 4 * time.Second
	// haBound is after how long new connections must work again.
	haBound = 3 * time.Second
)

// startEasyDex is an identity provider that logs everybody in as the same person,
// a member of the group "authors", without asking.
func startEasyDex(t *testing.T, visited func()) *dex {
	t.Helper()
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	d := &dex{store: memory.New(log), signer: &turningSigner{}}
	d.signer.turn(t)
	var handler atomic.Pointer[server.Server]
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/dex/auth") {
			visited()
		}
		handler.Load().ServeHTTP(w, r)
	}))
	t.Cleanup(site.Close)
	d.issuer = site.URL + "/dex"
	if err := d.store.CreateConnector(t.Context(), storage.Connector{ID: "mock", Type: "mockCallback", Name: "Easy", Config: []byte("{}")}); err != nil {
		t.Fatal(err)
	}
	s, err := server.NewServer(t.Context(), server.Config{
		Issuer: d.issuer, Storage: d.store, Logger: log, Signer: d.signer, SkipApprovalScreen: true,
		Web:               server.WebConfig{WebFS: web.FS()},
		AllowedGrantTypes: []string{"authorization_code"},
	})
	if err != nil {
		t.Fatal(err)
	}
	handler.Store(s)
	return d
}

// several is a deployment of two of each daemon with its services and its person.
type several struct {
	*stack.Stack
	t        *testing.T
	echo     *stack.Upstream
	secret   *stack.Upstream // nobody may reach it
	sessions sync.Map        // sallyport.SessionID to *login.Client
}

func startSeveral(t *testing.T, store string, passwordFile string, visited func()) *several {
	t.Helper()
	idp := startEasyDex(t, visited)
	secretFile := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secretFile, []byte(clientSecret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	config := idp.config()
	config["client_id"], config["client_secret_file"] = clientID, secretFile
	s := &several{t: t, echo: stack.EchoServer(t), secret: stack.EchoServer(t)}
	s.Stack = stack.StartSeveral(t, stack.Config{
		IDP:     config,
		Cached:  map[string]any{"store": store, "store_password_file": passwordFile},
		Policyd: map[string]any{"posture_sources": []string{"os", "file"}},
		Routes: []stack.Route{
			{From: "tcp://db.internal:5432", To: "tcp://" + s.echo.Addr, Policy: stack.Allow("writers", stack.Group("authors"))},
			{From: "tcp://payroll.internal:443", To: "tcp://" + s.secret.Addr, Policy: stack.Allow("finance", stack.Group("finance"))},
		},
	})
	idp.register(t, s.AuthdURL()+"/callback")
	return s
}

var (
	haDB      = sallyport.Target{Network: sallyport.TCP, Host: "db.internal", Port: 5432}
	haPayroll = sallyport.Target{Network: sallyport.TCP, Host: "payroll.internal", Port: 443}
)

// browser is how a person answers the login pages; the login ends with ctx.
func (s *several) browser(ctx context.Context) login.Options {
	return login.Options{Show: func(string, string) {}, Timeout: 15 * time.Second, Browser: func(page string) error {
		b := browse.New(&tls.Config{RootCAs: s.Roots(s.t), MinVersion: tls.VersionTLS13})
		got, err := b.Follow(ctx, page, map[string]string{"answer": "allow"})
		if err == nil && got.Status != http.StatusOK {
			err = fmt.Errorf("the browser ended at %s with status %d: %s", got.URL.Path, got.Status, got.Text)
		}
		return err
	}}
}

func (s *several) ca() []byte {
	ca, err := os.ReadFile(s.CAFile())
	if err != nil {
		s.t.Fatal(err)
	}
	return ca
}

// agent is one that is logged in and runs until the test ends.
func (s *several) agent(transport string) *agent.Agent {
	s.t.Helper()
	a, err := agent.New(agent.Config{StateDir: filepath.Join(s.t.TempDir(), "state"), Transport: transport, KeyStore: keys.File})
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := a.Login(s.t.Context(), agent.LoginRequest{Authd: s.AuthdURL(), CA: s.ca(), Options: s.browser(s.t.Context())}); err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := a.Run(ctx); err != nil {
			s.t.Errorf("agent: %v", err)
		}
	})
	s.t.Cleanup(func() {
		cancel()
		wg.Wait()
		a.Close()
	})
	return a
}

// client is a login client with a device key of its own.
func (s *several) client() *login.Client {
	s.t.Helper()
	base, err := login.ParseURL(s.AuthdURL())
	if err != nil {
		s.t.Fatal(err)
	}
	dir, err := state.Open(filepath.Join(s.t.TempDir(), "key"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { dir.Close() })
	key, err := keys.LoadOrCreate(s.t.Context(), dir, keys.Options{Where: keys.File})
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := login.NewClient(base, string(s.ca()), key)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.Close)
	return c
}

// load is what goes on while processes die.
type load struct {
	s      *several
	ctx    context.Context
	begun  time.Time
	agents []*agent.Agent

	lost      atomic.Int64 // long flows that ended
	flows     atomic.Int64 // long flows that are open
	logins    atomic.Int64
	failed    atomic.Int64 // logins
	loginTime atomic.Int64 // ns, of all logins together
	probes    atomic.Int64 // refused, as they must be
	mu        sync.Mutex   // guards what follows
	worked    []success    // new connections, newest last
	wrong     []string
	failures  []string       // of logins
	refused   map[string]int // errors of new connections
}

// success is a new connection that worked.
type success struct {
	agent      int
	begun, got time.Time
}

// load puts everything under load until the returned function is called.
func (s *several) load() (*load, func()) {
	ctx, cancel := context.WithCancel(s.t.Context())
	l := &load{s: s, ctx: ctx, begun: time.Now(), refused: map[string]int{}}
	var all sync.WaitGroup
	stop := sync.OnceFunc(func() { cancel(); all.Wait() })
	for i := range haAgents {
		l.agents = append(l.agents, s.agent([]string{"quic", "tls"}[i%2]))
	}
	revoked := s.revokedSession()
	for i, a := range l.agents {
		for range haFlows {
			all.Go(func() { l.holdFlows(a) })
		}
		all.Go(func() { l.connect(i, a) })
		all.Go(func() { l.every(250*time.Millisecond, func() { l.probe(a) }) })
	}
	for _, g := range revoked.Gateways {
		all.Go(func() { l.every(500*time.Millisecond, func() { l.probeRevoked(g, revoked) }) })
	}
	// A login takes its time, so that several are under way.
	const people = 2 * haLogins
	for i := range people {
		c := s.client()
		all.Go(func() {
			select {
			case <-time.After(time.Duration(i) * time.Second / haLogins):
				l.every(people*time.Second/haLogins, func() { l.login(c) })
			case <-ctx.Done():
			}
		})
	}
	return l, stop
}

// every runs f again and again; one that takes longer than the period delays the next.
func (l *load) every(period time.Duration, f func()) {
	tick := time.NewTicker(period)
	defer tick.Stop()
	for {
		select {
		case <-l.ctx.Done():
			return
		case <-tick.C:
			f()
		}
	}
}

// holdFlows keeps one flow open and in use, and opens another when it ends.
func (l *load) holdFlows(a *agent.Agent) {
	for l.ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(l.ctx, 10*time.Second)
		f, err := a.Open(ctx, haDB)
		cancel()
		if err != nil {
			select {
			case <-time.After(200 * time.Millisecond):
			case <-l.ctx.Done():
			}
			continue
		}
		l.flows.Add(1)
		l.inUse(f)
		l.flows.Add(-1)
		f.Close()
		if l.ctx.Err() == nil {
			l.lost.Add(1)
		}
	}
}

// inUse echoes each half second until that fails.
func (l *load) inUse(f net.Conn) {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-l.ctx.Done():
			return
		case <-tick.C:
			if err := stack.EchoWithin(f, "still here", haSilence); err != nil {
				return
			}
		}
	}
}

// connect opens new connections, also while earlier ones wait.
func (l *load) connect(i int, a *agent.Agent) {
	var all sync.WaitGroup
	defer all.Wait()
	l.every(100*time.Millisecond, func() { all.Go(func() { l.connectOnce(i, a) }) })
}

func (l *load) connectOnce(i int, a *agent.Agent) {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(l.ctx, 10*time.Second)
	defer cancel()
	f, err := a.Open(ctx, haDB)
	opened := err == nil
	if opened {
		err = stack.EchoWithin(f, "hello", haSilence)
		f.Close()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err == nil:
		l.worked = append(l.worked, success{i, begun, time.Now()})
	case l.ctx.Err() != nil:
	case opened: // it was open when its gateway died
		l.refused["lost"]++
	default:
		l.refused[sallyport.CodeOf(err)]++
		if sallyport.OutcomeOf(err) == sallyport.OutcomeLogin {
			l.wrong = append(l.wrong, "a session was taken away: "+err.Error())
		}
	}
}

func (l *load) wronglyAllowed(what string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wrong = append(l.wrong, what+" was allowed")
}

// probe asks for what nobody may reach.
func (l *load) probe(a *agent.Agent) {
	ctx, cancel := context.WithTimeout(l.ctx, 10*time.Second)
	defer cancel()
	f, err := a.Open(ctx, haPayroll)
	if err == nil {
		f.Close()
		l.wronglyAllowed("a denied target")
		return
	}
	l.probes.Add(1)
}

// revokedSession is a session that was revoked; its certificate is good for an hour.
func (s *several) revokedSession() *login.Session {
	s.t.Helper()
	session, err := s.client().Login(s.t.Context(), s.browser(s.t.Context()))
	if err != nil {
		s.t.Fatal(err)
	}
	s.Operator("sessions", "revoke", "--config", s.File, "--session", string(session.Session))
	return session
}

// probeRevoked asks with the certificate of a session that was revoked.
func (l *load) probeRevoked(g sallyport.GatewayInfo, session *login.Session) {
	ctx, cancel := context.WithTimeout(l.ctx, 5*time.Second)
	defer cancel()
	c, err := lane.Dial(ctx, tunnel.DialConfig{Gateway: g, TLS: &tls.Config{
		RootCAs: l.s.Roots(l.s.t), MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &session.Certificate, nil },
	}})
	if err != nil {
		return
	}
	defer c.Close()
	if f, err := c.Open(ctx, haDB, nil); err == nil {
		f.Close()
		l.wronglyAllowed("a revoked session")
		return
	}
	l.probes.Add(1)
}

// login is one login; its session must live to the end.
func (l *load) login(c *login.Client) {
	ctx, cancel := context.WithTimeout(l.ctx, 15*time.Second)
	defer cancel()
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	begun := time.Now()
	o := l.s.browser(ctx)
	visit := o.Browser
	o.Browser = func(page string) error {
		err := visit(page)
		if err != nil {
			giveUp(err) // a person would not wait, either
		}
		return err
	}
	session, err := c.Login(ctx, o)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	switch {
	case err == nil:
		l.logins.Add(1)
		l.loginTime.Add(int64(time.Since(begun)))
		l.s.sessions.Store(session.Session, c)
	case l.ctx.Err() == nil:
		l.failed.Add(1)
		l.mu.Lock()
		defer l.mu.Unlock()
		l.failures = append(l.failures, time.Since(l.begun).String()+" "+err.Error())
	}
}

// recovery is how long each agent's first new connection took that was begun after
// since; it waits for all of them.
func (l *load) recovery(t *testing.T, since time.Time) []time.Duration {
	t.Helper()
	took := make([]time.Duration, haAgents)
	stack.Eventually(t, 20*time.Second, func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		for i := range took {
			at := slices.IndexFunc(l.worked, func(w success) bool { return w.agent == i && w.begun.After(since) })
			if at < 0 {
				return fmt.Errorf("no new connection of agent %d; errors so far: %v", i, l.refused)
			}
			took[i] = l.worked[at].got.Sub(since)
		}
		return nil
	})
	slices.Sort(took)
	return took
}

// settle waits until all long flows are open again.
func (l *load) settle(t *testing.T) {
	t.Helper()
	stack.Eventually(t, 30*time.Second, func() error {
		if n := l.flows.Load(); n != haAgents*haFlows {
			return fmt.Errorf("%d of %d flows are open", n, haAgents*haFlows)
		}
		return nil
	})
}

// survives runs a failure under load and checks what must hold of every one.
func (l *load) survives(t *testing.T, name string, cutsFlows bool, fail func() (undo func())) {
	t.Helper()
	l.settle(t)
	lost, refused := l.lost.Load(), l.errors()
	since := time.Now()
	undo := fail()
	took := l.recovery(t, since)
	hold := haHold
	if cutsFlows { // they must have been noticed, so that the next failure is not blamed
		hold = haSilence + time.Second
	}
	<-time.After(time.Until(since.Add(hold)))
	undo()
	l.settle(t)
	median, worst := took[len(took)/2], took[len(took)-1]
	t.Logf("%-22s new connections after %4d ms (median of %d agents), %4d ms (worst); %d flows lost, %d new connections refused meanwhile",
		name, median.Milliseconds(), len(took), worst.Milliseconds(), l.lost.Load()-lost, l.errors()-refused)
	if worst > haBound {
		t.Errorf("%s: new connections after %v; want at most %v", name, worst, haBound)
	}
	if n := l.lost.Load() - lost; n > 0 && !cutsFlows {
		t.Errorf("%s: %d flows were lost that went through no dead gateway", name, n)
	}
}

func (l *load) errors() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range l.refused {
		n += k
	}
	return n
}

// finish stops the load and checks what must hold of all of it.
func (l *load) finish(t *testing.T, stop func()) {
	t.Helper()
	stop()
	if l.s.secret.Accepted() != 0 {
		t.Errorf("%d connections reached what nobody may reach", l.s.secret.Accepted())
	}
	for _, w := range l.wrong {
		t.Error(w)
	}
	var lost []error
	sessions := 0
	l.s.sessions.Range(func(id, c any) bool {
		sessions++
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if _, err := c.(*login.Client).Renew(ctx, id.(sallyport.SessionID), nil); err != nil {
			lost = append(lost, fmt.Errorf("session %s: %w", id, err))
		}
		return true
	})
	if len(lost) > 0 {
		t.Errorf("%d of %d sessions are lost, the first: %v", len(lost), sessions, lost[0])
	}
	logins := l.logins.Load()
	t.Logf("%d logins in %v, %d failed while something was down; %d new connections, errors of others %v; %d probes refused",
		logins, time.Since(l.begun).Round(time.Second), l.failed.Load(), len(l.worked), l.refused, l.probes.Load())
	for _, e := range l.failures[:min(len(l.failures), 20)] {
		t.Log(e)
	}
	t.Logf("a login took %v", (time.Duration(l.loginTime.Load()) / time.Duration(max(logins, 1))).Round(time.Millisecond))
	if l.logins.Load() == 0 || l.probes.Load() == 0 {
		t.Error("there was no load")
	}
}

// TestCase_M8_KillAny: whichever of the eight processes is killed or frozen.
func TestCase_M8_KillAny(t *testing.T) {
	pg := postgrestest.Start(t)
	s := startSeveral(t, pg.URL(pg.Database(t)), pg.PasswordFile(), func() {})
	l, stop := s.load()
	defer stop()
	for range *haRounds {
		for _, name := range stack.SeveralDaemons() {
			l.survives(t, name+" killed", strings.HasPrefix(name, "gateway"), func() func() {
				p := s.Daemon(name)
				p.Signal(syscall.SIGKILL)
				p.Wait(10 * time.Second)
				return func() { s.Again(name) }
			})
		}
		for _, name := range frozen() {
			l.survives(t, name+" frozen", strings.HasPrefix(name, "gateway"), func() func() {
				p := s.Daemon(name)
				p.Freeze()
				return func() { p.Signal(syscall.SIGCONT) }
			})
		}
	}
	l.finish(t, stop)
}

// frozen are the processes to freeze. A balancer by connections does not notice a
// frozen authd.
func frozen() []string {
	if *haFreeze {
		return slices.DeleteFunc(stack.SeveralDaemons(), func(n string) bool { return strings.HasPrefix(n, "authd") })
	}
	return []string{"policyd-1", "gateway-1"}
}

// TestCase_M8_PostgresRestart: PostgreSQL goes away and comes back.
func TestCase_M8_PostgresRestart(t *testing.T) {
	pg := postgrestest.Start(t)
	s := startSeveral(t, pg.URL(pg.Database(t)), pg.PasswordFile(), func() {})
	l, stop := s.load()
	defer stop()
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		before := l.logins.Load()
		l.survives(t, "PostgreSQL "+sig.String(), false, func() func() {
			if err := errors.Join(pg.Stop(sig), pg.Start()); err != nil {
				t.Fatal(err)
			}
			return func() {}
		})
		stack.Eventually(t, 20*time.Second, func() error {
			if l.logins.Load() == before {
				return errors.New("no login yet")
			}
			return nil
		})
	}
	l.finish(t, stop)
}

// TestCase_M8_PromoteStandby: the primary is killed, and its synchronous standby
// takes over.
func TestCase_M8_PromoteStandby(t *testing.T) {
	pg := postgrestest.Start(t)
	standby := pg.NewStandby(t, true)
	s := startSeveral(t, pg.URL(pg.Database(t), standby), pg.PasswordFile(), func() {})
	l, stop := s.load()
	defer stop()
	l.survives(t, "standby promoted", false, func() func() {
		if err := errors.Join(pg.Stop(syscall.SIGKILL), standby.Promote()); err != nil {
			t.Fatal(err)
		}
		return func() {}
	})
	before := l.logins.Load()
	stack.Eventually(t, 20*time.Second, func() error {
		if l.logins.Load() == before {
			return errors.New("no login since the standby took over")
		}
		return nil
	})
	l.finish(t, stop)
}

// TestLoginThroughTwoAuthds: what one authd began another one goes on with.
func TestLoginThroughTwoAuthds(t *testing.T) {
	pg := postgrestest.Start(t)
	var turn atomic.Pointer[func()] // once the browser is at the identity provider
	s := startSeveral(t, pg.URL(pg.Database(t)), pg.PasswordFile(), func() {
		if f := turn.Load(); f != nil {
			(*f)()
		}
	})
	c := s.client()
	to := func(authd string) {
		s.Balancer.To(s.Ready(authd).Authd.Listen)
		c.Close() // what is idle; a request that meets a dropped connection is not repeated
		s.Balancer.Drop()
	}
	second := func() { to("authd-2") }
	to("authd-1")
	turn.Store(&second)
	session, err := c.Login(t.Context(), s.browser(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	to("authd-1")
	if _, err := c.Renew(t.Context(), session.Session, nil); err != nil {
		t.Errorf("renewal at the other one: %v", err)
	}
}

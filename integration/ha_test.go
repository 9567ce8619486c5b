package integration

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport/agent/keys"
	"sallyport/agent/login"
	"sallyport/agent/state"
	"sallyport/cached/postgres/postgrestest"
	"sallyport/integration/stack"
	"sallyport/internal/browse"
	"sallyport/internal/oidcrp/oidcrptest"
)

const (
	pairFlows      = 100
	loginsPerSec   = 20
	pairsBackAfter = 3 * time.Second // new connections work again
)

// pairs is a site with two of each daemon under load: flows that stay open,
// connections made all the time by somebody who is allowed and somebody who is
// not, and logins.
type pairs struct {
	*stack.Site
	db      *postgrestest.Cluster
	idp     *oidcrptest.Provider
	subject atomic.Value // string: who the identity provider says the next person is

	echo, payroll *stack.Upstream
	tun           *stack.Tunnel
	flows         []net.Conn

	mu       sync.Mutex // guards what follows
	sessions []string   // of logins that were acknowledged
	refused  int        // logins that were not
	opened   int
	failed   int
}

func newPairs(t *testing.T, store string, db *postgrestest.Cluster) *pairs {
	t.Helper()
	p := &pairs{db: db, idp: oidcrptest.New(t), echo: stack.EchoServer(t), payroll: stack.EchoServer(t)}
	p.subject.Store("alice")
	p.idp.Claims = func(claims map[string]any) {
		who := p.subject.Load().(string)
		claims["sub"], claims["email"], claims["groups"] = who, who+"@test.example", []string{"staff"}
	}
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(oidcrptest.Secret), 0o600); err != nil {
		t.Fatal(err)
	}
	p.Site = stack.StartSite(t, stack.SiteConfig{
		Store: store, PasswordFile: db.PasswordFile(),
		IDP: func(string) map[string]any {
			return map[string]any{"issuer": p.idp.Issuer(), "client_id": oidcrptest.ClientID, "client_secret_file": secret}
		},
		Routes: []stack.Route{
			{From: "tcp://db.internal:5432", To: "tcp://" + p.echo.Addr, Policy: stack.Allow("staff", stack.Group("staff"))},
			{From: "tcp://payroll.internal:443", To: "tcp://" + p.payroll.Addr, Policy: stack.Allow("finance", stack.Group("finance"))},
		},
	})
	return p
}

// begin logs the two people in, opens the flows and starts the load, which ends
// with the returned function.
func (p *pairs) begin(t *testing.T) (end func()) {
	t.Helper()
	alice := p.NewAgent(t, "alice")
	alice.Login()
	p.tun = alice.Connect("db.internal:5432")
	p.open(t)
	p.subject.Store("bob")
	bob := p.NewAgent(t, "bob")
	bob.Login()
	p.subject.Store("carol")

	ctx, stop := context.WithCancel(context.Background())
	var load sync.WaitGroup
	for range 2 {
		load.Go(func() { p.connectAllTheTime(ctx) })
	}
	load.Go(func() {
		for ctx.Err() == nil {
			if r := bob.Run("connect", "--stdio", "payroll.internal:443"); r.Exit == 0 {
				t.Error("bob was let in")
			}
			pause(ctx, 200*time.Millisecond)
		}
	})
	load.Go(func() { p.logInAllTheTime(ctx, t) })
	return func() {
		stop()
		load.Wait()
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// open opens the flows that are to stay.
func (p *pairs) open(t *testing.T) {
	t.Helper()
	for _, c := range p.flows {
		c.Close()
	}
	p.flows = nil
	for range pairFlows {
		c := p.tun.Dial(t)
		p.flows = append(p.flows, c)
		if err := stack.Echo(c, "hello"); err != nil {
			t.Fatal(err)
		}
	}
}

// alive counts flows that still carry bytes.
func (p *pairs) alive() (n int) {
	for _, c := range p.flows {
		if stack.Echo(c, "still there") == nil {
			n++
		}
	}
	return n
}

func (p *pairs) connect() error {
	c, err := net.Dial("tcp", p.tun.Local)
	if err != nil {
		return err
	}
	defer c.Close()
	return stack.Echo(c, "new")
}

func (p *pairs) connectAllTheTime(ctx context.Context) {
	for ctx.Err() == nil {
		err := p.connect()
		p.mu.Lock()
		if p.opened++; err != nil {
			p.failed++
		}
		p.mu.Unlock()
		pause(ctx, 20*time.Millisecond)
	}
}

// logInAllTheTime has people log in, as an agent and a browser do it, without
// either program.
func (p *pairs) logInAllTheTime(ctx context.Context, t *testing.T) {
	ca, err := os.ReadFile(p.CAFile())
	if err != nil {
		t.Error(err)
		return
	}
	dir, err := state.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Error(err)
		return
	}
	key, err := keys.LoadOrCreate(ctx, dir, keys.Options{Where: keys.File})
	if err != nil {
		t.Error(err)
		return
	}
	tick := time.NewTicker(time.Second / loginsPerSec)
	defer tick.Stop()
	var under sync.WaitGroup
	defer under.Wait()
	slots := make(chan struct{}, 40)
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		select {
		case slots <- struct{}{}:
		default:
			continue // all are waiting for a daemon that is away
		}
		under.Go(func() {
			defer func() { <-slots }()
			session, err := p.logIn(context.WithoutCancel(ctx), key, ca)
			p.mu.Lock()
			defer p.mu.Unlock()
			if err != nil {
				p.refused++
				return
			}
			p.sessions = append(p.sessions, session)
		})
	}
}

func (p *pairs) logIn(ctx context.Context, key *keys.Key, ca []byte) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	base, err := login.ParseURL(p.AuthdURL())
	if err != nil {
		return "", err
	}
	client, err := login.NewClient(base, string(ca), key)
	if err != nil {
		return "", err
	}
	defer client.Close()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	browser := browse.New(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13})
	s, err := client.Login(ctx, login.Options{
		Show: func(string, string) {}, Timeout: 10 * time.Second,
		Browser: func(url string) error {
			_, err := browser.Follow(ctx, url, map[string]string{"answer": "allow"})
			if err != nil {
				cancel()
			}
			return err
		},
	})
	if err != nil {
		return "", err
	}
	return string(s.Session), nil
}

// back waits until a connection that was begun after the fault works, and returns
// how long that took.
func (p *pairs) back(t *testing.T, since time.Time) time.Duration {
	t.Helper()
	stack.Eventually(t, 30*time.Second, p.connect)
	return time.Since(since)
}

// check is what must be true after every fault.
func (p *pairs) check(t *testing.T) {
	t.Helper()
	if n := p.payroll.Accepted(); n != 0 {
		t.Errorf("%d connections reached a service that nobody may use", n)
	}
	there := p.Operator("sessions", "ls", "-o", "jsonl").Stdout
	live := map[string]bool{}
	for line := range bytes.Lines([]byte(there)) {
		var s struct{ Session string }
		if err := json.Unmarshal(line, &s); err != nil {
			t.Fatal(err)
		}
		live[s.Session] = true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	lost := 0
	for _, id := range p.sessions {
		if !live[id] {
			lost++
		}
	}
	if lost != 0 {
		t.Errorf("%d of %d sessions are lost", lost, len(p.sessions))
	}
	if len(p.sessions) == 0 {
		t.Error("nobody logged in")
	}
}

// TestHA_KillAny kills each daemon of the eight, one after the other, and starts
// it again. What another of its kind can go on with goes on: sessions live, nobody
// is let in who may not, flows stay open unless their own gateway is gone, and new
// connections work again within three seconds.
func TestHA_KillAny(t *testing.T) {
	db := postgrestest.Start(t)
	p := newPairs(t, db.URL(db.Database(t)), db)
	end := p.begin(t)
	for _, name := range stack.Members() {
		before := time.Now()
		p.Member(name).Signal(syscall.SIGKILL)
		took := p.back(t, before)
		p.Member(name).Wait(10 * time.Second)
		p.peopleLogIn(t)
		alive := p.alive()
		t.Logf("%-10s killed: a new connection after %4d ms, %d of %d flows live on", name, took.Milliseconds(), alive, pairFlows)
		if took > pairsBackAfter {
			t.Errorf("%s: new connections worked again after %s; want %s", name, took, pairsBackAfter)
		}
		if alive < pairFlows {
			if name != "gateway-1" && name != "gateway-2" {
				t.Errorf("%s: %d flows ended with it", name, pairFlows-alive)
			}
			p.open(t)
		}
		p.Start(name)
		p.WaitReady(name)
	}
	end()
	p.check(t)
	t.Logf("%d logins (%d refused while a daemon was away), %d connections (%d failed)", len(p.sessions), p.refused, p.opened, p.failed)
}

// TestCase_M8_TheOtherGatewayTakesOver kills the gateway that an agent uses, for
// good: its next connection goes through the other one of the login's answer.
func TestCase_M8_TheOtherGatewayTakesOver(t *testing.T) {
	db := postgrestest.Start(t)
	p := newPairs(t, db.URL(db.Database(t)), db)
	for _, transport := range []string{"quic", "tls"} {
		for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP} {
			t.Run(fmt.Sprint(transport, " ", sig), func(t *testing.T) { p.takesOver(t, transport, sig) })
		}
	}
}

func (p *pairs) takesOver(t *testing.T, transport string, sig syscall.Signal) {
	alice := p.NewAgent(t, "alice")
	alice.Login()
	p.tun = alice.Connect("db.internal:5432", "--transport", transport)
	if err := p.connect(); err != nil {
		t.Fatal(err)
	}
	p.Member("gateway-1").Signal(sig)
	took := p.back(t, time.Now())
	t.Logf("a new connection after %d ms", took.Milliseconds())
	if took > pairsBackAfter {
		t.Errorf("new connections worked again after %s; want %s", took, pairsBackAfter)
	}
	if sig == syscall.SIGSTOP {
		p.Member("gateway-1").Signal(syscall.SIGCONT)
		return
	}
	p.Member("gateway-1").Wait(10 * time.Second)
	p.Start("gateway-1")
	p.WaitReady("gateway-1")
}

// TestHA_PostgresRestart crashes PostgreSQL and starts it again, under load.
func TestHA_PostgresRestart(t *testing.T) {
	db := postgrestest.Start(t)
	p := newPairs(t, db.URL(db.Database(t)), db)
	end := p.begin(t)
	before := time.Now()
	if err := db.Stop(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	if err := db.Start(); err != nil {
		t.Fatal(err)
	}
	p.loginsAgain(t, "a crash of PostgreSQL", before)
	end()
	p.check(t)
}

// TestHA_PromoteStandby ends the primary for good and promotes its synchronous
// standby, under load.
func TestHA_PromoteStandby(t *testing.T) {
	primary := postgrestest.Start(t)
	name := primary.Database(t)
	standby := primary.NewStandby(t, true)
	p := newPairs(t, primary.URL(name, standby), primary)
	end := p.begin(t)
	before := time.Now()
	if err := errors.Join(primary.Stop(syscall.SIGQUIT), standby.Promote()); err != nil {
		t.Fatal(err)
	}
	p.loginsAgain(t, "a promotion", before)
	end()
	p.check(t)
}

// peopleLogIn waits until a second's worth of logins has gone through from now on.
func (p *pairs) peopleLogIn(t *testing.T) {
	t.Helper()
	count := func() int {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.sessions)
	}
	n := count()
	stack.Eventually(t, 30*time.Second, func() error {
		if got := count() - n; got < loginsPerSec {
			return fmt.Errorf("%d logins", got)
		}
		return nil
	})
}

// loginsAgain waits until people can log in again after something happened to the
// database, and looks at what must not have ended meanwhile.
func (p *pairs) loginsAgain(t *testing.T, what string, since time.Time) {
	t.Helper()
	p.peopleLogIn(t)
	t.Logf("%s: people log in again after %d ms; %d of %d flows live on", what, time.Since(since).Milliseconds(), p.alive(), pairFlows)
	if n := p.alive(); n < pairFlows {
		t.Errorf("%d flows ended", pairFlows-n)
	}
	if err := p.connect(); err != nil {
		t.Errorf("a new connection: %v", err)
	}
}

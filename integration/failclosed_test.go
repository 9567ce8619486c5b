package integration

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyport/integration/stack"
)

// What a deployment of four processes does while one of them is gone. The services
// count who reaches them; a refused connection must cause no packet, so their
// count must not move.

const (
	// maxStale is the bound of these tests; the shortest that policyd takes.
	maxStale = 3 * time.Second
	// backWithin is how long after a daemon is back everything works again.
	backWithin = 2 * time.Second
	// slack is what a busy machine adds to a bound.
	slack = 1500 * time.Millisecond
)

// fault is a way in which a daemon goes, and comes back.
type fault struct {
	name    string
	strike  func(*failing, string)
	undo    func(*failing, string)
	process bool // of the daemon itself, not of the network before it
	late    bool // it answers, too late for other daemons and in time for patient people
}

// faults are those of the security cases: killed; frozen, which is worse, because
// its sockets stay open; and the network before it gone or slow.
var faults = []fault{
	{"killed", func(w *failing, name string) {
		w.Daemon(name).Signal(syscall.SIGKILL)
		w.Daemon(name).Wait(10 * time.Second)
	}, func(w *failing, name string) { w.StartDaemon(name) }, true, false},
	{"frozen", func(w *failing, name string) {
		w.Daemon(name).Freeze()
	}, func(w *failing, name string) { w.Daemon(name).Signal(syscall.SIGCONT) }, true, false},
	{"partitioned", func(w *failing, name string) { w.Link(name).Freeze() }, func(w *failing, name string) { w.Link(name).Heal() }, false, false},
	{"slow", func(w *failing, name string) { w.Link(name).Delay(5 * time.Second) }, func(w *failing, name string) { w.Link(name).Heal() }, false, true},
}

// processFaults are the faults of a daemon itself.
var processFaults = faults[:2]

// eachFault runs a case on a deployment of its own for each of the faults, all at
// once: they wait, mostly.
func eachFault(t *testing.T, of []fault, edit func(*stack.Config), run func(*testing.T, *failing, fault)) {
	t.Parallel()
	for _, f := range of {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			run(t, newFailing(t, edit), f)
		})
	}
}

// failing is a deployment apart with one more service, which says "open" and goes
// on talking until its connection is closed.
type failing struct {
	*world
	hold *stack.Upstream
}

func newFailing(t *testing.T, edit func(*stack.Config)) *failing {
	t.Helper()
	hold := stack.Listen(t, func(c *net.TCPConn) {
		// The end of the request is no end: it goes on until somebody closes.
		for _, err := io.WriteString(c, "open\n"); err == nil; _, err = io.WriteString(c, ".\n") {
			<-time.After(100 * time.Millisecond)
		}
	})
	w := newWorldWith(t, stack.Apart, func(c *stack.Config) {
		c.Policyd, c.Links = map[string]any{"max_stale": maxStale.String()}, true
		c.Routes = append(c.Routes, stack.Route{From: "tcp://hold.internal:9", To: "tcp://" + hold.Addr, Policy: stack.Allow("all", stack.Anyone())})
		edit(c)
	})
	return &failing{w, hold}
}

// accepted is how many connections have reached any service.
func (w *failing) accepted() int64 {
	return w.echo.Accepted() + w.reply.Accepted() + w.payroll.Accepted() + w.hold.Accepted()
}

// live is a person with connections over both carriers, and one on stdin and stdout.
type live struct {
	tunnels []*stack.Tunnel
	conns   []net.Conn
	stdio   *stack.Process
}

func (w *failing) open(t *testing.T, a *stack.Agent) *live {
	t.Helper()
	l := &live{}
	for _, transport := range []string{"quic", "tls"} {
		tun := a.Connect("db.internal:5432", "--transport", transport)
		c := tun.Dial(t)
		if err := stack.Echo(c, "before"); err != nil {
			t.Fatal(err)
		}
		l.tunnels, l.conns = append(l.tunnels, tun), append(l.conns, c)
	}
	l.stdio = stack.StartProcess(t, a.Command("connect", "--stdio", "hold.internal:9"))
	if line := l.stdio.Line(20 * time.Second); line != "open" {
		t.Fatalf("the service behind --stdio says %q\n%s", line, l.stdio.Stderr())
	}
	return l
}

// close ends the person's processes.
func (l *live) close() {
	for _, tun := range l.tunnels {
		tun.Signal(syscall.SIGTERM)
		tun.Wait(10 * time.Second)
	}
	l.stdio.Signal(syscall.SIGTERM)
	l.stdio.Wait(10 * time.Second)
}

// wantStale wants every connection cut when the records are limit old, and the
// agent to say so and to end as unavailable: nobody revoked anything.
func (l *live) wantStale(t *testing.T, began time.Time, limit time.Duration) {
	t.Helper()
	for i, c := range l.conns {
		lived := stack.CutWithin(t, c, limit+10*time.Second).Sub(began)
		t.Logf("%s: cut after %s", l.tunnels[i].Carrier, lived.Round(time.Millisecond))
		// Records were at most one heartbeat old on each of two hops.
		if lived < limit-2*time.Second || lived > limit+slack {
			t.Errorf("%s: cut after %s; want about %s", l.tunnels[i].Carrier, lived, limit)
		}
	}
	if code := l.stdio.Wait(10 * time.Second); code != stack.ExitUnavailable {
		t.Errorf("--stdio: exit code %d; want %d\n%s", code, stack.ExitUnavailable, l.stdio.Stderr())
	}
	for _, p := range []*stack.Process{l.tunnels[0].Process, l.tunnels[1].Process, l.stdio} {
		stack.Eventually(t, 5*time.Second, func() error {
			if !strings.Contains(p.Stderr(), "could not confirm its policy") {
				return fmt.Errorf("the agent does not say why:\n%s", p.Stderr())
			}
			return nil
		})
	}
}

// dialEcho opens a connection through the tunnel, sends a line and wants it back.
// An agent that refuses may reset before Dial has returned.
func dialEcho(tun *stack.Tunnel, line string) error {
	c, err := net.Dial("tcp", tun.Local)
	if err != nil {
		return err
	}
	defer c.Close()
	return stack.Echo(c, line)
}

// refuses wants n connections at once through each open port, and one from a new
// process, to be refused, and none to reach a service.
func (w *failing) refuses(t *testing.T, l *live, n int) {
	t.Helper()
	before := w.accepted()
	var all sync.WaitGroup
	for _, tun := range l.tunnels {
		for range n {
			all.Go(func() {
				switch err := dialEcho(tun, "let me in"); {
				case err == nil:
					t.Error("an echo came back while nobody could decide")
				case errors.Is(err, syscall.ECONNREFUSED):
					t.Errorf("the port is closed: %v", err)
				}
			})
		}
	}
	all.Wait()
	if n := w.accepted() - before; n != 0 {
		t.Errorf("%d connections reached a service while nobody could decide", n)
	}
}

// recovers wants a new connection through each open port within the bound.
func (l *live) recovers(t *testing.T) {
	t.Helper()
	began := time.Now()
	for _, tun := range l.tunnels {
		stack.Eventually(t, backWithin+slack, func() error {
			err := dialEcho(tun, "again")
			if errors.Is(err, syscall.ECONNREFUSED) {
				t.Fatalf("the port is closed: %v\n%s", err, tun.Stderr())
			}
			return err
		})
	}
	t.Logf("works again %s after the daemon was back", time.Since(began).Round(time.Millisecond))
}

// TestCase_M1_PolicydGone: no allow without a live policyd; live connections end
// at max_stale, not before; backWithin without a hand.
func TestCase_M1_PolicydGone(t *testing.T) {
	eachFault(t, faults, func(*stack.Config) {}, func(t *testing.T, w *failing, f fault) {
		a := w.loggedIn(t, "alice")
		l := w.open(t, a)
		defer l.close()
		began := time.Now()
		f.strike(w, "policyd")
		w.refuses(t, l, 20)
		l.wantStale(t, began, maxStale)
		w.refuses(t, l, 50)
		before := w.accepted()
		wantExit(t, a.Run("connect", "--stdio", "db.internal:5432"), stack.ExitUnavailable)
		if n := w.accepted() - before; n != 0 {
			t.Errorf("%d connections reached a service while nobody could decide", n)
		}
		f.undo(w, "policyd")
		l.recovers(t)
		if tail := w.Operator("audit", "tail", "--config", w.File, "-n", "2000", "-o", "jsonl").Stdout; !strings.Contains(tail, `policy_stale`) {
			t.Error("no flow is recorded as ended by policy_stale")
		}
	})
}

// TestCase_M1_DefaultMaxStale: a live connection stays for 30 s if nothing else is
// configured.
func TestCase_M1_DefaultMaxStale(t *testing.T) {
	t.Parallel() // it waits, mostly
	w := newFailing(t, func(c *stack.Config) { c.Policyd = nil })
	l := w.open(t, w.loggedIn(t, "alice"))
	began := time.Now()
	faults[0].strike(w, "policyd")
	w.refuses(t, l, 5)
	l.wantStale(t, began, 30*time.Second)
}

// TestCase_M3_SlowPolicyd: a policyd that stands still for a moment delays
// connections and ends none.
func TestCase_M3_SlowPolicyd(t *testing.T) {
	w := newFailing(t, func(*stack.Config) {})
	l := w.open(t, w.loggedIn(t, "alice"))
	frozen := faults[1]
	frozen.strike(w, "policyd")
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if err := dialEcho(l.tunnels[0], "patient"); err != nil {
				t.Errorf("a connection that was asked for in the moment: %v", err)
			}
		})
	}
	<-time.After(time.Second) // less than decision_timeout
	frozen.undo(w, "policyd")
	all.Wait()
	for i, c := range l.conns {
		if err := stack.Echo(c, "still"); err != nil {
			t.Errorf("%s: a live connection: %v", l.tunnels[i].Carrier, err)
		}
	}
}

// TestCase_M4_CachedGone: whoever has a session is served for max_stale; nobody
// can log in, and a revocation says that it did not happen.
func TestCase_M4_CachedGone(t *testing.T) {
	eachFault(t, faults, func(*stack.Config) {}, func(t *testing.T, w *failing, f fault) {
		a := w.loggedIn(t, "alice")
		l := w.open(t, a)
		defer l.close()
		began := time.Now()
		f.strike(w, "cached")
		if err := dialEcho(l.tunnels[0], "new"); err != nil {
			t.Errorf("a session that policyd knows: %v", err)
		}
		l.wantStale(t, began, maxStale)
		w.refuses(t, l, 20)
		if !f.late {
			w.loginUnavailable(t, a)
		}
		if f.process {
			r := stack.Run(t, stack.Command{Program: "sallyport", Args: []string{"sessions", "revoke", "--config", w.File, "--user", "alice"}})
			if r.Exit != 1 || !strings.Contains(r.Stderr, "--direct") {
				t.Errorf("a revocation: %+v; want exit 1 and a hint", r)
			}
		}
		f.undo(w, "cached")
		l.recovers(t)
	})
}

// loginUnavailable wants a login refused with 503, in the browser or before there
// is one.
func (w *failing) loginUnavailable(t *testing.T, a *stack.Agent) {
	t.Helper()
	p := stack.StartProcess(t, a.Command("login", w.AuthdURL(), "--ca", w.CAFile(), "--no-browser", "--key-store", "file"))
	var address string
	stack.Eventually(t, 15*time.Second, func() error {
		if address = stack.AuthorizeURL(p.Stderr()); address == "" {
			select {
			case <-p.Done():
			default:
				return errors.New("agent login neither ends nor names an address")
			}
		}
		return nil
	})
	if address == "" {
		if code := p.Wait(time.Second); code != stack.ExitUnavailable {
			t.Errorf("agent login: exit code %d; want %d\n%s", code, stack.ExitUnavailable, p.Stderr())
		}
		return
	}
	page, err := a.Browser().Follow(t.Context(), address, map[string]string{"username": a.User, "password": stack.Password, "answer": "allow"})
	if err != nil || page.Status != 503 {
		t.Errorf("the browser sees %+v, %v; want status 503", page, err)
	}
	p.Signal(syscall.SIGTERM)
	p.Wait(10 * time.Second)
}

// TestCase_M4_DirectRevocation: cached is dead, policyd is told, and cached learns
// of it before it counts again. Nothing brings the session back.
func TestCase_M4_DirectRevocation(t *testing.T) {
	w := newFailing(t, func(c *stack.Config) { c.Policyd = map[string]any{"max_stale": "20s"} })
	a := w.loggedIn(t, "alice")
	l := w.open(t, a)
	faults[0].strike(w, "cached")
	if err := dialEcho(l.tunnels[0], "new while cached is gone"); err != nil {
		t.Errorf("a session that policyd knows: %v", err)
	}
	w.loginUnavailable(t, w.NewAgent(t, "bob"))

	r := stack.Run(t, stack.Command{Program: "sallyport", Args: []string{"sessions", "revoke", "--config", w.File, "--user", "alice"}})
	if r.Exit != 1 || !strings.Contains(r.Stderr, "--direct") {
		t.Errorf("without --direct: %+v; want exit 1 and a hint", r)
	}
	if err := stack.Echo(l.conns[0], "still"); err != nil {
		t.Errorf("a refused revocation cut a connection: %v", err)
	}
	began := time.Now()
	out := w.Operator("sessions", "revoke", "--config", w.File, "--user", "alice", "--direct").Stdout
	if !strings.Contains(out, "effective, not durable") {
		t.Errorf("said %q; want that it is effective, not durable", out)
	}
	for i, c := range l.conns {
		if took := stack.CutWithin(t, c, 5*time.Second).Sub(began); took > bound {
			t.Errorf("%s: cut after %s; want less than %s", l.tunnels[i].Carrier, took, bound)
		}
	}
	for _, p := range []*stack.Process{l.tunnels[0].Process, l.tunnels[1].Process, l.stdio} {
		if code := p.Wait(10 * time.Second); code != stack.ExitRevoked {
			t.Errorf("exit code %d; want %d\n%s", code, stack.ExitRevoked, p.Stderr())
		}
	}
	before := w.accepted()
	refused := func(when string, codes ...int) {
		t.Helper()
		r := a.Run("connect", "--stdio", "db.internal:5432")
		for _, code := range codes {
			if r.Exit == code {
				return
			}
		}
		t.Errorf("%s: exit code %d; want one of %v\n%s", when, r.Exit, codes, r.Stderr)
	}
	refused("revoked, cached away", stack.ExitLogin, stack.ExitUnavailable)
	w.StartDaemon("cached")
	refused("cached back", stack.ExitLogin, stack.ExitUnavailable)
	stack.Eventually(t, 10*time.Second, func() error {
		if list := w.Operator("sessions", "ls", "--config", w.File).Stdout; strings.Contains(list, "alice@") {
			return fmt.Errorf("cached still has her session:\n%s", list)
		}
		return nil
	})
	refused("written to cached", stack.ExitLogin)
	w.Restart("policyd", syscall.SIGKILL)
	refused("policyd anew", stack.ExitLogin)
	if n := w.accepted() - before; n != 0 {
		t.Errorf("%d connections of a revoked session reached a service", n)
	}
}

// TestCase_M6_AuthdGone: who is logged in notices nothing, also past the end of
// the certificate; logins say that they are unavailable; renewals catch up.
func TestCase_M6_AuthdGone(t *testing.T) {
	const certificate = 20 * time.Second
	shortLived := func(c *stack.Config) {
		c.Policyd = nil
		c.Session = map[string]any{"certificate_lifetime": certificate.String()}
	}
	eachFault(t, faults, shortLived, func(t *testing.T, w *failing, f fault) {
		a := w.loggedIn(t, "alice")
		l := w.open(t, a)
		expired := time.Now().Add(certificate + time.Second)
		f.strike(w, "authd")
		if !f.late { // a new process has no certificate yet, and cannot get one
			wantExit(t, a.Run("connect", "--stdio", "db.internal:5432"), stack.ExitUnavailable)
		}
		if f.name == "killed" {
			wantExit(t, a.Run("login", "--no-browser"), stack.ExitUnavailable)
		}
		stack.Eventually(t, 2*certificate, func() error {
			for i, tun := range l.tunnels {
				if err := stack.Echo(l.conns[i], "still"); err != nil {
					t.Fatalf("%s: a live connection: %v", tun.Carrier, err)
				}
			}
			if left := time.Until(expired); left > 0 {
				return fmt.Errorf("the certificate lives for another %s", left)
			}
			return nil
		})
		// QUIC carries new connections too: the session lives, not the certificate.
		if err := stack.Echo(l.tunnels[0].Dial(t), "new"); err != nil {
			t.Errorf("a new connection of a running agent: %v", err)
		}
		f.undo(w, "authd")
		w.Restart("gateway", syscall.SIGKILL) // both must show a certificate again
		stack.Eventually(t, 20*time.Second, func() error {
			for _, tun := range l.tunnels {
				if err := dialEcho(tun, "renewed"); err != nil {
					return fmt.Errorf("%s: %w\n%s", tun.Carrier, err, tun.Stderr())
				}
			}
			return nil
		})
		w.NewAgent(t, "bob").Login()
	})
}

// TestCase_M8_GatewayGone: connections are lost; sessions and ports are not.
func TestCase_M8_GatewayGone(t *testing.T) {
	eachFault(t, processFaults, func(*stack.Config) {}, func(t *testing.T, w *failing, f fault) {
		a := w.loggedIn(t, "alice")
		l := w.open(t, a)
		defer l.close()
		f.strike(w, "gateway")
		before := w.accepted()
		wantExit(t, a.Run("connect", "--stdio", "db.internal:5432"), stack.ExitUnavailable)
		if n := w.accepted() - before; n != 0 {
			t.Errorf("%d connections reached a service without a gateway", n)
		}
		f.undo(w, "gateway")
		l.recovers(t)
	})
}

// TestUpstreamGone: an allowed connection to a service that is not there.
func TestUpstreamGone(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := l.Addr().String()
	l.Close()
	w := newWorldWith(t, stack.Together, func(c *stack.Config) {
		c.Routes = append(c.Routes, stack.Route{From: "tcp://gone.internal:1", To: "tcp://" + gone, Policy: stack.Allow("all", stack.Anyone())})
	})
	a := w.loggedIn(t, "alice")
	r := a.Run("connect", "--stdio", "gone.internal:1")
	wantExit(t, r, stack.ExitUpstream)
	if !strings.Contains(r.Stderr, "you are allowed") {
		t.Errorf("says %s", r.Stderr)
	}
}

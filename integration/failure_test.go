package integration

import (
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport/integration/stack"
)

// maxStale is the bound of these tests; the shortest that policyd takes.
const maxStale = 3 * time.Second

// failures are the ways in which a daemon goes: killed, and frozen (which is worse,
// because its sockets stay open).
var failures = []struct {
	name string
	sig  syscall.Signal
}{{"killed", syscall.SIGKILL}, {"frozen", syscall.SIGSTOP}}

// failing is a deployment apart with a short max_stale and one open connection.
func failing(t *testing.T) (w *world, a *stack.Agent) {
	t.Helper()
	w = newWorldWith(t, stack.Apart, func(c *stack.Config) {
		c.Policyd = map[string]any{"max_stale": maxStale.String()}
	})
	a = w.loggedIn(t, "alice")
	return w, a
}

func openConn(t *testing.T, a *stack.Agent) (*stack.Tunnel, net.Conn) {
	t.Helper()
	tun := a.Connect("db.internal:5432")
	c := tun.Dial(t)
	if err := stack.Echo(c, "before"); err != nil {
		t.Fatal(err)
	}
	return tun, c
}

// comeBack brings the daemon back the way it went.
func (w *world) comeBack(t *testing.T, name string, sig syscall.Signal) {
	t.Helper()
	if sig == syscall.SIGSTOP {
		w.Daemon(name).Signal(syscall.SIGCONT)
		return
	}
	w.Daemon(name).Wait(10 * time.Second)
	w.StartDaemon(name)
}

// recovers wants new connections within the bound, and counts no packet that a
// refused one caused.
func recovers(t *testing.T, a *stack.Agent) {
	t.Helper()
	var tun *stack.Tunnel
	stack.Eventually(t, 10*time.Second, func() (err error) {
		tun, err = a.TryConnect("db.internal:5432")
		return err
	})
	if err := stack.Echo(tun.Dial(t), "again"); err != nil {
		t.Error(err)
	}
}

// TestCase_M1_PolicydGone: no allow without a live policyd; live connections end
// at max_stale, not before; recovery without a hand.
func TestCase_M1_PolicydGone(t *testing.T) { failClosed(t, "policyd") }

// TestCase_M4_CachedGone: what is decided stays for max_stale, logins are refused,
// and a revocation still takes effect when policyd is told directly.
func TestCase_M4_CachedGone(t *testing.T) { failClosed(t, "cached") }

func failClosed(t *testing.T, name string) {
	for _, f := range failures {
		t.Run(f.name, func(t *testing.T) {
			w, a := failing(t)
			_, live := openConn(t, a)
			began := time.Now()
			w.Daemon(name).Signal(f.sig)
			lived := stack.CutWithin(t, live, 4*maxStale).Sub(began)
			t.Logf("the live connection was cut %s after %s was %s", lived.Round(time.Millisecond), name, f.name)
			if lived < maxStale/2 || lived > maxStale+2*time.Second {
				t.Errorf("cut after %s; want about %s", lived, maxStale)
			}
			before := w.echo.Accepted()
			for range 2 {
				r := a.Run("connect", "--stdio", "db.internal:5432", "--transport", "tls")
				wantExit(t, r, stack.ExitUnavailable)
			}
			if n := w.echo.Accepted() - before; n != 0 {
				t.Errorf("%d connections reached the service while nobody could decide", n)
			}
			w.comeBack(t, name, f.sig)
			recovers(t, a)
		})
	}
}

// TestCase_M4_DirectRevocation: cached is dead, policyd is told, and cached learns
// of it before it counts again.
func TestCase_M4_DirectRevocation(t *testing.T) {
	w := newWorldWith(t, stack.Apart, func(c *stack.Config) { c.Policyd = map[string]any{"max_stale": "20s"} })
	a := w.loggedIn(t, "alice")
	tun, live := openConn(t, a)
	w.Daemon("cached").Signal(syscall.SIGKILL)
	w.Daemon("cached").Wait(10 * time.Second)

	// What policyd knows goes on for max_stale: new connections of live sessions.
	if err := stack.Echo(tun.Dial(t), "new while cached is gone"); err != nil {
		t.Error(err)
	}
	// Nobody can log in meanwhile.
	p, address := w.NewAgent(t, "bob").StartLogin()
	page, err := w.NewAgent(t, "bob").Browser().Follow(t.Context(), address, nil)
	if err != nil || page.Status != 503 {
		t.Errorf("a login while cached is gone: status %d, %v; want 503", page.Status, err)
	}
	p.Signal(syscall.SIGTERM)
	p.Wait(10 * time.Second)

	r := stack.Run(t, stack.Command{Program: "sallyport", Args: []string{"sessions", "revoke", "--config", w.File, "--user", "alice"}})
	if r.Exit != 1 || !strings.Contains(r.Stderr, "--direct") {
		t.Errorf("without --direct: %+v; want exit 1 and a hint", r)
	}
	began := time.Now()
	out := w.Operator("sessions", "revoke", "--config", w.File, "--user", "alice", "--direct").Stdout
	if !strings.Contains(out, "not durable") {
		t.Errorf("said %q; want that it is not durable", out)
	}
	if took := stack.CutWithin(t, live, 5*time.Second).Sub(began); took > bound {
		t.Errorf("cut after %s; want less than %s", took, bound)
	}
	w.StartDaemon("cached")
	stack.Eventually(t, 10*time.Second, func() error {
		if list := w.Operator("sessions", "ls", "--config", w.File).Stdout; strings.Contains(list, "alice@") {
			return fmt.Errorf("cached still has her session:\n%s", list)
		}
		return nil
	})
	w.Restart("policyd", syscall.SIGKILL) // what it knew by itself is gone
	wantExit(t, a.Run("connect", "--stdio", "db.internal:5432"), stack.ExitLogin)
}

// TestCase_M1_DefaultMaxStale: nobody configures max_stale, and it is 30 s.
func TestCase_M1_DefaultMaxStale(t *testing.T) {
	t.Parallel() // it waits, mostly
	w := newWorld(t, stack.Apart)
	a := w.loggedIn(t, "alice")
	tun, live := openConn(t, a)
	began := time.Now()
	w.Daemon("policyd").Signal(syscall.SIGSTOP)
	lived := stack.CutWithin(t, live, time.Minute).Sub(began)
	t.Logf("the live connection was cut %s after policyd was frozen", lived.Round(time.Millisecond))
	if lived < 28*time.Second || lived > 32*time.Second {
		t.Errorf("cut after %s; want about 30 s", lived)
	}
	stack.Eventually(t, 10*time.Second, func() error {
		if !strings.Contains(tun.Stderr(), "confirm") && !strings.Contains(tun.Stderr(), "stale") {
			return fmt.Errorf("the agent does not say that the decision could not be confirmed:\n%s", tun.Stderr())
		}
		return nil
	})
	w.comeBack(t, "policyd", syscall.SIGSTOP)
	recovers(t, a)
}

// TestCase_M6_AuthdGone: nobody notices who is logged in; logins say so.
func TestCase_M6_AuthdGone(t *testing.T) {
	for _, f := range failures {
		t.Run(f.name, func(t *testing.T) {
			w, a := failing(t)
			tun, live := openConn(t, a)
			w.Daemon("authd").Signal(f.sig)
			if err := stack.Echo(live, "still"); err != nil {
				t.Errorf("the live connection: %v", err)
			}
			if err := stack.Echo(tun.Dial(t), "new"); err != nil {
				t.Errorf("a new connection of a running agent: %v", err)
			}
			// A new process has no certificate yet, and cannot get one.
			wantExit(t, a.Run("connect", "--stdio", "db.internal:5432"), stack.ExitUnavailable)
			w.comeBack(t, "authd", f.sig)
			w.NewAgent(t, "bob").Login()
		})
	}
}

// TestCase_M8_GatewayGone: connections are lost, sessions are not.
func TestCase_M8_GatewayGone(t *testing.T) {
	for _, f := range failures {
		t.Run(f.name, func(t *testing.T) {
			w, a := failing(t)
			openConn(t, a)
			w.Daemon("gateway").Signal(f.sig)
			r := a.Run("connect", "--stdio", "db.internal:5432")
			wantExit(t, r, stack.ExitUnavailable)
			w.comeBack(t, "gateway", f.sig)
			recovers(t, a)
		})
	}
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

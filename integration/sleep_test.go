package integration

import (
	"fmt"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport/integration/stack"
)

// certificateLife is how long a session certificate is valid in these tests; the
// shortest that authd takes.
const certificateLife = 20 * time.Second

// asleep is a laptop with an open port that was closed in the middle of its work,
// and whose session certificate has expired meanwhile.
func asleep(t *testing.T, transport string, args ...string) (*world, *stack.Agent, *stack.Tunnel) {
	t.Helper()
	w := newWorldWith(t, stack.Apart, func(c *stack.Config) {
		c.Session = map[string]any{"certificate_lifetime": certificateLife.String()}
	})
	a := w.loggedIn(t, "alice")
	tun := a.Connect("db.internal:5432", append(args, "--transport", transport)...)
	c := tun.Dial(t)
	if err := stack.Echo(c, "before"); err != nil {
		t.Fatal(err)
	}
	c.Close()
	stack.Eventually(t, 5*time.Second, func() error {
		if n := w.echo.Open(); n != 0 {
			return fmt.Errorf("%d connections are open at the service", n)
		}
		return nil
	})
	tun.Freeze()
	return w, a, tun
}

// overslept waits until every certificate from before now has expired.
func overslept(t *testing.T) {
	t.Helper()
	select {
	case <-time.After(certificateLife + time.Second):
	case <-t.Context().Done():
	}
}

// wantLivingSession: the session itself has not ended.
func wantLivingSession(t *testing.T, w *world) {
	t.Helper()
	if list := w.Operator("sessions", "ls", "--config", w.File).Stdout; !strings.Contains(list, "alice@") {
		t.Fatalf("alice's session is not listed:\n%s", list)
	}
}

// TestSleep_SessionAlive: the certificate has expired, the session lives. A new
// connection through the same port works, and nobody is asked anything.
func TestSleep_SessionAlive(t *testing.T) {
	t.Parallel() // it waits, mostly
	for _, transport := range []string{"quic", "tls"} {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			w, _, tun := asleep(t, transport, "--no-browser")
			early := tun.Dial(t)                  // by a program that does not know of the sleep
			w.Restart("gateway", syscall.SIGKILL) // whatever was open has died without a word
			overslept(t)
			wantLivingSession(t, w)
			began := time.Now()
			tun.Signal(syscall.SIGCONT)
			if err := stack.Echo(early, "opened while it slept"); err != nil {
				t.Fatalf("%v\n%s", err, tun.Stderr())
			}
			t.Logf("served %s after it woke", time.Since(began).Round(time.Millisecond))
			if err := stack.Echo(tun.Dial(t), "after"); err != nil {
				t.Errorf("%v\n%s", err, tun.Stderr())
			}
			if strings.Contains(tun.Stderr(), "https://") {
				t.Errorf("somebody was asked to log in:\n%s", tun.Stderr())
			}
		})
	}
}

var visit = regexp.MustCompile(`(?m)^  (https://\S+)$`)

// TestSleep_SessionEnded: the session was revoked meanwhile. A login is asked for;
// the local connection is held until it is done, and then served.
func TestSleep_SessionEnded(t *testing.T) {
	t.Parallel() // it waits, mostly
	for _, transport := range []string{"quic", "tls"} {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			w, a, tun := asleep(t, transport, "--no-browser")
			w.Operator("sessions", "revoke", "--config", w.File, "--user", "alice")
			overslept(t)
			held := tun.Dial(t)
			tun.Signal(syscall.SIGCONT)
			var address string
			stack.Eventually(t, 20*time.Second, func() error {
				found := visit.FindStringSubmatch(tun.Stderr())
				if found == nil {
					return fmt.Errorf("no login is asked for:\n%s", tun.Stderr())
				}
				address = found[1]
				return nil
			})
			before := w.echo.Accepted()
			page, err := a.Browser().Follow(t.Context(), address, map[string]string{"username": a.User, "password": stack.Password, "answer": "allow"})
			if err != nil || page.Status != 200 {
				t.Fatalf("the browser ended with %+v, %v", page, err)
			}
			if err := stack.Echo(held, "held"); err != nil {
				t.Fatalf("the connection that was held: %v\n%s", err, tun.Stderr())
			}
			if n := w.echo.Accepted() - before; n != 1 {
				t.Errorf("%d connections reached the service; want the one that was held", n)
			}
			if n := strings.Count(tun.Stderr(), "https://"); n != 1 {
				t.Errorf("asked %d times; want once:\n%s", n, tun.Stderr())
			}
			wantLivingSession(t, w)
		})
	}
}

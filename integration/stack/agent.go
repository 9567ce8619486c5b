package stack

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"sallyport/internal/browse"
)

// Agent is one person at one machine: a state directory and the agent program.
type Agent struct {
	s       *Stack
	t       testing.TB
	User    string
	Posture string // the file with facts
	state   string
}

// Exit codes of the agent (DESIGN, section 9).
const (
	ExitUsage, ExitLogin, ExitDenied, ExitUpstream, ExitUnavailable, ExitConflict, ExitRevoked = 2, 3, 4, 6, 7, 9, 10
)

// NewAgent makes a machine for the user, with an encrypted disk and no firewall.
func (s *Stack) NewAgent(t testing.TB, user string) *Agent {
	t.Helper()
	dir := t.TempDir()
	a := &Agent{s: s, t: t, User: user, Posture: filepath.Join(dir, "posture"), state: filepath.Join(dir, "state")}
	if err := os.Mkdir(a.state, 0o700); err != nil {
		t.Fatal(err)
	}
	a.SetFacts("disk_encrypted: true\nfirewall: false\n")
	return a
}

// In is the same machine in another test.
func (a *Agent) In(t testing.TB) *Agent {
	b := *a
	b.t = t
	return &b
}

// SetFacts replaces the file with facts in one step.
func (a *Agent) SetFacts(text string) {
	a.t.Helper()
	if err := os.WriteFile(a.Posture+".new", []byte(text), 0o600); err != nil {
		a.t.Fatal(err)
	}
	if err := os.Rename(a.Posture+".new", a.Posture); err != nil {
		a.t.Fatal(err)
	}
}

// Command is the agent with the person's environment.
func (a *Agent) Command(args ...string) Command {
	return Command{Program: "agent", Args: args, Env: a.Env()}
}

// Path is where the agent's program is.
func (a *Agent) Path() string {
	a.t.Helper()
	dir, err := Binaries()
	if err != nil {
		a.t.Fatal(err)
	}
	return filepath.Join(dir, "agent")
}

// Env is the person's environment: a state directory, and no desktop.
func (a *Agent) Env() []string {
	return []string{"XDG_STATE_HOME=" + a.state, "XDG_RUNTIME_DIR=" + a.state, "DBUS_SESSION_BUS_ADDRESS=", "DISPLAY=", "WAYLAND_DISPLAY=", "BROWSER=", "NO_COLOR=1"}
}

// Run runs the agent to its end.
func (a *Agent) Run(args ...string) Result {
	a.t.Helper()
	return Run(a.t, a.Command(args...))
}

// Login logs the person in; it must succeed.
func (a *Agent) Login() {
	a.t.Helper()
	a.LoginWith(map[string]string{"username": a.User, "password": Password, "answer": "allow"})
}

// LoginWith is Login through whichever pages come, with what to type and to press
// by the names of their fields. The browser is a new one, without cookies.
func (a *Agent) LoginWith(fill map[string]string) {
	a.t.Helper()
	p, address := a.StartLogin()
	page, err := a.Browser().Follow(a.t.Context(), address, fill)
	if err != nil {
		a.t.Fatalf("browser: %v", err)
	}
	if page.Status != 200 || page.URL.Hostname() != "127.0.0.1" {
		a.t.Fatalf("the browser ended at %s with status %d: %s", page.URL.Redacted(), page.Status, page.Text)
	}
	if code := p.Wait(20 * time.Second); code != 0 {
		a.t.Fatalf("agent login: exit code %d\n%s", code, p.Stderr())
	}
}

var authorizeURL = regexp.MustCompile(`https://\S+/authorize\S+`)

// AuthorizeURL finds in the agent's words the address that a browser is to open.
func AuthorizeURL(text string) string { return authorizeURL.FindString(text) }

// StartLogin starts agent login and returns the address it wants opened.
func (a *Agent) StartLogin() (p *Process, address string) {
	a.t.Helper()
	p = StartProcess(a.t, a.Command("login", a.s.AuthdURL(), "--ca", a.s.CAFile(), "--no-browser", "--key-store", "file", "--posture-file", a.Posture))
	Eventually(a.t, 15*time.Second, func() error {
		if address = authorizeURL.FindString(p.Stderr()); address == "" {
			return fmt.Errorf("agent login names no address: %s", p.Stderr())
		}
		return nil
	})
	return p, address
}

// Browser is a new browser that trusts the deployment's CA.
func (a *Agent) Browser() *browse.Browser {
	a.t.Helper()
	return browse.New(&tls.Config{RootCAs: a.s.Roots(a.t), MinVersion: tls.VersionTLS13})
}

// Roots is a pool with the CA of the public listeners.
func (s *Stack) Roots(t testing.TB) *x509.CertPool {
	t.Helper()
	ca, err := os.ReadFile(s.CAFile())
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		t.Fatal("no CA in " + s.CAFile())
	}
	return pool
}

// Tunnel is an agent connect that has opened a port.
type Tunnel struct {
	*Process
	Local   string
	Carrier string
}

// Connect runs agent connect with further arguments and returns when the port is
// open; it must succeed.
func (a *Agent) Connect(target string, args ...string) *Tunnel {
	a.t.Helper()
	tun, err := a.TryConnect(target, args...)
	if err != nil {
		a.t.Fatal(err)
	}
	return tun
}

// TryConnect is Connect that may fail.
func (a *Agent) TryConnect(target string, args ...string) (*Tunnel, error) {
	a.t.Helper()
	p := StartProcess(a.t, a.Command(append([]string{"connect", target, "--listen", "127.0.0.1:0", "-o", "json"}, args...)...))
	line := p.Line(30 * time.Second)
	var doc struct{ Local, Carrier string }
	if err := json.Unmarshal([]byte(line), &doc); err != nil || doc.Local == "" {
		return nil, fmt.Errorf("agent connect %s opened no port: exit code %d\n%s", target, p.Wait(10*time.Second), p.Stderr())
	}
	return &Tunnel{p, doc.Local, doc.Carrier}, nil
}

// Dial opens a connection through the tunnel.
func (tun *Tunnel) Dial(t testing.TB) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", tun.Local)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// Echo sends a line and wants it back.
func Echo(c net.Conn, line string) error { return EchoWithin(c, line, 15*time.Second) }

// EchoWithin is Echo that waits no longer than limit.
func EchoWithin(c net.Conn, line string, limit time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		return err
	}
	got, err := bufio.NewReaderSize(c, 16).ReadString('\n')
	if err != nil {
		return err
	}
	if got != line+"\n" {
		return fmt.Errorf("sent %q and got %q", line, got)
	}
	return nil
}

// CutWithin waits until the connection has ended and returns when. One that
// lives on fails the test.
func CutWithin(t testing.TB, c net.Conn, limit time.Duration) time.Time {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, c); err != nil && os.IsTimeout(err) {
		t.Fatalf("the connection is open %s after it should have been cut", limit)
	}
	return time.Now()
}

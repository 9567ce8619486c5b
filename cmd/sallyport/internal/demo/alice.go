package demo

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"sallyport/internal/browse"
)

// Exit codes of the agent (DESIGN, section 9).
const (
	exitLogin   = 3
	exitDenied  = 4
	exitRevoked = 10
)

// alice is the person at the desk: she has a home directory and programs.
type alice struct {
	site            *site
	agent, operator string
	home            string

	mu    sync.Mutex // guards conns
	conns []*conn
}

func (a *alice) env() []string {
	keep := slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "XDG_") || strings.HasPrefix(kv, "DBUS_") || strings.HasPrefix(kv, "BROWSER=")
	})
	return append(keep, "XDG_STATE_HOME="+a.home, "XDG_RUNTIME_DIR="+a.home, "NO_COLOR=1")
}

// run runs the agent to its end.
func (a *alice) run(ctx context.Context, args ...string) (outcome, error) {
	return runProgram(ctx, a.agent, a.env(), args...)
}

// login runs agent login and is the browser beside it.
func (a *alice) login(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, a.agent, "login", a.site.authd, "--ca", a.site.caFile, "--no-browser", "--key-store", "file", "--posture-file", a.site.postureFile)
	cmd.Env = a.env()
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(a.home, 0o700); err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	address, said, err := findAddress(stderr)
	if err == nil {
		err = a.browse(ctx, address)
	}
	if err != nil {
		cancel()
		return fmt.Errorf("agent login: %w: %s", errors.Join(err, cmd.Wait()), said)
	}
	rest, err := io.ReadAll(stderr)
	if err := errors.Join(err, cmd.Wait()); err != nil {
		return fmt.Errorf("agent login: %w: %s%s", err, said, rest)
	}
	return nil
}

var address = regexp.MustCompile(`https://\S+/authorize\S+`)

// findAddress reads what the agent says until it names the page to open.
func findAddress(r io.Reader) (found, said string, err error) {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		said += line
		if m := address.FindString(line); m != "" {
			return m, said, nil
		}
		if err != nil {
			return "", said, errors.New("no address to open")
		}
	}
}

func (a *alice) browse(ctx context.Context, start string) error {
	ca, err := os.ReadFile(a.site.caFile)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	b := browse.New(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13})
	page, err := b.Follow(ctx, start, map[string]string{"username": userID, "password": userPassword, "answer": "allow"})
	if err != nil {
		return err
	}
	if page.Status != 200 || page.URL.Hostname() != "127.0.0.1" {
		return fmt.Errorf("the browser ended at %s with status %d: %s", page.URL.Redacted(), page.Status, page.Text)
	}
	return nil
}

// setPosture writes the facts that the agent reports beside its own.
func (a *alice) setPosture(encrypted bool) error {
	return a.site.writePosture(encrypted)
}

// conn is one `agent connect` process and an open connection through it.
type conn struct {
	net.Conn
	lines     *bufio.Reader
	announced string // what the agent said when the port was open

	cmd    *exec.Cmd
	stderr *bytes.Buffer
	done   chan struct{} // closed when the process has ended; exit is set then
	exit   int
}

// connect runs agent connect and opens one connection through its port.
func (a *alice) connect(ctx context.Context, target string) (*conn, error) {
	cmd := exec.Command(a.agent, "connect", target, "--listen", "127.0.0.1:0", "-o", "json")
	cmd.Env = a.env()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	c := &conn{cmd: cmd, stderr: new(bytes.Buffer), done: make(chan struct{})}
	cmd.Stderr = c.stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	a.mu.Lock()
	a.conns = append(a.conns, c)
	a.mu.Unlock()
	var doc struct{ Local, Carrier, Rule string }
	decodeErr := json.NewDecoder(stdout).Decode(&doc)
	go func() {
		defer close(c.done)
		_, _ = io.Copy(io.Discard, stdout) // until the process ends
		_ = cmd.Wait()                     // its exit code tells
		c.exit = cmd.ProcessState.ExitCode()
	}()
	if decodeErr != nil || doc.Local == "" {
		c.close()
		return nil, fmt.Errorf("agent connect %s did not open a port (exit code %d): %s", target, c.exit, c.stderr)
	}
	c.announced = fmt.Sprintf("%s → %s (%s, allowed by %q)", target, doc.Local, doc.Carrier, doc.Rule)
	var d net.Dialer
	if c.Conn, err = d.DialContext(ctx, "tcp", doc.Local); err != nil {
		c.close()
		return nil, err
	}
	c.lines = bufio.NewReader(c.Conn)
	return c, nil
}

// connectSoon is connect, tried again until a change that was just made is known.
func (a *alice) connectSoon(ctx context.Context, target string) (*conn, error) {
	end := time.Now().Add(5 * time.Second)
	for {
		c, err := a.connect(ctx, target)
		if err == nil || time.Now().After(end) || ctx.Err() != nil {
			return c, err
		}
	}
}

// ask sends a line and reads the answer.
func (c *conn) ask(line string) (string, error) {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(c.Conn, line); err != nil {
		return "", err
	}
	answer, err := c.lines.ReadString('\n')
	return strings.TrimSpace(answer), err
}

// cutBy lets the service send without pause, makes the change, and returns how
// long after it the last byte came. A connection that lives on is an error.
func (c *conn) cutBy(ctx context.Context, change func() error) (time.Duration, error) {
	if _, err := c.ask("STREAM"); err != nil {
		return 0, err
	}
	last := make(chan time.Time, 1)
	go func() {
		buf := make([]byte, 4096)
		at := time.Now()
		for {
			_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
			n, err := c.lines.Read(buf)
			if n > 0 {
				at = time.Now()
			}
			if err != nil {
				if errors.Is(err, os.ErrDeadlineExceeded) {
					at = time.Time{} // silent, but open: that is no cut
				}
				last <- at
				return
			}
		}
	}()
	start := time.Now()
	if err := change(); err != nil {
		return 0, err
	}
	select {
	case at := <-last:
		if at.IsZero() {
			return 0, errors.New("the connection fell silent and stayed open")
		}
		took := max(at.Sub(start), 0)
		if took >= bound {
			return took, fmt.Errorf("cut after %s; the bound is %s", brief(took), bound)
		}
		return took, nil
	case <-time.After(5 * bound):
		return 0, fmt.Errorf("the connection still carries data %s after the change", 5*bound)
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// lives checks that the connection still carries data.
func (c *conn) lives(context.Context) error {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c.Conn, "GET / HTTP/1.1\r\nHost: wiki.internal\r\n\r\n"); err != nil {
		return err
	}
	status, err := c.lines.ReadString('\n')
	if err != nil {
		return err
	}
	if !strings.Contains(status, " 200 ") {
		return fmt.Errorf("the wiki answered %q", status)
	}
	return nil
}

// endedWith waits for the agent's end and returns what it said last.
func (c *conn) endedWith(codes ...int) (string, error) {
	select {
	case <-c.done:
	case <-time.After(10 * time.Second):
		return "", errors.New("agent connect did not end after its connection was cut")
	}
	said := strings.TrimSpace(c.stderr.String())
	if !slices.Contains(codes, c.exit) {
		return "", fmt.Errorf("agent connect ended with exit code %d, want %v: %s", c.exit, codes, said)
	}
	var last []string
	for line := range strings.Lines(said) {
		if !strings.Contains(line, "→") && !strings.HasPrefix(line, "Ctrl-C") {
			last = append(last, strings.TrimSpace(line))
		}
	}
	return strings.Join(last, "\n"), nil
}

func (c *conn) close() {
	if c.Conn != nil {
		c.Conn.Close()
	}
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-c.done:
	case <-time.After(6 * time.Second):
		_ = c.cmd.Process.Kill()
		<-c.done
	}
}

// close ends what is still running.
func (a *alice) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.conns {
		c.close()
	}
}

// outcome is how a program ended.
type outcome struct {
	stdout, stderr string
	exit           int
}

func (o outcome) all() string { return strings.TrimSpace(o.stderr + o.stdout) }

// runProgram runs a program to its end; an exit code other than 0 is an error.
func runProgram(ctx context.Context, path string, env []string, args ...string) (outcome, error) {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = env
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 6 * time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	return outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}, err
}

func dirOf(path string) string { return filepath.Dir(path) }

func brief(d time.Duration) string { return d.Round(time.Millisecond).String() }

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}

func indent(s string) string { return strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n      ") }

func lastLines(b []byte, n int) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

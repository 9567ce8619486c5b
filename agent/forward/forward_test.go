//go:build unix

package forward_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyport"
	"sallyport/agent/forward"
	"sallyport/tunnel"
)

// knockEnv makes this test binary a client of another user: it connects to that
// address and prints what it reads.
const knockEnv = "FORWARD_TEST_KNOCK"

func TestMain(m *testing.M) {
	if addr := os.Getenv(knockEnv); addr != "" {
		os.Exit(knock(addr))
	}
	goleak.VerifyTestMain(m)
}

func knock(addr string) int {
	network := "tcp"
	if strings.HasPrefix(addr, "/") {
		network = "unix"
	}
	c, err := net.DialTimeout(network, addr, 5*time.Second)
	if err != nil {
		fmt.Println("dial:", err)
		return 0
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	fmt.Fprint(c, "knock")
	b := make([]byte, 5)
	n, err := io.ReadFull(c, b)
	fmt.Printf("read %q %v\n", b[:n], err)
	return 0
}

var db = sallyport.Target{Network: sallyport.TCP, Host: "db.internal", Port: 5432}

// echoes opens flows to an echo server that says how much it got after the end.
type echoes struct {
	server net.Listener
	tasks  sync.WaitGroup

	mu    sync.Mutex
	gate  chan struct{} // flows wait for it if not nil
	err   error
	why   error
	calls int
	last  *net.TCPConn
}

func newEchoes(t *testing.T) *echoes {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &echoes{server: l}
	e.tasks.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			e.tasks.Go(func() {
				defer c.Close()
				n, err := io.Copy(c, c)
				if err == nil {
					fmt.Fprintf(c, "[%d bytes]", n)
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		e.tasks.Wait()
	})
	return e
}

type tcpFlow struct{ *net.TCPConn }

func (f tcpFlow) Reset(uint64) {
	f.SetLinger(0)
	f.Close()
}

// Read turns the system's reset into the tunnel's.
func (f tcpFlow) Read(b []byte) (int, error) {
	n, err := f.TCPConn.Read(b)
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed) {
		err = &tunnel.ResetError{}
	}
	return n, err
}

func (e *echoes) Open(ctx context.Context, _ sallyport.Target) (*forward.Flow, error) {
	e.mu.Lock()
	e.calls++
	gate, err := e.gate, e.err
	e.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if err != nil {
		return nil, err
	}
	c, err := net.Dial("tcp", e.server.Addr().String())
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	e.last = c.(*net.TCPConn)
	e.mu.Unlock()
	return &forward.Flow{
		Flow:   &tunnel.Flow{Conn: tcpFlow{c.(*net.TCPConn)}, ID: "f-1", Rule: "dba"},
		WhyCut: func(context.Context, error) error { return e.why },
	}, nil
}

// cut breaks the flow that was opened last.
func (e *echoes) cut() {
	e.mu.Lock()
	defer e.mu.Unlock()
	tcpFlow{e.last}.Reset(0)
}

func (e *echoes) opened() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.calls
}

// served is a Forward that serves until the test ends.
type served struct {
	*forward.Forward
	addr string
	said chan error
	stop context.CancelFunc
	done chan error
}

func serve(t *testing.T, e forward.Opener, spec forward.Spec, allow forward.Allow) *served {
	t.Helper()
	b, err := forward.Bind(t.Context(), db, spec, allow, &memory{})
	if err != nil {
		t.Fatal(err)
	}
	s := &served{addr: b.Addr().String(), said: make(chan error, 1000), done: make(chan error, 1)}
	s.Forward = &forward.Forward{Target: db, Opener: e, Allow: allow, Say: func(err error) { s.said <- err }}
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	go func() {
		s.done <- s.Serve(ctx, b)
		close(s.done)
	}()
	t.Cleanup(func() {
		cancel()
		<-s.done
	})
	return s
}

var anyPort = forward.Spec{Network: "tcp", Host: "127.0.0.1"}

func dial(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// turnedAway connects and returns how that ends; a reset may come so soon that
// connecting itself fails with it.
func turnedAway(t *testing.T, addr string) error {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	_, err = c.Read(make([]byte, 1))
	return err
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); <-time.After(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func TestHalfCloseKeepsTheReply(t *testing.T) {
	s := serve(t, newEchoes(t), anyPort, forward.Allow{})
	c := dial(t, s.addr)
	io.WriteString(c, "hello")
	c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != "hello[5 bytes]" {
		t.Errorf("got %q, %v", got, err)
	}
	eventually(t, "the flow is counted", func() bool {
		live, totals := s.Status()
		return len(live) == 0 && totals == forward.Totals{Flows: 1, Up: 5, Down: 14}
	})
}

// While nothing can be opened, connections are accepted and held, unread.
func TestHeldUntilOpened(t *testing.T) {
	e := newEchoes(t)
	e.gate = make(chan struct{})
	s := serve(t, e, anyPort, forward.Allow{})
	conns := make([]*net.TCPConn, forward.MaxHeld+1)
	for i := range conns {
		conns[i] = dial(t, s.addr)
		fmt.Fprintf(conns[i], "%03d", i)
	}
	eventually(t, "all wait", func() bool { return e.opened() == len(conns) })
	// One more than may be held; which one is closed is nobody's business.
	if err := <-s.said; sallyport.CodeOf(err) != "local.too_many_held" {
		t.Errorf("said %v", err)
	}
	close(e.gate)
	closed := 0
	for i, c := range conns {
		c.CloseWrite()
		got, err := io.ReadAll(c)
		switch {
		case errors.Is(err, syscall.ECONNRESET):
			closed++
		case err != nil || string(got) != fmt.Sprintf("%03d[3 bytes]", i):
			t.Errorf("held connection %d: got %q, %v", i, got, err)
		}
	}
	if closed != 1 {
		t.Errorf("%d of %d connections were closed; want 1", closed, len(conns))
	}
}

// Many connections that are let in at once are not held, however many.
func TestBurstIsNotHeld(t *testing.T) {
	s := serve(t, newEchoes(t), anyPort, forward.Allow{})
	var wg sync.WaitGroup
	for range 3 * forward.MaxHeld {
		wg.Go(func() {
			c, err := net.Dial("tcp", s.addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.(*net.TCPConn).CloseWrite()
			if got, err := io.ReadAll(c); err != nil || string(got) != "[0 bytes]" {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	wg.Wait()
}

func TestRefusedFlowIsSaidAndTheTargetGoesOn(t *testing.T) {
	e := newEchoes(t)
	e.err = &sallyport.Error{Outcome: sallyport.OutcomeDenied, Code: "denied", Message: "no"}
	s := serve(t, e, anyPort, forward.Allow{})
	if err := turnedAway(t, s.addr); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v; want a reset, not an end", err)
	}
	if err := <-s.said; sallyport.OutcomeOf(err) != sallyport.OutcomeDenied {
		t.Errorf("said %v", err)
	}
	e.mu.Lock()
	e.err = nil
	e.mu.Unlock()
	c := dial(t, s.addr)
	c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != "[0 bytes]" {
		t.Errorf("after the refusal: %q, %v", got, err)
	}
}

// How a flow ends decides whether its target goes on.
func TestCuts(t *testing.T) {
	for name, tt := range map[string]struct {
		why  error
		ends bool
	}{
		"withdrawn":       {&sallyport.Error{Outcome: sallyport.OutcomeRevoked, Code: "policy"}, true},
		"session revoked": {&sallyport.Error{Outcome: sallyport.OutcomeRevoked, Code: "session_revoked"}, true},
		"session expired": {&sallyport.Error{Outcome: sallyport.OutcomeRevoked, Code: forward.CodeSessionExpired}, false},
		"gateway lost":    {&sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: "carrier.lost"}, false},
		"service reset":   {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEchoes(t)
			e.why = tt.why
			s := serve(t, e, anyPort, forward.Allow{})
			c := dial(t, s.addr)
			io.WriteString(c, "x")
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			e.cut()
			if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
				t.Errorf("the local end saw %v; a cut is not an end", err)
			}
			if tt.ends {
				if err := <-s.done; err != tt.why {
					t.Errorf("serve returned %v; want %v", err, tt.why)
				}
				return
			}
			if tt.why != nil {
				if err := <-s.said; err != tt.why {
					t.Errorf("said %v", err)
				}
			}
			again := dial(t, s.addr)
			again.CloseWrite()
			if got, err := io.ReadAll(again); err != nil || string(got) != "[0 bytes]" {
				t.Errorf("the target does not go on: %q, %v", got, err)
			}
		})
	}
}

func TestNobodyToAskEndsTheTarget(t *testing.T) {
	e := newEchoes(t)
	e.err = &sallyport.Error{Outcome: sallyport.OutcomeLogin, Code: forward.CodeNoLogin}
	s := serve(t, e, anyPort, forward.Allow{})
	turnedAway(t, s.addr)
	if err := <-s.done; sallyport.OutcomeOf(err) != sallyport.OutcomeLogin {
		t.Errorf("got %v; want login", err)
	}
}

// Case Q4: after the first Ctrl-C nothing new is accepted, and what is open may end.
func TestCase_Q4_Drain(t *testing.T) {
	s := serve(t, newEchoes(t), anyPort, forward.Allow{})
	c := dial(t, s.addr)
	io.WriteString(c, "hel")
	io.ReadFull(c, make([]byte, 3))
	s.stop()
	eventually(t, "the port is closed", func() bool {
		n, err := net.DialTimeout("tcp", s.addr, time.Second)
		if err == nil {
			n.Close()
		}
		return err != nil
	})
	io.WriteString(c, "lo")
	c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != "lo[5 bytes]" {
		t.Errorf("what was open: %q, %v", got, err)
	}
	if err := <-s.done; err != nil {
		t.Errorf("got %v; want nil", err)
	}
}

func TestDrainHasAnEnd(t *testing.T) {
	s := serve(t, newEchoes(t), anyPort, forward.Allow{})
	c := dial(t, s.addr)
	io.WriteString(c, "x")
	io.ReadFull(c, make([]byte, 1))
	began := time.Now()
	s.stop()
	if err := <-s.done; err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took < forward.Drain || took > forward.Drain+3*time.Second {
		t.Errorf("ended after %v; want %v", took, forward.Drain)
	}
}

// Case R10: another user's connection is closed before anything is opened for it.
func TestCase_R10_OtherUsers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Log("only root can knock as somebody else; as ourselves we get in")
		e := newEchoes(t)
		if got := knockAs(t, serve(t, e, anyPort, forward.Allow{}).addr, uint32(os.Getuid())); !strings.Contains(got, `"knock"`) {
			t.Errorf("got %s", got)
		}
		return
	}
	socket := filepath.Join(t.TempDir(), "s.sock")
	for _, tt := range []struct {
		name  string
		spec  forward.Spec
		allow string
		uid   uint32
		in    bool
	}{
		{"self", anyPort, "self", 0, true},
		{"another", anyPort, "self", 65534, false},
		{"another who may", anyPort, "65534", 65534, true},
		{"self who may not", anyPort, "65534", 0, false},
		{"anybody", anyPort, "any", 65534, true},
		{"another on ::1", forward.Spec{Network: "tcp", Host: "::1"}, "self", 65534, false},
		{"self on ::1", forward.Spec{Network: "tcp", Host: "::1"}, "self", 0, true},
		{"self on a socket", forward.Spec{Network: "unix", Path: socket}, "self", 0, true},
		{"another on a socket", forward.Spec{Network: "unix", Path: socket}, "self", 65534, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			allow, err := forward.ParseAllow(tt.allow)
			if err != nil {
				t.Fatal(err)
			}
			e := newEchoes(t)
			s := serve(t, e, tt.spec, allow)
			got := knockAs(t, s.addr, tt.uid)
			if in := strings.Contains(got, `"knock"`); in != tt.in {
				t.Errorf("got %s; want in: %v", got, tt.in)
			}
			if tt.in {
				return
			}
			if e.opened() != 0 {
				t.Error("a flow was opened")
			}
			if tt.spec.Network == "unix" {
				return // the socket's mode keeps them out already
			}
			if err := <-s.said; sallyport.CodeOf(err) != "local.other_user" || !strings.Contains(err.Error(), fmt.Sprint("uid ", tt.uid)) {
				t.Errorf("said %v; want who it was", err)
			}
		})
	}
}

// knockAs connects as another user from another process.
func knockAs(t *testing.T, addr string, uid uint32) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The test binary lies where only its owner may look.
	dir, err := os.MkdirTemp("/tmp", "knock")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755)
	binary, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "knock")
	if err := os.WriteFile(path, binary, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path)
	cmd.Dir = dir
	cmd.Env = []string{knockEnv + "=" + addr}
	if int(uid) != os.Getuid() {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

func TestStdio(t *testing.T) {
	e := newEchoes(t)
	f := &forward.Forward{Target: db, Opener: e, Say: func(err error) { t.Error(err) }}
	r, w := io.Pipe()
	out := &buffer{}
	done := make(chan error, 1)
	go func() { done <- f.Stdio(t.Context(), r, out) }()
	io.WriteString(w, "hello")
	w.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := out.String(); got != "hello[5 bytes]" || !out.closed {
		t.Errorf("got %q, closed %v", got, out.closed)
	}
}

// A cut ends it although nobody types anything.
func TestStdioCut(t *testing.T) {
	e := newEchoes(t)
	e.why = &sallyport.Error{Outcome: sallyport.OutcomeRevoked, Code: "policy"}
	f := &forward.Forward{Target: db, Opener: e, Say: func(err error) { t.Error(err) }}
	r, w := io.Pipe()
	defer w.Close()
	out := &buffer{}
	done := make(chan error, 1)
	go func() { done <- f.Stdio(t.Context(), r, out) }()
	io.WriteString(w, "x")
	eventually(t, "the echo", func() bool { return out.String() == "x" })
	e.cut()
	select {
	case err := <-done:
		if err != e.why {
			t.Errorf("got %v; want %v", err, e.why)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("still waits for standard input")
	}
}

func TestStdioRefused(t *testing.T) {
	e := newEchoes(t)
	e.err = &sallyport.Error{Outcome: sallyport.OutcomeDenied}
	f := &forward.Forward{Target: db, Opener: e}
	if err := f.Stdio(t.Context(), strings.NewReader("x"), &buffer{}); err != e.err {
		t.Errorf("got %v", err)
	}
}

type buffer struct {
	mu     sync.Mutex
	text   strings.Builder
	closed bool
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *buffer) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	return nil
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

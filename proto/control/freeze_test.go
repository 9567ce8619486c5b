package control_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport"
	"sallyport/internal/logging"
	"sallyport/internal/tlsid"
	"sallyport/proto/control"
)

// childDir makes the test binary a daemon, or a client that holds a lease: only
// a process of its own can be stopped with SIGSTOP and killed.
const (
	childDir  = "SALLYPORT_TEST_CHILD"  // directory with its certificates
	childAddr = "SALLYPORT_TEST_SERVER" // set: be a client of this address
	childSock = "SALLYPORT_TEST_SOCKET" // set: say whether this unix socket answers
)

func TestMain(m *testing.M) {
	if path := os.Getenv(childSock); path != "" {
		fmt.Println(childAsks(path))
		return
	}
	if dir := os.Getenv(childDir); dir != "" {
		if err := child(dir, os.Getenv(childAddr)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// child serves, or holds the lease "x", until its stdin ends. It prints its
// address and that of an echo server, or "held".
func child(dir, server string) error {
	pair, err := tlsid.LoadKeyPair(filepath.Join(dir, "crt"), filepath.Join(dir, "key"))
	if err != nil {
		return err
	}
	roots, err := tlsid.LoadPool(filepath.Join(dir, "ca"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	if server != "" {
		return childHolds(ctx, server, tlsid.ClientConfig(pair, roots, domain, "cached"))
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	echoLn, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer echoLn.Close()
	go echo(echoLn)
	fmt.Println(ln.Addr())
	fmt.Println(echoLn.Addr())
	return control.NewServer(tlsid.ServerConfig(pair, roots), domain, all(newSite()), logging.Discard()).Serve(ctx, ln)
}

func childHolds(ctx context.Context, server string, conf *tls.Config) error {
	c, err := control.Dial([]string{server}, conf, logging.Discard())
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Records().Lease(ctx, "x", time.Second, func(held context.Context) error {
		fmt.Println("held")
		<-held.Done()
		fmt.Println("lost")
		return nil
	})
}

func childAsks(path string) string {
	c, err := control.Dial([]string{"unix:" + path}, nil, logging.Discard())
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	if _, err := c.Records().Get(context.Background(), sallyport.KindUser, "nobody"); !errors.Is(err, sallyport.ErrNotFound) {
		return sallyport.CodeOf(err)
	}
	return "answered"
}

// process is a child.
type process struct {
	cmd   *exec.Cmd
	lines *bufio.Scanner
}

func start(t testing.TB, p pki, kind string, env ...string) *process {
	t.Helper()
	dir := t.TempDir()
	if err := tlsid.SaveKeyPair(p.issue(kind), filepath.Join(dir, "crt"), filepath.Join(dir, "key")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ca"), p.ca.PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	cmd.Env = append(cmd.Env, env...)
	cmd.Stderr = os.Stderr
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return &process{cmd, bufio.NewScanner(out)}
}

func (p *process) line(t testing.TB) string {
	t.Helper()
	if !p.lines.Scan() {
		t.Fatalf("the child ended: %v", p.lines.Err())
	}
	return p.lines.Text()
}

func (p *process) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// The socket's own mode is opened wide, so that only the peer's uid protects it.
// Another uid needs root; the rule itself is TestTrustedUID's.
func TestCase_R1_UnixSocketIsForItsOwner(t *testing.T) {
	dir, err := os.MkdirTemp("", "c")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path, exe := filepath.Join(dir, "cached.sock"), filepath.Join(dir, "test")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, ln, nil, all(newSite()))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	binary, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(exe, binary, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, open := range []string{dir, path} {
		if err := os.Chmod(open, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	want := map[uint32]string{uint32(os.Geteuid()): "answered"}
	if os.Geteuid() == 0 {
		want[65534] = control.CodeUnavailable
	}
	for uid, want := range want {
		cmd := exec.Command(exe)
		cmd.Dir = "/"
		cmd.Env = append(os.Environ(), childSock+"="+path)
		cmd.SysProcAttr = &syscall.SysProcAttr{}
		if int(uid) != os.Geteuid() {
			cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: uid}
		}
		out, err := cmd.CombinedOutput()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("uid %d: got %q, %v; want %q", uid, got, err, want)
		}
	}
}

// freeze stops the process and returns once every thread of it stands still: a
// signal takes its time, and until then it answers.
func (p *process) freeze(t *testing.T) {
	t.Helper()
	p.signal(t, syscall.SIGSTOP)
	tasks := fmt.Sprintf("/proc/%d/task", p.cmd.Process.Pid)
	eventually(t, 10*time.Second, func() bool {
		threads, err := os.ReadDir(tasks)
		if err != nil {
			t.Fatal(err)
		}
		for _, thread := range threads {
			status, err := os.ReadFile(filepath.Join(tasks, thread.Name(), "status"))
			if err == nil && !strings.Contains(string(status), "State:\tT") {
				return false
			}
		}
		return true
	})
}

// SECURITY-CASES M: a daemon that is stopped, not dead: its kernel still takes
// connections and bytes.
func TestFrozenServiceIsNoticed(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	daemon := start(t, p, "policyd")
	svc := remote(dial(t, p.client("operator", "policyd"), daemon.line(t)))
	ask := func(timeout time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		_, err := svc.authorize.Authorize(ctx, []sallyport.Request{question("a", 22)})
		return err
	}
	events, ended := follow(t.Context(), svc, sallyport.WatchRequest{})
	next(t, events)
	noticed := make(chan error, 1)
	go func() {
		noticed <- svc.changes.Watch(t.Context(), func(sallyport.Notice) error { return nil })
	}()
	lost := make(chan error, 1)
	holding := make(chan struct{})
	go func() {
		lost <- svc.Lease(t.Context(), "x", time.Second, func(held context.Context) error {
			close(holding)
			<-held.Done()
			return held.Err()
		})
	}()
	next(t, holding)
	if err := ask(5 * time.Second); err != nil {
		t.Fatal(err)
	}

	daemon.freeze(t)
	frozen := time.Now()
	err := ask(300 * time.Millisecond)
	within(t, time.Second, "a call with 300 ms", frozen)
	if !errors.Is(err, context.DeadlineExceeded) || sallyport.CodeOf(err) != control.CodeTimeout {
		t.Errorf("call: got %v; want %s", err, control.CodeTimeout)
	}
	if err := next(t, ended); sallyport.CodeOf(err) != control.CodeUnavailable {
		t.Errorf("records: got %v; want %s", err, control.CodeUnavailable)
	}
	if err := next(t, noticed); sallyport.CodeOf(err) != control.CodeUnavailable {
		t.Errorf("changes: got %v; want %s", err, control.CodeUnavailable)
	}
	next(t, lost)
	within(t, control.Silence+2*control.Pulse, "noticing by all streams", frozen)
	// And with a new connection that nobody answers.
	start := time.Now()
	if err := ask(300 * time.Millisecond); err == nil {
		t.Error("a frozen service answered")
	}
	within(t, time.Second, "a call on a new connection", start)
	start = time.Now()
	if err := svc.backuper.Backup(t.Context(), io.Discard); sallyport.CodeOf(err) != control.CodeUnavailable {
		t.Errorf("backup: got %v; want %s", err, control.CodeUnavailable)
	}
	within(t, control.Silence+control.Pulse, "a backup of a frozen service", start)

	daemon.signal(t, syscall.SIGCONT)
	eventually(t, 2*time.Second, func() bool { return ask(time.Second) == nil })
}

func TestFrozenFirstAddressIsLeft(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	frozen, alive := start(t, p, "policyd"), start(t, p, "policyd")
	svc := remote(dial(t, p.client("operator", "policyd"), frozen.line(t), alive.line(t)))
	must(t, svc, sallyport.Op{Kind: sallyport.KindUser, ID: "only-in-the-first"})
	events, ended := follow(t.Context(), svc, sallyport.WatchRequest{})
	next(t, events)
	frozen.freeze(t)
	next(t, ended)
	eventually(t, 4*time.Second, func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := svc.Get(ctx, sallyport.KindUser, "only-in-the-first")
		return errors.Is(err, sallyport.ErrNotFound)
	})
}

// A client that is frozen, or killed, must not keep a lease.
func TestFrozenClientLosesItsLease(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	for _, signal := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGKILL} {
		s := newSite()
		ln := listen(t, "127.0.0.1:0")
		serve(t, ln, p.server("cached"), all(s))
		client := start(t, p, "authd", childAddr+"="+ln.Addr().String())
		if got := client.line(t); got != "held" || !s.held("x") {
			t.Fatalf("child says %q, lease held: %t", got, s.held("x"))
		}
		client.signal(t, signal)
		took := eventually(t, 8*time.Second, func() bool { return !s.held("x") })
		if signal == syscall.SIGKILL && took > time.Second {
			t.Errorf("a killed client's lease was held for %v", took)
		}
		if signal != syscall.SIGSTOP {
			continue
		}
		client.signal(t, syscall.SIGCONT)
		if got := client.line(t); !strings.HasPrefix(got, "lost") {
			t.Errorf("the thawed holder says %q; want it to have lost the lease", got)
		}
	}
}

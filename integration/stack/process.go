package stack

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Binaries builds all programs once and returns where they are. The directory
// in SALLYPORT_BIN is used as it stands.
var Binaries = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("SALLYPORT_BIN"); dir != "" {
		return filepath.Abs(dir)
	}
	root, err := Root()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, "bin", "integration")
	args := []string{"build", "-C", root, "-o", dir + string(filepath.Separator)}
	if os.Getenv("SALLYPORT_RACE") != "" {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, "./cmd/agent", "./cmd/authd", "./cmd/cached", "./cmd/gateway", "./cmd/policyd", "./cmd/sallyport")...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return dir, nil
})

// Root is the directory of the main module.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(text), "module sallyport\n") {
			return dir, nil
		}
	}
	return "", errors.New("not inside the repository")
}

// Command is a program to run. Program is one of ours by name, else a path.
type Command struct {
	Program string
	Args    []string
	Env     []string // added to the environment
	Stdin   string
	// Interactive leaves standard input open for Process.Send.
	Interactive bool
	// Terminal is not given: no test has one.
}

func (c Command) build(t testing.TB) *exec.Cmd {
	t.Helper()
	path := c.Program
	if !strings.Contains(path, "/") {
		dir, err := Binaries()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(dir, path)); err == nil {
			path = filepath.Join(dir, path)
		}
	}
	cmd := exec.Command(path, c.Args...)
	cmd.Env = append(cmd.Environ(), c.Env...)
	return cmd
}

// Result is how a program ended.
type Result struct {
	Stdout, Stderr string
	Exit           int
}

// Run runs a program to its end, at most a minute.
func Run(t testing.TB, c Command) Result {
	t.Helper()
	cmd := c.build(t)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(c.Stdin), &stdout, &stderr
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	err := cmd.Wait()
	if !late.Stop() {
		t.Errorf("%s %s ran for a minute", c.Program, strings.Join(c.Args, " "))
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Errorf("%s: %v", c.Program, err)
	}
	return Result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// Process is a program that runs beside the test. It ends with the test.
type Process struct {
	t    testing.TB
	name string
	cmd  *exec.Cmd
	Pid  int

	stdin  io.WriteCloser // nil unless interactive
	lines  chan string
	stderr lockedBuffer
	done   chan struct{} // closed when it has ended; exit is set then
	exit   int
}

// StartProcess starts a program.
func StartProcess(t testing.TB, c Command) *Process {
	t.Helper()
	p := &Process{t: t, name: c.Program, cmd: c.build(t), lines: make(chan string, 1000), done: make(chan struct{})}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stderr = &p.stderr
	p.cmd.WaitDelay = time.Second
	if c.Stdin != "" {
		p.cmd.Stdin = strings.NewReader(c.Stdin)
	}
	if c.Interactive {
		if p.stdin, err = p.cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.Pid = p.cmd.Process.Pid
	go func() {
		defer close(p.done)
		in := bufio.NewScanner(stdout)
		in.Buffer(nil, 16<<20)
		for in.Scan() {
			select {
			case p.lines <- in.Text():
			default: // nobody reads it
			}
		}
		close(p.lines)
		_ = p.cmd.Wait() // its exit code tells
		p.exit = p.cmd.ProcessState.ExitCode()
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // does nothing if it has ended
		<-p.done
	})
	return p
}

// Line returns the next line of its standard output, or "" after it ended or in
// time nothing came.
func (p *Process) Line(limit time.Duration) string {
	select {
	case line := <-p.lines:
		return line
	case <-time.After(limit):
		return ""
	}
}

// Send writes a line to the standard input of an interactive process.
func (p *Process) Send(line string) {
	p.t.Helper()
	if _, err := io.WriteString(p.stdin, line+"\n"); err != nil {
		p.t.Fatalf("%s: %v\n%s", p.name, err, tailOf(p.Stderr(), 30))
	}
}

// Stderr is what it has written there so far.
func (p *Process) Stderr() string { return p.stderr.String() }

// Signal sends a signal, if it still runs.
func (p *Process) Signal(sig syscall.Signal) { _ = p.cmd.Process.Signal(sig) }

// Freeze stops the process and returns once every thread of it stands still: a
// signal takes its time, and until then it answers. SIGCONT lets it go on.
func (p *Process) Freeze() {
	p.t.Helper()
	p.Signal(syscall.SIGSTOP)
	Eventually(p.t, 5*time.Second, func() error {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.Pid))
		if err != nil || len(threads) == 0 {
			return fmt.Errorf("process %d is gone: %v", p.Pid, err)
		}
		for _, thread := range threads {
			status, err := os.ReadFile(thread)
			if err == nil && !strings.Contains(string(status), "State:\tT") {
				return errors.New("it still runs")
			}
		}
		return nil
	})
}

// Done is closed when it has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for its end and returns the exit code (-1: ended by a signal). One
// that does not end in time is killed, and the test fails.
func (p *Process) Wait(limit time.Duration) int {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(limit):
		p.t.Errorf("%s (pid %d) did not end in %s\n%s", p.name, p.Pid, limit, tailOf(p.Stderr(), 30))
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	return p.exit
}

// lockedBuffer may be read while a process writes into it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Eventually calls check until it returns nil; after limit the test fails with
// its last error.
func Eventually(t testing.TB, limit time.Duration, check func() error) {
	t.Helper()
	end := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %s still: %v", limit, err)
		}
		<-time.After(20 * time.Millisecond)
	}
}

func get(address string) error {
	client := http.Client{Timeout: 2 * time.Second}
	resp, err := client.Get(address)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, body)
	}
	return nil
}

func pipe(path, stdin string, args ...string) (string, error) {
	cmd := exec.Command(path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.Output()
	return string(out), err
}

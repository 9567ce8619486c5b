package run

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/goleak"

	"sallyport"
	"sallyport/cmd/internal/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const text = "domain: corp.example\ndata_dir: data\n"

// daemon runs a Start in the way a process does.
type daemon struct {
	t      *testing.T
	file   string
	cancel context.CancelFunc
	done   chan error
	out    *io.PipeReader
	log    *lockedBuffer
}

func start(t *testing.T, s Start) *daemon {
	t.Helper()
	d := &daemon{t: t, file: filepath.Join(t.TempDir(), "f.yaml"), done: make(chan error, 1), log: new(lockedBuffer)}
	d.write(text)
	ctx, cancel := context.WithCancel(t.Context())
	d.cancel = cancel
	var in *io.PipeWriter
	d.out, in = io.Pipe()
	go func() {
		err := Serve(ctx, "cached", d.file, in, d.log, s)
		in.Close()
		d.done <- err
	}()
	t.Cleanup(func() { cancel(); d.out.Close() })
	return d
}

func (d *daemon) write(content string) {
	d.t.Helper()
	fresh := d.file + ".new"
	if err := os.WriteFile(fresh, []byte(content), 0o600); err != nil {
		d.t.Fatal(err)
	}
	if err := os.Rename(fresh, d.file); err != nil {
		d.t.Fatal(err)
	}
}

func (d *daemon) end() error {
	d.t.Helper()
	select {
	case err := <-d.done:
		return err
	case <-time.After(10 * time.Second):
		d.t.Fatal("the daemon did not end")
		return nil
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); <-time.After(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: " + what)
		}
	}
}

func TestReadyAdminAndEnd(t *testing.T) {
	var order []string
	d := start(t, func(p *Process) error {
		p.AtEnd(func() error { order = append(order, "first opened"); return nil })
		p.AtEnd(func() error { order = append(order, "last opened"); return nil })
		p.Go("work", func(ctx context.Context) error {
			<-ctx.Done()
			order = append(order, "work")
			return ctx.Err()
		})
		admin, err := p.Admin(func() error { return nil })
		if err != nil {
			return err
		}
		return p.Ready(map[string]string{"admin": admin})
	})
	line := make([]byte, 6)
	if _, err := io.ReadFull(d.out, line); err != nil || string(line) != "ready " {
		t.Fatalf("got %q, %v; want the ready line", line, err)
	}
	var ready struct{ Admin string }
	if err := json.NewDecoder(d.out).Decode(&ready); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{"/healthz": 200, "/readyz": 200, "/metrics": 200, "/": 404} {
		if got := status(t, "http://"+ready.Admin+path); got != want {
			t.Errorf("%s: status %d; want %d", path, got, want)
		}
	}
	d.cancel()
	if err := d.end(); err != nil {
		t.Errorf("ended with %v; want nil", err)
	}
	if got := strings.Join(order, ", "); got != "work, last opened, first opened" {
		t.Errorf("ended in the order %s", got)
	}
}

func status(t *testing.T, url string) int {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// A part that fails, or ends for no reason, ends the process with its name.
func TestPartsAreAllNeeded(t *testing.T) {
	for name, c := range map[string]struct {
		part error
		want string
	}{
		"fails":          {errors.New("the disk is gone"), "store: the disk is gone"},
		"ends by itself": {nil, "store ended by itself"},
	} {
		t.Run(name, func(t *testing.T) {
			d := start(t, func(p *Process) error {
				p.Go("store", func(context.Context) error { return c.part })
				p.Go("other", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
				return nil
			})
			if err := d.end(); err == nil || !strings.Contains(err.Error(), c.want) || ExitCode(err) != ExitFailed {
				t.Errorf("got %v (exit %d); want %q and exit 1", err, ExitCode(err), c.want)
			}
		})
	}
}

// A start that meets the end of the process has not failed, and one that fails for want
// of a part that ended before tells why that part did.
func TestAStartThatIsCutShort(t *testing.T) {
	closed := errors.New("the store is shutting down")
	waits := func(p *Process) error { <-p.Context().Done(); return closed }
	d := start(t, waits)
	d.cancel()
	if err := d.end(); err != nil {
		t.Errorf("told to end: got %v; want no error", err)
	}
	d = start(t, func(p *Process) error {
		p.Go("store", func(context.Context) error { return errors.New("the disk is gone") })
		return waits(p)
	})
	if err := d.end(); err == nil || err.Error() != "store: the disk is gone" {
		t.Errorf("a part had failed: got %v; want what it said", err)
	}
}

// TestCase_J4_NothingHalfStarted: what a failed start had opened is closed.
func TestCase_J4_NothingHalfStarted(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	var first string
	closed := false
	began := time.Now()
	d := start(t, func(p *Process) error {
		l, err := p.Listen("127.0.0.1:0")
		if err != nil {
			return err
		}
		first = l.Addr().String()
		p.AtEnd(func() error { closed = true; return nil })
		p.Go("accept", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
		_, err = p.Listen(taken.Addr().String())
		return err
	})
	err = d.end()
	if err == nil || !strings.HasPrefix(err.Error(), "listen: "+taken.Addr().String()) || ExitCode(err) != ExitFailed {
		t.Errorf("got %v (exit %d); want listen: … and exit 1", err, ExitCode(err))
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("the start failed after %s; want at most 2 s", took)
	}
	if c, err := net.Dial("tcp", first); err == nil {
		c.Close()
		t.Errorf("%s is still listened on", first)
	}
	if !closed {
		t.Error("what was opened was not closed")
	}
}

// TestCase_J9_ReloadIsAtomic: a bad change is told and not taken; a good one
// is. The running configuration is what changes are compared with.
func TestCase_J9_ReloadIsAtomic(t *testing.T) {
	var mu sync.Mutex
	var seen []string
	var refusals []string // "" is a change that was taken
	var process *Process
	up := make(chan struct{})
	d := start(t, func(p *Process) error {
		process = p
		p.OnReload(func(f *config.File) error {
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, fmt.Sprint(f.ExplainGroups, len(f.Routes)))
			return nil
		})
		p.OnRefused(func(_ context.Context, err error) {
			mu.Lock()
			defer mu.Unlock()
			text := ""
			if err != nil {
				_, text, _ = strings.Cut(err.Error(), "f.yaml:")
			}
			refusals = append(refusals, text)
		})
		close(up)
		return nil
	})
	<-up
	d.write(text + "explain_groups: true\nroutes: [{from: nonsense}]\n")
	eventually(t, "the bad change is told", func() bool { return process.Stale() != nil })
	if !strings.Contains(process.Stale().Error(), "f.yaml:4: routes[0]") {
		t.Errorf("stale says %v", process.Stale())
	}
	d.write(text + "explain_groups: true\n")
	eventually(t, "the good change is taken", func() bool { return process.Stale() == nil })
	if err := os.Remove(d.file); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the missing file is told", func() bool { return process.Stale() != nil })
	d.write(text)
	eventually(t, "the file is back", func() bool { return process.Stale() == nil })
	mu.Lock()
	defer mu.Unlock()
	if got, want := strings.Join(seen, "; "), "true 0; false 0"; got != want {
		t.Errorf("taken over: %s; want %s", got, want)
	}
	if len(refusals) != 4 || !strings.HasPrefix(refusals[0], "4: routes[0]") || refusals[1] != "" || refusals[2] == "" || refusals[3] != "" {
		t.Errorf("told of refusals: %q; want the line, nothing, the missing file, nothing", refusals)
	}
	d.cancel()
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// A change that nobody could take over for a passing reason is not forgotten: a
// user who was taken out of the file must not stay in because cached was away.
func TestReloadIsTriedAgain(t *testing.T) {
	var calls atomic.Int32
	var process *Process
	up := make(chan struct{})
	d := start(t, func(p *Process) error {
		process = p
		p.OnReload(func(*config.File) error {
			if calls.Add(1) == 1 {
				return &sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Message: "cached is out of reach"}
			}
			return nil
		})
		close(up)
		return nil
	})
	<-up
	d.write(text + "explain_groups: true\n")
	eventually(t, "the change is taken at last", func() bool { return calls.Load() > 1 && process.Stale() == nil })
	d.cancel()
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// A file that is watched beside the configuration has it loaded again, also one
// that the configuration names only since a reload.
func TestWatchedFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var taken atomic.Value
	taken.Store("")
	up := make(chan struct{})
	d := start(t, func(p *Process) error {
		name := func(f *config.File) string { return filepath.Join(dir, fmt.Sprint(f.ExplainGroups)) }
		p.Watch(func(f *config.File) []string { return []string{name(f)} })
		write("false", "changed right after the start")
		p.OnReload(func(f *config.File) error {
			b, err := os.ReadFile(name(f))
			taken.Store(string(b))
			return err
		})
		close(up)
		return nil
	})
	<-up
	eventually(t, "the first change is taken", func() bool { return taken.Load() == "changed right after the start" })
	write("false", "again")
	eventually(t, "the second change is taken", func() bool { return taken.Load() == "again" })
	write("true", "another file")
	d.write(text + "explain_groups: true\n")
	eventually(t, "the other file is taken", func() bool { return taken.Load() == "another file" })
	write("true", "changed there")
	eventually(t, "its change is taken", func() bool { return taken.Load() == "changed there" })
	d.cancel()
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

// A client that sends its request drop by drop must not hold a connection.
func TestSlowRequestsEnd(t *testing.T) {
	up := make(chan string)
	ended := make(chan error, 1)
	d := start(t, func(p *Process) error {
		l, err := p.Listen("127.0.0.1:0")
		if err != nil {
			return err
		}
		s := &http.Server{ReadTimeout: 50 * time.Millisecond, Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			_, err := io.Copy(io.Discard, r.Body)
			ended <- err
		})}
		p.ServeHTTP("slow", l, s)
		go func() { up <- l.Addr().String() }()
		return nil
	})
	c, err := net.Dial("tcp", <-up)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nx")
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a request that is not whole was taken for one")
		}
	case <-time.After(10 * time.Second):
		t.Error("a request that never ends is waited for")
	}
	d.cancel()
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

func TestServersHaveLimits(t *testing.T) {
	s := bounded(&http.Server{})
	if s.ReadHeaderTimeout == 0 || s.ReadTimeout == 0 || s.WriteTimeout == 0 || s.IdleTimeout == 0 || s.MaxHeaderBytes == 0 {
		t.Errorf("a server waits for ever: %+v", s)
	}
}

func TestReloadSaysWhatNeedsARestart(t *testing.T) {
	up := make(chan struct{})
	d := start(t, func(*Process) error { close(up); return nil })
	<-up
	d.write(text + "cached: {listen: \"127.0.0.1:1\"}\n")
	eventually(t, "the log names the key", func() bool {
		return strings.Contains(d.log.String(), "need a restart") && strings.Contains(d.log.String(), "cached.listen")
	})
	d.cancel()
	if err := d.end(); err != nil {
		t.Error(err)
	}
}

func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	p := &Process{}
	l, err := p.ListenUnix(filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	fi, err := os.Stat(filepath.Join(dir, "s"))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", fi.Mode(), err)
	}
	if _, err := p.ListenUnix(filepath.Join(dir, "s")); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("a socket in use: got %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := p.ListenUnix(file); err == nil {
		t.Error("a plain file was replaced by a socket")
	}
	if err := os.Symlink(file, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.ListenUnix(filepath.Join(dir, "link")); err == nil {
		t.Error("a symbolic link was followed")
	}
	stale := filepath.Join(dir, "stale")
	old, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	old.(*net.UnixListener).SetUnlinkOnClose(false)
	old.Close()
	again, err := p.ListenUnix(stale)
	if err != nil {
		t.Fatalf("a stale socket was not replaced: %v", err)
	}
	again.Close()
}

func TestListenBothSharesThePort(t *testing.T) {
	p := &Process{}
	tcp, udp, err := p.ListenBoth("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	defer udp.Close()
	if tcp.Addr().(*net.TCPAddr).Port != udp.LocalAddr().(*net.UDPAddr).Port {
		t.Errorf("TCP at %s, UDP at %s", tcp.Addr(), udp.LocalAddr())
	}
	if _, _, err := p.ListenBoth(udp.LocalAddr().String()); err == nil {
		t.Error("an address in use was taken")
	}
}

// TestCase_M10_Clock: a clock from before the build cannot be right.
func TestCase_M10_Clock(t *testing.T) {
	built := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	for name, c := range map[string]struct {
		now, built time.Time
		ok         bool
	}{
		"now":              {built.Add(time.Hour), built, true},
		"another zone":     {built.Add(-14 * time.Hour), built, true},
		"1970":             {time.Unix(0, 0), built, false},
		"a week before":    {built.Add(-7 * 24 * time.Hour), built, false},
		"unknown building": {time.Unix(0, 0), time.Time{}, true},
	} {
		err := CheckClock(c.now, c.built)
		if (err == nil) != c.ok {
			t.Errorf("%s: got %v", name, err)
		}
		if err != nil && (sallyport.CodeOf(err) != "clock.implausible" || ExitCode(err) != ExitFailed) {
			t.Errorf("%s: code %s, exit %d", name, sallyport.CodeOf(err), ExitCode(err))
		}
	}
}

func TestExitCodesAndWords(t *testing.T) {
	problems := config.Problems{{File: "f", Line: 3, Key: "a.b", Message: "is wrong"}}
	for _, c := range []struct {
		err  error
		code int
		want string
	}{
		{nil, 0, ""},
		{errors.New("x failed"), 1, "name: x failed\n"},
		{Failure("open store", "free some space", errors.New("disk full")), 1, "name: open store: disk full\nhint: free some space\n"},
		{Usage("", "bad %s", "flag"), 2, "name: bad flag\n"},
		{problems, 2, "name: f:3: a.b: is wrong\nhint: "},
		{fmt.Errorf("load: %w", problems), 2, "name: f:3: a.b: is wrong\nhint: "},
		{fmt.Errorf("3 tests: %w", ErrDiffers), 4, "name: 3 tests: differs\n"},
		{Differs("findings: %d", 3), 4, "name: findings: 3\n"},
		{&sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: "schema.too_new", Message: "made by a newer version"}, 2, "name: schema.too_new: made by a newer version\n"},
	} {
		if got := ExitCode(c.err); got != c.code {
			t.Errorf("%v: exit %d; want %d", c.err, got, c.code)
		}
		if c.err == nil {
			continue
		}
		var out bytes.Buffer
		Print(&out, "name", c.err)
		if !strings.HasPrefix(out.String(), c.want) {
			t.Errorf("%v: printed %q; want %q", c.err, out.String(), c.want)
		}
	}
}

func TestExecuteTellsUsageErrors(t *testing.T) {
	cmd := &cobra.Command{Use: "x", RunE: func(*cobra.Command, []string) error { return nil }, Args: NoArgs}
	var errs bytes.Buffer
	cmd.SetErr(&errs)
	if code := Execute(cmd, []string{"--nope"}); code != ExitUsage || !strings.Contains(errs.String(), "unknown flag: --nope") {
		t.Errorf("exit %d, %q", code, errs.String())
	}
}

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

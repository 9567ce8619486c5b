//go:build unix

package state_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport"
	"sallyport/agent/state"
)

func open(t *testing.T, path string) *state.Dir {
	t.Helper()
	d, err := state.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func TestDefaultPath(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", "/somewhere/state")
	if got, err := state.DefaultPath(); err != nil || got != "/somewhere/state/sallyport" {
		t.Errorf("got %s, %v", got, err)
	}
	t.Setenv("XDG_STATE_HOME", "relative") // the specification: ignore it
	t.Setenv("HOME", "/home/alice")
	if got, err := state.DefaultPath(); err != nil || !strings.HasPrefix(got, "/home/alice/") {
		t.Errorf("got %s, %v; want it below HOME", got, err)
	}
}

func TestFiles(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "a", "state"))
	if _, err := d.Read("x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	for _, text := range []string{"one", "two"} {
		if err := d.Write("x", []byte(text)); err != nil {
			t.Fatal(err)
		}
		if got, err := d.Read("x"); err != nil || string(got) != text {
			t.Errorf("got %q, %v; want %q", got, err, text)
		}
	}
	if err := d.Create("x", []byte("three")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create over a file: %v", err)
	}
	if err := d.Remove("x"); err != nil {
		t.Error(err)
	}
	if err := d.Remove("x"); err != nil {
		t.Errorf("removing twice: %v", err)
	}
	if names, err := d.Names(); err != nil || len(names) != 0 {
		t.Errorf("left over: %v, %v", names, err)
	}
}

func TestCreateIsWonByOne(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	open(t, path)
	var won atomic.Int32
	var wg sync.WaitGroup
	for range 10 {
		d := open(t, path)
		wg.Go(func() {
			switch err := d.Create("key", []byte("x")); {
			case err == nil:
				won.Add(1)
			case !errors.Is(err, fs.ErrExist):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d made the file; want 1", won.Load())
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	a, b := open(t, path), open(t, path)
	unlock, err := a.TryLock("l")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.TryLock("l"); !errors.Is(err, state.ErrLocked) {
		t.Errorf("got %v; want ErrLocked", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := b.Lock(ctx, "l"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v; want the deadline", err)
	}
	unlock()
	unlock, err = b.Lock(t.Context(), "l")
	if err != nil {
		t.Fatal(err)
	}
	unlock()
}

// Case Q7: what is not ours alone is refused with what to type, and nothing is
// read or written through a link.
func TestCase_Q7_StateDirectory(t *testing.T) {
	base := t.TempDir()
	dir := func(name string) string {
		path := filepath.Join(base, name)
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	link := filepath.Join(base, "link")
	if err := os.Symlink(dir("elsewhere"), link); err != nil {
		t.Fatal(err)
	}
	loose := dir("loose")
	if err := os.Chmod(loose, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(base, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cases := map[string]struct{ path, code, hint string }{
		"a link":           {link, "state.symlink", "rm " + link},
		"open to others":   {loose, "state.mode", "chmod 700 " + loose},
		"a file":           {file, "state.not_a_directory", "rm " + file},
		"below a file":     {filepath.Join(file, "x"), "state.unusable", "XDG_STATE_HOME"},
		"nowhere writable": {"/proc/self/sallyport", "state.unusable", "XDG_STATE_HOME"},
	}
	if os.Geteuid() == 0 { // only root can make somebody else's directory
		foreign := dir("foreign")
		parent := dir("parent")
		for _, d := range []string{foreign, parent} {
			if err := os.Chown(d, 12345, 12345); err != nil {
				t.Fatal(err)
			}
		}
		cases["another owner"] = struct{ path, code, hint string }{foreign, "state.owner", "as the owner"}
		cases["another owner's home"] = struct{ path, code, hint string }{filepath.Join(parent, "x"), "state.owner", "as the owner"}
	}
	for name, tt := range cases {
		t.Run(name, func(t *testing.T) {
			d, err := state.Open(tt.path)
			if err == nil {
				d.Close()
				t.Fatal("opened")
			}
			var e *sallyport.Error
			if !errors.As(err, &e) || e.Outcome != sallyport.OutcomeUsage || e.Code != tt.code || !strings.Contains(e.Hint, tt.hint) {
				t.Errorf("got %+v; want %s and %q", err, tt.code, tt.hint)
			}
		})
	}
}

func TestCase_Q7_Files(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	d := open(t, path)
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("theirs"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(path, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(path, "loose"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(path, "loose"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, code := range map[string]string{"link": "state.symlink", "loose": "state.mode"} {
		if _, err := d.Read(name); sallyport.CodeOf(err) != code {
			t.Errorf("read %s: got %v; want %s", name, err, code)
		}
	}
	// Writing replaces the link and leaves what it pointed to alone.
	if err := d.Write("link", []byte("ours")); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(outside); string(got) != "theirs" {
		t.Errorf("wrote through the link: %q", got)
	}
}

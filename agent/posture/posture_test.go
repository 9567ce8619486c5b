package posture_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"sallyport"
	"sallyport/agent/posture"
)

// recorded reads a recording of a machine: files under fs/, commands as
// run/<command line> with what they print, run/<command line>!denied and
// run/<command line>!failed for those that do not, env/<name>, and the facts that
// are to come out in want.
func recorded(t *testing.T, name string) (posture.Machine, string) {
	t.Helper()
	archive, err := txtar.ParseFile(name)
	if err != nil {
		t.Fatal(err)
	}
	files, commands, env, want := fstest.MapFS{}, map[string]string{}, map[string]string{}, ""
	for _, f := range archive.Files {
		kind, rest, _ := strings.Cut(f.Name, "/")
		switch kind {
		case "fs":
			data := f.Data
			if strings.Contains(rest, "efivars") { // four bytes of attributes, then the value
				data = []byte{6, 0, 0, 0, strings.TrimSpace(string(data))[0] - '0'}
			}
			files[rest] = &fstest.MapFile{Data: data}
		case "run":
			commands[rest] = string(f.Data)
		case "env":
			env[rest] = strings.TrimSpace(string(f.Data))
		case "want":
			want = string(f.Data)
		default:
			t.Fatalf("%s: %s", name, f.Name)
		}
	}
	run := func(_ context.Context, command string, args ...string) ([]byte, error) {
		line := strings.Join(append([]string{command}, args...), " ")
		if out, ok := commands[line]; ok {
			return []byte(out), nil
		}
		if _, ok := commands[line+"!denied"]; ok {
			return nil, fs.ErrPermission
		}
		return nil, errors.New("exit status 1")
	}
	return posture.Machine{
		OS: "linux", FS: files, Run: run, Env: func(n string) string { return env[n] }, Home: "home/alice",
		AgentVersion: "1.2.3", KeyProtection: "file",
	}, want
}

func TestRecordings(t *testing.T) {
	names, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(names) < 8 {
		t.Fatalf("%d recordings, %v", len(names), err)
	}
	for _, name := range names {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txtar"), func(t *testing.T) {
			m, want := recorded(t, name)
			var got strings.Builder
			facts := m.Collect(t.Context())
			for _, k := range []string{
				"os", "os_version", "kernel", "agent_version", "key_protection",
				"disk_encrypted", "firewall", "screen_lock", "secure_boot",
			} {
				if f, ok := facts[k]; ok {
					fmt.Fprintf(&got, "%s %v\n", k, f.Value)
					if f.Source != sallyport.SourceOS || time.Since(f.At) > time.Minute {
						t.Errorf("%s: source %s, at %v", k, f.Source, f.At)
					}
				}
			}
			if diff := cmp.Diff(want, got.String()); diff != "" {
				t.Errorf("facts (-want +got):\n%s", diff)
			}
		})
	}
}

func TestThisMachine(t *testing.T) {
	facts := posture.ThisMachine("1.2.3", "file").Collect(t.Context())
	if facts[sallyport.FactOS].Value == "" || facts[sallyport.FactAgentVersion].Value != "1.2.3" {
		t.Errorf("got %v", facts)
	}
}

func TestParseFile(t *testing.T) {
	at := time.Unix(1000, 0)
	for name, tt := range map[string]struct {
		text string
		want map[string]any
	}{
		"lines":     {"# a comment\ndisk_encrypted: true\nos_version: 15.6\n\nnote: \"true\"\nscore: 1.5\nteam: red\n", map[string]any{"disk_encrypted": true, "os_version": "15.6", "note": "true", "score": 1.5, "team": "red"}},
		"json":      {`{"disk_encrypted": false, "os_version": "15.6", "score": 3}`, map[string]any{"disk_encrypted": false, "os_version": "15.6", "score": 3.0}},
		"empty":     {"", map[string]any{}},
		"no values": {"{}", map[string]any{}},
		"crlf":      {"firewall: false\r\n", map[string]any{"firewall": false}},
	} {
		facts, err := posture.ParseFile([]byte(tt.text), at)
		got := map[string]any{}
		for n, f := range facts {
			got[n] = f.Value
			if f.Source != sallyport.SourceFile || !f.At.Equal(at) {
				t.Errorf("%s: %s has source %s, at %v", name, n, f.Source, f.At)
			}
		}
		if diff := cmp.Diff(tt.want, got); err != nil || diff != "" {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, diff)
		}
	}
	for name, text := range map[string]string{
		"twice": "firewall: true\nfirewall: false\n", "twice in json": `{"a":1,"a":2}`, "no colon": "firewall\n", "no value": "x:\n",
		"yes is no bool": "firewall: yes\n", "text as bool": `{"firewall":"true"}`, "number as text": `{"os_version":15.6}`,
		"nested": `{"a":{"b":1}}`, "list": `{"a":[1]}`, "null": `{"a":null}`, "cut off": `{"a":1`, "more": `{"a":1} {"b":2}`,
		"bad name": "Disk Encrypted: true\n", "long name": strings.Repeat("a", 65) + ": 1\n", "bad quote": "a: \"x\n",
	} {
		if facts, err := posture.ParseFile([]byte(text), at); err == nil {
			t.Errorf("%s: got %v; want an error", name, facts)
		}
	}
}

func FuzzParseFile(f *testing.F) {
	f.Add([]byte("disk_encrypted: true\n"))
	f.Add([]byte(`{"a": 1, "b": "x"}`))
	f.Add([]byte("a: \"\\u0000\"\n{"))
	f.Fuzz(func(t *testing.T, text []byte) {
		facts, err := posture.ParseFile(text, time.Unix(0, 0))
		if err != nil {
			return
		}
		for name, fact := range facts {
			switch fact.Value.(type) {
			case bool, string, float64:
			default:
				t.Errorf("%q: %T", name, fact.Value)
			}
		}
	})
}

func TestOpenRefusesABadFile(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad")
	if err := os.WriteFile(bad, []byte("nonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, make([]byte, 65<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{bad, big, filepath.Join(dir, "missing"), dir} {
		if _, err := posture.Open(posture.Machine{}, file); sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
			t.Errorf("%s: got %v; want usage", file, err)
		}
	}
}

// still is a machine of which nothing is known.
func still() posture.Machine {
	return posture.Machine{
		OS: "linux", FS: fstest.MapFS{}, Env: func(string) string { return "" },
		Run: func(context.Context, string, ...string) ([]byte, error) { return nil, errors.New("none") },
	}
}

func TestWatch(t *testing.T) {
	file := filepath.Join(t.TempDir(), "facts")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("disk_encrypted: true")
	synctest.Test(t, func(t *testing.T) {
		s, err := posture.Open(still(), file)
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var told []any
		var at []time.Duration
		began := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go s.Watch(ctx, func(facts map[string]sallyport.Fact) {
			mu.Lock()
			defer mu.Unlock()
			told, at = append(told, facts[sallyport.FactDiskEncrypted].Value), append(at, time.Since(began))
		})
		expect := func(what string, n int, value any, from, to time.Duration) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if len(told) != n || told[n-1] != value || at[n-1] < from || at[n-1] > to {
				t.Errorf("%s: told %v at %v; want %v as number %d from %v to %v", what, told, at, value, n, from, to)
			}
		}
		expect("at start", 1, true, 0, 0)

		<-time.After(10 * time.Second)
		write("disk_encrypted: false")
		<-time.After(300 * time.Millisecond)
		expect("at once after a change", 2, false, 10*time.Second, 10*time.Second+250*time.Millisecond)

		<-time.After(time.Second)
		write("disk_encrypted: false # nothing new")
		write("# rewritten\ndisk_encrypted: false")
		<-time.After(30 * time.Second)
		expect("not for the same value", 2, false, 0, time.Hour)

		<-time.After(31 * time.Second)
		expect("each minute", 3, false, 70*time.Second, 71*time.Second)

		write("nonsense")
		<-time.After(2 * time.Second)
		expect("a broken file has no facts", 4, nil, 71*time.Second, 75*time.Second)

		write("disk_encrypted: true")
		<-time.After(300 * time.Millisecond)
		expect("mended", 5, true, 73*time.Second, 75*time.Second)

		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		<-time.After(2 * time.Second)
		expect("a missing file has no facts", 6, nil, 73*time.Second, 77*time.Second)
	})
}

func TestSystemChangeIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := still()
		var release atomic.Value
		release.Store("1")
		m.FS = readFS(func(name string) ([]byte, error) {
			if name == "proc/sys/kernel/osrelease" {
				return []byte(release.Load().(string)), nil
			}
			return nil, fs.ErrNotExist
		})
		s, err := posture.Open(m, "")
		if err != nil {
			t.Fatal(err)
		}
		var told []any
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go s.Watch(ctx, func(facts map[string]sallyport.Fact) { told = append(told, facts[sallyport.FactKernel].Value) })
		synctest.Wait()
		release.Store("2")
		<-time.After(16 * time.Second)
		synctest.Wait()
		if diff := cmp.Diff([]any{"1", "2"}, told); diff != "" {
			t.Errorf("told (-want +got):\n%s", diff)
		}
	})
}

// readFS is a file system of one function.
type readFS func(string) ([]byte, error)

func (r readFS) ReadFile(name string) ([]byte, error) { return r(name) }
func (readFS) Open(string) (fs.File, error)           { return nil, fs.ErrNotExist }

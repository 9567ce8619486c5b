package sqlite_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/sqlite"
	"sallyport/internal/keyring"
)

// stepEnv says before which step a helper that replaces a store kills itself.
const stepEnv = "SALLYPORT_SQLITE_STEP"

// dying is a configuration with which the process does not outlive that step.
func dying() (sqlite.Config, error) {
	n, err := strconv.Atoi(os.Getenv(stepEnv))
	return sqlite.Stepping(sqlite.Small(), func() {
		if n--; n == 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}), err
}

func replaceStore(path string) error {
	cfg, err := dying()
	if err != nil {
		return err
	}
	_, err = sqlite.Replace(path, cfg, fillNew)
	return err
}

func openStore(path string) error {
	cfg, err := dying()
	if err != nil {
		return err
	}
	s, err := sqlite.Open(path, cfg)
	if err != nil {
		return err
	}
	return s.Close()
}

// fillNew makes the store that takes the place of another one, in two transactions.
func fillNew(s *sqlite.Store) error {
	for rev := sallyport.Revision(1001); rev <= 1002; rev++ {
		err := s.Update(context.Background(), func(cached.Tx) (cached.Change, error) {
			row := cached.Row{Record: sallyport.Record{
				Kind: sallyport.KindRecord, ID: fmt.Sprint("new", rev), Revision: rev, Payload: []byte(`{}`),
			}, MAC: []byte{1}}
			return cached.Change{Rows: []cached.Row{row}, Head: cached.Head{Epoch: "e_new", Revision: rev, Seal: []byte{}}}, nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// contentAt opens the store and closes it again.
func contentAt(t *testing.T, path string) content {
	t.Helper()
	s, err := sqlite.Open(path, sqlite.Small())
	must(t, err)
	c, _ := contentOf(t, s)
	must(t, s.Close())
	return c
}

// oldFiles are those of a store that was killed: all of it is in the log.
func oldFiles(t *testing.T) (map[string][]byte, content) {
	files, c := allInTheLog(t)
	files["cached.db.journal"] = []byte("journal")
	return files, c
}

var newContent = content{
	{Kind: sallyport.KindRecord, ID: "new1001"}: "1001 {} false",
	{Kind: sallyport.KindRecord, ID: "new1002"}: "1002 {} false",
}

func TestReplaceKeepsTheOldFiles(t *testing.T) {
	files, _ := oldFiles(t)
	path := lay(t, t.TempDir(), files)
	aside, err := sqlite.Replace(path, sqlite.Small(), fillNew)
	must(t, err)
	for _, part := range []string{"", "-wal", ".journal"} {
		if got, err := os.ReadFile(aside + part); err != nil || !bytes.Equal(got, files["cached.db"+part]) {
			t.Errorf("%s%s: got %d bytes, %v; want the old ones", aside, part, len(got), err)
		}
	}
	if got := contentAt(t, path); !maps.Equal(got, newContent) {
		t.Errorf("got %v; want %v", got, newContent)
	}
	if rev, err := sqlite.Reached(path); err != nil || rev != 1002 {
		t.Errorf("the marker has %d, %v; want 1002", rev, err)
	}
	left, err := filepath.Glob(path + ".restored*")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestCase_L13_AKillWhileAStoreIsReplaced(t *testing.T) {
	files, old := oldFiles(t)
	killed := func(name, path string, step int) bool {
		cmd := helper(t, name, path)
		cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d", stepEnv, step))
		var exit *exec.ExitError
		err := cmd.Run()
		if err != nil && (!errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL) {
			t.Fatalf("%s, killed before step %d: %v", name, step, err)
		}
		return err != nil
	}
	var outcomes [2]int // old, new
	for step := 1; ; step++ {
		path := lay(t, t.TempDir(), files)
		if !killed("replace", path, step) {
			break
		}
		for again := 1; killed("open", path, again); again++ { // and whoever finishes it is killed, too
		}
		switch got := contentAt(t, path); {
		case maps.Equal(got, old):
			outcomes[0]++
		case maps.Equal(got, newContent):
			outcomes[1]++
		default:
			t.Errorf("killed before step %d: got %v", step, got)
		}
		_, err := sqlite.Replace(path, sqlite.Small(), fillNew) // and it can be done again
		must(t, err)
	}
	if outcomes[0] != 3 || outcomes[1] != 6 {
		t.Errorf("got the old store %d times, the new one %d times; want 3, 6", outcomes[0], outcomes[1])
	}
}

// What Replace is for: the store that was there is no good.
func TestReplaceOfWhatCannotBeOpened(t *testing.T) {
	whole, _ := oldFiles(t)
	for name, damage := range map[string]func(map[string][]byte){
		"nothing there":  func(f map[string][]byte) { clear(f) },
		"damaged":        func(f map[string][]byte) { f["cached.db"] = []byte("garbage") },
		"missing":        func(f map[string][]byte) { delete(f, "cached.db") },
		"marker missing": func(f map[string][]byte) { delete(f, "cached.db.lock") },
		"marker damaged": func(f map[string][]byte) { f["cached.db.lock"] = []byte("garbage") },
		"only the journal": func(f map[string][]byte) {
			maps.DeleteFunc(f, func(n string, _ []byte) bool { return n != "cached.db.journal" })
		},
		"rolled back": func(f map[string][]byte) { delete(f, "cached.db-wal") },
	} {
		t.Run(name, func(t *testing.T) {
			files := maps.Clone(whole)
			damage(files)
			path := lay(t, t.TempDir(), files)
			failed := errors.New("failed")
			if _, err := sqlite.Replace(path, sqlite.Small(), func(*sqlite.Store) error { return failed }); !errors.Is(err, failed) {
				t.Fatalf("got %v; want %v", err, failed)
			}
			for n, text := range files {
				if got, err := os.ReadFile(filepath.Join(filepath.Dir(path), n)); err != nil || !bytes.Equal(got, text) {
					t.Errorf("after a failure, %s is another one (%v)", n, err)
				}
			}
			if len(files) > 0 {
				if _, err := sqlite.Open(path, sqlite.Small()); sallyport.CodeOf(err) == "" {
					t.Errorf("after a failure it opens: %v", err)
				}
			}
			aside, err := sqlite.Replace(path, sqlite.Small(), fillNew)
			must(t, err)
			if got := contentAt(t, path); !maps.Equal(got, newContent) || (aside == "") != (len(files) == 0) {
				t.Errorf("got %v, aside %q", got, aside)
			}
		})
	}
}

func TestReplaceOfAStoreInUse(t *testing.T) {
	path := filled(t, 1)
	open(t, path)
	_, err := sqlite.Replace(path, sqlite.Small(), fillNew)
	if sallyport.CodeOf(err) != "storage.in_use" {
		t.Errorf("got %v; want storage.in_use", err)
	}
}

// usable returns what keeps cached from starting.
func usable(path string) (sessions int, err error) {
	store, err := sqlite.Open(path, sqlite.Small())
	if err != nil {
		return 0, err
	}
	defer store.Close()
	s, err := cached.New(cached.Config{}, cached.Deps{Store: store, KEK: key})
	if err != nil {
		return 0, err
	}
	defer s.Close()
	list, err := s.List(context.Background(), sallyport.KindSession)
	return len(list), err
}

func TestRestoreInPlace(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, path string){
		"an older file": func(t *testing.T, path string) {
			backup := filepath.Join(t.TempDir(), "backup.db")
			inSQL(t, path, `VACUUM INTO ?`, backup)
			revoke(t, path)
			move(t, backup, path)
		},
		"a row put back": func(t *testing.T, path string) {
			inSQL(t, path, `CREATE TABLE kept AS SELECT * FROM record WHERE id = 's0'`)
			revoke(t, path)
			inSQL(t, path, `REPLACE INTO record SELECT * FROM kept`)
		},
		"the marker removed": func(t *testing.T, path string) { must(t, os.Remove(path+".lock")) },
		"the marker damaged": func(t *testing.T, path string) { must(t, os.WriteFile(path+".lock", nil, 0o600)) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filled(t, 3)
			spoil(t, path)
			refused := func() {
				t.Helper()
				if _, err := usable(path); sallyport.CodeOf(err) != "storage.rolled_back" {
					t.Fatalf("got %v; want storage.rolled_back", err)
				}
			}
			refused()
			cfg := sqlite.Small()
			cfg.Restore = true
			store, err := sqlite.Open(path, cfg)
			must(t, err)
			must(t, store.Maintain(t.Context()))
			must(t, store.Close())
			refused() // nothing was put in order
			above, _ := sqlite.Reached(path)
			store, err = sqlite.Open(path, cfg)
			must(t, err)
			r, err := cached.RestoreInPlace(t.Context(), cached.Deps{Store: store, KEK: key}, cached.RestoreOptions{Above: above})
			must(t, err)
			must(t, store.Close())
			if n, err := usable(path); err != nil || n != 0 || r.SessionsEnded == 0 || r.Head.Revision <= above {
				t.Errorf("got %d sessions, %v, %+v; want none left", n, err, r)
			}
			j := readJournal(t, path, keyring.KEK{})
			if !j.Covers(r.Head) || j.Covers(r.From.Head) {
				t.Errorf("the journal says %+v; want it to begin at %+v", j, r.Head)
			}
		})
	}
}

func TestRestoreOpensNothingElse(t *testing.T) {
	path := filled(t, 1)
	cfg := sqlite.Small()
	cfg.Restore = true
	refused := func(path, code string) {
		t.Helper()
		if _, err := sqlite.Open(path, cfg); sallyport.CodeOf(err) != code {
			t.Errorf("got %v; want %s", err, code)
		}
	}
	s, err := sqlite.Open(path, sqlite.Small())
	must(t, err)
	refused(path, "storage.in_use")
	must(t, s.Close())
	must(t, os.WriteFile(path, []byte("garbage"), 0o600))
	refused(path, "storage.corrupt")
	nowhere := filepath.Join(t.TempDir(), "cached.db")
	refused(nowhere, "storage.corrupt")
	if _, rev := epochOf(t, nowhere); rev != 0 { // it is still a place for a new one
		t.Errorf("got revision %d", rev)
	}
}

func revoke(t *testing.T, path string) {
	t.Helper()
	s, end := serve(t, path)
	defer end()
	_, err := s.Revoke(t.Context(), sallyport.Revocation{Subjects: []sallyport.Subject{{Kind: sallyport.SubjectSession, ID: "s0"}}})
	must(t, err)
}

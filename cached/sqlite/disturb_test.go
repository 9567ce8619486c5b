package sqlite_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/cached"
	"sallyport/cached/sqlite"
)

// One write or flush fails once, and would succeed if it was tried again. It must
// not be: after a failed flush the kernel counts the lost pages as written.
func TestCase_L4_AFailedWriteEndsTheProcess(t *testing.T) {
	for name, c := range map[string]struct{ file, call, when string }{
		"flush of the log":           {"cached.db-wal", "fsync", "30"},
		"write to the log":           {"cached.db-wal", "pwrite64", "200"},
		"flush of the database":      {"cached.db", "fsync", "2"}, // by a checkpoint
		"write to the database":      {"cached.db", "pwrite64", "9"},
		"flush of the marker":        {"cached.db.lock", "fsync", "2"},
		"write to the marker":        {"cached.db.lock", "pwrite64", "40"},
		"every flush of the log":     {"cached.db-wal", "fsync", "30+"},
		"every write to the databse": {"cached.db", "pwrite64", "9+"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // they wait for the disk more than they work
			dir := t.TempDir()
			path, log := filepath.Join(dir, "cached.db"), filepath.Join(dir, "trace")
			store, err := sqlite.Open(path, sqlite.Config{}) // made before anything fails
			if err := errors.Join(err, store.Close()); err != nil {
				t.Fatal(err)
			}
			cmd := helper(t, "write-forever", path, "strace", "-f", "-qq", "-e", "signal=none", "-o", log,
				"-P", filepath.Join(dir, c.file), "-e", "trace=pwrite64,fsync,fdatasync,ftruncate",
				"-e", "inject="+c.call+":error=EIO:when="+c.when)
			var said bytes.Buffer
			cmd.Stderr = &said
			var l ledger
			err = l.follow(t, cmd, func() {})
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(said.String(), cached.ErrBroken.Error()) {
				t.Errorf("got %v, %q; want exit 1: %v", err, &said, cached.ErrBroken)
			}
			if l.total == 0 {
				t.Error("nothing was acknowledged before")
			}
			noneAfterInjection(t, log)
			l.check(t, open(t, path))
		})
	}
}

// noneAfterInjection checks that the file was left alone after the error.
func noneAfterInjection(t *testing.T, log string) {
	t.Helper()
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(text), "(INJECTED)\n")
	if !ok || strings.TrimSpace(after) != "" {
		t.Errorf("injected: %t; then the process did\n%s\nwant nothing", ok, after)
	}
}

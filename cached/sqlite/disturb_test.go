package sqlite_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/sqlite"
)

// One write or flush fails once, and would succeed if it was tried again. It must
// not be: after a failed flush the kernel counts the lost pages as written.
func TestCase_L4_AFailedWriteEndsTheProcess(t *testing.T) {
	for name, c := range map[string]struct{ file, call, when string }{
		"flush of the log":            {"cached.db-wal", "fsync", "30"},
		"write to the log":            {"cached.db-wal", "pwrite64", "200"},
		"flush of the database":       {"cached.db", "fsync", "2"}, // by a checkpoint
		"write to the database":       {"cached.db", "pwrite64", "9"},
		"flush of the marker":         {"cached.db.lock", "fsync", "2"},
		"write to the marker":         {"cached.db.lock", "pwrite64", "40"},
		"every flush of the log":      {"cached.db-wal", "fsync", "30+"},
		"every write to the database": {"cached.db", "pwrite64", "9+"},
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

// holdLock keeps everybody else from writing, and holdRead from writing the log
// back, until standard input ends.
func holdLock(path string) error { return hold(path, `BEGIN EXCLUSIVE`) }

func holdRead(path string) error { return hold(path, `BEGIN; SELECT * FROM head`) }

func hold(path, statement string) error {
	db, err := sql.Open("sqlite3", "file:"+path)
	if err != nil {
		return err
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	if _, err := db.Exec(statement); err != nil {
		return err
	}
	fmt.Println("held")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// held starts a helper that holds on to the database, and returns what ends it.
func held(t *testing.T, name, path string) (release func()) {
	t.Helper()
	cmd := helper(t, name, path)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, len("held\n"))); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := errors.Join(in.Close(), cmd.Wait()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Another process holds the file for longer than anybody waits.
func TestCase_L9_ALockedFileIsReadAndWaitedFor(t *testing.T) {
	path := filled(t, 1)
	s, end := serve(t, path)
	defer end()
	release := held(t, "lock", path)
	for range 2 {
		begun := time.Now()
		_, err := s.Apply(t.Context(), []sallyport.Op{sessionOp(1)})
		took := time.Since(begun)
		if sallyport.CodeOf(err) != "storage.busy" || sallyport.OutcomeOf(err) != sallyport.OutcomeUnavailable {
			t.Errorf("write: got %v; want storage.busy", err)
		}
		if took < 1900*time.Millisecond || took > 4*time.Second {
			t.Errorf("a write was refused after %v; want 2 s", took)
		}
		if _, err := s.Get(t.Context(), sallyport.KindSession, "s0"); err != nil {
			t.Errorf("read: %v", err)
		}
		if list, err := s.List(t.Context(), sallyport.KindSession); err != nil || len(list) != 1 {
			t.Errorf("snapshot: got %d sessions, %v", len(list), err)
		}
	}
	if err := s.Ready(); err != nil {
		t.Errorf("a locked file ended the server: %v", err)
	}
	release()
	if _, err := s.Apply(t.Context(), []sallyport.Op{sessionOp(1)}); err != nil {
		t.Errorf("write after the lock is gone: %v", err)
	}
}

// bulk writes 16 MiB past the server, for which that is much work: other ones for
// each n, because SQLite leaves alone what is the same.
func bulk(t *testing.T, store *sqlite.Store, n int) error {
	t.Helper()
	if err := store.Room(t.Context()); err != nil {
		return err
	}
	return store.Update(t.Context(), func(tx cached.Tx) (cached.Change, error) {
		row := cached.Row{Record: sallyport.Record{Kind: sallyport.KindRecord, ID: "bulk", Revision: tx.Head().Revision}, MAC: []byte{}}
		row.Payload = bytes.Repeat([]byte{byte(n)}, 16<<20)
		return cached.Change{Rows: []cached.Row{row}, Head: tx.Head()}, nil
	})
}

// logSize is how large the log's file is.
func logSize(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path + "-wal")
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

const logBound = 256 << 20

// A snapshot whose receiver does not go on must not let the log grow without end:
// it has to begin again, and writes go on.
func TestCase_L17_AStuckSnapshotIsEnded(t *testing.T) {
	path := filled(t, 100)
	store := open(t, path)
	s, err := cached.New(cached.Config{}, cached.Deps{Store: store, KEK: key})
	if err != nil {
		t.Fatal(err)
	}
	reading, goOn, done := make(chan struct{}), make(chan struct{}), make(chan error)
	go func() {
		first := true
		done <- store.Scan(context.Background(), cached.Query{}, func(cached.Head) error { return nil }, func(cached.Row) error {
			if first {
				first = false
				close(reading)
				<-goOn
			}
			return nil
		})
	}()
	<-reading
	for n := range 20 { // 320 MiB
		if err := bulk(t, store, n); err != nil {
			t.Fatal(err)
		}
	}
	if size := logSize(t, path); size > logBound {
		t.Errorf("the log has %d MiB", size>>20)
	}
	if err := store.Maintain(t.Context()); err != nil {
		t.Error(err)
	}
	if size := logSize(t, path); size > 64<<20 {
		t.Errorf("the log still has %d MiB after it was written back", size>>20)
	}
	close(goOn)
	if err := <-done; !errors.Is(err, cached.ErrScanTooLong) {
		t.Errorf("the stuck scan ended with %v; want storage.snapshot_too_long", err)
	}
	if list, err := s.List(t.Context(), sallyport.KindSession); err != nil || len(list) != 100 {
		t.Errorf("another snapshot: got %d sessions, %v", len(list), err)
	}
}

// Nobody can end a reader in another process. The log stops growing before its
// bound, but for revocations.
func TestCase_L17_AForeignReaderStopsAdditionsOnly(t *testing.T) {
	const sessions = 100
	path := filled(t, sessions)
	store := open(t, path)
	s, err := cached.New(cached.Config{}, cached.Deps{Store: store, KEK: key})
	if err != nil {
		t.Fatal(err)
	}
	release := held(t, "read", path)
	for n := 0; err == nil && n < 20; n++ {
		err = bulk(t, store, n)
	}
	if sallyport.CodeOf(err) != "storage.full" {
		t.Errorf("got %v; want storage.full", err)
	}
	for i := range sessions {
		subject := sallyport.Subject{Kind: sallyport.SubjectSession, ID: fmt.Sprint("s", i)}
		if got, err := s.Revoke(t.Context(), sallyport.Revocation{Subjects: []sallyport.Subject{subject}}); err != nil || got.Sessions != 1 {
			t.Fatalf("revocation %d: got %+v, %v", i, got, err)
		}
	}
	begun := time.Now()
	if err := store.Maintain(t.Context()); err != nil || time.Since(begun) > time.Second {
		t.Errorf("housekeeping took %v, %v", time.Since(begun), err)
	}
	if size := logSize(t, path); size > logBound {
		t.Errorf("the log has %d MiB", size>>20)
	}
	release()
	if err := store.Maintain(t.Context()); err != nil {
		t.Error(err)
	}
	if size := logSize(t, path); size > 64<<20 {
		t.Errorf("the log still has %d MiB after the reader went", size>>20)
	}
	if err := bulk(t, store, 21); err != nil {
		t.Errorf("write after the reader went: %v", err)
	}
}

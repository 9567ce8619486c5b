package sqlite_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"sallyport"
	"sallyport/internal/keyring"
)

// fullDir is set in the process that the test below starts in a mount namespace
// of its own.
const fullDir = "SALLYPORT_FULL_DIR"

// A full disk must not keep a session alive: revocations go on, what adds
// something is refused, and nothing acknowledged is lost.
func TestRevocationsGoOnWhenTheDiskIsFull(t *testing.T) {
	if dir := os.Getenv(fullDir); dir != "" {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
			t.Fatal(err)
		}
		revokeOnFullDisk(t, dir)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), fullDir+"="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS: "+t.Name()) {
		t.Errorf("in a namespace of its own: %v\n%s", err, out)
	}
}

func revokeOnFullDisk(t *testing.T, dir string) {
	const sessions = 300
	path := filepath.Join(dir, "cached.db")
	store, s, end, err := openServed(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range sessions {
		if _, err := s.Apply(t.Context(), []sallyport.Op{sessionOp(i)}); err != nil {
			t.Fatal(err)
		}
	}
	filler := fill(t, filepath.Join(dir, "filler"))
	if _, err := s.Apply(t.Context(), []sallyport.Op{sessionOp(sessions)}); sallyport.CodeOf(err) != "storage.full" {
		t.Errorf("put: got %v; want storage.full", err)
	}
	for i := range sessions {
		subject := sallyport.Subject{Kind: sallyport.SubjectSession, ID: fmt.Sprint("s", i)}
		got, err := s.Revoke(t.Context(), sallyport.Revocation{Subjects: []sallyport.Subject{subject}})
		if err != nil || got.Sessions != 1 || !got.Durable {
			t.Fatalf("revocation %d: got %+v, %v; want it done", i, got, err)
		}
		if err := store.Maintain(t.Context()); err != nil { // the marker goes on, too
			t.Fatalf("revocation %d: %v", i, err)
		}
	}
	j := readJournal(t, path, keyring.KEK{})
	if head, err := store.Head(t.Context()); err != nil || len(j.Ended) != sessions || j.Reached != head.Revision {
		t.Errorf("the journal has %d endings up to %d, %v; want %d", len(j.Ended), j.Reached, err, sessions)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Apply(t.Context(), []sallyport.Op{sessionOp(sessions)}); err != nil {
		t.Errorf("put with room again: %v", err)
	}
	if err := end(); err != nil {
		t.Fatal(err)
	}
	if _, s, end, err = openServed(path); err != nil {
		t.Fatal(err)
	}
	defer end()
	list, err := s.List(t.Context(), sallyport.KindSession)
	if err != nil || len(list) != 1 || list[0].ID != fmt.Sprint("s", sessions) {
		t.Errorf("got %d sessions, %v; want the one written last", len(list), err)
	}
}

// fill takes all that is left of the disk.
func fill(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int{1 << 20, 4096, 1} {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	return path
}

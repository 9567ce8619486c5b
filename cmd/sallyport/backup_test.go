package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/memory"
	"sallyport/cached/storetest"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
)

// A backup's name appears when it is whole, and takes nobody else's place; what
// came to nothing leaves nothing behind.
func TestABackupIsWholeOrAsItWas(t *testing.T) {
	server := storetest.Run(t, cached.Deps{Store: memory.New(), KEK: storetest.KEK()})
	var backup bytes.Buffer
	if err := server.Backup(t.Context(), &backup); err != nil {
		t.Fatal(err)
	}
	writes := func(text []byte, err error) func(string, io.Writer) error {
		return func(_ string, w io.Writer) error {
			_, failed := w.Write(text)
			return errors.Join(failed, err)
		}
	}
	whole, cut := backup.Bytes(), backup.Bytes()[:backup.Len()-1]
	broken := errors.New("cached was killed")
	const others = "somebody else's"
	for _, c := range []struct {
		name   string
		before bool // the file is there
		force  bool
		take   func(path string, w io.Writer) error
		exit   int
		want   string // in the file; empty: there is none
	}{
		{"whole", false, false, writes(whole, nil), run.ExitOK, string(whole)},
		{"replaced", true, true, writes(whole, nil), run.ExitOK, string(whole)},
		{"there is one", true, false, writes(whole, nil), run.ExitUsage, others},
		{"broken off", false, false, writes(cut, broken), run.ExitFailed, ""},
		{"broken off, forced", true, true, writes(cut, broken), run.ExitFailed, others},
		{"cut, and nobody noticed", true, true, writes(cut, nil), run.ExitFailed, others},
		{"one appears meanwhile", false, false, func(path string, w io.Writer) error {
			return errors.Join(os.WriteFile(path, []byte(others), 0o600), writes(whole, nil)("", w))
		}, run.ExitUsage, others},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "one.bak")
			if c.before {
				if err := os.WriteFile(path, []byte(others), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			_, err := saveBackup(&config.File{}, path, c.force, func(w io.Writer) error { return c.take(path, w) })
			if got := run.ExitCode(err); got != c.exit {
				t.Errorf("exit code %d (%v); want %d", got, err, c.exit)
			}
			got, err := os.ReadFile(path)
			if string(got) != c.want || (err == nil) != (c.want != "") {
				t.Errorf("the file holds %d bytes, %v; want %d", len(got), err, len(c.want))
			}
			if files, err := os.ReadDir(filepath.Dir(path)); err != nil || len(files) > 1 {
				t.Errorf("got %v, %v; want nothing left", files, err)
			}
		})
	}
}

// What is said of sessions follows from what the journal covers.
func TestRestoreSaysWhatBecameOfSessions(t *testing.T) {
	backup := cached.Head{Epoch: "e-1", Revision: 812}
	for _, c := range []struct {
		name        string
		journal     *cached.Journal
		why         string
		ended, kept int
		want        string
	}{
		{"covered", &cached.Journal{Epoch: "e-1", After: 700, Reached: 907}, "", 14, 301, "journal covers revisions 812 to 907: 14 sessions ended since the backup stay ended, 301 sessions live on\n"},
		{"nothing since", &cached.Journal{Epoch: "e-1", After: 812, Reached: 811}, "", 1, 1, "journal covers revisions 812 to 812: 1 session ended since the backup stays ended, 1 session lives on\n"},
		{"none", nil, "PostgreSQL has none", 315, 0, "no journal covers the time since the backup (PostgreSQL has none): all 315 sessions are ended; everybody logs in again\n"},
		{"another epoch", &cached.Journal{Epoch: "e-2", Reached: 907}, "", 1, 0, "no journal covers the time since the backup (it is that of another store, or of one that was restored since): the only session is ended; its user logs in again\n"},
		{"a gap", &cached.Journal{Epoch: "e-1", After: 900, Reached: 907}, "", 0, 0, "no journal covers the time since the backup (it goes back to revision 900 only, the backup is of revision 812): there were no sessions to end\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := restored{Journal: journalUseOf(c.journal, c.why, backup), SessionsEnded: c.ended, SessionsKept: c.kept}
			if got := r.text(); !bytes.HasPrefix([]byte(got), []byte(c.want)) {
				t.Errorf("got:\n%swant:\n%s", got, c.want)
			}
		})
	}
}

// Everything that is told of a backup's key is its id.
func TestABackupTellsTheIDOfItsKeyOnly(t *testing.T) {
	kek := storetest.KEK()
	server := storetest.Run(t, cached.Deps{Store: memory.New(), KEK: kek})
	if _, err := server.Apply(t.Context(), []sallyport.Op{sallyport.Put(sallyport.KindUser, "u1", sallyport.User{ID: "u1"})}); err != nil {
		t.Fatal(err)
	}
	var backup bytes.Buffer
	if err := server.Backup(t.Context(), &backup); err != nil {
		t.Fatal(err)
	}
	size := backup.Len()
	done, err := look(&backup, &config.File{}, "one.bak")
	if err != nil {
		t.Fatal(err)
	}
	if id := kek.IDs()[0].String(); done.RecordsKey != id || done.KeyFile != "" || done.Records != 2 || done.Bytes != int64(size) {
		t.Errorf("got %+v; want two records (one of them its keys) in %d bytes under the key %s", done, size, id)
	}
}

// A restore by another user would leave a store that cached cannot open.
func TestRestoreIsForTheOwnerOfTheData(t *testing.T) {
	dir := t.TempDir()
	if err := asOwner(dir, os.Geteuid()); err != nil {
		t.Errorf("as the owner: %v", err)
	}
	if err := asOwner(dir, os.Geteuid()+1); run.ExitCode(err) != run.ExitUsage {
		t.Errorf("as another user: got %v; want a usage error", err)
	}
}

package postgres_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/postgres"
	"sallyport/internal/logging"
)

func refused(t *testing.T, cfg postgres.Config, code string) *sallyport.Error {
	t.Helper()
	s, err := postgres.Open(t.Context(), cfg)
	if err == nil {
		t.Fatalf("opened, %v; want %s", s.Close(), code)
	}
	var e *sallyport.Error
	if !errors.As(err, &e) || e.Code != code || e.Hint == "" {
		t.Fatalf("got %v; want %s with a hint", err, code)
	}
	return e
}

// Several that begin at once in an empty database make one store.
func TestOneStoreIsMade(t *testing.T) {
	url := cluster.URL(cluster.Database(t))
	epochs := make([]sallyport.Epoch, 6)
	var wg sync.WaitGroup
	for i := range epochs {
		cfg := config(t, url)
		wg.Go(func() {
			s, err := postgres.Open(t.Context(), cfg)
			if err != nil {
				t.Error(err)
				return
			}
			head, err := s.Head(t.Context())
			if epochs[i] = head.Epoch; errors.Join(err, s.Close()) != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, e := range epochs {
		if e == "" || e != epochs[0] {
			t.Fatalf("got epochs %q; want one", epochs)
		}
	}
}

func TestAnEmptyDatabaseIsNotTakenForTheStore(t *testing.T) {
	cfg := config(t, cluster.URL(cluster.Database(t)))
	must(t, open1(t, cfg).Close())
	empty := cfg
	empty.URL = cluster.URL(cluster.Database(t))
	refused(t, empty, "storage.corrupt")
	other := config(t, cluster.URL(cluster.Database(t)))
	must(t, open1(t, other).Close())
	other.Marker = cfg.Marker
	refused(t, other, "storage.rolled_back")
	must(t, open1(t, cfg).Close()) // the refused ones have changed nothing
}

func open1(t *testing.T, cfg postgres.Config) *postgres.Store {
	t.Helper()
	s, err := postgres.Open(t.Context(), cfg)
	must(t, err)
	return s
}

// The marker follows what is written, so that an older copy is refused.
func TestAnOlderCopyIsRefused(t *testing.T) {
	db := cluster.Database(t)
	cfg := config(t, cluster.URL(db))
	s := open1(t, cfg)
	must(t, s.Update(t.Context(), func(tx cached.Tx) (cached.Change, error) {
		head := tx.Head()
		head.Revision = 7
		return cached.Change{Head: head}, nil
	}))
	must(t, s.Maintain(t.Context()))
	text, err := os.ReadFile(cfg.Marker)
	if err != nil || !strings.Contains(string(text), `"revision":7`) {
		t.Errorf("got marker %q, %v; want revision 7 in it", text, err)
	}
	must(t, s.Close())
	cluster.Exec(t, db, `UPDATE sallyport.head SET revision = 6`)
	e := refused(t, cfg, "storage.rolled_back")
	if !strings.Contains(e.Message, "at revision 6, and 7 was written") {
		t.Errorf("got %q; want both revisions in it", e.Message)
	}
}

func TestASecondProcessOfTheDirectoryIsRefused(t *testing.T) {
	cfg := config(t, cluster.URL(cluster.Database(t)))
	open(t, cfg)
	refused(t, cfg, "storage.in_use")
}

func TestCase_J10_ANewerSchemaInPostgreSQL(t *testing.T) {
	db := cluster.Database(t)
	cfg := config(t, cluster.URL(db))
	must(t, open1(t, cfg).Close())
	cluster.Exec(t, db, `UPDATE sallyport.meta SET value = '99' WHERE name = 'schema'`)
	refused(t, cfg, "schema.too_new")
	cluster.Exec(t, db, `UPDATE sallyport.meta SET value = 'x' WHERE name = 'schema'`)
	refused(t, cfg, "storage.corrupt")
}

// A commit is a promise whatever the role or the database say.
func TestSynchronousCommitIsNeverOff(t *testing.T) {
	for _, c := range []struct{ has, want string }{
		{"off", "on"},
		{"local", "on"},
		{"on", "on"},
		{"remote_apply", "remote_apply"},
	} {
		db := cluster.Database(t)
		cluster.Exec(t, "postgres", fmt.Sprintf(`ALTER DATABASE %s SET synchronous_commit = %s`, db, c.has))
		s := open1(t, config(t, cluster.URL(db)))
		cluster.Exec(t, db, `CREATE TABLE sallyport.said (what text)`,
			`CREATE FUNCTION sallyport.say() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
				INSERT INTO sallyport.said VALUES (current_setting('synchronous_commit')); RETURN NEW; END $$`,
			`CREATE TRIGGER say BEFORE UPDATE ON sallyport.head FOR EACH ROW EXECUTE FUNCTION sallyport.say()`)
		must(t, s.Update(t.Context(), func(tx cached.Tx) (cached.Change, error) { return cached.Change{Head: tx.Head()}, nil }))
		if got := cluster.Query(t, db, `SELECT what FROM sallyport.said`); got != c.want {
			t.Errorf("%s: got %s; want %s", c.has, got, c.want)
		}
		must(t, s.Close())
	}
}

// Somebody's transaction holds the head: writes are refused after a while, reads
// go on, and so do writes afterwards.
func TestCase_L9_ALockedHeadIsWaitedFor(t *testing.T) {
	db := cluster.Database(t)
	s := open(t, config(t, cluster.URL(db)))
	conn, err := cluster.Connect(t.Context(), db)
	must(t, err)
	defer conn.Close(t.Context())
	_, err = conn.Exec(t.Context(), `BEGIN; SELECT * FROM sallyport.head FOR UPDATE`)
	must(t, err)
	write := func() error {
		return s.Update(t.Context(), func(tx cached.Tx) (cached.Change, error) { return cached.Change{Head: tx.Head()}, nil })
	}
	begun := time.Now()
	if code := sallyport.CodeOf(write()); code != "storage.busy" {
		t.Errorf("got %q; want storage.busy", code)
	}
	if took := time.Since(begun); took < time.Second || took > 10*time.Second {
		t.Errorf("refused after %v; want about 2s", took)
	}
	_, err = s.Head(t.Context())
	must(t, err)
	_, err = conn.Exec(t.Context(), `ROLLBACK`)
	must(t, err)
	must(t, write())
}

func TestAFullDisk(t *testing.T) {
	db := cluster.Database(t)
	s := open(t, config(t, cluster.URL(db)))
	cluster.Exec(t, db, `CREATE FUNCTION sallyport.full() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE SQLSTATE '53100'; END $$`,
		`CREATE TRIGGER full_disk BEFORE UPDATE ON sallyport.head FOR EACH ROW EXECUTE FUNCTION sallyport.full()`)
	err := s.Update(t.Context(), func(tx cached.Tx) (cached.Change, error) { return cached.Change{Head: tx.Head()}, nil })
	if sallyport.CodeOf(err) != "storage.full" || errors.Is(err, cached.ErrBroken) {
		t.Errorf("got %v; want storage.full", err)
	}
}

// The password is read for each connection, and never told.
func TestCase_J2_ThePasswordIsNeverTold(t *testing.T) {
	var log bytes.Buffer
	logger, err := logging.New(&log, "trace", "json")
	must(t, err)
	cfg := config(t, cluster.URL(cluster.Database(t)))
	cfg.Log = logger
	wrong := "wrong-password-0123456789abcdef0123456789"
	cfg.PasswordFile = filepath.Join(t.TempDir(), "password")
	must(t, os.WriteFile(cfg.PasswordFile, []byte(wrong+"\n"), 0o600))
	said := []string{fmt.Sprintf("%+v", refused(t, cfg, "storage.unavailable"))}
	must(t, os.Chmod(cfg.PasswordFile, 0o644))
	_, err = postgres.Open(t.Context(), cfg)
	if err == nil || !strings.Contains(err.Error(), "chmod") {
		t.Errorf("got %v; want a password that others may read refused", err)
	}
	must(t, os.Chmod(cfg.PasswordFile, 0o600))
	must(t, os.WriteFile(cfg.PasswordFile, []byte(cluster.Password()+"\n"), 0o600))
	s := open(t, cfg)
	_, err = s.Head(t.Context())
	must(t, err)
	bad := cfg
	bad.URL = strings.Replace(cfg.URL, "@", ":"+wrong+"@", 1) + "&sslmode=nonsense"
	_, err = postgres.Open(t.Context(), bad)
	for _, text := range append(said, fmt.Sprint(err), log.String()) {
		if strings.Contains(text, wrong) || strings.Contains(text, cluster.Password()) {
			t.Errorf("the password stands in: %s", text)
		}
	}
}

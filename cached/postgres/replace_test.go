package postgres_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/postgres"
	"sallyport/cached/storetest"
)

// replaceEnv says, in a process that a test starts, before which step to die, and
// what to replace: URL, password file and marker, one a line.
const replaceEnv = "SALLYPORT_POSTGRES_REPLACE"

func replaceAndDie(text string) error {
	part := strings.Split(text, "\n")
	n, err := strconv.Atoi(part[0])
	if err != nil {
		return err
	}
	cfg := postgres.Config{URL: part[1], PasswordFile: part[2], Marker: part[3]}
	_, err = postgres.Replace(context.Background(), postgres.Stepping(cfg, func() {
		if n--; n == 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}), fillNew)
	return err
}

func fillNew(s *postgres.Store) error { return write(s, "e_new", 1000) }

// write begins a history, or goes on with it.
func write(s *postgres.Store, epoch sallyport.Epoch, rev sallyport.Revision) error {
	return s.Update(context.Background(), func(cached.Tx) (cached.Change, error) {
		return cached.Change{Head: cached.Head{Epoch: epoch, Revision: rev}}, nil
	})
}

func headAt(t *testing.T, cfg postgres.Config) cached.Head {
	t.Helper()
	s := open1(t, cfg)
	head, err := s.Head(t.Context())
	must(t, errors.Join(err, s.Close()))
	return head
}

func TestCase_L13_AKillWhileASchemaIsReplaced(t *testing.T) {
	var outcomes [2]int // old, new
	for step := 1; ; step++ {
		cfg := config(t, empty())
		s := open1(t, cfg)
		must(t, write(s, "e_old", 500))
		must(t, s.Close())
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, os.Args[0])
		cmd.Env = append(os.Environ(), replaceEnv+"="+strings.Join([]string{strconv.Itoa(step), cfg.URL, cfg.PasswordFile, cfg.Marker}, "\n"))
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if err != nil && (!errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL) {
			t.Fatalf("killed before step %d: %v\n%s", step, err, out)
		}
		head := headAt(t, cfg)
		if err == nil {
			if head.Epoch != "e_new" {
				t.Errorf("not killed: got %+v", head)
			}
			break
		}
		switch head.Epoch {
		case "e_old":
			outcomes[0]++
		case "e_new":
			outcomes[1]++
		default:
			t.Errorf("killed before step %d: got %+v", step, head)
		}
		_, err = postgres.Replace(t.Context(), cfg, fillNew) // and it can be done again
		must(t, err)
		if head := headAt(t, cfg); head.Epoch != "e_new" || head.Revision != 1000 {
			t.Errorf("done again: got %+v", head)
		}
	}
	if outcomes[0] != 3 || outcomes[1] != 1 {
		t.Errorf("got the old store %d times, the new one %d times; want 3, 1", outcomes[0], outcomes[1])
	}
}

func TestReplaceKeepsTheOldSchema(t *testing.T) {
	db := cluster.Database(t)
	cfg := config(t, cluster.URL(db))
	aside, err := postgres.Replace(t.Context(), cfg, fillNew) // where there is none
	if err != nil || aside != "" {
		t.Fatalf("got %q, %v", aside, err)
	}
	aside, err = postgres.Replace(t.Context(), cfg, func(s *postgres.Store) error { return write(s, "e_newer", 2000) })
	must(t, err)
	if got := cluster.Query(t, db, `SELECT epoch FROM `+aside+`.head`); got != "e_new" {
		t.Errorf("aside is %s; want e_new", got)
	}
	failed := errors.New("failed")
	if _, err := postgres.Replace(t.Context(), cfg, func(*postgres.Store) error { return failed }); !errors.Is(err, failed) {
		t.Errorf("got %v; want %v", err, failed)
	}
	if head := headAt(t, cfg); head.Epoch != "e_newer" {
		t.Errorf("got %+v; want e_newer", head)
	}
	if rev, err := postgres.Reached(cfg.Marker); err != nil || rev != 2000 {
		t.Errorf("the marker has %d, %v; want 2000", rev, err)
	}
}

// Another machine's cached is connected.
func TestReplaceOfADatabaseInUse(t *testing.T) {
	cfg := config(t, cluster.URL(cluster.Database(t)))
	open(t, cfg)
	cfg.Marker = config(t, "").Marker
	if _, err := postgres.Replace(t.Context(), cfg, fillNew); sallyport.CodeOf(err) != "storage.in_use" {
		t.Errorf("got %v; want storage.in_use", err)
	}
}

// An administrator renames the schemas under a cached that runs. It ends, and has
// written nothing of the old history into the new one.
func TestACachedOnAReplacedSchemaEnds(t *testing.T) {
	db := cluster.Database(t)
	cfg := config(t, cluster.URL(db))
	store := open(t, cfg)
	s, err := cached.New(cached.Config{}, cached.Deps{Store: store, KEK: storetest.KEK()})
	must(t, err)
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { ended <- s.Run(ctx) }()
	_, err = s.Apply(ctx, []sallyport.Op{sallyport.Put(sallyport.KindRecord, "old", 1)})
	must(t, err)
	other := open1(t, config(t, cluster.URL(db)+"&search_path=another"))
	must(t, errors.Join(fillNew(other), other.Close()))
	cluster.Exec(t, db, `BEGIN; ALTER SCHEMA sallyport RENAME TO aside; ALTER SCHEMA another RENAME TO sallyport; COMMIT`)
	if _, err := s.Apply(ctx, []sallyport.Op{sallyport.Put(sallyport.KindRecord, "late", 1)}); err == nil {
		t.Error("a write after the exchange was acknowledged")
	}
	select {
	case err := <-ended:
		if c := sallyport.CodeOf(err); c != "storage.replaced" && c != "storage.failed" {
			t.Errorf("got %v; want storage.replaced or storage.failed", err)
		}
	case <-time.After(within):
		t.Error("it goes on")
	}
	if got := cluster.Query(t, db, `SELECT count(*)::text || epoch FROM sallyport.head LEFT JOIN sallyport.record ON true WHERE record.id IS NULL GROUP BY epoch`); got != "1e_new" {
		t.Errorf("the new schema has %q; want nothing but its head", got)
	}
}

func TestRestoreInPlace(t *testing.T) {
	db := cluster.Database(t)
	cfg := config(t, cluster.URL(db))
	deps := cached.Deps{Store: open1(t, cfg), KEK: storetest.KEK()}
	s, err := cached.New(cached.Config{}, deps)
	must(t, err)
	must(t, s.Close())
	must(t, write(deps.Store.(*postgres.Store), "e_old", 7))
	must(t, deps.Store.(*postgres.Store).Close())
	cluster.Exec(t, db, `UPDATE sallyport.head SET revision = 6`)
	refused(t, cfg, "storage.rolled_back")
	restore := cfg
	restore.Restore = true
	must(t, open1(t, restore).Close())
	refused(t, cfg, "storage.rolled_back") // nothing was put in order
	store := open1(t, restore)
	deps.Store = store
	above, err := postgres.Reached(cfg.Marker)
	must(t, err)
	r, err := cached.RestoreInPlace(t.Context(), deps, cached.RestoreOptions{Above: above})
	must(t, errors.Join(err, store.Close()))
	if head := headAt(t, cfg); head.Epoch != r.Head.Epoch || head.Revision <= 7 {
		t.Errorf("got %+v; want %+v", head, r.Head)
	}
	refused(t, postgres.Config{URL: cluster.URL(cluster.Database(t)), PasswordFile: cfg.PasswordFile, Marker: config(t, "").Marker, Restore: true}, "storage.corrupt")
}

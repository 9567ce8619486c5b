package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/postgres"
	"sallyport/cached/postgres/postgrestest"
	"sallyport/cached/storetest"
)

// within is how long anything may take that should happen soon.
const within = 30 * time.Second

// ledger is what writers were told, kept beside the store.
type ledger struct {
	t      *testing.T
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	acked   map[string]sallyport.Revision
	last    time.Time // of an acknowledgement
	refused map[string]int
}

// load has writers put record after record through the servers until it is ended.
func load(t *testing.T, servers ...*cached.Server) *ledger {
	ctx, cancel := context.WithCancel(context.Background())
	l := &ledger{t: t, cancel: cancel, acked: map[string]sallyport.Revision{}, refused: map[string]int{}}
	t.Cleanup(l.end)
	for w := range 2 * len(servers) {
		l.wg.Go(func() { l.write(ctx, servers[w%len(servers)], w) })
	}
	return l
}

func (l *ledger) write(ctx context.Context, s *cached.Server, w int) {
	var last sallyport.Revision
	for i := 0; ctx.Err() == nil; i++ {
		id := fmt.Sprintf("%d/%d", w, i)
		rev, err := s.Apply(context.WithoutCancel(ctx), []sallyport.Op{sallyport.Put(sallyport.KindRecord, id, i)})
		l.mu.Lock()
		if err == nil {
			if l.acked[id], l.last = rev, time.Now(); rev <= last {
				l.t.Errorf("writer %d got revision %d after %d", w, rev, last)
			}
			last = rev
		} else if l.refused[sallyport.CodeOf(err)]++; sallyport.OutcomeOf(err) != sallyport.OutcomeUnavailable {
			l.t.Errorf("writer %d: %v", w, err)
		}
		l.mu.Unlock()
	}
}

func (l *ledger) end() {
	l.cancel()
	l.wg.Wait()
}

func (l *ledger) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.acked)
}

// more waits for that many acknowledgements from now on.
func (l *ledger) more(n int) {
	l.t.Helper()
	want := l.count() + n
	eventually(l.t, fmt.Sprint(n, " more acknowledgements"), func() bool { return l.count() >= want })
}

// check ends the load and looks every acknowledged write up.
func (l *ledger) check(s cached.Store) {
	l.t.Helper()
	l.end()
	l.t.Logf("%d acknowledged, refused: %v", len(l.acked), l.refused)
	seen := map[sallyport.Revision]string{}
	for id, rev := range l.acked {
		row, err := s.Get(context.Background(), sallyport.KindRecord, id)
		if err != nil || row.Revision != rev {
			l.t.Errorf("%s was acknowledged at %d and is at %d: %v", id, rev, row.Revision, err)
		}
		if other, twice := seen[rev]; twice {
			l.t.Errorf("%s and %s have both revision %d", id, other, rev)
		}
		seen[rev] = id
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(within)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("not within %v: %s", within, what)
		case <-tick.C:
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// two starts a cluster with a standby, and returns them with a database.
func two(t *testing.T) (primary, standby *postgrestest.Cluster, database string) {
	t.Helper()
	primary = postgrestest.Start(t)
	database = primary.Database(t)
	return primary, primary.NewStandby(t, true), database
}

func of(t *testing.T, c *postgrestest.Cluster, url string) postgres.Config {
	return postgres.Config{URL: url, PasswordFile: c.PasswordFile(), Marker: filepath.Join(t.TempDir(), "postgres.marker")}
}

// TestCase_L12_Failover: the primary dies under load and its synchronous standby
// takes over. Nothing that was acknowledged is lost, the history goes on, and so
// does the service, by itself.
func TestCase_L12_Failover(t *testing.T) {
	primary, standby, db := two(t)
	url := primary.URL(db, standby)
	key := storetest.KEK()
	var servers []*cached.Server
	var stores []*postgres.Store
	for range 2 {
		stores = append(stores, open(t, of(t, primary, url)))
		servers = append(servers, storetest.Run(t, cached.Deps{Store: stores[len(stores)-1], KEK: key}))
	}
	before, err := stores[0].Head(t.Context())
	must(t, err)
	l := load(t, servers...)
	l.more(100)
	must(t, primary.Stop(syscall.SIGQUIT))
	must(t, standby.Promote())
	promoted := time.Now()
	l.more(1)
	if took := time.Since(promoted); took > 3*time.Second {
		t.Errorf("the first write after the promotion took %v; want at most 3s", took)
	} else {
		t.Logf("the first write came %v after the promotion", took)
	}
	l.more(100)
	l.check(stores[1])
	after, err := stores[1].Head(t.Context())
	must(t, err)
	if after.Epoch != before.Epoch || after.Revision <= before.Revision {
		t.Errorf("got head %+v after %+v; want the same history", after, before)
	}
	// Both servers tell what is there now, and a new one finds all rows genuine.
	for _, s := range append(servers, storetest.Run(t, cached.Deps{Store: open(t, of(t, standby, standby.URL(db))), KEK: key})) {
		eventually(t, "a server follows the new primary", func() bool {
			records, err := s.List(t.Context(), sallyport.KindRecord)
			return err == nil && len(records) >= l.count() && watches(t, s)
		})
	}
}

var errBegun = errors.New("begun")

// watches reports whether a watch may begin.
func watches(t *testing.T, s *cached.Server) bool {
	err := s.Watch(t.Context(), sallyport.WatchRequest{}, func(sallyport.WatchEvent) error { return errBegun })
	return errors.Is(err, errBegun)
}

// TestCase_L12_ConnectionsKilled: every connection is cut again and again, in the
// middle of whatever it does. A counter that is only ever raised by one tells
// whether a write was lost or made twice.
func TestCase_L12_ConnectionsKilled(t *testing.T) {
	db := cluster.Database(t)
	var stores []*postgres.Store
	for range 2 {
		stores = append(stores, open(t, config(t, cluster.URL(db))))
	}
	raise := func(tx cached.Tx) (cached.Change, error) {
		rows, err := tx.Rows(cached.Key{Kind: sallyport.KindRecord, ID: "n"})
		if err != nil {
			return cached.Change{}, err
		}
		row := cached.Row{Record: sallyport.Record{Kind: sallyport.KindRecord, ID: "n", Version: 1, Payload: []byte("1")}, MAC: []byte("mac")}
		if len(rows) > 0 {
			n, err := strconv.Atoi(string(rows[0].Payload))
			if err != nil {
				return cached.Change{}, err
			}
			row.Payload = []byte(strconv.Itoa(n + 1))
		}
		head := tx.Head()
		head.Revision++
		row.Revision = head.Revision
		return cached.Change{Rows: []cached.Row{row}, Head: head}, nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var mu sync.Mutex
	done, unknown := 0, 0
	for i := range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				err := stores[i%2].Update(context.WithoutCancel(ctx), raise)
				mu.Lock()
				switch code := sallyport.CodeOf(err); {
				case err == nil:
					done++
				case code == "storage.unknown":
					unknown++
				case code != "storage.unavailable" && code != "storage.busy":
					t.Errorf("got %v", err)
				}
				mu.Unlock()
			}
		})
	}
	for range 60 {
		cluster.KillConnections(t, db)
		<-time.After(20 * time.Millisecond)
	}
	cancel()
	wg.Wait()
	row, err := stores[0].Get(t.Context(), sallyport.KindRecord, "n")
	must(t, err)
	n, err := strconv.Atoi(string(row.Payload))
	must(t, err)
	t.Logf("%d raised, %d unknown, the counter says %d", done, unknown, n)
	if n < done || n > done+unknown || done == 0 {
		t.Errorf("got %d; want %d, and at most %d more", n, done, unknown)
	}
}

// TestCase_L12_SerializationFailure: what PostgreSQL aborts is planned anew.
func TestCase_L12_SerializationFailure(t *testing.T) {
	db := cluster.Database(t)
	server := storetest.Serve(t, open(t, config(t, cluster.URL(db))))
	cluster.Exec(t, db, `CREATE SEQUENCE sallyport.attempts`,
		`CREATE FUNCTION sallyport.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			CASE nextval('sallyport.attempts')
				WHEN 1 THEN RAISE SQLSTATE '40001';
				WHEN 2 THEN RAISE SQLSTATE '40P01';
				WHEN 3 THEN PERFORM pg_terminate_backend(pg_backend_pid());
				ELSE
			END CASE;
			RETURN NEW;
		END $$`,
		`CREATE TRIGGER refuse BEFORE INSERT ON sallyport.record FOR EACH ROW EXECUTE FUNCTION sallyport.refuse()`)
	rev, err := server.Apply(t.Context(), []sallyport.Op{sallyport.Put(sallyport.KindRecord, "a", 1)})
	if err != nil || rev != 1 {
		t.Errorf("got %d, %v; want it written as revision 1", rev, err)
	}
	if n := cluster.Query(t, db, `SELECT last_value FROM sallyport.attempts`); n != "4" {
		t.Errorf("got %s attempts; want 4", n)
	}
}

// TestCase_L12_ACutOffPrimaryCannotConfirm: the standby took over while the old
// primary lives on. Who knows only the old one falls silent; who knows both moves
// on.
func TestCase_L12_ACutOffPrimaryCannotConfirm(t *testing.T) {
	t.Parallel() // it waits more than it works
	primary, standby, db := two(t)
	key := storetest.KEK()
	stuck := storetest.Run(t, cached.Deps{Store: open(t, of(t, primary, primary.URL(db))), KEK: key})
	moves := storetest.Run(t, cached.Deps{Store: open(t, of(t, primary, primary.URL(db, standby))), KEK: key})
	put := func(s *cached.Server, id string) error {
		_, err := s.Apply(t.Context(), []sallyport.Op{sallyport.Put(sallyport.KindRecord, id, 1)})
		return err
	}
	must(t, put(stuck, "before"))
	must(t, standby.Promote())
	promoted := time.Now()
	if code := sallyport.CodeOf(put(stuck, "lost")); code != "storage.unknown" {
		t.Errorf("got %q from a primary that nobody follows; want storage.unknown", code)
	}
	if n := primary.Query(t, db, `SELECT count(*) FROM sallyport.record WHERE id = 'lost'`); n != "0" {
		t.Error("the old primary shows what nobody else has")
	}
	eventually(t, "the server on the old primary falls silent", func() bool { return !watches(t, stuck) })
	eventually(t, "the other one writes to the new primary", func() bool { return put(moves, "after") == nil })
	eventually(t, "and is sure of it", func() bool { return watches(t, moves) })
	t.Logf("the server that knows both went on %v after the promotion", time.Since(promoted))
	fresh := storetest.Run(t, cached.Deps{Store: open(t, of(t, standby, standby.URL(db))), KEK: key})
	if _, err := fresh.Get(t.Context(), sallyport.KindRecord, "after"); err != nil {
		t.Errorf("got %v; want what was written after the failover", err)
	}
	if code := sallyport.CodeOf(stuck.Ready()); watches(t, stuck) || code != "storage.not_current" {
		t.Errorf("got %q from the server on the old primary; want it waiting, as storage.not_current", code)
	}
	// A server that starts now is not taken in, either.
	if s, err := postgres.Open(t.Context(), of(t, primary, primary.URL(db))); err == nil {
		t.Error("opened a store that cannot be confirmed", s.Close())
	}
	open(t, of(t, primary, primary.URL(db, standby)))
}

// TestCase_L12_ACrashUnderLoad: PostgreSQL dies and comes back.
func TestCase_L12_ACrashUnderLoad(t *testing.T) {
	c := postgrestest.Start(t)
	s := open(t, of(t, c, c.URL(c.Database(t))))
	server := storetest.Serve(t, s)
	l := load(t, server)
	for range 3 {
		l.more(50)
		must(t, c.Stop(syscall.SIGQUIT))
		must(t, c.Start())
	}
	l.more(50)
	l.check(s)
	eventually(t, "watches may begin again", func() bool { return watches(t, server) })
}

// TestCase_L12_AReplicaIsNeverRead: a standby in the URL is passed over, and alone
// it is refused.
func TestCase_L12_AReplicaIsNeverRead(t *testing.T) {
	t.Parallel() // it waits more than it works
	primary, standby, db := two(t)
	s := open(t, of(t, primary, standby.URL(db, primary)))
	server := storetest.Serve(t, s)
	_, err := server.Apply(t.Context(), []sallyport.Op{sallyport.Put(sallyport.KindRecord, "a", 1)})
	must(t, err)
	_, err = server.Get(t.Context(), sallyport.KindRecord, "a")
	must(t, err)
	const ours = `SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sallyport-cached'`
	if n := standby.Query(t, "postgres", ours); n != "0" {
		t.Errorf("got %s connections to the standby; want none", n)
	}
	if n := primary.Query(t, "postgres", ours); n == "0" {
		t.Error("got no connection to the primary")
	}
	if _, err := postgres.Open(t.Context(), of(t, primary, standby.URL(db))); sallyport.CodeOf(err) != "storage.unavailable" {
		t.Errorf("got %v from a standby alone; want storage.unavailable", err)
	}
}

// TestCase_L12_AStandbyThatLayBehind: after the promotion of an asynchronous
// standby a store that lacks what was acknowledged is refused.
func TestCase_L12_AStandbyThatLayBehind(t *testing.T) {
	t.Parallel() // it waits more than it works
	primary := postgrestest.Start(t)
	db := primary.Database(t)
	cfg := of(t, primary, primary.URL(db))
	s, err := postgres.Open(t.Context(), cfg)
	must(t, err)
	standby := primary.NewStandby(t, false)
	standby.Exec(t, "postgres", `ALTER SYSTEM SET primary_conninfo = ''`, `SELECT pg_reload_conf()`)
	eventually(t, "the standby follows no more", func() bool {
		return primary.Query(t, "postgres", `SELECT count(*) FROM pg_stat_replication`) == "0"
	})
	err = s.Update(t.Context(), func(tx cached.Tx) (cached.Change, error) {
		head := tx.Head()
		head.Revision++
		return cached.Change{Head: head}, nil
	})
	must(t, errors.Join(err, s.Close()))
	must(t, primary.Stop(syscall.SIGQUIT))
	must(t, standby.Promote())
	cfg.URL = standby.URL(db)
	if _, err := postgres.Open(t.Context(), cfg); sallyport.CodeOf(err) != "storage.rolled_back" {
		t.Errorf("got %v; want storage.rolled_back", err)
	}
}

package cached_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/memory"
	"sallyport/cached/storetest"
	"sallyport/internal/logging"
)

func TestServer(t *testing.T) {
	storetest.Records(t, func(t *testing.T) storetest.API { return storetest.Serve(t, nil) })
}

func TestConfig(t *testing.T) {
	for _, c := range []struct {
		cfg  cached.Config
		want string // keys with faults
	}{
		{cached.Config{}, ""},
		{cached.Config{Listen: "127.0.0.1:8444", Store: "sqlite"}, ""},
		{cached.Config{Listen: "[::1]:0"}, ""},
		{cached.Config{Listen: "127.0.0.1"}, "listen"},
		{cached.Config{Listen: "127.0.0.1:http"}, "listen"},
		{cached.Config{Listen: "127.0.0.1:65536", Store: "redis"}, "listen store"},
		{cached.Config{Listen: "127.0.0.1:+1", Store: "postgres://u@h/db"}, "listen store"},
	} {
		var keys []string
		for _, f := range c.cfg.Validate() {
			keys = append(keys, f.Key)
		}
		if got := strings.Join(keys, " "); got != c.want {
			t.Errorf("%+v: got faults %q; want %q", c.cfg, got, c.want)
		}
	}
}

// TestCase_J2_PostgresURL: no password in the configuration, nothing that can be
// listened to, and no fault quotes what it refuses.
func TestCase_J2_PostgresURL(t *testing.T) {
	const secret = "hunter2-hunter2"
	for _, c := range []struct{ url, want string }{
		{"postgres://u@localhost/db", ""},
		{"postgres://u@127.0.0.1:5432,[::1]:5433/db?sslmode=disable", ""},
		{"postgresql:///db?host=/run/postgresql&search_path=two", ""},
		{"postgres://u@%2Frun%2Fpostgresql/db", ""},
		{"postgres://u@db.corp.example/db?sslmode=verify-full&sslrootcert=/ca.pem&sslcert=/c.pem&sslkey=/c.key", ""},
		{"postgres://u@a,b:5433/db?sslmode=verify-full&target_session_attrs=read-write", ""},
		{"postgres://u:" + secret + "@localhost/db", "cached.store_password_file"},
		{"postgres://u:" + secret + "@p@localhost/db", "cached.store_password_file"},
		{"postgres://localhost/db?user=u&password=" + secret, "cached.store_password_file"},
		{"postgres://u@localhost/db?sslpassword=" + secret, "cached.store_password_file"},
		{"postgres://u@db.corp.example/db", "sslmode=verify-full"},
		{"postgres://u@db.corp.example/db?sslmode=require", "sslmode=verify-full"},
		{"postgres://u@localhost,db.corp.example/db?sslmode=prefer", "sslmode=verify-full"},
		{"postgres://u@localhost/db?host=db.corp.example", "sslmode=verify-full"},
		{"postgres://u@10.0.0.7/db?sslmode=verify-ca", "sslmode=verify-full"},
		{"postgres://u@localhost/db?sslmode=disable&sslmode=verify-full", "given twice"},
		{"postgres://u@localhost/db?options=-csynchronous_commit%3Doff", "not supported"},
		{"postgres://u@localhost/db?servicefile=/tmp/" + secret, "not supported"},
		{"postgres://u@localhost/db?target_session_attrs=any", "only read from the primary"},
		{"postgres:///db", "names no host"},
		{"postgres://u@localhost/db?a=%zz", "no URL"},
	} {
		faults := cached.Config{Store: c.url}.Validate()
		text := fmt.Sprint(faults.Err())
		if c.want == "" && len(faults) > 0 || c.want != "" && !strings.Contains(text, c.want) || strings.Contains(text, secret) {
			t.Errorf("%s: got %s; want %q", c.url, text, c.want)
		}
	}
	if f := (cached.Config{StorePasswordFile: "p"}).Validate(); len(f) != 1 || f[0].Key != "store_password_file" {
		t.Errorf("got %v; want a password without PostgreSQL refused", f)
	}
}

func TestNewRefuses(t *testing.T) {
	for name, deps := range map[string]cached.Deps{
		"no store":  {MACKey: storetest.Key()},
		"no key":    {Store: memory.New()},
		"short key": {Store: memory.New(), MACKey: make([]byte, 16)},
	} {
		if _, err := cached.New(cached.Config{}, deps); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if _, err := cached.New(cached.Config{Store: "x"}, cached.Deps{Store: memory.New(), MACKey: storetest.Key()}); err == nil {
		t.Error("a bad configuration is taken")
	}
}

// store is an engine that a test can get in the way of.
type store struct {
	cached.Store

	mu     sync.Mutex
	write  func([]cached.Row) error // before each write
	groups [][]cached.Row           // what was written
	edit   func(*cached.Row)        // what a read makes of a row
}

func newStore() *store { return &store{Store: memory.New()} }

func (s *store) onWrite(f func([]cached.Row) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.write = f
}

func (s *store) Update(ctx context.Context, plan func(cached.Tx) (cached.Change, error)) error {
	return s.Store.Update(ctx, func(tx cached.Tx) (cached.Change, error) {
		c, err := plan(seenTx{tx, s})
		if err != nil || c.Empty() {
			return c, err
		}
		s.mu.Lock()
		f := s.write
		s.mu.Unlock()
		if f != nil {
			if err := f(c.Rows); err != nil {
				return c, err
			}
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.groups = append(s.groups, c.Rows)
		return c, nil
	})
}

// seenTx is a Tx whose rows are tampered with.
type seenTx struct {
	cached.Tx
	store *store
}

func (tx seenTx) Rows(keys ...cached.Key) ([]cached.Row, error) {
	rows, err := tx.Tx.Rows(keys...)
	for i := range rows {
		rows[i] = tx.store.seen(rows[i])
	}
	return rows, err
}

// tamper lets every read see what edit makes of a row.
func (s *store) tamper(edit func(*cached.Row)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.edit = edit
}

func (s *store) seen(row cached.Row) cached.Row {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.edit != nil {
		s.edit(&row)
	}
	return row
}

func (s *store) Get(ctx context.Context, kind sallyport.Kind, id string) (cached.Row, error) {
	row, err := s.Store.Get(ctx, kind, id)
	return s.seen(row), err
}

func (s *store) Scan(ctx context.Context, q cached.Query, begin func(cached.Head) error, each func(cached.Row) error) error {
	return s.Store.Scan(ctx, q, begin, func(row cached.Row) error { return each(s.seen(row)) })
}

func (s *store) Changed(ctx context.Context, after sallyport.Revision, limit int) ([]cached.Row, cached.Head, error) {
	rows, head, err := s.Store.Changed(ctx, after, limit)
	for i := range rows {
		rows[i] = s.seen(rows[i])
	}
	return rows, head, err
}

func put(kind sallyport.Kind, id string) sallyport.Op {
	return sallyport.Op{Kind: kind, ID: id, Payload: []byte(`{"id":"` + id + `"}`)}
}

func apply(t testing.TB, s *cached.Server, ops ...sallyport.Op) sallyport.Revision {
	t.Helper()
	rev, err := s.Apply(t.Context(), ops)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func TestCase_L8_ARowThatDoesNotVerifyIsMissing(t *testing.T) {
	var log bytes.Buffer
	logger, err := logging.New(&log, "warn", "text")
	if err != nil {
		t.Fatal(err)
	}
	st := newStore()
	s, err := cached.New(cached.Config{}, cached.Deps{Store: st, MACKey: storetest.Key(), Log: logger})
	if err != nil {
		t.Fatal(err)
	}
	apply(t, s, put(sallyport.KindSession, "good"))
	apply(t, s, put(sallyport.KindSession, "bad"), put(sallyport.KindCode, "secret-code"))
	good, err := st.Store.Get(t.Context(), sallyport.KindSession, "good")
	if err != nil {
		t.Fatal(err)
	}
	st.tamper(func(r *cached.Row) {
		if r.ID != "good" { // another row's sealed content
			r.Payload, r.MAC = good.Payload, good.MAC
		}
	})
	for _, k := range []sallyport.Op{put(sallyport.KindSession, "bad"), put(sallyport.KindCode, "secret-code")} {
		if _, err := s.Get(t.Context(), k.Kind, k.ID); !errors.Is(err, sallyport.ErrNotFound) {
			t.Errorf("%s: got %v; want ErrNotFound", k.Kind, err)
		}
	}
	if list, err := s.List(t.Context(), sallyport.KindSession); err != nil || len(list) != 1 || list[0].ID != "good" {
		t.Errorf("got %v, %v; want good alone", list, err)
	}
	if got := snapshotIDs(t, s); !slices.Equal(got, []string{"good"}) {
		t.Errorf("got a snapshot of %v; want good alone", got)
	}
	exists := put(sallyport.KindSession, "bad")
	exists.If = sallyport.Condition{Exists: true}
	if _, err := s.Apply(t.Context(), []sallyport.Op{exists}); !errors.Is(err, sallyport.ErrConflict) {
		t.Errorf("got %v; want ErrConflict", err)
	}
	if text := log.String(); !strings.Contains(text, "does not verify") || strings.Contains(text, "secret-code") {
		t.Errorf("got log %q; want the row named, and no id of a code", text)
	}
	st.tamper(nil)
	if _, err := s.Get(t.Context(), sallyport.KindSession, "bad"); err != nil {
		t.Errorf("untampered: %v", err)
	}
}

// pass lets time pass in a synctest bubble.
func pass(d time.Duration) { <-time.After(d) }

func snapshotIDs(t *testing.T, s *cached.Server) (list []string) {
	t.Helper()
	stop := errors.New("stop")
	err := s.Watch(t.Context(), sallyport.WatchRequest{}, func(ev sallyport.WatchEvent) error {
		for _, r := range ev.Records {
			list = append(list, r.ID)
		}
		if ev.Type == sallyport.WatchEnd {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) {
		t.Fatal(err)
	}
	return list
}

// A watch whose receiver stops for a while must not lose a change, although the
// ring forgets: it reads them from the store, in one piece.
func TestSlowWatchReadsFromTheStore(t *testing.T) {
	st := newStore()
	s := storetest.Run(t, cached.Deps{Store: st, MACKey: storetest.Key()})
	cached.BoundFeed(s, 4)
	apply(t, s, put(sallyport.KindUser, "first"))
	have := map[string]sallyport.Revision{}
	var last, caughtUp sallyport.Revision
	stop := errors.New("stop")
	err := s.Watch(t.Context(), sallyport.WatchRequest{}, func(ev sallyport.WatchEvent) error {
		if ev.Type == sallyport.WatchEnd {
			for i := range 50 { // while the receiver is here, the ring goes on
				apply(t, s, put(sallyport.KindUser, fmt.Sprint("u", i%20)), put(sallyport.KindDevice, fmt.Sprint("d", i%20)))
			}
			apply(t, s, put(sallyport.KindUser, "bad"))
			st.tamper(func(r *cached.Row) {
				if r.ID == "bad" {
					r.Version++
				}
			})
			last = apply(t, s, sallyport.Op{Kind: sallyport.KindUser, ID: "first", Delete: true})
		}
		for _, r := range ev.Records {
			if have[r.ID] = r.Revision; r.Deleted {
				delete(have, r.ID)
			}
		}
		if ev.Type == sallyport.WatchChange {
			caughtUp = ev.Revision
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || caughtUp != last || len(have) != 40 {
		t.Errorf("got %d records at %d, %v; want 40 at %d in one piece", len(have), caughtUp, err, last)
	}
}

func TestWatchTooFarBehindStartsAgain(t *testing.T) {
	s := storetest.Serve(t, nil)
	cached.BoundFeed(s, 1)
	var batch []sallyport.Op
	for i := range cached.CatchUpMax {
		batch = append(batch, put(sallyport.KindUser, fmt.Sprint("u", i)))
	}
	err := s.Watch(t.Context(), sallyport.WatchRequest{}, func(ev sallyport.WatchEvent) error {
		if ev.Type == sallyport.WatchEnd {
			apply(t, s, batch...)
			apply(t, s, put(sallyport.KindUser, "one more"))
			apply(t, s, put(sallyport.KindUser, "and another"))
		}
		return nil
	})
	if !errors.Is(err, sallyport.ErrCompacted) {
		t.Errorf("got %v; want ErrCompacted", err)
	}
}

func TestExpiryIsToTheInstant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := storetest.Serve(t, nil)
		op := put(sallyport.KindSession, "s")
		op.Expires = time.Now().Add(400 * time.Millisecond)
		apply(t, s, op)
		pass(400*time.Millisecond - 1)
		if _, err := s.Get(t.Context(), op.Kind, op.ID); err != nil {
			t.Errorf("a nanosecond before its end: %v", err)
		}
		pass(1)
		if _, err := s.Get(t.Context(), op.Kind, op.ID); !errors.Is(err, sallyport.ErrNotFound) {
			t.Errorf("at its end: got %v; want ErrNotFound", err)
		}
	})
}

func TestOldTombstonesAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st, key := memory.New(), storetest.Key()
		s := storetest.Run(t, cached.Deps{Store: st, MACKey: key})
		old := apply(t, s, put(sallyport.KindUser, "a"), put(sallyport.KindUser, "b"))
		apply(t, s, sallyport.Op{Kind: sallyport.KindUser, ID: "a", Delete: true})
		pass(30 * time.Minute)
		young := apply(t, s, sallyport.Op{Kind: sallyport.KindUser, ID: "b", Delete: true})
		state, err := st.Head(t.Context())
		if err != nil || state.Compacted != 0 {
			t.Errorf("after half an hour: got %+v, %v; want nothing compacted", state, err)
		}
		pass(45 * time.Minute)
		synctest.Wait()
		if state, _ = st.Head(t.Context()); state.Compacted <= old || state.Compacted >= young {
			t.Errorf("got %+v; want compacted between %d and %d", state, old, young)
		}
		rows, _, err := st.Changed(t.Context(), 0, 10)
		if err != nil || len(rows) != 1 || rows[0].ID != "b" {
			t.Errorf("got %v, %v; want the tombstone of b alone", rows, err)
		}
		restarted, err := cached.New(cached.Config{}, cached.Deps{Store: st, MACKey: key})
		if err != nil {
			t.Fatal(err)
		}
		q := sallyport.WatchRequest{Epoch: state.Epoch, Since: old}
		if err := restarted.Watch(t.Context(), q, nil); !errors.Is(err, sallyport.ErrCompacted) {
			t.Errorf("got %v; want ErrCompacted", err)
		}
	})
}

func TestHeartbeatsAreASecondApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := storetest.Serve(t, nil)
		start := time.Now()
		n := 0
		stop := errors.New("stop")
		err := s.Watch(t.Context(), sallyport.WatchRequest{}, func(ev sallyport.WatchEvent) error {
			if ev.Type != sallyport.WatchHeartbeat {
				return nil
			}
			if n++; time.Since(start) != time.Duration(n)*time.Second {
				t.Errorf("heartbeat %d came after %v", n, time.Since(start))
			}
			if n == 5 {
				return stop
			}
			return nil
		})
		if !errors.Is(err, stop) {
			t.Error(err)
		}
	})
}

var errBusy = &sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: "storage.busy", Message: "busy"}

func TestLeaseIsLostWhenItCannotBeRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := newStore()
		s := storetest.Run(t, cached.Deps{Store: st, MACKey: storetest.Key()})
		const ttl = 10 * time.Second
		start := time.Now()
		err := s.Lease(t.Context(), "x", ttl, func(held context.Context) error {
			st.onWrite(func([]cached.Row) error { return errBusy })
			<-held.Done()
			if lost := time.Since(start); lost > ttl || lost < ttl-time.Second {
				t.Errorf("lost after %v; want just before %v", lost, ttl)
			}
			st.onWrite(nil)
			pass(time.Second)
			return s.Lease(t.Context(), "x", ttl, func(next context.Context) error { return next.Err() })
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// A holder that was away too long must neither prolong nor give back the lease
// that another has by now.
func TestAnOldHolderDoesNotEndTheNewLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := newStore()
		s := storetest.Run(t, cached.Deps{Store: st, MACKey: storetest.Key()})
		const ttl = 10 * time.Second
		away := make(chan struct{})
		old := make(chan error)
		go func() {
			old <- s.Lease(t.Context(), "x", ttl, func(held context.Context) error {
				st.onWrite(func([]cached.Row) error { return errBusy })
				<-held.Done()
				st.onWrite(nil)
				<-away
				return nil
			})
		}()
		pass(ttl + time.Second)
		err := s.Lease(t.Context(), "x", ttl, func(context.Context) error {
			close(away)
			if err := <-old; err != nil {
				t.Error(err)
			}
			third := s.Lease(t.Context(), "x", ttl, func(context.Context) error { return nil })
			if !errors.Is(third, sallyport.ErrLeaseHeld) {
				t.Errorf("got %v; want ErrLeaseHeld", third)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// While one flush is under way everybody else waits for the next one.
func TestWritesAreGrouped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := newStore()
		s := storetest.Run(t, cached.Deps{Store: st, MACKey: storetest.Key()})
		release := make(chan struct{})
		st.onWrite(func([]cached.Row) error { <-release; return nil })
		results := make(chan error)
		for i := range 50 {
			go func() {
				op := put(sallyport.KindUser, fmt.Sprint("u", i))
				op.If.Absent = true
				_, err := s.Apply(t.Context(), []sallyport.Op{op})
				results <- err
			}()
			synctest.Wait()
		}
		close(release)
		for range 50 {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
		if len(st.groups) != 2 || len(st.groups[1]) != 49 {
			t.Errorf("got %d writes; want one, and one for the 49 who waited", len(st.groups))
		}
		for i, row := range st.groups[1] {
			if row.Revision != sallyport.Revision(i+2) {
				t.Errorf("row %d has revision %d; want one for each batch", i, row.Revision)
			}
		}
	})
}

// In a group, a batch sees what the batches before it write.
func TestBatchesOfAGroupSeeEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := newStore()
		s := storetest.Run(t, cached.Deps{Store: st, MACKey: storetest.Key()})
		release := make(chan struct{})
		st.onWrite(func([]cached.Row) error { <-release; return nil })
		apply := func(op sallyport.Op) <-chan error {
			done := make(chan error, 1)
			go func() {
				_, err := s.Apply(t.Context(), []sallyport.Op{op})
				done <- err
			}()
			synctest.Wait()
			return done
		}
		first := put(sallyport.KindCode, "once")
		use := sallyport.Op{Kind: sallyport.KindCode, ID: "once", Delete: true, If: sallyport.Condition{Exists: true}}
		blocked := apply(put(sallyport.KindUser, "u"))
		made, used, again := apply(first), apply(use), apply(use)
		close(release)
		if err := errors.Join(<-blocked, <-made, <-used); err != nil {
			t.Error(err)
		}
		if err := <-again; !errors.Is(err, sallyport.ErrConflict) {
			t.Errorf("a code is used twice: got %v; want ErrConflict", err)
		}
	})
}

func TestApplyIsWithdrawnWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := newStore()
		s := storetest.Run(t, cached.Deps{Store: st, MACKey: storetest.Key()})
		release := make(chan struct{})
		st.onWrite(func([]cached.Row) error { <-release; return nil })
		first := make(chan error, 1)
		go func() {
			_, err := s.Apply(t.Context(), []sallyport.Op{put(sallyport.KindUser, "first")})
			first <- err
		}()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.Apply(ctx, []sallyport.Op{put(sallyport.KindUser, "second")}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v; want context.DeadlineExceeded", err)
		}
		close(release)
		if err := <-first; err != nil {
			t.Error(err)
		}
		if _, err := s.Get(t.Context(), sallyport.KindUser, "second"); !errors.Is(err, sallyport.ErrNotFound) {
			t.Errorf("got %v; want what was withdrawn not written", err)
		}
	})
}

func TestABusyStoreIsNoEnd(t *testing.T) {
	st := newStore()
	s := storetest.Run(t, cached.Deps{Store: st, MACKey: storetest.Key()})
	st.onWrite(func([]cached.Row) error { return errBusy })
	if _, err := s.Apply(t.Context(), []sallyport.Op{put(sallyport.KindUser, "u")}); sallyport.CodeOf(err) != "storage.busy" {
		t.Errorf("got %v; want storage.busy", err)
	}
	st.onWrite(nil)
	if rev := apply(t, s, put(sallyport.KindUser, "u")); rev != 1 || s.Ready() != nil {
		t.Errorf("got revision %d, ready %v; want 1, and ready", rev, s.Ready())
	}
}

// After a failed flush nothing is known: no further write, and Run ends so that
// the daemon does.
func TestCase_L4_ABrokenStoreEndsTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := newStore()
		s, err := cached.New(cached.Config{}, cached.Deps{Store: st, MACKey: storetest.Key()})
		if err != nil {
			t.Fatal(err)
		}
		ran, watched := make(chan error, 1), make(chan error, 1)
		go func() { ran <- s.Run(t.Context()) }()
		go func() {
			watched <- s.Watch(t.Context(), sallyport.WatchRequest{}, func(sallyport.WatchEvent) error { return nil })
		}()
		synctest.Wait()
		st.onWrite(func([]cached.Row) error { return fmt.Errorf("flush: %w", cached.ErrBroken) })
		_, err = s.Apply(t.Context(), []sallyport.Op{put(sallyport.KindUser, "u")})
		for what, err := range map[string]error{"apply": err, "run": <-ran, "watch": <-watched, "ready": s.Ready()} {
			if sallyport.CodeOf(err) != "storage.failed" || sallyport.OutcomeOf(err) != sallyport.OutcomeUnavailable {
				t.Errorf("%s: got %v; want storage.failed", what, err)
			}
		}
		st.onWrite(nil)
		if _, err := s.Apply(t.Context(), []sallyport.Op{put(sallyport.KindUser, "u")}); err == nil {
			t.Error("a write after a failed one is taken")
		}
	})
}

func TestCloseEndsWatchesAndRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := cached.New(cached.Config{}, cached.Deps{Store: memory.New(), MACKey: storetest.Key()})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ran, watched, leased := make(chan error, 1), make(chan error, 1), make(chan error, 1)
		go func() { ran <- s.Run(ctx) }()
		go func() {
			watched <- s.Watch(t.Context(), sallyport.WatchRequest{}, func(sallyport.WatchEvent) error { return nil })
		}()
		go func() {
			leased <- s.Lease(t.Context(), "x", time.Hour, func(held context.Context) error {
				<-held.Done()
				return nil
			})
		}()
		synctest.Wait()
		cancel()
		if err := errors.Join(<-ran, <-leased); err != nil {
			t.Error(err)
		}
		_, getErr := s.Get(t.Context(), sallyport.KindUser, "u")
		_, applyErr := s.Apply(t.Context(), []sallyport.Op{put(sallyport.KindUser, "u")})
		_, listErr := s.List(t.Context(), sallyport.KindUser)
		for what, err := range map[string]error{"watch": <-watched, "get": getErr, "apply": applyErr, "list": listErr} {
			if sallyport.CodeOf(err) != "storage.closed" {
				t.Errorf("%s: got %v; want storage.closed", what, err)
			}
		}
	})
}

// auditor keeps records, or refuses them.
type auditor struct {
	mu      sync.Mutex
	err     error
	records []sallyport.AuditRecord
}

func (a *auditor) Append(_ context.Context, r sallyport.AuditRecord) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		return a.err
	}
	a.records = append(a.records, r)
	return nil
}

func (a *auditor) take() (details []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range a.records {
		details = append(details, r.Type+": "+r.Detail)
	}
	a.records = nil
	return details
}

func TestChangesAreAudited(t *testing.T) {
	st, audit := newStore(), &auditor{}
	s := storetest.Run(t, cached.Deps{Store: st, MACKey: storetest.Key(), Audit: audit})
	session := sallyport.Put(sallyport.KindSession, "s1", sallyport.Session{ID: "s1", User: "alice", Claims: map[string]any{"x": "canary"}})
	for _, step := range []struct {
		do   func()
		want []string
	}{
		{func() { apply(t, s, session, put(sallyport.KindCode, "canary")) }, []string{"change: put session s1 at revision 1"}},
		{func() { apply(t, s, put(sallyport.KindConfig, "current")) }, []string{"config.apply: put config current at revision 2"}},
		{func() { apply(t, s, sallyport.Op{Kind: sallyport.KindUser, ID: "nobody", Delete: true}) }, nil},
		{func() {
			if _, err := s.Revoke(t.Context(), sallyport.Revocation{
				Subjects: []sallyport.Subject{{Kind: sallyport.SubjectUser, ID: "alice"}}, Reason: "left", By: "root",
			}); err != nil {
				t.Error(err)
			}
		}, []string{"revocation: user:alice by root: left", "change: delete session s1 at revision 3 (revoked)"}},
		{func() {
			st.onWrite(func([]cached.Row) error { return errBusy })
			if _, err := s.Apply(t.Context(), []sallyport.Op{put(sallyport.KindUser, "u")}); err == nil {
				t.Error("a failing store takes a write")
			}
			st.onWrite(nil)
		}, []string{"change: put user u at revision 4", "change: revisions 4 to 4 were not written"}},
	} {
		step.do()
		if got := audit.take(); !slices.Equal(got, step.want) {
			t.Errorf("got audit %q; want %q", got, step.want)
		}
	}
}

func TestWhatCannotBeAuditedIsRefusedUnlessItTakesAway(t *testing.T) {
	audit := &auditor{}
	s := storetest.Run(t, cached.Deps{Store: memory.New(), MACKey: storetest.Key(), Audit: audit})
	apply(t, s, put(sallyport.KindUser, "u"), put(sallyport.KindSession, "s"), put(sallyport.KindSession, "r"), put(sallyport.KindDevice, "d"))
	audit.mu.Lock()
	audit.err = errors.New("disk full")
	audit.mu.Unlock()
	for _, batch := range [][]sallyport.Op{
		{put(sallyport.KindUser, "v")},
		{{Kind: sallyport.KindUser, ID: "u", Delete: true}, put(sallyport.KindUser, "v")},
	} {
		if _, err := s.Apply(t.Context(), batch); sallyport.CodeOf(err) != "audit.unavailable" {
			t.Errorf("got %v; want audit.unavailable", err)
		}
	}
	if _, err := s.Get(t.Context(), sallyport.KindUser, "u"); err != nil {
		t.Errorf("something of a refused batch was done: %v", err)
	}
	apply(t, s, sallyport.Op{Kind: sallyport.KindSession, ID: "s", Delete: true})
	for subject, want := range map[sallyport.Subject]int{
		{Kind: sallyport.SubjectSession, ID: "r"}: 1,
		{Kind: sallyport.SubjectDevice, ID: "d"}:  0,
	} {
		got, err := s.Revoke(t.Context(), sallyport.Revocation{Subjects: []sallyport.Subject{subject}})
		if err != nil || got.Sessions != want {
			t.Errorf("%v: got %+v, %v; want %d sessions ended", subject, got, err, want)
		}
	}
}

func TestRevocationSurvivesARowThatDoesNotVerify(t *testing.T) {
	st := newStore()
	s := storetest.Run(t, cached.Deps{Store: st, MACKey: storetest.Key()})
	apply(t, s,
		sallyport.Put(sallyport.KindSession, "s1", sallyport.Session{Login: "l1", User: "alice"}),
		sallyport.Put(sallyport.KindSession, "s2", sallyport.Session{Login: "l2", User: "alice"}))
	st.tamper(func(r *cached.Row) {
		if r.ID == "s2" {
			r.Payload = []byte("{}")
		}
	})
	got, err := s.Revoke(t.Context(), sallyport.Revocation{Subjects: []sallyport.Subject{{Kind: sallyport.SubjectSession, ID: "s2"}}})
	if err != nil || got.Sessions != 0 {
		t.Errorf("got %+v, %v; want no live session ended", got, err)
	}
	st.tamper(nil)
	if _, err := s.Get(t.Context(), sallyport.KindSession, "s2"); !errors.Is(err, sallyport.ErrNotFound) {
		t.Errorf("got %v; want the row gone, should its bytes come back", err)
	}
}

func BenchmarkGet(b *testing.B) {
	s := storetest.Serve(b, nil)
	apply(b, s, put(sallyport.KindSession, "s"))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Get(b.Context(), sallyport.KindSession, "s"); err != nil {
			b.Fatal(err)
		}
	}
}

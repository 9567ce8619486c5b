package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport"
	"sallyport/cached"
)

// Store runs the suite of the engines. open returns an empty one, which lives
// until the (sub)test ends.
func Store(t *testing.T, open func(t *testing.T) cached.Store) {
	for _, c := range storeCases {
		t.Run(c.name, func(t *testing.T) { c.run(t, &engine{t, open(t)}) })
	}
}

var storeCases = []struct {
	name string
	run  func(*testing.T, *engine)
}{
	{"a new store is empty", storeEmpty},
	{"a row comes back as it was written", storeRoundTrip},
	{"the last row of a record counts", storeReplaces},
	{"a scan is one instant", storeScanInstant},
	{"a scan leaves out tombstones and other kinds", storeScanKinds},
	{"a scan ends with the first error", storeScanError},
	{"changes come in order of revision", storeChanged},
	{"rows are found by their owners", storeOwned},
	{"what has ended is found, oldest first", storeExpired},
	{"a scan may ask for tombstones", storeScanTombstones},
	{"old tombstones are found and forgotten", storeForgets},
	{"a plan sees the store, and its error writes nothing", storePlans},
	{"plans are carried out one after the other", storeOneAfterTheOther},
	{"rows belong to the caller", storeOwnership},
	{"readers are not in the way of the writer", storeConcurrent},
	{"rows may hold any bytes", storeAnyBytes},
	{"many rows are written at once", storeManyRows},
	{"a watch from before what was forgotten starts again with a snapshot", servedCompacted},
	{"closing ends waiting watches", servedCloses},
	{"a lease is lost with its server", servedLosesLease},
}

// engine is a store with the few moves that the cases need.
type engine struct {
	t *testing.T
	cached.Store
}

// write writes rows as a server would: the head follows the last of them.
func (e *engine) write(rows ...cached.Row) {
	e.t.Helper()
	e.update(func(tx cached.Tx) cached.Change {
		head := tx.Head()
		head.Revision, head.Seal = rows[len(rows)-1].Revision, []byte("sealed")
		return cached.Change{Rows: rows, Head: head}
	})
}

func (e *engine) update(plan func(cached.Tx) cached.Change) {
	e.t.Helper()
	err := e.Update(e.t.Context(), func(tx cached.Tx) (cached.Change, error) { return plan(tx), nil })
	if err != nil {
		e.t.Fatal(err)
	}
}

func (e *engine) head() cached.Head {
	e.t.Helper()
	head, err := e.Head(e.t.Context())
	if err != nil {
		e.t.Fatal(err)
	}
	return head
}

func (e *engine) scan(kinds ...sallyport.Kind) []cached.Row {
	e.t.Helper()
	rows := []cached.Row{}
	err := e.Scan(e.t.Context(), cached.Query{Kinds: kinds}, func(cached.Head) error { return nil }, func(row cached.Row) error {
		rows = append(rows, row)
		return nil
	})
	if err != nil {
		e.t.Fatal(err)
	}
	slices.SortFunc(rows, func(a, b cached.Row) int { return int(a.Revision) - int(b.Revision) })
	return rows
}

func ids(rows []cached.Row) []string {
	list := []string{}
	for _, row := range rows {
		list = append(list, row.ID)
	}
	return list
}

func row(kind sallyport.Kind, id string, rev sallyport.Revision, edit ...func(*cached.Row)) cached.Row {
	r := cached.Row{MAC: []byte{1, 2, 3, byte(rev)}}
	r.Kind, r.ID, r.Version, r.Revision = kind, id, 1, rev
	r.Payload = fmt.Appendf(nil, `{"id":%q,"n":%d}`, id, rev)
	for _, f := range edit {
		f(&r)
	}
	return r
}

func tombstone(r *cached.Row) { r.Deleted, r.Payload, r.Owner = true, nil, cached.Owner{} }

func owned(o cached.Owner) func(*cached.Row) { return func(r *cached.Row) { r.Owner = o } }

func expires(at time.Time) func(*cached.Row) { return func(r *cached.Row) { r.Expires = at } }

func same(t *testing.T, got, want any) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("got (+) differs from want (-):\n%s", d)
	}
}

func storeEmpty(t *testing.T, s *engine) {
	head := s.head()
	if head.Epoch == "" || head.Revision != 0 || head.Compacted != 0 || len(head.Seal) != 0 {
		t.Errorf("got head %+v; want an epoch at revision 0", head)
	}
	if _, err := s.Get(t.Context(), sallyport.KindUser, "u"); !errors.Is(err, sallyport.ErrNotFound) {
		t.Errorf("got %v; want ErrNotFound", err)
	}
	same(t, s.scan(), []cached.Row{})
}

func storeRoundTrip(t *testing.T, s *engine) {
	all := cached.Row{
		Record: sallyport.Record{
			Kind: sallyport.KindIDPToken, ID: "id \"'%_äö", Version: 65535, Payload: []byte{0, 255, '\n', 0},
			Revision: 1 << 40, Expires: time.Unix(1_800_000_000, 123456789).UTC(),
		},
		Owner: cached.Owner{Login: "l", User: "u", Device: "d"},
		MAC:   bytes.Repeat([]byte{0xfe}, 32),
	}
	s.write(all)
	got, err := s.Get(t.Context(), all.Kind, all.ID)
	if err != nil {
		t.Fatal(err)
	}
	same(t, got, all)
	none := row(sallyport.KindUser, "u", 1<<40+1, func(r *cached.Row) { r.Payload = nil })
	s.write(none)
	if got, err = s.Get(t.Context(), none.Kind, none.ID); err != nil {
		t.Fatal(err)
	}
	same(t, got, none)
}

func storeReplaces(t *testing.T, s *engine) {
	u := sallyport.KindUser
	s.write(row(u, "a", 1), row(u, "b", 1), row(u, "a", 2))
	s.write(row(u, "b", 3, tombstone))
	same(t, s.scan(), []cached.Row{row(u, "a", 2)})
	got, err := s.Get(t.Context(), u, "b")
	if err != nil {
		t.Fatal(err)
	}
	same(t, got, row(u, "b", 3, tombstone))
	if rev := s.head().Revision; rev != 3 {
		t.Errorf("got revision %d; want 3", rev)
	}
}

func storeScanInstant(t *testing.T, s *engine) {
	for i := range sallyport.Revision(100) {
		s.write(row(sallyport.KindUser, fmt.Sprint("u", i), i+1))
	}
	seen := 0
	var at sallyport.Revision
	err := s.Scan(t.Context(), cached.Query{}, func(head cached.Head) error {
		at = head.Revision
		return nil
	}, func(r cached.Row) error {
		if seen == 0 { // writes meanwhile are not seen
			s.write(row(sallyport.KindUser, "u99", 101), row(sallyport.KindUser, "new", 102))
		}
		if seen++; r.Revision > at {
			t.Errorf("scan at %d sees revision %d", at, r.Revision)
		}
		return nil
	})
	if err != nil || seen != 100 || at != 100 {
		t.Errorf("got %d rows at %d, %v; want 100 at 100", seen, at, err)
	}
}

func storeScanKinds(t *testing.T, s *engine) {
	s.write(row(sallyport.KindUser, "a", 1), row(sallyport.KindDevice, "b", 2), row(sallyport.KindTrust, "c", 3),
		row(sallyport.KindUser, "d", 4, tombstone))
	same(t, ids(s.scan(sallyport.KindUser, sallyport.KindTrust)), []string{"a", "c"})
	same(t, ids(s.scan(sallyport.KindPosture)), []string{})
}

func storeScanError(t *testing.T, s *engine) {
	s.write(row(sallyport.KindUser, "a", 1), row(sallyport.KindUser, "b", 2))
	stop := errors.New("stop")
	none := func(cached.Head) error { return nil }
	if err := s.Scan(t.Context(), cached.Query{}, func(cached.Head) error { return stop }, nil); !errors.Is(err, stop) {
		t.Errorf("got %v; want begin's error", err)
	}
	n := 0
	if err := s.Scan(t.Context(), cached.Query{}, none, func(cached.Row) error { n++; return stop }); !errors.Is(err, stop) || n != 1 {
		t.Errorf("got %v after %d rows; want each's error after 1", err, n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Scan(ctx, cached.Query{}, none, func(cached.Row) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v; want context.Canceled", err)
	}
}

func storeChanged(t *testing.T, s *engine) {
	u := sallyport.KindUser
	s.write(row(u, "a", 1), row(u, "b", 2), row(u, "c", 2), row(u, "d", 4))
	s.write(row(u, "b", 5), row(u, "d", 6, tombstone))
	for _, c := range []struct {
		after sallyport.Revision
		limit int
		want  []string
	}{
		{0, 10, []string{"a", "c", "b", "d"}},
		{2, 10, []string{"b", "d"}},
		{0, 3, []string{"a", "c", "b"}},
		{6, 10, []string{}},
	} {
		rows, head, err := s.Changed(t.Context(), c.after, c.limit)
		if err != nil {
			t.Fatal(err)
		}
		same(t, ids(rows), c.want)
		same(t, head, s.head())
	}
}

func storeOwned(t *testing.T, s *engine) {
	of := func(l sallyport.LoginID, u sallyport.UserID, d sallyport.DeviceID) cached.Owner {
		return cached.Owner{Login: l, User: u, Device: d}
	}
	s.write(
		row(sallyport.KindLogin, "l1", 1, owned(of("", "alice", ""))),
		row(sallyport.KindSession, "s1", 2, owned(of("l1", "alice", "d1"))),
		row(sallyport.KindSession, "s2", 3, owned(of("l1", "alice", ""))),
		row(sallyport.KindSession, "s3", 4, owned(of("l2", "bob", "d1"))),
		row(sallyport.KindSession, "s4", 5, owned(of("l1", "alice", "d1"))),
	)
	s.write(row(sallyport.KindSession, "s4", 6, tombstone))
	for _, c := range []struct {
		owner cached.Owner
		want  []string
	}{
		{of("", "alice", ""), []string{"l1", "s1", "s2"}},
		{of("l1", "", ""), []string{"s1", "s2"}},
		{of("", "", "d1"), []string{"s1", "s3"}},
		{of("l2", "", "d1"), []string{"s1", "s3"}},
		{of("", "carol", ""), []string{}},
		{of("", "", ""), []string{}},
	} {
		s.update(func(tx cached.Tx) cached.Change {
			rows, err := tx.Owned(c.owner)
			if err != nil {
				t.Fatal(err)
			}
			got := ids(rows)
			slices.Sort(got)
			same(t, got, c.want)
			return cached.Change{}
		})
	}
}

func storeExpired(t *testing.T, s *engine) {
	now := time.Unix(1_800_000_000, 0).UTC()
	s.write(
		row(sallyport.KindCode, "later", 1, expires(now.Add(1))),
		row(sallyport.KindCode, "now", 2, expires(now)),
		row(sallyport.KindCode, "never", 3),
		row(sallyport.KindCode, "long ago", 4, expires(now.Add(-time.Hour))),
		row(sallyport.KindCode, "gone", 5, expires(now.Add(-time.Hour)), tombstone),
	)
	for limit, want := range map[int][]string{10: {"long ago", "now"}, 1: {"long ago"}} {
		rows, err := s.Expired(t.Context(), now, limit)
		if err != nil {
			t.Fatal(err)
		}
		same(t, ids(rows), want)
	}
}

func storeForgets(t *testing.T, s *engine) {
	u := sallyport.KindUser
	s.write(row(u, "a", 1, tombstone), row(u, "b", 2), row(u, "c", 3, tombstone), row(u, "d", 4, tombstone))
	forget := func(upTo sallyport.Revision, limit, want int) {
		t.Helper()
		s.update(func(tx cached.Tx) cached.Change {
			rows, err := tx.Tombstones(upTo, limit)
			if err != nil || len(rows) != want {
				t.Errorf("got %d tombstones, %v; want %d", len(rows), err, want)
			}
			c := cached.Change{Head: tx.Head()}
			c.Head.Compacted, c.Head.Seal = max(c.Head.Compacted, upTo), []byte("sealed")
			for _, row := range rows {
				c.Forget = append(c.Forget, row.Key())
			}
			return c
		})
	}
	forget(3, 1, 1)
	forget(3, 10, 1)
	forget(4, 10, 1) // the last revision of all
	same(t, ids(s.scan()), []string{"b"})
	if head := s.head(); head.Compacted != 4 || head.Revision != 4 {
		t.Errorf("got head %+v; want revision 4, compacted 4", head)
	}
}

func storePlans(t *testing.T, s *engine) {
	u := sallyport.KindUser
	s.write(row(u, "a", 1), row(u, "b", 2), row(u, "c", 2, tombstone))
	before := s.head()
	stop := errors.New("stop")
	err := s.Update(t.Context(), func(tx cached.Tx) (cached.Change, error) {
		same(t, tx.Head(), before)
		rows, err := tx.Rows(cached.Key{Kind: u, ID: "c"}, cached.Key{Kind: u, ID: "x"}, cached.Key{Kind: u, ID: "a"}, cached.Key{Kind: sallyport.KindDevice, ID: "b"})
		if err != nil {
			return cached.Change{}, err
		}
		got := ids(rows)
		slices.Sort(got)
		same(t, got, []string{"a", "c"})
		head := tx.Head()
		head.Revision = 3
		return cached.Change{Rows: []cached.Row{row(u, "a", 3)}, Head: head}, stop
	})
	if !errors.Is(err, stop) {
		t.Errorf("got %v; want the plan's error", err)
	}
	s.update(func(cached.Tx) cached.Change { return cached.Change{} })
	same(t, s.head(), before)
	same(t, ids(s.scan()), []string{"a", "b"})
}

// Plans that read what the plan before them wrote must see it.
func storeOneAfterTheOther(t *testing.T, s *engine) {
	const writers, each = 8, 10
	s.write(row(sallyport.KindUser, "n", 1))
	errs := make(chan error, writers)
	for range writers {
		go func() {
			errs <- func() error {
				for range each {
					err := s.Update(context.Background(), func(tx cached.Tx) (cached.Change, error) {
						rows, err := tx.Rows(cached.Key{Kind: sallyport.KindUser, ID: "n"})
						if err != nil {
							return cached.Change{}, err
						}
						head := tx.Head()
						if rows[0].Revision != head.Revision {
							return cached.Change{}, fmt.Errorf("row at %d, head at %d", rows[0].Revision, head.Revision)
						}
						head.Revision++
						return cached.Change{Rows: []cached.Row{row(sallyport.KindUser, "n", head.Revision)}, Head: head}, nil
					})
					if err != nil {
						return err
					}
				}
				return nil
			}()
		}()
	}
	for range writers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if rev := s.head().Revision; rev != 1+writers*each {
		t.Errorf("got revision %d; want %d", rev, 1+writers*each)
	}
}

func storeScanTombstones(t *testing.T, s *engine) {
	s.write(row(sallyport.KindUser, "a", 1), row(sallyport.KindUser, "b", 2, tombstone), row(sallyport.KindDevice, "c", 3, tombstone))
	got := []string{}
	err := s.Scan(t.Context(), cached.Query{Kinds: []sallyport.Kind{sallyport.KindUser}, Tombstones: true},
		func(cached.Head) error { return nil },
		func(r cached.Row) error { got = append(got, r.ID); return nil })
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	same(t, got, []string{"a", "b"})
}

func storeOwnership(t *testing.T, s *engine) {
	want := row(sallyport.KindUser, "a", 1)
	mine := row(sallyport.KindUser, "a", 1)
	s.write(mine)
	clear(mine.Payload)
	clear(mine.MAC)
	for range 2 {
		got, err := s.Get(t.Context(), sallyport.KindUser, "a")
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, want)
		clear(got.Payload)
		clear(got.MAC)
	}
}

func storeConcurrent(t *testing.T, s *engine) {
	const writes = 100
	done := make(chan error, 4)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.write(row(sallyport.KindUser, "a", 1), row(sallyport.KindUser, "b", 1))
	for range cap(done) {
		go func() {
			for ctx.Err() == nil {
				if err := untorn(s); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for i := range sallyport.Revision(writes) {
		s.write(row(sallyport.KindUser, "a", i+2), row(sallyport.KindUser, "b", i+2))
	}
	cancel()
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// untorn reads two rows that are only ever written together.
func untorn(s *engine) error {
	rows, _, err := s.Changed(context.Background(), 0, 10)
	if err != nil {
		return err
	}
	if len(rows) != 2 || rows[0].Revision != rows[1].Revision {
		return fmt.Errorf("got %d rows, the first at revision %d; want both of one write", len(rows), rows[0].Revision)
	}
	return nil
}

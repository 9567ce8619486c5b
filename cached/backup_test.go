package cached_test

import (
	"bytes"
	"context"
	"io"
	"slices"
	"testing"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/memory"
	"sallyport/cached/storetest"
	"sallyport/internal/keyring"
)

// backedUp is a server with two sessions, a revoked session's tombstone, a device
// and a code, and a backup of it.
func backedUp(t testing.TB) (deps cached.Deps, backup []byte) {
	t.Helper()
	deps = cached.Deps{Store: memory.New(), KEK: storetest.KEK()}
	s := storetest.Run(t, deps)
	for _, batch := range [][]sallyport.Op{
		{
			sallyport.Put(sallyport.KindSession, "s1", sallyport.Session{ID: "s1", User: "u1", Device: "d1"}),
			sallyport.Put(sallyport.KindSession, "s2", sallyport.Session{ID: "s2", User: "u2"}),
			sallyport.Put(sallyport.KindSession, "gone", sallyport.Session{ID: "gone"}),
			sallyport.Put(sallyport.KindUser, "u1", sallyport.User{ID: "u1"}),
			sallyport.Put(sallyport.KindDevice, "d1", sallyport.Device{ID: "d1", Name: "laptop"}),
			sallyport.Put(sallyport.KindCode, "c1", map[string]string{"sealed": "x"}),
		},
		{{Kind: sallyport.KindSession, ID: "gone", Delete: true}},
	} {
		if _, err := s.Apply(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	if err := s.Backup(t.Context(), &out); err != nil {
		t.Fatal(err)
	}
	return deps, out.Bytes()
}

// restored restores the backup into an empty store and serves it.
func restored(t *testing.T, deps cached.Deps, backup []byte, opts cached.RestoreOptions) (cached.Restored, *cached.Server) {
	t.Helper()
	deps.Store = memory.New()
	r, err := cached.Restore(t.Context(), deps, bytes.NewReader(backup), opts)
	if err != nil {
		t.Fatal(err)
	}
	return r, storetest.Run(t, deps)
}

func ids(t *testing.T, s *cached.Server, kind sallyport.Kind) map[string]sallyport.Record {
	t.Helper()
	list, err := s.List(t.Context(), kind)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]sallyport.Record{}
	for _, r := range list {
		all[r.ID] = r
	}
	return all
}

func TestRestoreEndsEverySession(t *testing.T) {
	deps, backup := backedUp(t)
	r, s := restored(t, deps, backup, cached.RestoreOptions{Above: 500})
	if r.SessionsEnded != 2 || r.SessionsKept != 0 || r.Dropped != 0 || r.Users != 1 || r.Devices != 1 {
		t.Errorf("got %+v; want two sessions ended, one user, one device", r)
	}
	if r.Head.Epoch == r.From.Head.Epoch || r.Head.Revision <= 500 {
		t.Errorf("got head %+v; want a new epoch and a revision above 500", r.Head)
	}
	if got := ids(t, s, sallyport.KindSession); len(got) != 0 {
		t.Errorf("got sessions %v; want none", got)
	}
	if got := ids(t, s, sallyport.KindDevice); len(got) != 1 {
		t.Errorf("got devices %v; want one", got)
	}
}

func TestRestoreWithAJournalKeepsWhatDidNotEnd(t *testing.T) {
	deps, backup := backedUp(t)
	info, err := cached.VerifyBackup(bytes.NewReader(backup), deps)
	if err != nil || info.Damaged != 0 {
		t.Fatalf("got %+v, %v; want a good backup", info, err)
	}
	journal := &cached.Journal{Epoch: info.Head.Epoch, After: info.Head.Revision, Reached: 90, Ended: []cached.Ending{
		{Key: cached.Key{Kind: sallyport.KindSession, ID: "s2"}, Revision: 80},
		{Key: cached.Key{Kind: sallyport.KindDevice, ID: "d1"}, Revision: 90, Marked: true},
		{Key: cached.Key{Kind: sallyport.KindUser, ID: "u1"}, Revision: 1}, // before the row that the backup has
	}}
	r, s := restored(t, deps, backup, cached.RestoreOptions{Journal: journal})
	if r.SessionsEnded != 1 || r.SessionsKept != 1 || r.Applied != 2 || r.Head.Revision <= 90 {
		t.Errorf("got %+v; want one session ended and one kept, above revision 90", r)
	}
	if got := ids(t, s, sallyport.KindSession); len(got) != 1 || got["s1"].ID == "" {
		t.Errorf("got sessions %v; want s1", got)
	}
	device, err := sallyport.Decode[sallyport.Device](ids(t, s, sallyport.KindDevice)["d1"])
	if err != nil || !device.Revoked || device.Name != "laptop" {
		t.Errorf("got device %+v, %v; want it revoked and otherwise as it was", device, err)
	}
	if r.Devices != 1 || r.DevicesRevoked != 1 {
		t.Errorf("got %+v; want one device, revoked", r)
	}
	if _, err := s.Get(t.Context(), sallyport.KindCode, "c1"); err == nil {
		t.Error("a single-use code is back")
	}
	for name, gap := range map[string]*cached.Journal{
		"other epoch": {Epoch: "e-other"},
		"gap":         {Epoch: info.Head.Epoch, After: info.Head.Revision + 1},
	} {
		if r, _ := restored(t, deps, backup, cached.RestoreOptions{Journal: gap}); r.SessionsKept != 0 {
			t.Errorf("%s: got %d sessions kept; want none", name, r.SessionsKept)
		}
	}
}

// A backup with one bit changed, cut anywhere or with another key is refused, and
// nothing is written.
func TestCase_L13_AChangedBackupIsRefused(t *testing.T) {
	deps, backup := backedUp(t)
	refused := func(what string, deps cached.Deps, text []byte) {
		t.Helper()
		empty := memory.New()
		deps.Store = empty
		if _, err := cached.Restore(t.Context(), deps, bytes.NewReader(text), cached.RestoreOptions{}); err == nil {
			t.Errorf("%s: taken", what)
		}
		if head, err := empty.Head(t.Context()); err != nil || len(head.Seal) > 0 {
			t.Errorf("%s: got head %+v, %v; want nothing written", what, head, err)
		}
	}
	for n := range backup {
		refused("cut", deps, backup[:n])
	}
	for i := range backup {
		text := bytes.Clone(backup)
		text[i] ^= 1
		refused("bit", deps, text)
	}
	refused("more", deps, append(bytes.Clone(backup), 0))
	deps.KEK = storetest.KEK()
	refused("other key", deps, backup)
}

// A backup that was not restored to its end is not served.
func TestAnUnfinishedRestoreIsRefused(t *testing.T) {
	deps, backup := backedUp(t)
	st := newStore()
	ctx, cancel := context.WithCancel(t.Context())
	st.onWrite(func([]cached.Row) error { cancel(); return nil }) // the first write is the last
	deps.Store = st
	if _, err := cached.Restore(ctx, deps, bytes.NewReader(backup), cached.RestoreOptions{}); err == nil {
		t.Fatal("the restore went on")
	}
	if _, err := cached.New(cached.Config{}, deps); sallyport.CodeOf(err) != "storage.unfinished" {
		t.Errorf("got %v; want storage.unfinished", err)
	}
}

// Rows that were put back are refused at the start; in place, what verifies stays
// and every session ends.
func TestRestoreInPlace(t *testing.T) {
	deps, _ := backedUp(t)
	old, err := deps.Store.Get(t.Context(), sallyport.KindSession, "s1")
	if err != nil {
		t.Fatal(err)
	}
	s := storetest.Run(t, deps)
	if _, err := s.Apply(t.Context(), []sallyport.Op{{Kind: sallyport.KindSession, ID: "s1", Delete: true}}); err != nil {
		t.Fatal(err)
	}
	err = deps.Store.Update(t.Context(), func(tx cached.Tx) (cached.Change, error) {
		return cached.Change{Rows: []cached.Row{old}, Head: tx.Head()}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cached.New(cached.Config{}, deps); sallyport.CodeOf(err) != "storage.rolled_back" {
		t.Fatalf("got %v; want storage.rolled_back", err)
	}
	r, err := cached.RestoreInPlace(t.Context(), deps, cached.RestoreOptions{Above: 70})
	if err != nil || r.SessionsEnded != 2 || r.SessionsKept != 0 || r.Head.Revision <= 70 {
		t.Fatalf("got %+v, %v; want both sessions ended, above revision 70", r, err)
	}
	if got := ids(t, storetest.Run(t, deps), sallyport.KindUser); len(got) != 1 {
		t.Errorf("got users %v; want one", got)
	}
}

func FuzzReadBackup(f *testing.F) {
	_, backup := backedUp(f)
	f.Add(backup)
	f.Add(backup[:len(backup)/2])
	f.Fuzz(func(t *testing.T, text []byte) {
		rows, begun := 0, false
		err := cached.ReadBackup(bytes.NewReader(text),
			func(cached.BackupInfo) error { begun = true; return nil },
			func(cached.Row) error { rows++; return nil })
		if err == nil && !begun {
			t.Error("a backup without a head was taken")
		}
		if err == nil && len(text) > 0 {
			if err := cached.ReadBackup(io.LimitReader(bytes.NewReader(text), int64(len(text)-1)),
				func(cached.BackupInfo) error { return nil }, func(cached.Row) error { return nil }); err == nil {
				t.Error("its prefix was taken, too")
			}
		}
	})
}

// A backup says which key it needs, to whoever has no key.
func TestABackupNamesItsKey(t *testing.T) {
	deps, backup := backedUp(t)
	var named []keyring.ID
	err := cached.ReadBackup(bytes.NewReader(backup), func(cached.BackupInfo) error { return nil }, func(row cached.Row) error {
		if id, ok := cached.WrappedBy(row); ok {
			named = append(named, id)
		}
		return nil
	})
	if err != nil || !slices.Equal(named, deps.KEK.IDs()) {
		t.Errorf("got %v, %v; want %v", named, err, deps.KEK.IDs())
	}
}

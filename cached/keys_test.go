package cached_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/memory"
	"sallyport/cached/storetest"
)

func keysOf(t testing.TB, s *cached.Server) []sallyport.DataKey {
	t.Helper()
	ring, err := s.RowKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return ring.Keys
}

func TestCase_O3_RowKeyIsRotatedUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st, kek := memory.New(), storetest.KEK()
		s := storetest.Run(t, cached.Deps{Store: st, KEK: kek})
		const before = 2_000
		for i := range before / 500 { // batches larger and smaller than a step
			var ops []sallyport.Op
			for j := range 500 {
				ops = append(ops, put(sallyport.KindUser, fmt.Sprint("u", 500*i+j)))
			}
			apply(t, s, ops...)
		}
		apply(t, s, sallyport.Op{Kind: sallyport.KindUser, ID: "u1", Delete: true})
		old := keysOf(t, s)[0]
		rev := apply(t, s, put(sallyport.KindUser, "last"))

		ctx, stop := context.WithCancel(t.Context())
		var load sync.WaitGroup
		var written, missing atomic.Int64
		for w := range 4 {
			load.Go(func() {
				for i := 0; ctx.Err() == nil && i < 300; i++ {
					id := fmt.Sprintf("w%d-%d", w, i)
					apply(t, s, put(sallyport.KindUser, id))
					if _, err := s.Get(t.Context(), sallyport.KindUser, id); err != nil {
						missing.Add(1)
					}
					written.Add(1)
					pass(10 * time.Millisecond)
				}
			})
		}
		load.Go(func() {
			for i := 2; ctx.Err() == nil && i < before; i++ {
				if _, err := s.Get(t.Context(), sallyport.KindUser, fmt.Sprint("u", i)); err != nil {
					missing.Add(1)
				}
				pass(time.Millisecond)
			}
		})
		if err := s.RotateRowKey(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := s.RotateRowKey(t.Context()); sallyport.CodeOf(err) != "keys.busy" {
			t.Errorf("a second rotation meanwhile: got %v; want keys.busy", err)
		}
		load.Wait()
		stop()
		pass(20 * time.Minute)
		synctest.Wait()
		if missing.Load() != 0 || written.Load() != 1200 {
			t.Errorf("%d rows missing, %d written", missing.Load(), written.Load())
		}
		keys := keysOf(t, s)
		if len(keys) != 1 || keys[0].ID == old.ID || keys[0].Rows < before+1200 {
			t.Errorf("got keys %+v; want one new key for all rows", keys)
		}
		list, err := s.List(t.Context(), sallyport.KindUser)
		if err != nil || len(list) != before+1200 {
			t.Errorf("got %d users, %v; want %d", len(list), err, before+1200)
		}
		if rec, err := s.Get(t.Context(), sallyport.KindUser, "last"); err != nil || rec.Revision != rev {
			t.Errorf("got revision %d, %v; want %d as before", rec.Revision, err, rev)
		}
		again, err := cached.New(cached.Config{}, cached.Deps{Store: st, KEK: kek}) // verifies the sum
		if err != nil {
			t.Fatal(err)
		}
		again.Close()
	})
}

// TestCase_O3_RotationSurvivesEachStep: a server that dies between two steps leaves
// a store that the next one opens, serves and goes on with.
func TestCase_O3_RotationSurvivesEachStep(t *testing.T) {
	for dies := 1; dies < 8; dies++ {
		synctest.Test(t, func(t *testing.T) {
			st, kek := newStore(), storetest.KEK()
			first, err := cached.New(cached.Config{}, cached.Deps{Store: st, KEK: kek})
			if err != nil {
				t.Fatal(err)
			}
			for i := range 1_200 {
				apply(t, first, put(sallyport.KindUser, fmt.Sprint("u", i)))
			}
			writes := 0
			st.onWrite(func([]cached.Row) error {
				if writes++; writes >= dies {
					return fmt.Errorf("killed: %w", cached.ErrBroken)
				}
				return nil
			})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- first.Run(ctx) }()
			_ = first.RotateRowKey(t.Context()) // may be what dies
			pass(time.Minute)
			cancel()
			<-done

			st.onWrite(nil)
			s := storetest.Run(t, cached.Deps{Store: st, KEK: kek})
			if list, err := s.List(t.Context(), sallyport.KindUser); err != nil || len(list) != 1_200 {
				t.Fatalf("killed at write %d: %d users, %v", dies, len(list), err)
			}
			pass(20 * time.Minute)
			if keys := keysOf(t, s); len(keys) != 1 || keys[0].Rows < 1_200 {
				t.Errorf("killed at write %d: keys %+v", dies, keys)
			}
			if list, err := s.List(t.Context(), sallyport.KindUser); err != nil || len(list) != 1_200 {
				t.Errorf("killed at write %d: %d users in the end, %v", dies, len(list), err)
			}
		})
	}
}

func TestCase_O3_WrongKEKLeavesTheStoreUntouched(t *testing.T) {
	st, kek := newStore(), storetest.KEK()
	s, err := cached.New(cached.Config{}, cached.Deps{Store: st, KEK: kek})
	if err != nil {
		t.Fatal(err)
	}
	apply(t, s, put(sallyport.KindUser, "u"))
	s.Close()
	st.onWrite(func([]cached.Row) error { t.Error("something was written"); return nil })
	_, err = cached.New(cached.Config{}, cached.Deps{Store: st, KEK: storetest.KEK()})
	if sallyport.CodeOf(err) != "keys.wrong" || sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
		t.Errorf("got %v; want keys.wrong, a usage error", err)
	}
	if _, err = cached.New(cached.Config{}, cached.Deps{Store: st, KEK: kek}); err != nil {
		t.Error(err)
	}
}

func TestCase_O3_NewKEKWrapsAgainAndNothingElse(t *testing.T) {
	st, kek := newStore(), storetest.KEK()
	s := storetest.Run(t, cached.Deps{Store: st, KEK: kek})
	apply(t, s, put(sallyport.KindUser, "u"))
	var rows []cached.Row
	st.onWrite(func(r []cached.Row) error { rows = append(rows, r...); return nil })
	if err := s.SetKEK(t.Context(), storetest.KEK()); sallyport.CodeOf(err) != "keys.wrong" {
		t.Errorf("a foreign key: got %v; want keys.wrong", err)
	}
	next := kek.Rotated()
	if err := s.SetKEK(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	if len(rows) != 1 || rows[0].Kind != sallyport.KindKeyring {
		t.Errorf("wrote %d rows; want the ring's alone", len(rows))
	}
	if _, err := s.Get(t.Context(), sallyport.KindUser, "u"); err != nil {
		t.Error(err)
	}
	if _, err := cached.New(cached.Config{}, cached.Deps{Store: st, KEK: next.Newest()}); err != nil {
		t.Errorf("without the old key: %v", err)
	}
	if _, err := cached.New(cached.Config{}, cached.Deps{Store: st, KEK: kek}); sallyport.CodeOf(err) != "keys.wrong" {
		t.Errorf("with the old key alone: got %v; want keys.wrong", err)
	}
}

// shared lets two servers have one store.
type shared struct{ *memory.Store }

func (shared) Wait(ctx context.Context, most time.Duration) error {
	select {
	case <-ctx.Done():
	case <-time.After(most):
	}
	return nil
}
func (shared) Confirm(context.Context) error { return nil }

// TestCase_O3_TheOtherServerLearnsTheNewKey before it judges a row.
func TestCase_O3_TheOtherServerLearnsTheNewKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st, kek := shared{memory.New()}, storetest.KEK()
		a := storetest.Run(t, cached.Deps{Store: st, KEK: kek})
		b := storetest.Run(t, cached.Deps{Store: st, KEK: kek})
		apply(t, a, put(sallyport.KindUser, "u"))
		if err := a.RotateRowKey(t.Context()); err != nil {
			t.Fatal(err)
		}
		apply(t, a, put(sallyport.KindUser, "v"))
		if _, err := b.Get(t.Context(), sallyport.KindUser, "v"); err != nil {
			t.Errorf("read by the other: %v", err)
		}
		apply(t, b, put(sallyport.KindUser, "w"))
		for range 100 {
			pass(10 * time.Second)
			for _, s := range []*cached.Server{a, b} {
				if list, err := s.List(t.Context(), sallyport.KindUser); err != nil || len(list) != 3 {
					t.Fatalf("got %d users, %v; want 3", len(list), err)
				}
			}
		}
		if keys := keysOf(t, b); len(keys) != 1 {
			t.Errorf("got %d keys; want the new one", len(keys))
		}
	})
}

// TestCase_O3_AServerWithoutTheNewKEK goes on with the keys that it knows, does not
// wrap them by the old one again.
func TestCase_O3_AServerWithoutTheNewKEK(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st, kek := shared{memory.New()}, storetest.KEK()
		a := storetest.Run(t, cached.Deps{Store: st, KEK: kek})
		late, err := cached.New(cached.Config{}, cached.Deps{Store: st, KEK: kek})
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- late.Run(t.Context()) }()
		next := kek.Rotated()
		if err := a.SetKEK(t.Context(), next); err != nil {
			t.Fatal(err)
		}
		pass(time.Minute)
		apply(t, late, put(sallyport.KindUser, "u"))
		if err := late.RotateRowKey(t.Context()); sallyport.CodeOf(err) != "keys.wrong" {
			t.Errorf("rotation without the new key: got %v; want keys.wrong", err)
		}
		if ring, err := a.RowKeys(t.Context()); err != nil || ring.KEK != next.IDs()[0].String() {
			t.Errorf("wrapped by %s, %v; want the new one", ring.KEK, err)
		}
	})
}

func TestRingIsNobodysRecord(t *testing.T) {
	s := storetest.Serve(t, nil)
	if _, err := s.Get(t.Context(), sallyport.KindKeyring, "cached"); sallyport.CodeOf(err) != "records.bad_request" {
		t.Errorf("get: %v", err)
	}
	for _, op := range []sallyport.Op{{Payload: []byte(`{}`)}, {Delete: true}} {
		op.Kind, op.ID = sallyport.KindKeyring, "cached"
		if _, err := s.Apply(t.Context(), []sallyport.Op{op}); sallyport.CodeOf(err) != "records.bad_request" {
			t.Errorf("apply: %v", err)
		}
	}
	if _, err := s.List(t.Context(), sallyport.KindKeyring); err == nil {
		t.Error("rings were listed")
	}
}

// TestRingThatWasChanged: taken out, put back as it was, or edited: the store is
// refused.
func TestCase_L8_RingThatWasChanged(t *testing.T) {
	key := cached.Key{Kind: sallyport.KindKeyring, ID: "cached"}
	for name, edit := range map[string]func(st *memory.Store, old cached.Row) cached.Change{
		"taken out": func(*memory.Store, cached.Row) cached.Change { return cached.Change{Forget: []cached.Key{key}} },
		"put back":  func(_ *memory.Store, old cached.Row) cached.Change { return cached.Change{Rows: []cached.Row{old}} },
		"edited": func(st *memory.Store, _ cached.Row) cached.Change {
			row, _ := st.Get(context.Background(), key.Kind, key.ID)
			row.Payload = append(row.Payload, ' ')
			return cached.Change{Rows: []cached.Row{row}}
		},
	} {
		st, kek := memory.New(), storetest.KEK()
		s, err := cached.New(cached.Config{}, cached.Deps{Store: st, KEK: kek})
		if err != nil {
			t.Fatal(err)
		}
		apply(t, s, put(sallyport.KindUser, "u"))
		old, err := st.Get(t.Context(), key.Kind, key.ID)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(s.RotateRowKey(t.Context()), s.Close()); err != nil {
			t.Fatal(err)
		}
		err = st.Update(t.Context(), func(tx cached.Tx) (cached.Change, error) {
			c := edit(st, old)
			c.Head = tx.Head()
			return c, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := cached.New(cached.Config{}, cached.Deps{Store: st, KEK: kek}); sallyport.CodeOf(err) != "storage.rolled_back" {
			t.Errorf("%s: got %v; want storage.rolled_back", name, err)
		}
	}
}

var _ sallyport.KeyKeeper = (*cached.Server)(nil)

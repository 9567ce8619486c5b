package policyd

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"sallyport"

	"pgregory.net/rapid"
)

// A table behaves as a map, and no edit ever shows in the table it came from.
func TestTableIsAnImmutableMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var tables []table[numbered]
		var models []map[string]int
		now, model := table[numbered]{}, map[string]int{}
		for range rapid.IntRange(1, 8).Draw(t, "edits") {
			d := now.edit()
			model = maps.Clone(model)
			for range rapid.IntRange(0, 6).Draw(t, "ops") {
				key := rapid.SampledFrom([]string{"a", "b", "c", "d", "e"}).Draw(t, "key")
				if rapid.Bool().Draw(t, "delete") {
					d.delete(key)
					delete(model, key)
				} else {
					v := rapid.Int().Draw(t, "v")
					d.set(numbered{key, v})
					model[key] = v
				}
			}
			now = d.table
			tables, models = append(tables, now), append(models, model)
		}
		for i := range tables {
			got := map[string]int{}
			for v := range tables[i].all() {
				got[v.id] = v.n
			}
			if !maps.Equal(got, models[i]) {
				t.Fatalf("after edit %d: got %v; want %v", i, got, models[i])
			}
			for _, key := range []string{"a", "b", "c", "d", "e"} {
				v, ok := tables[i].get(key)
				if w, has := models[i][key]; v.n != w || ok != has {
					t.Fatalf("after edit %d: %s is %d, %v", i, key, v.n, ok)
				}
			}
		}
	})
}

// A table of many nodes behaves as one of few, and an edit of it is undone by its
// opposite.
func TestTableOfManyRecords(t *testing.T) {
	const n = 20_000
	id := func(i int) string { return fmt.Sprint("id", i) }
	d := table[numbered]{}.edit()
	for i := range n {
		d.set(numbered{id(i), i})
	}
	full := d.table
	d = full.edit()
	for i := 0; i < n; i += 2 {
		d.delete(id(i))
	}
	d.delete("nobody")
	half := d.table
	d = half.edit()
	for i := 1; i < n; i += 2 {
		d.delete(id(i))
	}
	none := d.table
	for i := range n {
		if v, ok := full.get(id(i)); !ok || v.n != i {
			t.Fatalf("%s: got %v, %t before the edits", id(i), v, ok)
		}
		if _, ok := half.get(id(i)); ok != (i%2 == 1) {
			t.Fatalf("%s: %t after every other one was deleted", id(i), ok)
		}
	}
	for v := range none.all() {
		t.Errorf("%s is left", v.id)
	}
	if len(none.root.below) != 0 {
		t.Errorf("an empty table has %d nodes", len(none.root.below))
	}
}

// Two ids part sooner or later, however many of their bits are the same.
func TestPathsPart(t *testing.T) {
	a, b, again := pathOf("a"), pathOf("b"), pathOf("a")
	same := 0
	for depth := range 100 * levels {
		place := a.step()
		if place != again.step() {
			t.Fatalf("an id has two places at depth %d", depth)
		}
		if place == b.step() {
			same++
		}
	}
	if same > 100*levels/4 {
		t.Errorf("two ids have the same place at %d of %d depths", same, 100*levels)
	}
}

type numbered struct {
	id string
	n  int
}

func (v numbered) key() string { return v.id }

func TestConfigValidate(t *testing.T) {
	if faults := (Config{}).Validate(); faults != nil {
		t.Errorf("the zero Config: %v", faults)
	}
	c := Config{
		Listen: "8445", MaxStale: time.Second, DecisionTimeout: -1, PostureTTL: time.Millisecond, PostureSources: []string{"os", "me"},
	}
	var keys []string
	for _, f := range c.Validate() {
		keys = append(keys, f.Key)
	}
	if got, want := strings.Join(keys, " "), "listen max_stale decision_timeout posture_ttl posture_sources[1]"; got != want {
		t.Errorf("got %s; want %s", got, want)
	}
	if _, err := New(c, Deps{}); err == nil {
		t.Error("New takes a bad Config")
	}
	if _, err := New(Config{}, Deps{}); err == nil {
		t.Error("New takes no Records")
	}
}

func TestClipKeepsCharactersWhole(t *testing.T) {
	for _, tt := range []struct{ in, want string }{{"abc", "abc"}, {"abcdefghij", "abcdefghij"}, {"abcdefghijk", "abcdefg…"}, {"abcdefü-ghijk", "abcdef…"}} {
		if got := clip(tt.in, 10); got != tt.want {
			t.Errorf("%q: got %q; want %q", tt.in, got, tt.want)
		}
	}
}

func BenchmarkAuthorize(b *testing.B) {
	s := &Server{audit: &nowhere{}, done: make(chan struct{}), advance: make(chan struct{}), start: time.Now()}
	s.cfg = Config{}.withDefaults()
	s.revoked.Store(&overrides{})
	d := (&snapshot{epoch: "e", revision: 1}).edit(s.cfg, time.Now())
	for _, r := range liveRecords(time.Now()) {
		d.apply(r)
	}
	s.snap.Store(d.finish())
	q := []sallyport.Request{question("s1", db)}
	b.ReportAllocs()
	for b.Loop() {
		s.confirm()
		ds, err := s.Authorize(b.Context(), q)
		if err != nil || !ds[0].Allowed() {
			b.Fatal(ds, err)
		}
	}
}

// nowhere is an audit log that costs nothing.
type nowhere struct{}

func (*nowhere) Append(context.Context, sallyport.AuditRecord) error { return nil }

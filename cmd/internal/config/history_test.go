package config

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/memory"
	"sallyport/internal/keyring"
)

// archive is a cached whose audit log can be read.
type archive struct {
	*cached.Server
	mu    sync.Mutex
	notes []string

	meanwhile func() // before the next write, once
}

func (a *archive) Append(_ context.Context, r sallyport.AuditRecord) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.Type == sallyport.AuditConfigApply {
		a.notes = append(a.notes, r.Detail)
	}
	return nil
}

func (a *archive) Apply(ctx context.Context, batch []sallyport.Op) (sallyport.Revision, error) {
	if f := a.meanwhile; f != nil {
		a.meanwhile = nil
		f()
	}
	return a.Server.Apply(ctx, batch)
}

func newArchive(t *testing.T) *archive {
	t.Helper()
	a := &archive{}
	var err error
	a.Server, err = cached.New(cached.Config{}, cached.Deps{Store: memory.New(), KEK: keyring.NewKEK(), Audit: a})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// apply applies a configuration with one route, to host.
func (a *archive) apply(t *testing.T, host string) sallyport.Revision {
	t.Helper()
	rev, _, err := Apply(t.Context(), a, configOf(host))
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func configOf(host string) sallyport.Config {
	return sallyport.Config{
		Domain: "corp.example", Source: host + ".yaml", Applied: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Routes: []sallyport.Route{{From: "tcp://" + host + ":22", Policy: "allow: {or: [{accept: true}]}"}},
	}
}

func (a *archive) history(t *testing.T) []Past {
	t.Helper()
	all, err := History(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// inForce returns the configuration record and its revision.
func (a *archive) inForce(t *testing.T) (sallyport.Config, sallyport.Revision) {
	t.Helper()
	r, err := a.Get(t.Context(), sallyport.KindConfig, currentConfig)
	if err != nil {
		t.Fatal(err)
	}
	c, err := sallyport.Decode[sallyport.Config](r)
	if err != nil {
		t.Fatal(err)
	}
	return c, r.Revision
}

func TestHistory(t *testing.T) {
	a := newArchive(t)
	if got := a.history(t); len(got) != 0 {
		t.Fatalf("history of nothing: %+v", got)
	}
	first, second := a.apply(t, "a"), a.apply(t, "b")
	if again := a.apply(t, "b"); again != second {
		t.Errorf("the same again is revision %d; want %d as before", again, second)
	}
	all := a.history(t)
	if len(all) != 2 || all[0].Revision != second || all[1].Revision != first {
		t.Fatalf("got %+v; want revisions %d and %d", all, second, first)
	}
	live, rev := a.inForce(t)
	if rev != second {
		t.Errorf("in force is revision %d; the history says %d", rev, second)
	}
	kept, err := all[0].Unpack()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(live, kept); diff != "" {
		t.Errorf("in force and in the history differ:\n%s", diff)
	}
	if p := all[0]; p.By == "" || p.Source != "b.yaml" || p.Routes != 1 || p.Applied.IsZero() {
		t.Errorf("got %+v; want who, from where, how many routes and when", p.PastConfig)
	}
	for i := range keepRevisions + 3 {
		a.apply(t, fmt.Sprint("h", i))
	}
	if n := len(a.history(t)); n != keepRevisions {
		t.Errorf("%d are kept; want %d", n, keepRevisions)
	}
}

func TestHistoryIsBoundedInBytes(t *testing.T) {
	big := make([]Past, 10)
	for i := range big {
		big[i].Revision, big[i].Packed = sallyport.Revision(100-i), make([]byte, 10<<20)
	}
	for _, c := range []struct {
		size, goes int
	}{
		{1, 7},        // three of 10 MB and the new one
		{10 << 20, 8}, // two and the new one
		{31 << 20, 9}, // the one before is always kept
	} {
		if got := surplus(big, c.size); len(got) != c.goes || got[len(got)-1].Revision != 91 {
			t.Errorf("with one of %d bytes to come, %d go; want the oldest %d", c.size, len(got), c.goes)
		}
	}
}

func TestRollback(t *testing.T) {
	a := newArchive(t)
	first := a.apply(t, "a")
	second := a.apply(t, "b")
	now := configOf("b")
	now.Gateways, now.Forbidden = []sallyport.GatewayInfo{{Name: "moved"}}, []string{"10.0.0.1:443"}
	third, _, err := Apply(t.Context(), a, now)
	if err != nil {
		t.Fatal(err)
	}
	from, fourth, changed, err := Rollback(t.Context(), a, first, time.Now())
	if err != nil || !changed || from.Revision != first || fourth <= third {
		t.Fatalf("got revision %d, %t, %v; want a new one", fourth, changed, err)
	}
	live, rev := a.inForce(t)
	if rev != fourth || live.Routes[0].From != "tcp://a:22" || live.RollbackTo != first {
		t.Errorf("in force: %+v of revision %d", live, rev)
	}
	if live.Gateways[0].Name != "moved" || live.Forbidden[0] != "10.0.0.1:443" {
		t.Errorf("processes do not listen elsewhere because of a rollback: %+v", live)
	}
	if got := a.notes[len(a.notes)-1]; !strings.Contains(got, fmt.Sprintf("rollback to revision %d, by ", first)) {
		t.Errorf("the audit log says %q", got)
	}
	if got := a.notes[0]; strings.Contains(got, "rollback") || !strings.Contains(got, "by ") {
		t.Errorf("the audit log says %q of the first", got)
	}
	if _, _, _, err := Rollback(t.Context(), a, 0, time.Now()); err != nil {
		t.Fatal(err)
	}
	if live, _ := a.inForce(t); live.Routes[0].From != "tcp://b:22" || live.RollbackTo != third {
		t.Errorf("without a revision: got %+v; want the one before", live)
	}
	if _, rev, changed, err := Rollback(t.Context(), a, second, time.Now()); changed || err != nil || rev != fourth+1 {
		t.Errorf("to what is in force: %d, %t, %v; want nothing written", rev, changed, err)
	}
	if got := a.history(t)[0]; got.RollbackTo != third {
		t.Errorf("the history does not tell a rollback apart: %+v", got.PastConfig)
	}
}

func TestRollbackIsRefused(t *testing.T) {
	a := newArchive(t)
	if _, _, _, err := Rollback(t.Context(), a, 0, time.Now()); !errors.Is(err, sallyport.ErrNotFound) {
		t.Errorf("with nothing in force: %v", err)
	}
	broken := configOf("a")
	broken.Routes[0].Policy = "alow: 1"
	first, _, err := Apply(t.Context(), a, broken)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := Rollback(t.Context(), a, 0, time.Now()); !errors.Is(err, ErrNotKept) {
		t.Errorf("with nothing before: %v", err)
	}
	second := a.apply(t, "b")
	if _, _, _, err := Rollback(t.Context(), a, 99, time.Now()); !errors.Is(err, ErrNotKept) {
		t.Errorf("to what never was: %v", err)
	}
	var loads *LoadError
	if _, _, _, err := Rollback(t.Context(), a, first, time.Now()); !errors.As(err, &loads) || !strings.Contains(err.Error(), `unknown key "alow"`) {
		t.Errorf("to what does not load: %v", err)
	}
	if _, rev := a.inForce(t); rev != second {
		t.Errorf("a refused rollback changed something")
	}
	third := a.apply(t, "c")
	a.meanwhile = func() { a.apply(t, "d") }
	if _, _, _, err := Rollback(t.Context(), a, second, time.Now()); !errors.Is(err, sallyport.ErrConflict) {
		t.Errorf("while another was applied: %v", err)
	}
	if live, rev := a.inForce(t); live.Routes[0].From != "tcp://d:22" || rev != third+1 {
		t.Errorf("the other one is gone: %+v", live)
	}
}

func TestShow(t *testing.T) {
	c := configOf("a")
	c.PostureTTL = time.Minute
	var b bytes.Buffer
	if err := WriteRoutes(&b, c); err != nil {
		t.Fatal(err)
	}
	const want = `policyd:
  posture_ttl: 1m0s
routes:
  - from: tcp://a:22
    policy:
      allow: {or: [{accept: true}]}
`
	if b.String() != want {
		t.Errorf("got\n%s; want\n%s", b.String(), want)
	}
	f, err := parse("f.yaml", append([]byte("domain: corp.example\ndata_dir: d\n"), b.Bytes()...), Tool)
	if err != nil || !same(f.Record(nil, nil, time.Time{}), sallyport.Config{Domain: c.Domain, Routes: f.Record(nil, nil, time.Time{}).Routes, PostureTTL: time.Minute}) {
		t.Errorf("what is shown cannot be read back: %v", err)
	}
}

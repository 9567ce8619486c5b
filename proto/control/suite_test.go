package control_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"sallyport"
)

// services is every interface of the control plane, directly or over a wire.
type services struct {
	sallyport.Records
	lister    sallyport.Lister
	revoker   sallyport.Revoker
	backuper  sallyport.Backuper
	authorize sallyport.Authorizer
	explain   sallyport.Explainer
	changes   sallyport.Changes
	posture   sallyport.PostureSink
}

func direct(s *site) services {
	return services{s, lister{s}, s, s, policy{s}, policy{s}, policy{s}, policy{s}}
}

// TestSuite runs each interface directly, over loopback mTLS and over a unix
// socket: nobody may be able to tell which it is.
func TestSuite(t *testing.T) {
	ways := []struct {
		name    string
		connect func(*testing.T, *site) services
	}{
		{"direct", func(_ *testing.T, s *site) services { return direct(s) }},
		{"mtls", overTLS},
		{"unix", overUnix},
	}
	cases := []struct {
		name string
		run  func(*testing.T, *site, services)
	}{
		{"records", testRecords},
		{"watch", testWatch},
		{"watch ends", testWatchEnds},
		{"lease", testLease},
		{"lease ends with its context", testLeaseContext},
		{"list of records", testListRecords},
		{"authorize", testAuthorize},
		{"authorize fails", testAuthorizeFails},
		{"explain", testExplain},
		{"changes", testChanges},
		{"posture", testPosture},
		{"revoke", testRevoke},
		{"backup", testBackup},
		{"backup fails", testBackupFails},
	}
	for _, way := range ways {
		for _, c := range cases {
			t.Run(way.name+"/"+c.name, func(t *testing.T) {
				t.Parallel()
				s := newSite()
				c.run(t, s, way.connect(t, s))
			})
		}
	}
}

func testRecords(t *testing.T, _ *site, svc services) {
	ctx := t.Context()
	put := sallyport.Op{Kind: sallyport.KindUser, ID: "u1", Payload: []byte{0, 1, 0xff}, Expires: time.Unix(2_000_000_000, 7)}
	rev, err := svc.Apply(ctx, []sallyport.Op{put})
	if err != nil {
		t.Fatal(err)
	}
	got, err := svc.Get(ctx, sallyport.KindUser, "u1")
	want := sallyport.Record{Kind: sallyport.KindUser, ID: "u1", Version: 1, Payload: put.Payload, Expires: put.Expires, Revision: rev}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	put.If.Absent = true
	if _, err := svc.Apply(ctx, []sallyport.Op{{Kind: sallyport.KindUser, ID: "u2"}, put}); !errors.Is(err, sallyport.ErrConflict) {
		t.Errorf("put of what is there: got %v; want ErrConflict", err)
	}
	if _, err := svc.Get(ctx, sallyport.KindUser, "u2"); !errors.Is(err, sallyport.ErrNotFound) {
		t.Errorf("get after a refused batch: got %v; want ErrNotFound", err)
	}
}

// follow runs a watch and returns its events and its end.
func follow(ctx context.Context, svc services, q sallyport.WatchRequest) (<-chan sallyport.WatchEvent, <-chan error) {
	events, ended := make(chan sallyport.WatchEvent, 100), make(chan error, 1)
	go func() {
		ended <- svc.Watch(ctx, q, func(e sallyport.WatchEvent) error {
			events <- e
			return nil
		})
	}()
	return events, ended
}

func next[T any](t *testing.T, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(10 * time.Second):
		t.Fatal("nothing came for ten seconds")
		panic("unreachable")
	}
}

func testWatch(t *testing.T, _ *site, svc services) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	must(t, svc, sallyport.Op{Kind: sallyport.KindUser, ID: "u1", Payload: []byte("one")})
	events, ended := follow(ctx, svc, sallyport.WatchRequest{})
	var types []sallyport.WatchEventType
	for range 3 {
		types = append(types, next(t, events).Type)
	}
	if want := []sallyport.WatchEventType{sallyport.WatchBegin, sallyport.WatchItems, sallyport.WatchEnd}; !slices.Equal(types, want) {
		t.Fatalf("snapshot: got %v; want %v", types, want)
	}
	// A batch of 6 MiB: several messages, one event.
	var batch []sallyport.Op
	for _, id := range strings.Fields("a b c d e f") {
		batch = append(batch, sallyport.Op{Kind: sallyport.KindUser, ID: id, Payload: []byte(strings.Repeat(id, 1<<20))})
	}
	rev := must(t, svc, batch...)
	e := next(t, events)
	if e.Type != sallyport.WatchChange || e.Revision != rev || len(e.Records) != len(batch) || e.Epoch != epoch {
		t.Errorf("got %d records at %d; want the whole batch at %d", len(e.Records), e.Revision, rev)
	}
	must(t, svc, sallyport.Op{Kind: sallyport.KindUser, ID: "a", Delete: true})
	if e := next(t, events); len(e.Records) != 1 || !e.Records[0].Deleted {
		t.Errorf("got %+v; want a tombstone", e)
	}
	cancel()
	if err := next(t, ended); !errors.Is(err, context.Canceled) {
		t.Errorf("the watch ended with %v; want context.Canceled", err)
	}
}

func must(t *testing.T, svc services, batch ...sallyport.Op) sallyport.Revision {
	t.Helper()
	rev, err := svc.Apply(t.Context(), batch)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func testWatchEnds(t *testing.T, _ *site, svc services) {
	mine := errors.New("enough")
	if err := svc.Watch(t.Context(), sallyport.WatchRequest{}, func(sallyport.WatchEvent) error { return mine }); err != mine {
		t.Errorf("got %v; want each's error", err)
	}
	nothing := func(sallyport.WatchEvent) error { return nil }
	if err := svc.Watch(t.Context(), sallyport.WatchRequest{Epoch: "old", Since: 1}, nothing); !errors.Is(err, sallyport.ErrCompacted) {
		t.Errorf("got %v; want ErrCompacted", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := svc.Watch(ctx, sallyport.WatchRequest{}, nothing); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v; want context.DeadlineExceeded", err)
	}
}

func testLease(t *testing.T, s *site, svc services) {
	mine := errors.New("done")
	err := svc.Lease(t.Context(), "sync", time.Second, func(ctx context.Context) error {
		if !s.held("sync") {
			t.Error("hold runs without the lease")
		}
		second := svc.Lease(t.Context(), "sync", time.Second, func(context.Context) error { return nil })
		if !errors.Is(second, sallyport.ErrLeaseHeld) {
			t.Errorf("second holder: got %v; want ErrLeaseHeld", second)
		}
		if err := svc.Lease(t.Context(), "other", time.Second, func(context.Context) error { return nil }); err != nil {
			t.Errorf("another lease: %v", err)
		}
		return mine
	})
	if err != mine {
		t.Errorf("got %v; want hold's error", err)
	}
	if s.held("sync") {
		t.Error("the lease is still held after Lease returned")
	}
}

func testLeaseContext(t *testing.T, s *site, svc services) {
	ctx, cancel := context.WithCancel(t.Context())
	err := svc.Lease(ctx, "sync", time.Second, func(held context.Context) error {
		cancel()
		<-held.Done()
		return held.Err()
	})
	if !errors.Is(err, context.Canceled) || s.held("sync") {
		t.Errorf("got %v, held %t; want context.Canceled and the lease given back", err, s.held("sync"))
	}
	if err := svc.Lease(ctx, "sync", time.Second, func(ctx context.Context) error { return ctx.Err() }); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that is over: got %v", err)
	}
}

func testListRecords(t *testing.T, _ *site, svc services) {
	var batch []sallyport.Op
	for _, id := range strings.Fields("a b c") {
		batch = append(batch, sallyport.Op{Kind: sallyport.KindUser, ID: id, Payload: []byte(strings.Repeat("x", 800<<10))})
	}
	must(t, svc, append(batch, sallyport.Op{Kind: sallyport.KindDevice, ID: "d"})...)
	got, err := svc.lister.List(t.Context(), sallyport.KindUser)
	if err != nil || len(got) != 3 || got[2].ID != "c" || len(got[2].Payload) != 800<<10 {
		t.Errorf("got %d records, %v; want a, b, c", len(got), err)
	}
	if got, err := svc.lister.List(t.Context(), sallyport.KindTrust); err != nil || len(got) != 0 {
		t.Errorf("got %v, %v; want none", got, err)
	}
}

func question(host string, port uint16) sallyport.Request {
	return sallyport.Request{
		Session: "s-1", Target: sallyport.Target{Network: sallyport.TCP, Host: host, Port: port},
		Headers: map[string][]string{"Origin": {"https://x"}}, Peer: netip.MustParseAddrPort("192.0.2.1:999"),
	}
}

func testAuthorize(t *testing.T, _ *site, svc services) {
	got, err := svc.authorize.Authorize(t.Context(), []sallyport.Request{question("a", 22), question("b", 23), question("c", 22)})
	if err != nil {
		t.Fatal(err)
	}
	want, _ := policy{}.Authorize(t.Context(), []sallyport.Request{question("a", 22), question("b", 23), question("c", 22)})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got[0].Allowed() == got[1].Allowed() {
		t.Error("the allow and the denial are the same")
	}
	if none, err := svc.authorize.Authorize(t.Context(), nil); err != nil || len(none) != 0 {
		t.Errorf("no question: got %v, %v", none, err)
	}
}

func testAuthorizeFails(t *testing.T, _ *site, svc services) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := svc.authorize.Authorize(ctx, []sallyport.Request{question("slow.internal", 22)}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v; want context.DeadlineExceeded", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := svc.authorize.Authorize(ctx, []sallyport.Request{question("slow.internal", 22)}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v; want context.Canceled", err)
	}
	_, err := svc.authorize.Authorize(t.Context(), []sallyport.Request{question("late.internal", 22)})
	if !errors.Is(err, context.DeadlineExceeded) || sallyport.CodeOf(err) != "policy.slow" || sallyport.OutcomeOf(err) != sallyport.OutcomeUnavailable {
		t.Errorf("got %v; want policy.slow", err)
	}
	_, err = svc.authorize.Authorize(t.Context(), []sallyport.Request{question("broken.internal", 22)})
	if err == nil || !strings.Contains(err.Error(), "engine on fire") || sallyport.OutcomeOf(err) != sallyport.OutcomeInternal {
		t.Errorf("got %v; want the engine's error", err)
	}
}

func testExplain(t *testing.T, _ *site, svc services) {
	d, err := svc.explain.Explain(t.Context(), question("b", 23))
	if err != nil || d.Allowed() || len(d.WouldAllowIf) != 2 || d.Reasons[0].Found != "192.0.2.1:999https://x" {
		t.Errorf("got %+v, %v", d, err)
	}
	got, err := svc.explain.List(t.Context(), sallyport.ListRequest{Session: "s-1"})
	want, _ := policy{}.List(t.Context(), sallyport.ListRequest{Session: "s-1"})
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	_, err = svc.explain.List(t.Context(), sallyport.ListRequest{})
	var e *sallyport.Error
	if !errors.As(err, &e) || e.Outcome != sallyport.OutcomeLogin || e.Hint != "run: agent login" {
		t.Errorf("got %v; want login_required", err)
	}
}

func testChanges(t *testing.T, _ *site, svc services) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	notices, ended := make(chan sallyport.Notice, 10), make(chan error, 1)
	go func() {
		ended <- svc.changes.Watch(ctx, func(n sallyport.Notice) error {
			notices <- n
			return nil
		})
	}()
	n := next(t, notices)
	if !n.First || n.SourceAge >= 0 || n.Trust == nil || n.Trust.SessionCAs != "pem" {
		t.Errorf("first notice: got %+v", n)
	}
	rev := must(t, svc, sallyport.Op{Kind: sallyport.KindPosture, ID: "dev"})
	for len(n.Changes) == 0 {
		n = next(t, notices)
	}
	want := sallyport.SubjectChange{Subject: sallyport.Subject{Kind: sallyport.SubjectDevice, ID: "dev"}, Revision: rev, Why: "changed"}
	if n.Changes[0] != want || n.First {
		t.Errorf("got %+v; want %+v", n, want)
	}
	cancel()
	if err := next(t, ended); !errors.Is(err, context.Canceled) {
		t.Errorf("the stream ended with %v; want context.Canceled", err)
	}
}

func testPosture(t *testing.T, s *site, svc services) {
	if err := svc.posture.ReportPosture(t.Context(), "s-1", "eyJ.x.y"); err != nil {
		t.Fatal(err)
	}
	if want := []string{"s-1 eyJ.x.y"}; !slices.Equal(s.reports, want) {
		t.Errorf("got %q; want %q", s.reports, want)
	}
	if err := svc.posture.ReportPosture(t.Context(), "s-1", "junk"); sallyport.CodeOf(err) != "posture.bad_signature" {
		t.Errorf("got %v; want posture.bad_signature", err)
	}
}

func testRevoke(t *testing.T, _ *site, svc services) {
	must(t, svc, sallyport.Op{Kind: sallyport.KindSession, ID: "s-1"})
	got, err := svc.revoker.Revoke(t.Context(), sallyport.Revocation{
		Subjects: []sallyport.Subject{{Kind: sallyport.SubjectSession, ID: "s-1"}}, Reason: "lost", By: "alice",
	})
	if err != nil || got.Sessions != 1 || !got.Durable || got.Revision == 0 {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := svc.Get(t.Context(), sallyport.KindSession, "s-1"); !errors.Is(err, sallyport.ErrNotFound) {
		t.Errorf("the session is still there: %v", err)
	}
}

func testBackup(t *testing.T, s *site, svc services) {
	s.backup = bytes.Repeat([]byte("backup "), 1<<17) // more than three parts
	var got bytes.Buffer
	if err := svc.backuper.Backup(t.Context(), &got); err != nil || !bytes.Equal(got.Bytes(), s.backup) {
		t.Errorf("got %d bytes, %v; want the %d of the backup", got.Len(), err, len(s.backup))
	}
	full := errors.New("no space left")
	if err := svc.backuper.Backup(t.Context(), failingWriter{full}); !errors.Is(err, full) {
		t.Errorf("got %v; want the writer's error", err)
	}
}

func testBackupFails(t *testing.T, s *site, svc services) {
	s.backupErr = &sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: "storage.failed", Message: "the disk failed"}
	if err := svc.backuper.Backup(t.Context(), io.Discard); sallyport.CodeOf(err) != "storage.failed" {
		t.Errorf("got %v; want storage.failed", err)
	}
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

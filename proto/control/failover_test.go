package control_test

import (
	"context"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport"
	"sallyport/proto/control"
)

// failing is a site whose records answer with one error as long as it has one, and
// that counts who asked.
type failing struct {
	*site
	err   atomic.Pointer[sallyport.Error]
	asked atomic.Int32
}

func (f *failing) fails(code string) {
	f.err.Store(&sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: code, Message: "for the test"})
}

func (f *failing) answer() error {
	f.asked.Add(1)
	if err := f.err.Load(); err != nil {
		return err
	}
	return nil
}

func (f *failing) Get(ctx context.Context, kind sallyport.Kind, id string) (sallyport.Record, error) {
	if err := f.answer(); err != nil {
		return sallyport.Record{}, err
	}
	return f.site.Get(ctx, kind, id)
}

func (f *failing) Apply(ctx context.Context, batch []sallyport.Op) (sallyport.Revision, error) {
	if err := f.answer(); err != nil {
		return 0, err
	}
	return f.site.Apply(ctx, batch)
}

// pair is one service at two addresses over one set of records, as two cached over
// one PostgreSQL are.
func pair(t *testing.T) (first, second *failing, svc services) {
	t.Helper()
	p, s := newPKI(t), newSite()
	first, second = &failing{site: s}, &failing{site: s}
	var addrs []string
	for _, f := range []*failing{first, second} {
		ln := listen(t, "127.0.0.1:0")
		offered := all(s)
		offered.Records = f
		serve(t, ln, p.server(control.KindCached), offered)
		addrs = append(addrs, ln.Addr().String())
	}
	return first, second, remote(dial(t, p.client(control.KindOperator, control.KindCached), addrs...))
}

// TestServiceThatCannotServeIsLeft: what is asked again elsewhere, and what is not
// because it may have happened.
func TestServiceThatCannotServeIsLeft(t *testing.T) {
	put := func(ctx context.Context, svc services) error {
		_, err := svc.Apply(ctx, []sallyport.Op{{Kind: sallyport.KindUser, ID: "u"}})
		return err
	}
	get := func(ctx context.Context, svc services) error {
		_, err := svc.Get(ctx, sallyport.KindUser, "absent")
		if errors.Is(err, sallyport.ErrNotFound) {
			return nil
		}
		return err
	}
	for _, tt := range []struct {
		name, code string
		call       func(context.Context, services) error
		elsewhere  bool // asked there in the same call
		left       bool // the next call goes there
	}{
		{"a read where the store is away", "storage.unavailable", get, true, true},
		{"a read where the store is broken", "storage.failed", get, true, true},
		{"a read where the store was replaced", "storage.replaced", get, true, true},
		{"a write that did not begin", "storage.not_current", put, true, true},
		{"a write that found no room", "storage.busy", put, true, true},
		{"a write that may be half done", "storage.failed", put, false, true},
		{"a write that may have happened", "storage.unknown", put, false, false},
		{"a write that nobody would take", "storage.full", put, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			first, second, svc := pair(t)
			first.fails(tt.code)
			err := tt.call(t.Context(), svc)
			if (err == nil) != tt.elsewhere || err != nil && sallyport.CodeOf(err) != tt.code {
				t.Errorf("got %v; want an answer from elsewhere: %t", err, tt.elsewhere)
			}
			if got := second.asked.Load() > 0; got != tt.elsewhere {
				t.Errorf("asked elsewhere: %t; want %t", got, tt.elsewhere)
			}
			before := first.asked.Load()
			if err := tt.call(t.Context(), svc); (err == nil) != tt.left {
				t.Errorf("the next call: %v; want success: %t", err, tt.left)
			}
			if got := first.asked.Load() == before; got != tt.left {
				t.Errorf("the next call went elsewhere: %t; want %t", got, tt.left)
			}
		})
	}
}

// TestBothCannotServe: each is asked once, and the error is theirs.
func TestBothCannotServe(t *testing.T) {
	first, second, svc := pair(t)
	first.fails("storage.unavailable")
	second.fails("storage.unavailable")
	if _, err := svc.Get(t.Context(), sallyport.KindUser, "u"); sallyport.CodeOf(err) != "storage.unavailable" {
		t.Errorf("got %v; want storage.unavailable", err)
	}
	if a, b := first.asked.Load(), second.asked.Load(); a != 1 || b != 1 {
		t.Errorf("asked %d and %d times; want once each", a, b)
	}
}

// TestNobodyAtAnAddress: a write whose request never left goes to the next address.
func TestNobodyAtAnAddress(t *testing.T) {
	p, s := newPKI(t), newSite()
	gone := listen(t, "127.0.0.1:0")
	gone.Close()
	ln := listen(t, "127.0.0.1:0")
	serve(t, ln, p.server(control.KindCached), all(s))
	svc := remote(dial(t, p.client(control.KindOperator, control.KindCached), gone.Addr().String(), ln.Addr().String()))
	began := time.Now()
	must(t, svc, sallyport.Op{Kind: sallyport.KindUser, ID: "u"})
	within(t, time.Second, "the write", began)
}

// TestKilledServiceIsLeft: calls and streams are at the other address within a
// second, and the list that broke off is whole.
func TestKilledServiceIsLeft(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	killed, alive := start(t, p, "policyd"), start(t, p, "policyd")
	svc := remote(dial(t, p.client("operator", "policyd"), killed.line(t), alive.line(t)))
	events, ended := follow(t.Context(), svc, sallyport.WatchRequest{})
	next(t, events)
	began := time.Now()
	killed.signal(t, syscall.SIGKILL)
	if err := next(t, ended); sallyport.CodeOf(err) != control.CodeUnavailable {
		t.Errorf("stream: got %v; want %s", err, control.CodeUnavailable)
	}
	events, _ = follow(t.Context(), svc, sallyport.WatchRequest{})
	next(t, events)
	if _, err := svc.authorize.Authorize(t.Context(), []sallyport.Request{question("a", 22)}); err != nil {
		t.Errorf("question: %v", err)
	}
	must(t, svc, sallyport.Op{Kind: sallyport.KindUser, ID: "u"})
	if _, err := svc.lister.List(t.Context(), sallyport.KindUser); err != nil {
		t.Errorf("list: %v", err)
	}
	within(t, time.Second, "the other address", began)
}

// TestFrozenServiceCostsHalfTheTime: a question to one that stands still is answered
// by the other within its deadline, and the next one at once.
func TestFrozenServiceCostsHalfTheTime(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	frozen, alive := start(t, p, "policyd"), start(t, p, "policyd")
	svc := remote(dial(t, p.client("operator", "policyd"), frozen.line(t), alive.line(t)))
	ask := func(timeout time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		_, err := svc.authorize.Authorize(ctx, []sallyport.Request{question("a", 22)})
		return err
	}
	if err := ask(5 * time.Second); err != nil {
		t.Fatal(err)
	}
	frozen.freeze(t)
	if err := ask(2 * time.Second); err != nil {
		t.Errorf("the first question: %v", err)
	}
	began := time.Now()
	if err := ask(2 * time.Second); err != nil {
		t.Errorf("the next question: %v", err)
	}
	within(t, slowQuestion, "the next question", began)
}

const slowQuestion = 500 * time.Millisecond

package control_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"sallyport"
	"sallyport/proto/control"
)

// unwell is a cached that says of itself that it cannot answer.
type unwell struct {
	*site
	code  string
	asked atomic.Int64
}

func (u *unwell) err() error {
	u.asked.Add(1)
	return &sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: u.code, Message: "cannot"}
}

func (u *unwell) Get(context.Context, sallyport.Kind, string) (sallyport.Record, error) {
	return sallyport.Record{}, u.err()
}

func (u *unwell) Apply(context.Context, []sallyport.Op) (sallyport.Revision, error) { return 0, u.err() }

func (u *unwell) Watch(context.Context, sallyport.WatchRequest, func(sallyport.WatchEvent) error) error {
	return u.err()
}

// TestAnUnwellServiceIsLeft: what one cached says it cannot do another is asked to
// do, at once where nothing can have happened, with the next call where something
// may have.
func TestAnUnwellServiceIsLeft(t *testing.T) {
	put := []sallyport.Op{{Kind: sallyport.KindUser, ID: "u", Payload: []byte("{}")}}
	for _, c := range []struct {
		code  string
		apply bool // is done at once
	}{
		{"storage.not_current", true},
		{"storage.unavailable", true},
		{"storage.closed", true},
		{"storage.failed", false},
	} {
		t.Run(c.code, func(t *testing.T) {
			t.Parallel()
			for _, call := range []struct {
				name   string
				atOnce bool
				do     func(context.Context, *control.Records) error
			}{
				{"get", true, func(ctx context.Context, r *control.Records) error {
					_, err := r.Get(ctx, sallyport.KindUser, "nobody")
					if errors.Is(err, sallyport.ErrNotFound) {
						return nil
					}
					return err
				}},
				{"apply", c.apply, func(ctx context.Context, r *control.Records) error {
					_, err := r.Apply(ctx, put)
					return err
				}},
				{"watch", false, func(ctx context.Context, r *control.Records) error {
					enough := errors.New("enough")
					err := r.Watch(ctx, sallyport.WatchRequest{}, func(sallyport.WatchEvent) error { return enough })
					if errors.Is(err, enough) {
						return nil
					}
					return err
				}},
			} {
				p, bad := newPKI(t), &unwell{site: newSite(), code: c.code}
				first, second := listen(t, "127.0.0.1:0"), listen(t, "127.0.0.1:0")
				serve(t, first, p.server(control.KindCached), control.Services{Records: bad})
				serve(t, second, p.server(control.KindCached), all(newSite()))
				records := dial(t, p.client(control.KindAuthd, control.KindCached), first.Addr().String(), second.Addr().String()).Records()
				if err := call.do(t.Context(), records); (err == nil) != call.atOnce {
					t.Errorf("%s: got %v; want it done at once: %t", call.name, err, call.atOnce)
				}
				if err := call.do(t.Context(), records); err != nil {
					t.Errorf("%s: the next one: %v", call.name, err)
				}
				if n := bad.asked.Load(); n != 1 {
					t.Errorf("%s: the unwell one was asked %d times; want once", call.name, n)
				}
			}
		})
	}
}

// TestTheOnlyServiceIsKept: there is nowhere to go.
func TestTheOnlyServiceIsKept(t *testing.T) {
	p, bad := newPKI(t), &unwell{site: newSite(), code: "storage.not_current"}
	ln := listen(t, "127.0.0.1:0")
	serve(t, ln, p.server(control.KindCached), control.Services{Records: bad})
	records := dial(t, p.client(control.KindAuthd, control.KindCached), ln.Addr().String()).Records()
	if _, err := records.Get(t.Context(), sallyport.KindUser, "u"); sallyport.CodeOf(err) != bad.code || bad.asked.Load() != 1 {
		t.Errorf("got %v after %d questions; want its own word after one", err, bad.asked.Load())
	}
}

// TestAFrozenServiceIsLeft: a question that changes nothing is answered by another
// within Silence and a moment, although nobody holds a stream to the frozen one.
func TestAFrozenServiceIsLeft(t *testing.T) {
	p := newPKI(t)
	frozen := start(t, p, control.KindCached)
	addr := frozen.line(t)
	second := listen(t, "127.0.0.1:0")
	serve(t, second, p.server(control.KindCached), all(newSite()))
	records := dial(t, p.client(control.KindAuthd, control.KindCached), addr, second.Addr().String()).Records()
	get := func() {
		t.Helper()
		if _, err := records.Get(t.Context(), sallyport.KindUser, "nobody"); !errors.Is(err, sallyport.ErrNotFound) {
			t.Errorf("got %v; want ErrNotFound", err)
		}
	}
	get()
	frozen.freeze(t)
	begun := time.Now()
	get()
	within(t, control.Silence+2*time.Second, "an answer of the other", begun)
	begun = time.Now()
	get()
	within(t, time.Second, "the next answer", begun)
}

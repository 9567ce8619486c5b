package control

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"sallyport"
	"sallyport/proto/control/internal/pb"
)

// fill sets every field of v to something that is not its zero value, so that a
// field which does not travel is missed.
func fill(t *testing.T, v reflect.Value, n *int) {
	t.Helper()
	*n++
	switch v.Interface().(type) {
	case time.Time:
		v.Set(reflect.ValueOf(time.Unix(1_700_000_000, int64(*n)).UTC()))
		return
	case netip.AddrPort:
		v.Set(reflect.ValueOf(netip.AddrPortFrom(netip.MustParseAddr("2001:db8::1"), uint16(*n))))
		return
	case sallyport.WatchEventType:
		v.Set(reflect.ValueOf(sallyport.WatchChange))
		return
	case sallyport.Verdict:
		v.Set(reflect.ValueOf(sallyport.VerdictPending))
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(fmt.Sprintf("text-%d", *n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Uint8, reflect.Uint16, reflect.Uint64:
		v.SetUint(uint64(*n % 200))
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range 2 {
			fill(t, v.Index(i), n)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fill(t, key, n)
		fill(t, value, n)
		v.SetMapIndex(key, value)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(t, v.Elem(), n)
	case reflect.Struct:
		for i := range v.NumField() {
			fill(t, v.Field(i), n)
		}
	default:
		t.Fatalf("fill does not know %s", v.Type())
	}
}

func full[T any](t *testing.T) T {
	t.Helper()
	var v T
	n := 0
	fill(t, reflect.ValueOf(&v).Elem(), &n)
	return v
}

// travels sends a full and a zero value there and back.
func travels[T any, M proto.Message](t *testing.T, to func(T) M, from func(M) (T, error)) {
	t.Helper()
	var zero T
	for _, want := range []T{full[T](t), zero} {
		b, err := proto.Marshal(to(want))
		if err != nil {
			t.Fatal(err)
		}
		m := reflect.New(reflect.TypeFor[M]().Elem()).Interface().(M)
		if err := proto.Unmarshal(b, m); err != nil {
			t.Fatal(err)
		}
		got, err := from(m)
		if err != nil {
			if reflect.DeepEqual(want, zero) {
				continue // no zero value of this type
			}
			t.Fatal(err)
		}
		// The terms of CAs are policyd's business: gateways are told what counts now.
		noTerms := cmpopts.IgnoreFields(sallyport.Trust{}, "Terms")
		if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{}), cmpopts.EquateEmpty(), noTerms); diff != "" {
			t.Errorf("%T changes on the wire (-sent +received):\n%s", want, diff)
		}
	}
}

func sure[M, T any](from func(M) T) func(M) (T, error) {
	return func(m M) (T, error) { return from(m), nil }
}

func TestConversionsKeepEveryField(t *testing.T) {
	travels(t, recordToWire, sure(recordFromWire))
	travels(t, opToWire, sure(opFromWire))
	travels(t, watchRequestToWire, sure(watchRequestFromWire))
	travels(t, watchEventToWire, watchEventFromWire)
	travels(t, requestToWire, requestFromWire)
	travels(t, decisionToWire, decisionFromWire)
	travels(t, listRequestToWire, listRequestFromWire)
	travels(t, noticeToWire, sure(noticeFromWire))
	travels(t, revocationToWire, sure(revocationFromWire))
	travels(t, revokedToWire, sure(revokedFromWire))
}

func TestVerdictsTravel(t *testing.T) {
	seen := map[pb.Decision_Verdict]bool{}
	for v := sallyport.VerdictDeny; v.String() != "deny" || v == sallyport.VerdictDeny; v++ {
		w := verdictToWire(v)
		if got := verdictFromWire(w); got != v || seen[w] {
			t.Errorf("%v arrives as %v", v, got)
		}
		seen[w] = true
	}
	if len(seen) != len(pb.Decision_Verdict_name) {
		t.Errorf("%d verdicts travel; the wire has %d", len(seen), len(pb.Decision_Verdict_name))
	}
	if got := verdictFromWire(99); got != sallyport.VerdictDeny {
		t.Errorf("unknown verdict: got %v; want deny", got)
	}
}

func TestBadMessagesAreRefused(t *testing.T) {
	for name, err := range map[string]error{
		"peer of one byte":      second(requestFromWire(&pb.Request{Peer: []byte{1}})),
		"peer of a listing":     second(listRequestFromWire(&pb.ListRequest{Peer: make([]byte, 7)})),
		"target port 65536":     second(requestFromWire(&pb.Request{Target: &pb.Target{Port: 65536}})),
		"upstream port 65558":   second(decisionFromWire(&pb.Decision{Upstream: &pb.Upstream{Port: 65558}})),
		"watch event of type 9": second(watchEventFromWire(&pb.WatchEvent{Type: 9})),
		"empty watch event":     second(watchEventFromWire(&pb.WatchEvent{})),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestErrorsTravel(t *testing.T) {
	decision := full[sallyport.Decision](t)
	denied := &sallyport.Error{
		Outcome: sallyport.OutcomeDenied, Code: "denied", Message: "no", Hint: "ask", After: time.Second,
		Decision: &decision, Err: errors.New("internals"),
	}
	arrives := func(err error) error {
		t.Helper()
		got, ok := failureFromWire(status.Convert(failureToWire(err)))
		if !ok {
			t.Fatalf("%v does not arrive", err)
		}
		return got
	}
	for _, s := range sentinels {
		sent := fmt.Errorf("user u1: %w", s.err)
		if got := arrives(sent); !errors.Is(got, s.err) || got.Error() != sent.Error() {
			t.Errorf("got %v; want %v", got, sent)
		}
		if got := arrives(&sallyport.Error{Message: "no", Err: s.err}); !errors.Is(got, s.err) {
			t.Errorf("wrapped: got %v; want %v", got, s.err)
		}
	}
	var got *sallyport.Error
	if err := arrives(fmt.Errorf("deciding: %w", denied)); !errors.As(err, &got) {
		t.Fatalf("got %T; want *sallyport.Error", err)
	}
	want := *denied
	want.Err = nil
	if diff := cmp.Diff(want, *got, cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
		t.Errorf("(-sent +received):\n%s", diff)
	}
	if got := arrives(errors.New("disk on fire")); got.Error() != "disk on fire" || sallyport.OutcomeOf(got) != sallyport.OutcomeInternal {
		t.Errorf("got %v", got)
	}
	if got := arrives(errors.New(strings.Repeat("ä", 5000) + "\xff")); len(got.Error()) > maxFailureText+8 {
		t.Errorf("a text of %d bytes went into a header", len(got.Error()))
	}
	huge := *denied
	huge.Decision = &sallyport.Decision{ID: "d-1", Rule: strings.Repeat("x", maxFailure)}
	if err := arrives(&huge); !errors.As(err, &got) || got.Decision != nil || got.Code != "denied" {
		t.Errorf("an error larger than a header may be: got %+v", err)
	}
}

func TestTransportErrorsAreOurs(t *testing.T) {
	for code, want := range map[codes.Code]struct {
		outcome sallyport.Outcome
		code    string
	}{
		codes.Unavailable:       {sallyport.OutcomeUnavailable, CodeUnavailable},
		codes.Canceled:          {sallyport.OutcomeUnavailable, CodeUnavailable},
		codes.DeadlineExceeded:  {sallyport.OutcomeUnavailable, CodeTimeout},
		codes.Unimplemented:     {sallyport.OutcomeInternal, CodeUnsupported},
		codes.ResourceExhausted: {sallyport.OutcomeInternal, CodeTooLarge},
		codes.Internal:          {sallyport.OutcomeInternal, CodeBadMessage},
	} {
		err := transportError("policyd", status.Error(code, "x"))
		if sallyport.OutcomeOf(err) != want.outcome || sallyport.CodeOf(err) != want.code {
			t.Errorf("%v: got %v, %s", code, sallyport.OutcomeOf(err), sallyport.CodeOf(err))
		}
		if errors.Is(err, context.DeadlineExceeded) != (code == codes.DeadlineExceeded) {
			t.Errorf("%v: is it a deadline? %v", code, err)
		}
	}
}

// Whatever arrives, it is an error or a value that survives the way back, and it
// allows only if it says so in the one way there is.
func FuzzDecision(f *testing.F) {
	for _, d := range []sallyport.Decision{{}, {Verdict: sallyport.VerdictAllow, Upstream: sallyport.Upstream{Port: 1}}} {
		b, err := proto.Marshal(decisionToWire(d))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{0x10, 0x81, 0x80, 0x80, 0x80, 0x10}) // verdict 2^32+1
	f.Fuzz(func(t *testing.T, b []byte) {
		var m pb.Decision
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		d, err := decisionFromWire(&m)
		if err != nil {
			return
		}
		if d.Allowed() != (m.GetVerdict() == pb.Decision_ALLOW) {
			t.Errorf("verdict %d is read as %v", m.GetVerdict(), d.Verdict)
		}
		again, err := decisionFromWire(decisionToWire(d))
		if err != nil || !reflect.DeepEqual(d, again) && cmp.Diff(d, again, cmpopts.EquateEmpty()) != "" {
			t.Errorf("got %+v, %v; want %+v", again, err, d)
		}
	})
}

func FuzzRequest(f *testing.F) {
	b, err := proto.Marshal(requestToWire(sallyport.Request{Session: "s", Peer: netip.MustParseAddrPort("[fe80::1%eth0]:1")}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var m pb.Request
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		q, err := requestFromWire(&m)
		if err != nil {
			return
		}
		again, err := requestFromWire(requestToWire(q))
		if err != nil || q.Peer != again.Peer || q.Target != again.Target || q.Session != again.Session {
			t.Errorf("got %+v, %v; want %+v", again, err, q)
		}
	})
}

package policyd

import (
	"runtime"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached/storetest"

	"github.com/google/go-cmp/cmp"
)

// What a question sees of a session and a login is what their records say.
func TestCompactRecordsAreWrittenOutAsTheyCame(t *testing.T) {
	people := storetest.Population{Sessions: 10, Now: time.Now()}
	odd := func(s sallyport.Session) sallyport.Op { return sallyport.Put(sallyport.KindSession, string(s.ID), s) }
	zoned := time.Date(2026, 3, 1, 12, 0, 0, 7, time.FixedZone("", 5400))
	for name, op := range map[string]sallyport.Op{
		"usual":        people.SessionOp(3),
		"bare":         odd(sallyport.Session{ID: "s", Login: "l", User: "u"}),
		"escaped":      odd(sallyport.Session{ID: `s"<`, Login: "l\\", User: "ü", Kind: "some day", Claims: map[string]any{"n": 1.5, "l": []any{"a", nil}}}),
		"another zone": odd(sallyport.Session{ID: "s", Login: "l", User: "u", Created: zoned, Expires: zoned}),
	} {
		r := recordOf(op)
		want, err := sallyport.Decode[sallyport.Session](r)
		if err != nil {
			t.Fatal(err)
		}
		h, err := new(common).session(&r)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var got sallyport.Session
		h.value.write(&got, h.id)
		want.Address = "" // nobody decides by it
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: (-record +question)\n%s", name, diff)
		}
	}
	again := sallyport.Login{ID: "l", User: "u", Created: zoned, Expires: zoned.Add(time.Hour), Authenticated: zoned.Add(time.Minute), AuthMethods: []string{"pwd"}}
	for _, op := range []sallyport.Op{people.LoginOp(3), sallyport.Put(sallyport.KindLogin, "l", again)} {
		r := recordOf(op)
		want, err := sallyport.Decode[sallyport.Login](r)
		if err != nil {
			t.Fatal(err)
		}
		h, err := new(common).login(&r)
		if err != nil {
			t.Fatal(err)
		}
		var got sallyport.Login
		h.value.write(&got, h.id)
		want.Issuer = "" // nobody decides by it
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("login %s: (-record +question)\n%s", op.ID, diff)
		}
	}
}

func TestCompactRecordsOfAnotherAreRefused(t *testing.T) {
	s, l := recordOf(sallyport.Put(sallyport.KindSession, "s1", sallyport.Session{ID: "s2"})),
		recordOf(sallyport.Put(sallyport.KindLogin, "l1", sallyport.Login{ID: "l2"}))
	if _, err := new(common).session(&s); err == nil {
		t.Error("a session with the payload of another is taken")
	}
	if _, err := new(common).login(&l); err == nil {
		t.Error("a login with the payload of another is taken")
	}
	bad := sallyport.Record{Kind: sallyport.KindSession, ID: "s", Payload: []byte(`{"id":"s","claims":[1]}`)}
	if _, err := new(common).session(&bad); err == nil {
		t.Error("a session whose claims are a list is taken")
	}
}

// Times that no clock will ever show are taken for the ends of time, not for others
// in between.
func TestInstantsKeepTheirOrder(t *testing.T) {
	times := []time.Time{
		time.Date(1, 1, 2, 0, 0, 0, 0, time.UTC), time.Date(1969, 1, 1, 0, 0, 0, 0, time.UTC),
		time.Date(2026, 1, 1, 0, 0, 0, 1, time.UTC), time.Date(2026, 1, 1, 0, 0, 0, 2, time.UTC), time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	for i, later := range times[1:] {
		if a, b := instantOf(times[i]), instantOf(later); a >= b {
			t.Errorf("%v is %d, and %v is %d", times[i], a, later, b)
		}
	}
	now := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	for i, want := range []bool{true, true, true, true, false} {
		if got := instantOf(times[i]).passed(now); got != want {
			t.Errorf("%v has passed: %t", times[i], got)
		}
	}
	if !instantOf(time.Time{}).time().IsZero() || instantOf(time.Time{}).passed(now) {
		t.Error("the zero time is one")
	}
}

// Claims are kept once, and for no longer than somebody has them.
func TestSharedValuesGoWithTheLastRecord(t *testing.T) {
	var c common
	people := storetest.Population{Sessions: 10, Now: time.Now()} // of one person
	first, second, other := recordOf(people.SessionOp(0)), recordOf(people.SessionOp(1)), recordOf(people.UserOp(1))
	a, err := c.session(&first)
	if err != nil {
		t.Fatal(err)
	}
	b, err := c.session(&second)
	if err != nil {
		t.Fatal(err)
	}
	u, err := c.user(&other)
	if err != nil {
		t.Fatal(err)
	}
	if a.value.claims != b.value.claims || a.value.methods != b.value.methods {
		t.Error("two sessions of a person share nothing")
	}
	if u.value.claims == a.value.claims {
		t.Error("two people have the same claims")
	}
	runtime.KeepAlive(a)
	runtime.KeepAlive(b)
	runtime.KeepAlive(u)
	left := func() int {
		c.claims.mu.Lock()
		defer c.claims.mu.Unlock()
		return len(c.claims.values)
	}
	for deadline := time.Now().Add(10 * time.Second); left() > 0; runtime.GC() {
		if time.Now().After(deadline) {
			t.Fatalf("%d claims are still there", left())
		}
	}
}

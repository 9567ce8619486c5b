package storetest

import (
	"errors"
	"testing"
	"time"

	"sallyport"
)

var recordsCases = []struct {
	name string
	run  func(*testing.T, API)
}{
	{"what was applied can be read", testRoundTrip},
}

func testRoundTrip(t *testing.T, api API) {
	ctx := t.Context()
	ends := time.Now().Add(time.Hour)
	op := sallyport.Put(sallyport.KindUser, "u1", sallyport.User{ID: "u1", Email: "alice@corp.example"})
	op.Expires = ends
	rev, err := api.Apply(ctx, []sallyport.Op{op})
	if err != nil {
		t.Fatal(err)
	}
	got, err := api.Get(ctx, sallyport.KindUser, "u1")
	if err != nil {
		t.Fatal(err)
	}
	if got.Revision != rev || got.Version != 1 || !got.Expires.Equal(ends) || string(got.Payload) != string(op.Payload) {
		t.Errorf("got %+v; want what was written at %d", got, rev)
	}
	if _, err := api.Get(ctx, sallyport.KindUser, "u2"); !errors.Is(err, sallyport.ErrNotFound) {
		t.Errorf("got %v; want ErrNotFound", err)
	}
}

// Package storetest is the conformance suites of the record store: [Store] for
// the engines under a cached.Server and [Records] for what its users see,
// whether they hold the server itself or a client that reaches it over the
// wire. Both need a real implementation and prove behaviour only through its
// interface.
package storetest

import (
	"context"
	"testing"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/memory"
	"sallyport/internal/keyring"
)

// API is everything that users of the record store call.
type API interface {
	sallyport.Records
	sallyport.Lister
	sallyport.Revoker
}

// Serve returns a server over the store, running until the test ends. A nil
// store is an empty one in memory.
func Serve(t testing.TB, store cached.Store) *cached.Server {
	t.Helper()
	if store == nil {
		store = memory.New()
	}
	return Run(t, cached.Deps{Store: store, KEK: KEK()})
}

// Run returns a server with these parts, running until the test ends.
func Run(t testing.TB, deps cached.Deps) *cached.Server {
	t.Helper()
	s, err := cached.New(cached.Config{}, deps)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("cached.Server.Run: %v", err)
		}
	})
	return s
}

// KEK returns a fresh key-encryption key, for Deps of a store of their own.
func KEK() keyring.KEK { return keyring.NewKEK() }

// Records runs the suite of sallyport.Records, Lister and Revoker. open returns
// an implementation over an empty, running store of its own, which lives until
// the (sub)test ends.
func Records(t *testing.T, open func(t *testing.T) API) {
	for _, group := range []struct {
		name  string
		cases []recordsCase
	}{{"records", recordsCases}, {"watch", watchCases}, {"revoke", revokeCases}} {
		t.Run(group.name, func(t *testing.T) {
			for _, c := range group.cases {
				t.Run(c.name, func(t *testing.T) {
					t.Parallel() // they wait more than they work
					c.run(t, &client{t, open(t)})
				})
			}
		})
	}
}

type recordsCase struct {
	name string
	run  func(*testing.T, *client)
}

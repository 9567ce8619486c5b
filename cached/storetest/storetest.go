// Package storetest is the conformance suites of the record store: [Store] for
// the engines under a cached.Server, [Shared] for those that several servers may
// write, and [Records] for what their users see, whether they hold the server
// itself or a client that reaches it over the wire. All need a real
// implementation and prove behaviour only through its interface.
package storetest

import (
	"context"
	"crypto/rand"
	"errors"
	"sync"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/memory"
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
	return Run(t, cached.Deps{Store: store, MACKey: Key()})
}

// Run returns a server with these parts, running until the test ends.
func Run(t testing.TB, deps cached.Deps) *cached.Server {
	t.Helper()
	s, stop := start(t, deps)
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("cached.Server.Run: %v", err)
		}
	})
	awaitCurrent(t, s)
	return s
}

// start returns a running server, and what ends it and returns Run's error.
func start(t testing.TB, deps cached.Deps) (*cached.Server, func() error) {
	t.Helper()
	s, err := cached.New(cached.Config{}, deps)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return s, sync.OnceValue(func() error {
		cancel()
		return <-done
	})
}

// awaitCurrent waits until watches may begin: on a shared store that takes a
// confirmation.
func awaitCurrent(t testing.TB, s *cached.Server) {
	t.Helper()
	begun := errors.New("begun")
	retry := time.NewTicker(5 * time.Millisecond)
	defer retry.Stop()
	for deadline := time.Now().Add(within); time.Now().Before(deadline); <-retry.C {
		err := s.Watch(context.Background(), sallyport.WatchRequest{}, func(sallyport.WatchEvent) error { return begun })
		if errors.Is(err, begun) {
			return
		}
	}
	t.Fatal("the store does not confirm that it is the one in use")
}

// Key returns a fresh key for the rows' codes.
func Key() []byte {
	key := make([]byte, cached.KeySize)
	rand.Read(key)
	return key
}

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

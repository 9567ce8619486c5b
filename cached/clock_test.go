package cached_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/storetest"
	"sallyport/internal/logging"
)

// clocked is a running server whose wall clock a test sets.
type clocked struct {
	*cached.Server
	t     *testing.T
	store *store
	off   atomic.Int64 // of the wall clock, in nanoseconds
	log   bytes.Buffer
}

// withClock runs a test in a bubble of its own.
func withClock(t *testing.T, test func(*clocked)) {
	synctest.Test(t, func(t *testing.T) {
		c := &clocked{t: t, store: newStore()}
		logger, err := logging.New(&c.log, "info", "text")
		if err != nil {
			t.Fatal(err)
		}
		c.Server = storetest.Run(t, cached.Deps{Store: c.store, KEK: storetest.KEK(), Now: c.now, Log: logger})
		test(c)
	})
}

func (c *clocked) now() time.Time { return time.Now().Add(time.Duration(c.off.Load())) }

// set moves the wall clock to where it is off by that much.
func (c *clocked) set(off time.Duration) { c.off.Store(int64(off)) }

// session writes a session that ends after d by the wall clock.
func (c *clocked) session(id string, d time.Duration) {
	c.t.Helper()
	op := put(sallyport.KindSession, id)
	op.Expires = c.now().Add(d)
	apply(c.t, c.Server, op)
}

// want checks what a session is: "live", "ended" (it reads as missing, and is
// kept) or "removed".
func (c *clocked) want(id, want, when string) {
	c.t.Helper()
	got := "live"
	if _, err := c.Get(c.t.Context(), sallyport.KindSession, id); errors.Is(err, sallyport.ErrNotFound) {
		got = "ended"
		if row, err := c.store.Get(c.t.Context(), sallyport.KindSession, id); err != nil || row.Deleted {
			got = "removed"
		}
	} else if err != nil {
		c.t.Fatal(err)
	}
	listed := false
	for _, there := range snapshotIDs(c.t, c.Server) {
		listed = listed || there == id
	}
	if got != want || listed != (want == "live") {
		c.t.Errorf("%s: %s is %s, in a snapshot: %t; want it %s", when, id, got, listed, want)
	}
}

// logged counts the lines that hold text.
func (c *clocked) logged(text string) int {
	synctest.Wait()
	return strings.Count(c.log.String(), text)
}

func TestCase_M10_AClockSetForwardRemovesNobody(t *testing.T) {
	withClock(t, func(c *clocked) {
		c.session("hour", time.Hour)
		pass(time.Minute)
		c.set(2 * time.Hour)
		c.want("hour", "ended", "at the jump")
		pass(9 * time.Minute)
		c.want("hour", "ended", "in doubt")
		if n := c.logged("[WARN]  clock jumped"); n != 1 {
			t.Errorf("the jump was logged %d times; want once\n%s", n, &c.log)
		}
		c.set(0)
		c.want("hour", "live", "set right again")
		pass(51 * time.Minute) // an hour and a minute in all
		c.want("hour", "removed", "after its end")
		if c.logged("clock is right again") != 1 {
			t.Errorf("log does not tell that the clock is right again:\n%s", &c.log)
		}
	})
}

func TestCase_M10_AClockThatStaysForwardIsTaken(t *testing.T) {
	withClock(t, func(c *clocked) {
		c.session("hour", time.Hour)
		c.session("day", 24*time.Hour)
		pass(time.Minute)
		c.set(2 * time.Hour)
		pass(9 * time.Minute)
		c.set(4 * time.Hour) // a second jump: the doubt begins anew
		pass(9 * time.Minute)
		c.want("hour", "ended", "in doubt")
		pass(2 * time.Minute)
		c.want("hour", "removed", "after the doubt")
		c.want("day", "live", "after the doubt")
		if c.logged("clock jumped") != 2 || c.logged("clock is taken as it is") != 1 {
			t.Errorf("got log\n%s", &c.log)
		}
	})
}

func TestCase_M10_AClockSetBackLetsNothingLiveAgain(t *testing.T) {
	withClock(t, func(c *clocked) {
		c.session("old", 30*time.Second)
		c.session("minutes", 3*time.Minute)
		c.session("day", 24*time.Hour)
		pass(time.Minute)
		c.set(-2 * time.Hour)
		c.want("minutes", "live", "before its end")
		pass(2 * time.Minute)
		c.want("minutes", "ended", "in doubt")
		pass(7 * time.Minute)
		c.want("minutes", "ended", "in doubt")
		pass(2 * time.Minute)
		for _, id := range []string{"old", "minutes"} {
			c.want(id, "removed", "after the doubt")
		}
		c.want("day", "live", "after the doubt")
		c.session("new", time.Minute)
		pass(30 * time.Second)
		c.want("new", "live", "by the clock that was taken")
		pass(time.Minute)
		c.want("new", "removed", "by the clock that was taken")
	})
}

// A clock that is set back is taken only after what it would let live again is
// gone, however long that cannot be written.
func TestCase_M10_AClockSetBackWaitsForTheSweep(t *testing.T) {
	withClock(t, func(c *clocked) {
		c.session("minutes", 3*time.Minute)
		c.set(-2 * time.Hour)
		c.store.onWrite(func([]cached.Row) error { return errBusy })
		pass(time.Hour)
		c.want("minutes", "ended", "while nothing can be written")
		c.store.onWrite(nil)
		pass(2 * time.Second)
		c.want("minutes", "removed", "once it can")
	})
}

// A time service that slews moves the clock far, but never at once.
func TestCase_M10_ASlewedClockIsNoJump(t *testing.T) {
	withClock(t, func(c *clocked) {
		c.session("s", 40*time.Minute)
		for range 30 { // minutes
			pass(time.Minute)
			c.set(time.Duration(c.off.Load()) + 20*time.Second)
		}
		if pass(2 * time.Second); c.logged("clock") != 0 {
			t.Errorf("got log\n%s", &c.log)
		}
		c.want("s", "removed", "after 40 minutes by the wall clock")
	})
}

func TestCase_M10_TombstonesAreKeptWhileInDoubt(t *testing.T) {
	withClock(t, func(c *clocked) {
		apply(c.t, c.Server, put(sallyport.KindUser, "a"))
		apply(c.t, c.Server, sallyport.Op{Kind: sallyport.KindUser, ID: "a", Delete: true})
		pass(30 * time.Minute)
		for i, off := range []time.Duration{9 * time.Hour, 0, 9 * time.Hour} {
			c.set(off)
			pass(9 * time.Minute)
			if head, err := c.store.Head(c.t.Context()); err != nil || head.Compacted != 0 {
				t.Errorf("jump %d: got %+v, %v; want no tombstone forgotten", i, head, err)
			}
		}
	})
}

// Whatever becomes of the clock: while a holder believes that it holds the lease
// nobody else gets it, and when it is gone somebody does.
func TestCase_M10_NoClockGivesALeaseToTwo(t *testing.T) {
	const ttl = 30 * time.Second
	for _, jump := range []time.Duration{5 * time.Second, -5 * time.Second, 50 * time.Second, 2 * time.Hour, -2 * time.Hour} {
		for _, after := range []time.Duration{time.Second, 11 * time.Second, 25 * time.Second} {
			for _, back := range []time.Duration{0, 2 * time.Minute} { // when it is set right; 0: never
				for _, away := range []bool{false, true} { // the holder cannot renew
					t.Run(fmt.Sprintf("%v after %v back %v away %t", jump, after, back, away), func(t *testing.T) {
						withClock(t, func(c *clocked) { c.leaseJump(ttl, jump, after, back, away) })
					})
				}
			}
		}
	}
}

func (c *clocked) leaseJump(ttl, jump, after, back time.Duration, away bool) {
	ctx, end := context.WithCancel(c.t.Context())
	first, lost := make(chan context.Context), make(chan error)
	go func() {
		lost <- c.Lease(ctx, "x", ttl, func(held context.Context) error {
			first <- held
			<-held.Done()
			return nil
		})
	}()
	held := <-first
	if away {
		c.forbidRenewal()
	}
	var clock sync.WaitGroup
	defer clock.Wait()
	clock.Go(func() {
		pass(after)
		c.set(jump)
		if back > 0 {
			pass(back)
			c.set(0)
		}
	})
	var tookAfter time.Duration
	for start := time.Now(); tookAfter == 0 && time.Since(start) < 5*time.Hour; {
		if time.Since(start) > 20*time.Minute {
			end() // a holder that goes gives the lease back
		}
		err := c.Lease(c.t.Context(), "x", ttl, func(context.Context) error {
			if held.Err() == nil {
				c.t.Errorf("a second one has the lease after %v", time.Since(start))
			}
			tookAfter = time.Since(start)
			return nil
		})
		if err != nil && !errors.Is(err, sallyport.ErrLeaseHeld) {
			c.t.Fatal(err)
		}
		pass(time.Second)
	}
	if tookAfter == 0 {
		c.t.Error("nobody ever got the lease again")
	}
	end()
	if err := <-lost; err != nil {
		c.t.Error(err)
	}
}

// forbidRenewal lets nobody write what the holder of the lease would write.
func (c *clocked) forbidRenewal() {
	row, err := c.store.Get(c.t.Context(), sallyport.KindLease, "x")
	if err != nil {
		c.t.Fatal(err)
	}
	c.store.onWrite(func(rows []cached.Row) error {
		for i := range rows {
			if rows[i].Kind == sallyport.KindLease && bytes.Equal(rows[i].Payload, row.Payload) {
				return errBusy
			}
		}
		return nil
	})
}

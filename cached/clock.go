package cached

import (
	"sync/atomic"
	"time"

	"sallyport/internal/logging"
)

const (
	// jumpOver is by how much the wall clock and the steady one may part between
	// two looks. What a time service slews is far below it.
	jumpOver = time.Minute

	// doubtFor is how long after a jump nothing is thrown away: whoever set the
	// clock wrong has this long to set it right again.
	doubtFor = 10 * time.Minute
)

// clock tells the time that records are judged by. The wall clock is what their
// expiry is written in, but it can be set wrong, forward or back; the steady clock
// (Go's monotonic reading, carried on from the last time that both agreed) cannot,
// but stands still while the machine is suspended. While they disagree, each
// question goes to the clock whose answer lets nobody in: see now and earlier.
//
// The zero value is not usable; newClock makes one.
type clock struct {
	wall func() time.Time
	log  logging.Logger
	// base is when both clocks agreed last, or when a jump was accepted; before is
	// the one before it.
	base, before atomic.Pointer[reading]

	// What follows is touched by look, accept and agree alone, for Run.

	jumped time.Time     // by the steady clock; zero: not in doubt
	by     time.Duration // how far
}

// reading is both clocks at one instant.
type reading struct {
	wall   time.Time // without a monotonic reading
	steady time.Time // of which only the monotonic reading counts
}

// newClock returns a clock that trusts wall for now; nil: time.Now.
func newClock(wall func() time.Time, log logging.Logger) *clock {
	if wall == nil {
		wall = time.Now
	}
	c := &clock{wall: wall, log: log}
	r := c.read()
	c.base.Store(&r)
	c.before.Store(&r)
	return c
}

func (c *clock) read() reading { return reading{wall: c.wall().Round(0), steady: time.Now()} }

// steadyAt is what the wall clock would say at r if it had not been set since base.
func (r reading) steadyAt(base *reading) time.Time {
	return base.wall.Add(r.steady.Sub(base.steady))
}

// off returns by how much the wall clock was set since both agreed; small steps,
// and what a time service slews, are none.
func (c *clock) off(r reading) time.Duration {
	if by := r.wall.Sub(r.steadyAt(c.base.Load())); by.Abs() > jumpOver {
		return by
	}
	return 0
}

// now is the time at which a record has expired or not: in doubt the later one of
// the two clocks. A clock that is set back lets nothing live again, and what a
// clock that is set forward has ended stays out until it is set right.
func (c *clock) now() time.Time { return c.later(c.read()) }

func (c *clock) later(r reading) time.Time { return r.wall.Add(max(0, -c.off(r))) }

// earlier is the time at which somebody may take what another one holds: the
// earlier one of the two clocks, however little they part. The steady clock follows
// no sooner than the second look, until when a holder has looked, too (leaseLook).
func (c *clock) earlier() time.Time { return c.earliest(c.read()) }

func (c *clock) earliest(r reading) time.Time {
	at := r.wall
	for _, base := range []*reading{c.base.Load(), c.before.Load()} {
		if steady := r.steadyAt(base); steady.Before(at) {
			at = steady
		}
	}
	return at
}

// look compares the clocks. While doubt is true, records that look expired must be
// kept. Otherwise the caller throws away what has ended, and then accepts the
// reading.
func (c *clock) look() (r reading, doubt bool) {
	r = c.read()
	by := c.off(r)
	switch {
	case by == 0:
		if !c.jumped.IsZero() {
			c.log.Info("clock is right again")
		}
		c.agree(r)
		return r, false
	case c.jumped.IsZero() || (by-c.by).Abs() > jumpOver:
		c.jumped, c.by = r.steady, by
		c.log.Warn("clock jumped: until it is right again or has stood for a while, nothing that looks expired is removed",
			"by", by, "while", doubtFor)
	}
	return r, r.steady.Sub(c.jumped) < doubtFor
}

// ended returns up to when the caller of look may throw away what has ended. When
// a jump is accepted, that is by the later clock: what a clock that was set back
// would let live again has to be gone first.
func (c *clock) ended(r reading) time.Time {
	if c.off(r) == 0 {
		return c.earliest(r)
	}
	return c.later(r)
}

// accept takes a jump that nobody took back: it is the time from now on.
func (c *clock) accept(r reading) {
	if by := c.off(r); by != 0 {
		c.log.Warn("clock is taken as it is", "by", by)
		c.agree(r)
	}
}

// agree lets both clocks go on from where they are, so that small steps never add
// up to a jump.
func (c *clock) agree(r reading) {
	c.before.Store(c.base.Load())
	c.base.Store(&r)
	c.jumped, c.by = time.Time{}, 0
}

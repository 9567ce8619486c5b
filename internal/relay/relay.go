// Package relay carries bytes between two connections: both ways at once, with
// half-close kept, without allocating per read, until both directions have
// ended, one side is reset, nothing has moved for too long, or the caller
// withdraws the flow. It owns the copying, its buffers and the order in which
// ends and resets are passed on; it knows neither who talks nor why.
package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Conn is one side. CloseWrite ends the outgoing direction only; Reset ends both
// at once and tells the peer a code where the transport can. A Read after the
// peer's reset returns an error that is not io.EOF. tunnel.Conn is one; TCP makes
// one from a *net.TCPConn.
type Conn interface {
	net.Conn
	CloseWrite() error
	Reset(code uint64)
}

// Meter counts a flow's bytes while it lives. The zero Meter is ready; its
// counters may be read at any time.
type Meter struct {
	Up   atomic.Int64 // bytes written to up
	Down atomic.Int64 // bytes written to down
}

func (m *Meter) total() int64 { return m.Up.Load() + m.Down.Load() }

// Options say what Splice tells whom. The zero Options count nobody's bytes,
// never time out, and reset with code 0.
type Options struct {
	// Meter counts; nil: a private one.
	Meter *Meter
	// Idle ends the flow when no byte has moved either way for this long (up to a
	// quarter longer). 0: never.
	Idle time.Duration
	// UpReset is the code that is told when up was reset or broke.
	UpReset uint64
	// DownReset is the code that is told when down was reset or broke.
	DownReset uint64
	// Withdrawn is the code for both sides when ctx ends, unless the cause of its
	// end is a *Cut.
	Withdrawn uint64
	// IdleReset is the code for both sides at the idle limit.
	IdleReset uint64
}

// Cut is a cause to cancel a Splice's context with (context.WithCancelCause): it
// chooses the code that both sides are reset with.
type Cut struct {
	Code   uint64
	Reason string
}

func (c *Cut) Error() string { return fmt.Sprintf("cut (%#x): %s", c.Code, c.Reason) }

// End says how a flow ended.
type End uint8

// The ends.
const (
	// EndEOF: both directions ended with their last byte delivered.
	EndEOF End = iota
	// EndUpReset: up was reset or broke.
	EndUpReset
	// EndDownReset: down was reset or broke.
	EndDownReset
	// EndIdle: the idle limit.
	EndIdle
	// EndWithdrawn: the context ended.
	EndWithdrawn
)

// String returns eof, up_reset, down_reset, idle or withdrawn.
func (e End) String() string {
	return [...]string{"eof", "up_reset", "down_reset", "idle", "withdrawn"}[e]
}

// Result tells how a flow ended and what it carried.
type Result struct {
	Up, Down int64 // bytes delivered to up and to down
	End      End
	// Err is the read or write error behind a reset, or the cause of ctx's end.
	Err error
}

const (
	// A direction waits for its next byte with a small buffer of its own and
	// borrows a large one only while there is more to carry: thousands of flows
	// are idle at any time, and what they hold is what the process needs.
	smallBuffer = 1 << 10
	largeBuffer = 64 << 10
	// Below this a read gives the large buffer back.
	largeKeep = 8 << 10
	// drain is how long one direction may still deliver what is on its way after
	// the other found its destination broken.
	drain = 5 * time.Second
)

var buffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}

var errIdle = errors.New("idle limit reached")

// Splice carries bytes between down (whoever asked) and up (what was asked for)
// until the flow is over. It owns both connections and has closed them when it
// returns.
//
// The end of one direction is passed on with CloseWrite after its last byte, and
// the other direction goes on. When a destination breaks, the direction towards
// it ends, but what the broken side had still sent is delivered first: a service
// that answers and closes without reading its input gets its answer across. A
// reset of one side resets the other.
func Splice(ctx context.Context, down, up Conn, o Options) Result {
	s := &splice{down: down, up: up, o: o, meter: o.Meter}
	if s.meter == nil {
		s.meter = new(Meter)
	}
	s.toUp.from(s, down, up, &s.meter.Up, EndDownReset, EndUpReset)
	s.toDown.from(s, up, down, &s.meter.Down, EndUpReset, EndDownReset)

	stop := context.AfterFunc(ctx, func() { s.withdraw(context.Cause(ctx)) })
	stopIdle := s.watchIdle()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.toUp.run()
	}()
	s.toDown.run()
	<-done
	stop()
	stopIdle()
	r := s.result()

	down.Close()
	up.Close()
	return r
}

type splice struct {
	down, up Conn
	o        Options
	meter    *Meter

	toUp, toDown pump

	mu    sync.Mutex
	ended bool // the first end decided
	over  bool // both pumps have ended: a watcher that fires late does nothing
	end   End
	code  uint64
	err   error
}

// finish records how the flow ended, once, and reports whether it did.
func (s *splice) finish(end End, code uint64, err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return false
	}
	s.ended, s.end, s.code, s.err = true, end, code, err
	return true
}

// reset resets both sides with the code of the recorded end: a pump that fails
// because the other one has reset its side must not tell a code of its own.
func (s *splice) reset() {
	s.mu.Lock()
	code := s.code
	s.mu.Unlock()
	s.down.Reset(code)
	s.up.Reset(code)
}

// withdraw cuts at once, also what is only delivered still because a destination
// broke.
func (s *splice) withdraw(cause error) {
	code := s.o.Withdrawn
	var cut *Cut
	if errors.As(cause, &cut) {
		code = cut.Code
	}
	if !s.finish(EndWithdrawn, code, cause) {
		s.mu.Lock()
		over := s.over
		s.code = code
		s.mu.Unlock()
		if over {
			return
		}
	}
	s.reset()
}

// watchIdle looks four times per limit whether bytes have moved.
func (s *splice) watchIdle() (stop func()) {
	if s.o.Idle <= 0 {
		return func() {}
	}
	period := max(s.o.Idle/4, time.Millisecond)
	last, still := s.meter.total(), 0
	var t *time.Timer
	armed := make(chan struct{})
	t = time.AfterFunc(period, func() {
		<-armed
		if now := s.meter.total(); now != last {
			last, still = now, 0
		} else if still++; still >= 4 {
			s.idle()
			return
		}
		t.Reset(period)
	})
	close(armed)
	return func() { t.Stop() }
}

func (s *splice) idle() {
	if s.finish(EndIdle, s.o.IdleReset, errIdle) {
		s.reset()
	}
}

// broke records that a pump's source or destination failed.
func (s *splice) broke(end End, err error) {
	code := s.o.DownReset
	if end == EndUpReset {
		code = s.o.UpReset
	}
	s.finish(end, code, err)
}

// result closes the books: from here on nobody resets anything.
func (s *splice) result() Result {
	s.finish(EndEOF, 0, nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	return Result{Up: s.meter.Up.Load(), Down: s.meter.Down.Load(), End: s.end, Err: s.err}
}

// pump carries one direction.
type pump struct {
	s        *splice
	src, dst Conn
	count    *atomic.Int64
	srcBroke End
	dstBroke End
	small    [smallBuffer]byte
}

// from sets the fields one by one: a literal would put a second pump, with its
// buffer, on the stack that Splice holds as long as the flow lives.
func (p *pump) from(s *splice, src, dst Conn, count *atomic.Int64, srcBroke, dstBroke End) {
	p.s, p.src, p.dst, p.count = s, src, dst, count
	p.srcBroke, p.dstBroke = srcBroke, dstBroke
}

func (p *pump) run() {
	srcErr, dstErr := p.copy()
	if srcErr == io.EOF {
		dstErr = p.dst.CloseWrite()
	}
	switch {
	case dstErr != nil:
		// dst takes nothing any more. It may still have sent something, which the
		// other pump delivers until it meets the failure itself; if dst only stopped
		// reading and sends on, the deadline ends that.
		p.s.broke(p.dstBroke, dstErr)
		p.dst.SetReadDeadline(time.Now().Add(drain))
	case srcErr != io.EOF:
		p.s.broke(p.srcBroke, srcErr)
		p.s.reset()
	}
}

// copy moves bytes until src ends or one side fails. It allocates nothing.
func (p *pump) copy() (srcErr, dstErr error) {
	buf := p.small[:]
	var large *[largeBuffer]byte
	defer func() {
		if large != nil {
			buffers.Put(large)
		}
	}()
	for {
		n, err := p.src.Read(buf)
		if n > 0 {
			w, werr := p.dst.Write(buf[:n])
			p.count.Add(int64(w))
			if werr != nil {
				return nil, werr
			}
		}
		if err != nil {
			return err, nil
		}
		switch {
		case large == nil && n == len(buf):
			large = buffers.Get().(*[largeBuffer]byte)
			buf = large[:]
		case large != nil && n < largeKeep:
			buffers.Put(large)
			large, buf = nil, p.small[:]
		}
	}
}

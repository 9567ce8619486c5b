// Package forward is the local end of tunnels: listeners on loopback ports and
// unix sockets, and standard input and output. It owns which port a target gets,
// who on this machine may use it, and what happens to a local connection while
// nothing can be opened for it yet: it is held, unread. It knows no session and no
// gateway; an Opener gives it flows.
package forward

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"sallyport"
	"sallyport/internal/relay"
	"sallyport/tunnel"
)

// Limits of what is held while a login runs, and of the end after Ctrl-C.
const (
	MaxHeld = 64              // connections of one target
	heldAt  = 2 * time.Second // what waits longer is held: nobody but a login takes so long
	HoldFor = 5 * time.Minute // at most
	Drain   = 5 * time.Second // for flows that live when Serve is told to stop
)

// Opener opens flows. Package agent is one.
type Opener interface {
	// Open asks the gateway for a flow; it may take as long as a login does.
	Open(ctx context.Context, t sallyport.Target) (*Flow, error)
}

// Flow is an open flow.
type Flow struct {
	*tunnel.Flow
	// WhyCut says why the flow ended badly, if it did with cause: an error of
	// OutcomeRevoked if the gateway withdrew it, another one, or nil if its own
	// ends did it.
	WhyCut func(ctx context.Context, cause error) error
}

// Forward serves one local end. Its fields are set before Serve.
type Forward struct {
	Target sallyport.Target
	Opener Opener
	Allow  Allow
	// Say gets what a person should read: refused users, refused flows. It may be
	// called from several goroutines. This field is required.
	Say func(err error)
	// Changed is called when a flow begins or ends; nil: nobody wants to know.
	Changed func()

	mu   sync.Mutex
	held int
	live map[*liveFlow]struct{}
	past Totals
}

// Totals are what a local end has carried.
type Totals struct {
	Flows    int64 // ever opened
	Up, Down int64 // bytes
}

// Live is a flow as ps shows it.
type Live struct {
	ID       sallyport.FlowID     `json:"id"`
	Decision sallyport.DecisionID `json:"decision,omitempty"`
	Rule     string               `json:"rule,omitempty"`
	Since    time.Time            `json:"since"`
	Up       int64                `json:"bytes_up"`
	Down     int64                `json:"bytes_down"`
}

type liveFlow struct {
	flow  *Flow
	since time.Time
	meter relay.Meter
}

// Status returns the live flows, oldest first, and what all flows have carried.
func (f *Forward) Status() ([]Live, Totals) {
	f.mu.Lock()
	defer f.mu.Unlock()
	live, totals := make([]Live, 0, len(f.live)), f.past
	for l := range maps.Keys(f.live) {
		up, down := l.meter.Up.Load(), l.meter.Down.Load()
		totals.Up, totals.Down = totals.Up+up, totals.Down+down
		live = append(live, Live{ID: l.flow.ID, Decision: l.flow.Decision, Rule: l.flow.Rule, Since: l.since, Up: up, Down: down})
	}
	slices.SortFunc(live, func(a, b Live) int { return a.Since.Compare(b.Since) })
	return live, totals
}

// Serve accepts on l until ctx ends, the target is withdrawn from a live flow, or
// no login can be asked for; the latter two it returns as errors. It closes l.
// After the end of ctx live flows have Drain to finish.
func (f *Forward) Serve(ctx context.Context, l net.Listener) error {
	accepting, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	// Flows outlive ctx for a while; hard ends them.
	hard, cut := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cut(nil)
	closed := context.AfterFunc(accepting, func() { l.Close() })
	defer closed()

	var flows sync.WaitGroup
	for {
		c, err := l.Accept()
		if err != nil {
			if accepting.Err() == nil {
				if temporary(err) && pause(accepting, 50*time.Millisecond) {
					continue
				}
				stop(fmt.Errorf("accept for %s: %w", f.Target.Authority(), err))
			}
			break
		}
		flows.Go(func() {
			if err := f.serve(accepting, hard, c); err != nil {
				stop(err)
			}
		})
	}
	drained := context.AfterFunc(ctx, func() {
		timer := time.AfterFunc(Drain, func() { cut(context.Canceled) })
		context.AfterFunc(hard, func() { timer.Stop() })
	})
	flows.Wait()
	drained()
	if err := context.Cause(accepting); ctx.Err() == nil || !errors.Is(err, context.Cause(ctx)) {
		return err
	}
	return nil
}

func temporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary() // EMFILE, ECONNABORTED
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// serve carries one local connection. Its error ends the target.
func (f *Forward) serve(accepting, hard context.Context, c net.Conn) error {
	down := localConn(c)
	if err := f.checkPeer(c); err != nil {
		f.Say(err)
		down.Reset(0)
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(accepting, HoldFor, &sallyport.Error{
		Outcome: sallyport.OutcomeLogin,
		Code:    "local.held_too_long", Message: fmt.Sprintf("%s: a connection waited %s, closed it", f.Target.Authority(), HoldFor),
	})
	flow, err := f.open(ctx)
	cancel()
	if err != nil {
		down.Reset(0)
		if accepting.Err() != nil {
			return nil
		}
		if sallyport.CodeOf(err) == CodeNoLogin {
			return err
		}
		f.Say(err)
		return nil
	}
	err = f.carry(hard, down, flow)
	switch {
	case sallyport.OutcomeOf(err) == sallyport.OutcomeRevoked && sallyport.CodeOf(err) != CodeSessionExpired:
		return err
	case err != nil:
		f.Say(err)
	}
	return nil
}

// CodeSessionExpired is the code of a flow that was cut because the session came
// to its end: the next connection asks for a login, so the target goes on.
const CodeSessionExpired = "session_expired"

// CodeNoLogin is the code of the error with which an Opener says that a login is
// needed and that nobody can be asked for it here.
const CodeNoLogin = "login.needed"

func (f *Forward) checkPeer(c net.Conn) error {
	if f.Allow.Any {
		return nil
	}
	uid, err := peerUID(c)
	if err == nil && f.Allow.permits(uid) {
		return nil
	}
	who := userName(uid)
	if err != nil {
		who = "an unknown user"
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeDenied, Code: "local.other_user", Err: err,
		Message: fmt.Sprintf("refused a connection of %s to %s", who, c.LocalAddr()),
		Hint:    fmt.Sprintf("%s may use it; to let others in: --allow-uid", f.Allow),
	}
}

// open asks for a flow. A connection that has to wait needs one of the places for
// those; a burst of connections that are let in at once needs none.
func (f *Forward) open(ctx context.Context) (*Flow, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	held, decided := false, make(chan struct{})
	timer := time.AfterFunc(heldAt, func() {
		defer close(decided)
		if held = f.hold(); !held {
			cancel(&sallyport.Error{
				Outcome: sallyport.OutcomeConflict, Code: "local.too_many_held",
				Message: fmt.Sprintf("%s: %d connections wait already, closed one more", f.Target.Authority(), MaxHeld),
			})
		}
	})
	flow, err := f.Opener.Open(ctx, f.Target)
	if timer.Stop() {
		return flow, err
	}
	if <-decided; held {
		f.release()
	}
	var why *sallyport.Error
	if err != nil && errors.As(context.Cause(ctx), &why) {
		err = why // says more than that the context ended
	}
	return flow, err
}

func (f *Forward) hold() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held >= MaxHeld {
		return false
	}
	f.held++
	return true
}

func (f *Forward) release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held--
}

// carry splices until the flow is over. The error says why it ended badly.
func (f *Forward) carry(hard context.Context, down relay.Conn, flow *Flow) error {
	l := &liveFlow{flow: flow, since: time.Now()}
	f.note(func() {
		if f.live == nil {
			f.live = make(map[*liveFlow]struct{})
		}
		f.live[l] = struct{}{}
		f.past.Flows++
	})
	r := relay.Splice(hard, down, flow, relay.Options{Meter: &l.meter})
	f.note(func() {
		delete(f.live, l)
		f.past.Up, f.past.Down = f.past.Up+r.Up, f.past.Down+r.Down
	})
	return f.verdict(flow, r)
}

func (f *Forward) note(change func()) {
	f.mu.Lock()
	change()
	f.mu.Unlock()
	if f.Changed != nil {
		f.Changed()
	}
}

// verdict asks why a flow was cut. A flow that its own ends closed is no news.
func (f *Forward) verdict(flow *Flow, r relay.Result) error {
	if r.End != relay.EndUpReset {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	return flow.WhyCut(ctx, r.Err)
}

// localConn is a relay.Conn over an accepted connection.
func localConn(c net.Conn) relay.Conn {
	switch c := c.(type) {
	case *net.TCPConn:
		return relay.TCP(c)
	case *net.UnixConn:
		return unixConn{c}
	}
	return plainConn{c}
}

// unixConn has no reset: closing with unread data is what the peer notices.
type unixConn struct{ *net.UnixConn }

func (c unixConn) Reset(uint64) { c.Close() }

// plainConn ends both ways at once.
type plainConn struct{ net.Conn }

func (c plainConn) CloseWrite() error { return nil }
func (c plainConn) Reset(uint64)      { c.Close() }

package control

import (
	"context"
	"time"

	"google.golang.org/grpc"

	"sallyport"
	"sallyport/proto/control/internal/pb"
)

// Where a service runs at several addresses: which failures are the place's and
// send a client on to the next, and what it may ask a second time there.

// A call that may be repeated waits for firstPatience at one address, or for half
// of its time if that is less. What has waited for less than slow says nothing
// about the address.
const (
	firstPatience = 2 * time.Second
	slow          = 500 * time.Millisecond
)

// repeatable are the calls that change nothing, or the same thing whether they come
// once or twice.
var repeatable = map[string]bool{
	pb.Records_Get_FullMethodName:          true,
	pb.Policy_Authorize_FullMethodName:     true,
	pb.Policy_Explain_FullMethodName:       true,
	pb.Policy_List_FullMethodName:          true,
	pb.Policy_ReportPosture_FullMethodName: true,
	pb.Revoker_Revoke_FullMethodName:       true,
}

// placeCodes are the failures that are those of the place: another one may serve.
// true: what was asked has not happened, so that whatever it was it may be asked
// there. storage.unknown is none of them: what it is about may have happened, and
// only the caller can look.
var placeCodes = map[string]bool{
	CodeUnavailable:       false,
	CodeTimeout:           false,
	"storage.unavailable": true,
	"storage.not_current": true,
	"storage.busy":        true,
	"storage.closed":      true,
	"storage.failed":      false,
	"storage.replaced":    false,
	"policy.none":         true,
	"policy.source":       true,
}

// wherever makes a call at the address in use, and if that address fails it, once
// at each other one as long as ctx allows: always if the request never left, or if
// nothing has come of it, else only if it may be repeated.
func (c *Client) wherever(ctx context.Context, call func(context.Context, *grpc.ClientConn) (sent bool, err error), repeatable bool) error {
	for left := len(c.addrs); ; left-- {
		conn, err := c.current()
		if err != nil {
			return err
		}
		began := time.Now()
		tryCtx, cancel := ctx, context.CancelFunc(func() {})
		if patience := patienceFor(ctx); left > 1 && repeatable && patience >= slow {
			tryCtx, cancel = context.WithTimeout(ctx, patience)
		}
		sent, err := call(tryCtx, conn)
		cancel()
		code := sallyport.CodeOf(err)
		nothing, place := placeCodes[code]
		if code == CodeTimeout && time.Since(began) < slow {
			place = false
		}
		if err == nil || !place {
			return err
		}
		c.leave(conn, err)
		if ctx.Err() != nil || left == 1 || sent && !nothing && !repeatable {
			return err
		}
	}
}

func patienceFor(ctx context.Context) time.Duration {
	if end, ok := ctx.Deadline(); ok {
		return min(firstPatience, time.Until(end)/2)
	}
	return firstPatience
}

// leave has the next call go to the next address, if there is one. A connection on
// which somebody waited in vain is closed: what still waits on it fails, and the
// next call there makes a new one. Any other mends itself.
func (c *Client) leave(conn *grpc.ClientConn, why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conns[c.at] != conn {
		return // somebody else was faster
	}
	if sallyport.CodeOf(why) == CodeTimeout {
		if len(c.addrs) == 1 {
			return // slow is better than nobody
		}
		c.conns[c.at] = nil
		conn.Close()
	}
	if len(c.addrs) > 1 {
		from := c.addrs[c.at].Addr
		c.at = (c.at + 1) % len(c.addrs)
		c.log.Warn("service left for its next address", "service", c.name, "address", from, "next", c.addrs[c.at].Addr, "error", why)
	}
}

// silent drops a connection whose other end has said nothing for Silence, and goes
// on to the next address.
func (c *Client) silent(conn *grpc.ClientConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conns[c.at] != conn {
		return
	}
	c.conns[c.at] = nil
	conn.Close()
	c.at = (c.at + 1) % len(c.addrs)
	c.log.Warn("service has fallen silent, connecting anew", "service", c.name, "address", c.addrs[c.at].Addr)
}

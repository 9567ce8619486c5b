package control

import (
	"context"
	"slices"
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

// leave has the next call go to the next address, if there is one. A call that
// waited in vain takes its connection with it only then: slow is better than nobody.
func (c *Client) leave(conn *grpc.ClientConn, why error) {
	c.drop(conn, len(c.addrs) > 1 && sallyport.CodeOf(why) == CodeTimeout, why)
}

// drop goes on to the next address if conn is the one in use. hangs: somebody waited
// on it in vain. Then it is closed, so that what still waits there fails, and the
// next call there makes a new one; any other mends itself.
func (c *Client) drop(conn *grpc.ClientConn, hangs bool, why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.Index(c.conns, conn)
	if i < 0 {
		return // somebody else was faster
	}
	if hangs {
		c.conns[i] = nil
		conn.Close()
	}
	if i != c.at || len(c.addrs) == 1 && !hangs {
		return
	}
	c.at = (c.at + 1) % len(c.addrs)
	c.log.Warn("service left, the next address is tried", "service", c.name, "addr", c.addrs[i].Addr, "error", why)
}

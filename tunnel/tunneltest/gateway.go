package tunneltest

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

// Hosts of targets that a Gateway answers; the port does not matter. Others are
// unknown.
const (
	Echo     = "echo.test"     // sends back what comes, ends when it ends
	Digest   = "digest.test"   // reads to the end, then answers its SHA-256 and 1 MiB of Reply
	Download = "download.test" // sends until nobody reads
	Deny     = "deny.test"     // 403 with Denied
	Down     = "down.test"     // 504
	Stale    = "stale.test"    // 503
	Cut      = "cut.test"      // one byte, then a reset with CodeFlowWithdrawn
	Held     = "held.test"     // waits for Gateway.Release, then echoes
)

// Denied is the decision behind Deny.
var Denied = sallyport.Decision{
	ID: "d-TEST", Verdict: sallyport.VerdictDeny, Rule: "finance", PolicyRevision: 214,
	Reasons:      []sallyport.Reason{{Rule: "finance", Condition: "device.disk_encrypted", Wanted: "is true", Found: "false", Result: "false"}},
	WouldAllowIf: [][]sallyport.Remedy{{{Condition: "device.disk_encrypted", Want: "true", Hint: "turn on disk encryption"}}},
}

// Reply is what Digest sends after the sum.
var Reply = func() []byte {
	b := make([]byte, 1<<20)
	rand.Read(b)
	return b
}()

// Gateway is a tunnel.Handler without policy.
type Gateway struct {
	release chan struct{}

	mu       sync.Mutex
	refuse   func(tunnel.Peer) error
	admitted int
	released int
	conns    map[tunnel.ServerConn]bool
	resets   []error // what the streams' reads failed with
	asked    int     // CONNECTs
}

// NewGateway returns a Gateway.
func NewGateway() *Gateway {
	return &Gateway{release: make(chan struct{}), conns: make(map[tunnel.ServerConn]bool)}
}

// Refuse lets decide decide on connections from now on.
func (g *Gateway) Refuse(decide func(tunnel.Peer) error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.refuse = decide
}

// Release lets the flows to Held go on.
func (g *Gateway) Release() { close(g.release) }

// Counts returns how many connections were admitted and released, and how many
// CONNECTs came.
func (g *Gateway) Counts() (admitted, released, asked int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.admitted, g.released, g.asked
}

// Conns returns the live connections.
func (g *Gateway) Conns() []tunnel.ServerConn {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make([]tunnel.ServerConn, 0, len(g.conns))
	for c := range g.conns {
		out = append(out, c)
	}
	return out
}

// Resets returns the errors that reads of flows met.
func (g *Gateway) Resets() []error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]error(nil), g.resets...)
}

// Admit implements tunnel.Handler.
func (g *Gateway) Admit(_ context.Context, c tunnel.ServerConn) (func(), error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.refuse != nil {
		if err := g.refuse(c.Peer()); err != nil {
			return nil, err
		}
	}
	g.admitted++
	g.conns[c] = true
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.released++
		delete(g.conns, c)
	}, nil
}

// Connect implements tunnel.Handler.
func (g *Gateway) Connect(ctx context.Context, s tunnel.ServerStream) {
	g.mu.Lock()
	g.asked++
	g.mu.Unlock()
	switch s.Target().Host {
	case Deny:
		s.Refuse(connect.Denial(Denied))
	case Down:
		s.Refuse(&sallyport.Error{Outcome: sallyport.OutcomeUpstream, Code: connect.ProblemTimeout, Message: "you are allowed; the service did not answer"})
	case Stale:
		s.Refuse(&sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: connect.ProblemUnavailable, Message: "policy is not available"})
	case Held:
		select {
		case <-g.release:
			g.serve(s, echo)
		case <-ctx.Done():
			s.Refuse(&sallyport.Error{Outcome: sallyport.OutcomeInternal, Code: "internal", Message: "gone"})
		}
	case Echo:
		g.serve(s, echo)
	case Digest:
		g.serve(s, digest)
	case Download:
		g.serve(s, download)
	case Cut:
		g.serve(s, func(c tunnel.Conn) error {
			_, err := io.ReadFull(c, make([]byte, 1))
			c.Reset(connect.CodeFlowWithdrawn)
			return err
		})
	default:
		s.Refuse(connect.Denial(sallyport.Decision{ID: "d-NONE", Verdict: sallyport.VerdictNoRoute}))
	}
}

func (g *Gateway) serve(s tunnel.ServerStream, behaviour func(tunnel.Conn) error) {
	c, err := s.Accept(http.Header{
		connect.HeaderFlow: {"f-TEST"}, connect.HeaderDecision: {"d-ALLOW"}, connect.HeaderRule: {"dba"},
	})
	if err != nil {
		return
	}
	defer c.Close()
	if err := behaviour(c); err != nil {
		g.mu.Lock()
		g.resets = append(g.resets, err)
		g.mu.Unlock()
		c.Reset(0)
	}
}

func echo(c tunnel.Conn) error {
	if _, err := io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}); err != nil {
		return err
	}
	return c.CloseWrite()
}

func digest(c tunnel.Conn) error {
	h := sha256.New()
	if _, err := io.Copy(h, struct{ io.Reader }{c}); err != nil {
		return err
	}
	if _, err := c.Write(h.Sum(nil)); err != nil {
		return err
	}
	if _, err := c.Write(Reply); err != nil {
		return err
	}
	return c.CloseWrite()
}

func download(c tunnel.Conn) error {
	for {
		if _, err := c.Write(Reply[:64<<10]); err != nil {
			return err
		}
	}
}

// ServeAPI implements tunnel.Handler: /v1/me tells the session, /v1/events streams
// three lines and then waits for the client to go, /v1/posture answers the length
// of its body, everything else is unknown.
func (g *Gateway) ServeAPI(w http.ResponseWriter, r *http.Request, c tunnel.ServerConn) {
	switch r.URL.Path {
	case connect.PathMe:
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]string{
			"session": string(c.Peer().Session), "carrier": c.Peer().Carrier, "addr": c.RemoteAddr().String(), "query": r.URL.RawQuery,
		})
	case connect.PathEvents:
		rc := http.NewResponseController(w)
		for i := range 3 {
			fmt.Fprintf(w, "{\"type\":\"ping\",\"after_ms\":%d}\n", i)
			rc.Flush()
		}
		<-r.Context().Done()
	case connect.PathPosture:
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		w.Header().Set("X-Length", fmt.Sprint(len(body)))
		w.WriteHeader(http.StatusNoContent)
	default:
		connect.WriteRefusal(w, connect.Denial(sallyport.Decision{Verdict: sallyport.VerdictNoRoute}))
	}
}

// Eventually polls until ok, and fails the test if that takes longer than 10 s.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
		<-tick.C
	}
}

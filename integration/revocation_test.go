package integration

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport"
	"sallyport/integration/stack"
	"sallyport/internal/logging"
	"sallyport/proto/control"
)

const (
	liveFlows   = 1000
	flowAgents  = 4                      // processes that share the flows
	chatter     = 500 * time.Millisecond // between two bytes of a flow
	revokeBound = time.Second            // DESIGN, section 6
)

// BenchmarkRevocation measures, at 1,000 flows that carry bytes, how long after a
// revocation was acknowledged each of them has ended for the program at the
// person's end, who gets no byte after that. Below zero: before the
// acknowledgement came. The asked- figures count from sending the revocation.
func BenchmarkRevocation(b *testing.B) {
	for _, transport := range []string{"quic", "tls"} {
		b.Run(transport, func(b *testing.B) {
			chatty := stack.Listen(b, func(c *net.TCPConn) {
				tick := time.NewTicker(chatter)
				defer tick.Stop()
				for {
					if _, err := c.Write([]byte{'.'}); err != nil {
						return
					}
					<-tick.C
				}
			})
			w := newWorldWith(b, stack.Apart, func(c *stack.Config) {
				c.Gateway = map[string]any{"limits": map[string]any{"lanes": 2 * liveFlows}} // 512 else
				c.Routes = append(c.Routes, stack.Route{From: "tcp://chatty.internal:1", To: "tcp://" + chatty.Addr, Policy: stack.Allow("all", stack.Anyone())})
			})
			var acked, asked []time.Duration
			for b.Loop() {
				a, s := revokeUnderLoad(b, w, transport)
				acked, asked = append(acked, a...), append(asked, s...)
			}
			b.ReportMetric(0, "ns/op") // of no meaning: most of it is opening the flows
			for name, took := range map[string][]time.Duration{"": acked, "asked-": asked} {
				slices.Sort(took)
				b.ReportMetric(milliseconds(took[len(took)/2]), name+"p50-ms")
				b.ReportMetric(milliseconds(took[len(took)*99/100]), name+"p99-ms")
			}
			if worst := acked[len(acked)-1]; worst > revokeBound {
				b.Errorf("the last flow ended %s after the acknowledgement; want less than %s", worst, revokeBound)
			}
		})
	}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// revokeUnderLoad opens the flows, revokes their user, and returns when each flow
// ended, counted from the acknowledgement and from the question.
func revokeUnderLoad(b *testing.B, w *world, transport string) (acked, asked []time.Duration) {
	b.Helper()
	flows := openFlows(b, w.loggedIn(b, "alice"), transport)
	ends := make([]time.Time, len(flows))
	var readers errgroup.Group
	for i, c := range flows {
		readers.Go(func() error {
			_, err := io.Copy(io.Discard, c)
			ends[i] = time.Now()
			if e, ok := err.(net.Error); ok && e.Timeout() {
				return fmt.Errorf("flow %d was not cut", i)
			}
			return nil
		})
	}
	client, err := control.Dial([]string{"unix:" + w.Ready("cached").Cached.Socket}, nil, logging.Discard())
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	if _, err := client.Records().List(b.Context(), sallyport.KindSession); err != nil { // connects
		b.Fatal(err)
	}
	question := time.Now()
	done, err := client.Records().Revoke(b.Context(), sallyport.Revocation{
		Subjects: []sallyport.Subject{{Kind: sallyport.SubjectUser, ID: "alice"}}, Reason: "benchmark", By: "test",
	})
	answer := time.Now()
	if err != nil || done.Sessions == 0 {
		b.Fatalf("revoke: %+v, %v", done, err)
	}
	if err := readers.Wait(); err != nil {
		b.Fatal(err)
	}
	for _, end := range ends {
		if end.Before(question) {
			b.Fatal("a flow ended before the revocation")
		}
		acked, asked = append(acked, end.Sub(answer)), append(asked, end.Sub(question))
	}
	return acked, asked
}

// openFlows opens the flows through several agents of one person, and returns
// when the service's first byte has come on each.
func openFlows(b *testing.B, a *stack.Agent, transport string) []net.Conn {
	b.Helper()
	var tunnels []*stack.Tunnel
	for range flowAgents {
		tunnels = append(tunnels, a.Connect("chatty.internal:1", "--transport", transport))
	}
	flows := make([]net.Conn, liveFlows)
	opening, ctx := errgroup.WithContext(b.Context())
	opening.SetLimit(50)
	for i := range flows {
		opening.Go(func() (err error) {
			flows[i], err = openFlow(ctx, tunnels[i%flowAgents].Local)
			return err
		})
	}
	b.Cleanup(func() {
		for _, c := range flows {
			if c != nil {
				c.Close()
			}
		}
	})
	if err := opening.Wait(); err != nil {
		b.Fatalf("%v\n%s", err, tunnels[0].Stderr())
	}
	return flows
}

func openFlow(ctx context.Context, addr string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Now().Add(45 * time.Second)); err != nil {
		return c, err
	}
	_, err = io.ReadFull(c, make([]byte, 1))
	return c, err
}

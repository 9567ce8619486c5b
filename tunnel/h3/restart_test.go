package h3_test

import (
	"context"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sallyport"
	"sallyport/tunnel"
	"sallyport/tunnel/h3"
	"sallyport/tunnel/tunneltest"
)

// mortal is a socket that says nothing any more once it is dead, as that of a
// killed process does.
type mortal struct {
	net.PacketConn
	dead atomic.Bool
}

func (m *mortal) WriteTo(b []byte, to net.Addr) (int, error) {
	if m.dead.Load() {
		return len(b), nil
	}
	return m.PacketConn.WriteTo(b, to)
}

// TestKilledServer: a carrier to a server that was killed ends with what reaches its
// successor: the next flow, or the keepalive of a client that asks for nothing.
func TestKilledServer(t *testing.T) {
	t.Run("asked", func(t *testing.T) {
		t.Parallel()
		carrier, restart := killed(t)
		restart()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if _, err := carrier.Open(ctx, echoTarget, nil); err == nil || ctx.Err() != nil {
			t.Fatalf("a flow over the dead connection: %v; want an error before %s", err, 5*time.Second)
		}
		wantGone(t, carrier, time.Second)
	})
	t.Run("silent", func(t *testing.T) {
		t.Parallel()
		carrier, restart := killed(t)
		restart()
		wantGone(t, carrier, 20*time.Second) // it speaks after 15 s
	})
}

func wantGone(t *testing.T, carrier tunnel.Carrier, within time.Duration) {
	t.Helper()
	select {
	case <-carrier.Done():
	case <-time.After(within):
		t.Fatalf("the carrier lives on after %s", within)
	}
	if err := carrier.Err(); err == nil || !strings.Contains(err.Error(), "gateway") {
		t.Errorf("the carrier ended with %v", err)
	}
}

var echoTarget = sallyport.Target{Network: sallyport.TCP, Host: tunneltest.Echo, Port: 1}

// killed returns a carrier whose server was killed, and what starts another one in its
// place.
func killed(t *testing.T) (carrier tunnel.Carrier, restart func()) {
	t.Helper()
	site := tunneltest.NewSite(t)
	conf := h3.ServerConfig{
		TLS: site.ServerTLS(h3.NextProto), Domain: tunneltest.Domain, Host: tunneltest.Host,
		Handler: tunneltest.NewGateway(), ResetKey: [32]byte{1},
	}
	start := func(addr string) (*mortal, func()) {
		pc, err := net.ListenPacket("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		m := &mortal{PacketConn: pc}
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- h3.NewServer(conf).Serve(ctx, m) }()
		return m, func() {
			cancel()
			if err := <-served; err != nil {
				t.Error(err)
			}
			pc.Close()
		}
	}
	first, stop := start("127.0.0.1:0")
	addr := first.LocalAddr().String()
	carrier, err := h3.Dial(t.Context(), site.DialConfig(addr, site.Session(t, "s-1", nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { carrier.Close() })
	// A first answer confirms the handshake. Until then a client repeats that only
	// (RFC 9002, section 6.2.1), and nobody answers it with a reset.
	flow, err := carrier.Open(t.Context(), echoTarget, nil)
	if err != nil {
		t.Fatal(err)
	}
	flow.Close()
	<-time.After(200 * time.Millisecond) // nothing is under way any more
	first.dead.Store(true)
	stop()
	return carrier, func() {
		_, stop := start(addr)
		t.Cleanup(stop)
	}
}

package h3_test

import (
	"context"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sallyport"
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

// TestKilledServer: a carrier to a server that was killed ends with the first
// packet that reaches its successor.
func TestKilledServer(t *testing.T) {
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
	defer carrier.Close()
	target := sallyport.Target{Network: sallyport.TCP, Host: tunneltest.Echo, Port: 1}
	// A first answer confirms the handshake. Until then a client repeats that only
	// (RFC 9002, section 6.2.1), and nobody answers it with a reset.
	flow, err := carrier.Open(t.Context(), target, nil)
	if err != nil {
		t.Fatal(err)
	}
	flow.Close()
	first.dead.Store(true)
	stop()
	_, stop = start(addr)
	defer stop()

	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := carrier.Open(ctx, target, nil); err == nil || ctx.Err() != nil {
		t.Fatalf("a flow over the dead connection: %v; want an error before %s", err, 5*time.Second)
	}
	select {
	case <-carrier.Done():
	case <-ctx.Done():
		t.Fatal("the carrier lives on")
	}
	if err := carrier.Err(); err == nil || !strings.Contains(err.Error(), "gateway") {
		t.Errorf("the carrier ended with %v", err)
	}
}

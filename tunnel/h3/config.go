package h3

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
)

// Name is the carrier's name as people see it.
const Name = "quic"

// NextProto is the ALPN protocol; a handshake without it is refused.
const NextProto = "h3"

const (
	keepAlive   = 15 * time.Second
	idleTimeout = 45 * time.Second // three lost keepalives

	// A CONNECT's early bytes wait in the stream's window for the allow, so a
	// gateway opens it small (twice connect.MaxEarlyBytes); it grows with the flow.
	serverStreamWindow = 128 << 10
	clientStreamWindow = 512 << 10
	// One stream must not hold the whole connection's window: with quic-go's
	// defaults two stalled uploads freeze every other flow.
	maxStreamWindow     = 1 << 20
	initialConnWindow   = 16 << 20
	maxConnWindow       = 64 << 20
	windowBudget        = 512 << 20 // growth beyond the initial windows, all connections together
	maxIncomingStreams  = 4096      // quic-go's 100 makes the 101st flow wait silently
	maxIncomingControls = 16

	// idLength is the length of a server's connection IDs in bytes, the longest there
	// is (RFC 9000, section 17.2). quic-go answers only packets of more than 42 bytes
	// with a stateless reset; with its IDs of 4 bytes a CONNECT may be shorter, and a
	// client would wait for a killed gateway that is back until idleTimeout. A
	// keepalive has 41 bytes, still.
	idLength = 20
	// freeHandshakes a second pass without address validation; above it a client
	// needs a Retry round trip, and a spoofed one costs no state.
	freeHandshakes = 200
)

func clientConfig() *quic.Config {
	return &quic.Config{
		KeepAlivePeriod:                keepAlive,
		MaxIdleTimeout:                 idleTimeout,
		InitialStreamReceiveWindow:     clientStreamWindow,
		MaxStreamReceiveWindow:         maxStreamWindow,
		InitialConnectionReceiveWindow: initialConnWindow,
		MaxConnectionReceiveWindow:     maxConnWindow,
		MaxIncomingStreams:             -1, // servers open none
		MaxIncomingUniStreams:          maxIncomingControls,
		// So that an answer outlives a reset that follows it closely.
		EnableStreamResetPartialDelivery: true,
	}
}

func serverConfig(b *budget) *quic.Config {
	return &quic.Config{
		MaxIdleTimeout:                 idleTimeout,
		InitialStreamReceiveWindow:     serverStreamWindow,
		MaxStreamReceiveWindow:         maxStreamWindow,
		InitialConnectionReceiveWindow: initialConnWindow,
		MaxConnectionReceiveWindow:     maxConnWindow,
		AllowConnectionWindowIncrease:  b.grant,
		MaxIncomingStreams:             maxIncomingStreams,
		MaxIncomingUniStreams:          maxIncomingControls,
		Allow0RTT:                      false, // a replayed CONNECT would dial twice

		EnableStreamResetPartialDelivery: true,
	}
}

// budget bounds what connections may add to their windows, together.
type budget struct {
	granted atomic.Int64
	conns   sync.Map // *quic.Conn to *atomic.Int64: what each was granted
}

func (b *budget) grant(c *quic.Conn, delta uint64) bool {
	if b.granted.Add(int64(delta)) > windowBudget {
		b.granted.Add(-int64(delta))
		return false
	}
	n, _ := b.conns.LoadOrStore(c, new(atomic.Int64))
	n.(*atomic.Int64).Add(int64(delta))
	return true
}

// release returns what c was granted; c is closed.
func (b *budget) release(c *quic.Conn) {
	if n, ok := b.conns.LoadAndDelete(c); ok {
		b.granted.Add(-n.(*atomic.Int64).Load())
	}
}

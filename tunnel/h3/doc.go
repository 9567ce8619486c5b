// Package h3 is the carrier that agents prefer: HTTP/3 over QUIC. A flow is a
// CONNECT stream (RFC 9114, section 4.4): one round trip to its first byte, no
// head-of-line blocking, resets with a code, half-close both ways.
//
// quic-go's only congestion controller is NewReno, which a lossy path starves, so
// an agent spreads its flows over up to four QUIC connections. Windows, stream
// limits and keepalives differ from quic-go's defaults where these would let one
// stalled flow stop the others; config.go says which and why.
//
// CONNECT-UDP (RFC 9298) is refused until UDP routes exist.
//
// The package owns QUIC and HTTP/3; no type of quic-go leaves it. Who may connect
// and what a request gets is the tunnel.Handler's.
package h3

// Package lane is the carrier for bulk and for networks without UDP: one TLS 1.3
// connection per flow, an HTTP/1.1 CONNECT on it, then the flow's raw bytes. The
// agent keeps a few connections warm, so that opening a flow costs one round
// trip and no handshake.
//
// A connection carries one request, CONNECT or /v1, and nothing after it is ever
// parsed: there is no keep-alive to smuggle a second request into. The parser is
// strict (RFC 9112, with every "MAY be lenient" declined).
//
// A TLS connection can only be closed, not closed with a code. So a flow is cut
// with a TCP reset, of which the event stream tells the reason, and a connection
// that is not admitted gets its first request answered with the refusal: 401 and
// session_revoked for a revoked session (case E6), 429 over a limit.
//
// The package owns the wire form, the deadlines and the pool; who may connect and
// what a request gets is the tunnel.Handler's.
package lane

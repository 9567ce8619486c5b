// Package tunnel is an authenticated session between an agent and a gateway: a
// carrier. It knows connections and streams, certificates and addresses; it
// knows no policy and no users. Every carrier serves the same CONNECT and the
// same /v1 requests (package proto/connect), so what is decided, dialled,
// relayed and audited is written once, in gateway, for all of them.
//
// An implementation is a subpackage named after its technology: h3 (HTTP/3 over
// QUIC) and lane (one TLS 1.3 connection per flow, HTTP/1.1 CONNECT).
// tunneltest is the suite that each of them passes.
package tunnel

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"net/netip"

	"sallyport"
)

// Conn is a flow's byte stream. CloseWrite sends the end of the stream and
// leaves the other direction open (half-close); Close ends both directions after
// what was written has been sent; Reset ends both at once and tells the peer a
// code of proto/connect where the carrier can. A Read after the peer's Reset
// returns a *ResetError, never io.EOF: a cut is not an end.
type Conn interface {
	net.Conn
	CloseWrite() error
	Reset(code uint64)
}

// ResetError is what Read and Write return after the peer reset the stream.
type ResetError struct {
	Code uint64 // of proto/connect; 0 where the carrier cannot tell
}

func (e *ResetError) Error() string { return "stream reset by the gateway or the service" }

// Carrier is the agent's side.
type Carrier interface {
	// Open asks for a flow to target and returns when the gateway has answered.
	// A refusal is a *sallyport.Error; a dead carrier, or one that was refused
	// for its certificate, is one too (OutcomeUnavailable, OutcomeLogin). Bytes written
	// by early go out behind the CONNECT without waiting for the answer (at most
	// connect.MaxEarlyBytes); nil for none.
	Open(ctx context.Context, target sallyport.Target, early []byte) (*Flow, error)
	// RoundTrip sends a /v1 request; req.URL needs only a path and a query.
	http.RoundTripper
	// Name is "quic", "tls" or "wireguard", as people see it.
	Name() string
	// Done is closed when the carrier is dead; Err then says why.
	Done() <-chan struct{}
	Err() error
	Close() error
}

// Flow is an accepted CONNECT as the agent sees it.
type Flow struct {
	Conn
	ID       sallyport.FlowID
	Decision sallyport.DecisionID
	Rule     string
	Header   http.Header
}

// DialConfig is what every carrier needs to reach a gateway.
type DialConfig struct {
	// URL is the gateway's tunnel host, https://host[:port]. This field is required.
	Gateway sallyport.GatewayInfo
	// TLS has RootCAs and GetClientCertificate set; MinVersion and NextProtos are
	// the carrier's business. GetClientCertificate is called at each handshake, so
	// a renewed certificate needs no new DialConfig. This field is required.
	TLS *tls.Config
	// DialContext dials TCP; nil: net.Dialer, with HTTPS_PROXY honoured by lane.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)
}

// Peer is who stands at the other end of a carrier, as the gateway sees it.
type Peer struct {
	// Session is from the verified client certificate's SPIFFE id
	// (VerifiedChains[0][0]), nothing else.
	Session sallyport.SessionID
	// Certificate is that leaf.
	Certificate *x509.Certificate
	// Carrier is the carrier's name.
	Carrier string
}

// Handler is what a gateway does with what arrives on carriers. The carrier
// servers call it; package gateway implements it.
type Handler interface {
	// Admit is called once for each new connection, after its handshake and
	// before any request on it is read. An error refuses it: the carrier closes
	// with the code of AdmitError, or CodeSessionRevoked. Otherwise released is
	// called when the connection is gone.
	Admit(ctx context.Context, c ServerConn) (released func(), err error)
	// Connect serves one CONNECT and returns when the flow is over. It calls
	// Accept or Refuse exactly once. ctx ends with the connection.
	Connect(ctx context.Context, s ServerStream)
	// ServeAPI serves one request that is no CONNECT. Peer is its sender.
	ServeAPI(w http.ResponseWriter, r *http.Request, c ServerConn)
}

// AdmitError refuses a connection with a code of proto/connect.
type AdmitError struct {
	Code   uint64
	Reason string
}

func (e *AdmitError) Error() string { return e.Reason }

// ServerConn is one connection of a carrier at the gateway.
type ServerConn interface {
	Peer() Peer
	// RemoteAddr is where the peer is now, IPv4 unmapped. It may change during a
	// connection's life (QUIC roams silently), so ask each time.
	RemoteAddr() netip.AddrPort
	// Close ends the connection and everything on it with a code of proto/connect.
	Close(code uint64, reason string)
}

// ServerStream is one CONNECT at the gateway, not answered yet.
type ServerStream interface {
	// Conn is the connection it came on.
	Conn() ServerConn
	// Target is the canonical target. A request whose authority has no canonical
	// form never becomes a ServerStream: the carrier answers 400 itself.
	Target() sallyport.Target
	Header() http.Header
	// Accept answers 200 with h and returns the stream. Bytes that the client
	// sent early come first.
	Accept(h http.Header) (Conn, error)
	// Refuse answers with the refusal's status, Proxy-Status, Sallyport-Decision
	// and problem+json body (proto/connect.WriteRefusal) and ends the stream.
	Refuse(err *sallyport.Error) error
}

package tunnel

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"sallyport"
	"sallyport/internal/localhost"
	"sallyport/proto/connect"
)

// HandshakeTimeout is how long a peer may take to finish its handshake.
const HandshakeTimeout = 10 * time.Second

// ServerTLS returns the tunnel host's TLS configuration: TLS 1.3 only, a client
// certificate signed by clientCAs required, no session tickets (so that nothing
// from before a revocation can be resumed), one of protos negotiated. certificate
// is called at each handshake.
func ServerTLS(certificate func() *tls.Certificate, clientCAs *x509.CertPool, protos ...string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             protos,
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              clientCAs,
		SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if c := certificate(); c != nil {
				return c, nil
			}
			return nil, errors.New("tunnel host: no certificate")
		},
	}
}

// PeerOf returns who stands behind a finished handshake on the tunnel host. What
// it refuses must be closed: a client without a verified session certificate of
// the domain, another TLS version or protocol, another host than ours.
func PeerOf(state tls.ConnectionState, domain, host, proto, carrier string) (Peer, error) {
	switch {
	case state.Version != tls.VersionTLS13:
		return Peer{}, errors.New("TLS 1.3 is required")
	case state.NegotiatedProtocol != proto:
		return Peer{}, fmt.Errorf("protocol %q is required", proto)
	case !strings.EqualFold(state.ServerName, host):
		return Peer{}, fmt.Errorf("server name %.80q is not the tunnel host", state.ServerName)
	case len(state.VerifiedChains) == 0 || len(state.VerifiedChains[0]) == 0:
		return Peer{}, errors.New("no verified client certificate")
	}
	leaf := state.VerifiedChains[0][0]
	session, err := connect.SessionOf(leaf, domain)
	if err != nil {
		return Peer{}, err
	}
	return Peer{Session: session, Certificate: leaf, Carrier: carrier}, nil
}

// Endpoint is where a gateway is and what it is called.
type Endpoint struct {
	// Host is the tunnel host's name: SNI, and what its certificate must show.
	Host string
	// Authority is the URL's host[:port], as requests name it.
	Authority string
	// Addresses to dial, host:port, in order.
	Addresses []string
}

// EndpointOf reads a gateway's URL. Names under localhost mean loopback without
// being resolved (RFC 6761, section 6.3), which Go's resolver does not do.
func EndpointOf(g sallyport.GatewayInfo) (Endpoint, error) {
	u, err := url.Parse(g.URL)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil {
		return Endpoint{}, &sallyport.Error{
			Outcome: sallyport.OutcomeUsage, Code: connect.ProblemGatewayDown,
			Message: fmt.Sprintf("gateway URL %.200q is not https://host[:port]", g.URL), Err: err,
		}
	}
	host, port := strings.ToLower(u.Hostname()), u.Port()
	if port == "" {
		port = "443"
	}
	e := Endpoint{Host: host, Authority: u.Host, Addresses: g.Addresses}
	if len(e.Addresses) > 0 {
		return e, nil
	}
	if localhost.Is(host) {
		e.Addresses = localhost.Addresses(port)
		return e, nil
	}
	e.Addresses = []string{net.JoinHostPort(host, port)}
	return e, nil
}

// DialAny calls dial for each address in turn and returns the first success or
// all the errors.
func DialAny[T any](ctx context.Context, addresses []string, dial func(ctx context.Context, address string) (T, error)) (T, error) {
	var errs []error
	for _, a := range addresses {
		c, err := dial(ctx, a)
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	var none T
	return none, errors.Join(errs...)
}

// AddrPortOf returns a socket's address, IPv4 unmapped; the zero AddrPort if it is
// none.
func AddrPortOf(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

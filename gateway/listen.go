package gateway

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/tunnel"
	"sallyport/tunnel/h3"
	"sallyport/tunnel/lane"
)

const (
	// acceptPause is the longest wait after a failed accept (no descriptors left):
	// connections end meanwhile, and a busy loop would help nobody.
	acceptPause = time.Second
)

// host is what one name (SNI) on the TLS port serves. The name that a client
// asked for in its handshake fixes the connection's host for good.
type host struct {
	// config returns the TLS configuration of a TCP connection to this host. An
	// error refuses the handshake: the host is not ready, or the client asked for
	// nothing that it serves.
	config func(*tls.ClientHelloInfo) (*tls.Config, error)
	// serve serves one connection after its handshake and returns when it is over.
	// It closes it.
	serve func(context.Context, *tls.Conn)
}

// believe replaces the session CAs. Connections that were let in under the
// earlier ones stay: their sessions are decided on by policyd, not by the CA.
func (s *Server) believe(t sallyport.Trust) error {
	if had := s.trust.Load(); had != nil && had.bundle == t.SessionCAs {
		return nil
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(t.SessionCAs)) {
		return errNoCAs
	}
	s.trust.Store(&trust{
		bundle: t.SessionCAs,
		lane:   tunnel.ServerTLS(s.deps.Certificate, pool, lane.NextProto),
		quic:   tunnel.ServerTLS(s.deps.Certificate, pool, h3.NextProto),
	})
	s.log.Info("session CAs taken")
	return nil
}

// trust is the tunnel host's TLS configuration with the session CAs that it
// believes: immutable, replaced as a whole.
type trust struct {
	bundle string      // PEM
	lane   *tls.Config // http/1.1 over TCP
	quic   *tls.Config // h3 over QUIC
}

var (
	errNotReady = errors.New("not ready: policyd has not been heard yet")
	errNoSNI    = errors.New("the client names no host")
	errNoCAs    = errors.New("the trust bundle holds no certificate")
)

// tunnelLane returns the tunnel host's configuration for TCP.
func (s *Server) tunnelLane(*tls.ClientHelloInfo) (*tls.Config, error) {
	if t := s.trust.Load(); t != nil {
		return t.lane, nil
	}
	return nil, errNotReady
}

// tunnelQUIC returns the tunnel host's configuration for QUIC, which serves no
// other host.
func (s *Server) tunnelQUIC(*tls.ClientHelloInfo) (*tls.Config, error) {
	if t := s.trust.Load(); t != nil {
		return t.quic, nil
	}
	return nil, errNotReady
}

// unknownHost has no certificate for anybody: crypto/tls answers such a
// handshake with the alert unrecognized_name (RFC 6066, section 3).
var unknownHost = &tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true}

// switchHost chooses the configuration by the name in the handshake.
func (s *Server) switchHost(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	if hello.ServerName == "" {
		return nil, errNoSNI
	}
	h, ok := s.hosts[strings.ToLower(hello.ServerName)]
	if !ok {
		return unknownHost, nil
	}
	return h.config(hello)
}

// acceptTCP accepts until accepting ends and serves what it accepted until
// serving does.
func (s *Server) acceptTCP(accepting, serving context.Context, g *errgroup.Group, l net.Listener) error {
	stop := context.AfterFunc(accepting, func() { l.Close() })
	defer stop()
	defer l.Close()
	outer := &tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true, GetConfigForClient: s.switchHost}
	pause := minPause
	for {
		c, err := l.Accept()
		switch {
		case err == nil:
			pause = minPause
		case accepting.Err() != nil:
			return nil
		case !passing(err):
			return err
		default:
			s.log.Warn("connection not accepted", "error", err, "pause", pause)
			select {
			case <-time.After(pause):
			case <-accepting.Done():
				return nil
			}
			pause = min(2*pause, acceptPause)
			continue
		}
		source := sourceOf(c.RemoteAddr())
		if !s.handshakes.take(source) {
			c.Close()
			continue
		}
		g.Go(func() error {
			s.serveConn(serving, c, outer, func() { s.handshakes.give(source) })
			return nil
		})
	}
}

// passing reports whether accepting may work again after err.
func passing(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// serveConn hands the connection to its host after the handshake. Its stack lives
// as long as the connection, so what is only needed before stays in functions of
// its own, here and in what is called below.
func (s *Server) serveConn(ctx context.Context, c net.Conn, config *tls.Config, shaken func()) {
	t := tls.Server(lane.Socket(c), config)
	name, err := shakeHands(ctx, t)
	shaken()
	if err != nil {
		s.log.Debug("handshake refused", "peer", c.RemoteAddr().String(), "error", connect.Printable(err.Error(), 200))
		c.Close()
		return
	}
	s.hosts[name].serve(ctx, t)
}

// shakeHands does the handshake, within its own time, and returns the host that
// was asked for.
func shakeHands(ctx context.Context, t *tls.Conn) (name string, err error) {
	ctx, cancel := context.WithTimeout(ctx, tunnel.HandshakeTimeout)
	defer cancel()
	if err := t.HandshakeContext(ctx); err != nil {
		return "", err
	}
	return strings.ToLower(t.ConnectionState().ServerName), nil
}

// budget bounds what is under way from all sources, and from one.
type budget struct {
	limit, perSource int

	mu      sync.Mutex
	all     int
	sources map[netip.Prefix]int
}

func newBudget(limit int) *budget {
	return &budget{limit: limit, perSource: max(limit/4, 1), sources: make(map[netip.Prefix]int)}
}

func (b *budget) take(source netip.Prefix) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.all >= b.limit || b.sources[source] >= b.perSource {
		return false
	}
	b.all++
	b.sources[source]++
	return true
}

func (b *budget) give(source netip.Prefix) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all--
	if b.sources[source]--; b.sources[source] == 0 {
		delete(b.sources, source)
	}
}

// sourceOf returns what counts as one source: an IPv4 address, or the 64 bits of
// an IPv6 network (one host has all addresses of its own).
func sourceOf(a net.Addr) netip.Prefix {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Prefix{}
	}
	addr := ap.Addr().Unmap().WithZone("")
	bits := 64
	if addr.Is4() {
		bits = 32
	}
	p, _ := addr.Prefix(bits) // fits by construction
	return p
}

package h3

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/time/rate"

	"sallyport"
	"sallyport/internal/logging"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

// ServerConfig is what a Server needs.
type ServerConfig struct {
	// TLS is the tunnel host's configuration (tunnel.ServerTLS with NextProto), or
	// one whose GetConfigForClient returns it; it is asked at each handshake. Other
	// server names than Host, and none, are refused before. This field is required.
	TLS *tls.Config
	// Domain is the trust domain of session certificates. This field is required.
	Domain string
	// Host is the tunnel host's name, with or without a port. This field is required.
	Host string
	// Handler serves what arrives. This field is required.
	Handler tunnel.Handler
	// ResetKey lets agents learn at their next packet that a gateway has restarted
	// (RFC 9000, section 10.3), so it has to outlive the process, and be this
	// gateway's alone. The zero key is replaced by a random one: agents then notice
	// a killed gateway only when it has been silent for 45 s.
	ResetKey [32]byte
	// Log gets one line a refused connection at debug level; nil: none.
	Log logging.Logger
}

// Server serves the tunnel host over QUIC.
type Server struct {
	cfg    ServerConfig
	host   string // without port, lower case
	log    logging.Logger
	h3     *http3.Server
	budget budget
	conns  sync.Map // *quic.Conn to its *serverConn, for ConnContext
}

// NewServer returns a Server.
func NewServer(cfg ServerConfig) *Server {
	s := &Server{cfg: cfg, host: tunnel.Hostname(cfg.Host), log: cfg.Log}
	if s.log == nil {
		s.log = logging.Discard()
	}
	s.h3 = &http3.Server{
		Handler:        http.HandlerFunc(s.serve),
		MaxHeaderBytes: tunnel.MaxHead,
		Logger:         slog.New(slog.DiscardHandler),
		ConnContext: func(ctx context.Context, c *quic.Conn) context.Context {
			sc, _ := s.conns.Load(c)
			return context.WithValue(ctx, connKey{}, sc)
		},
	}
	return s
}

type connKey struct{}

// Serve serves on pc until ctx ends, then closes every connection with
// connect.CodeDraining and returns when everything it started has ended. It does
// not close pc.
func (s *Server) Serve(ctx context.Context, pc net.PacketConn) error {
	limiter := rate.NewLimiter(freeHandshakes, freeHandshakes)
	resetKey := quic.StatelessResetKey(s.cfg.ResetKey)
	if s.cfg.ResetKey == [32]byte{} {
		rand.Read(resetKey[:])
	}
	transport := &quic.Transport{
		Conn:                batched(pc),
		StatelessResetKey:   &resetKey,
		ConnectionIDLength:  idLength,
		VerifySourceAddress: func(net.Addr) bool { return !limiter.Allow() },
	}
	defer transport.Close()
	ln, err := transport.Listen(s.tlsConfig(), serverConfig(&s.budget))
	if err != nil {
		return fmt.Errorf("listen quic %s: %w", pc.LocalAddr(), err)
	}
	defer ln.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := ln.Accept(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept quic %s: %w", pc.LocalAddr(), err)
		}
		wg.Go(func() { s.serveConn(ctx, c) })
	}
}

// tlsConfig is a configuration that takes handshakes for our host only. The
// returned configurations are made once for each that the caller hands out.
func (s *Server) tlsConfig() *tls.Config {
	var (
		mu   sync.Mutex
		last *tls.Config
		ours *tls.Config
	)
	prepare := func(base *tls.Config) *tls.Config {
		mu.Lock()
		defer mu.Unlock()
		if last != base {
			c := base.Clone()
			c.NextProtos = []string{NextProto}
			c.GetConfigForClient = nil
			last, ours = base, c
		}
		return ours
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{NextProto},
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			if !strings.EqualFold(hello.ServerName, s.host) {
				return nil, fmt.Errorf("server name %.80q is not the tunnel host", hello.ServerName)
			}
			if s.cfg.TLS.GetConfigForClient != nil {
				c, err := s.cfg.TLS.GetConfigForClient(hello)
				if err != nil {
					return nil, err
				}
				if c != nil {
					return prepare(c), nil
				}
			}
			return prepare(s.cfg.TLS), nil
		},
	}
}

func (s *Server) serveConn(ctx context.Context, q *quic.Conn) {
	defer s.budget.release(q)
	peer, err := tunnel.PeerOf(q.ConnectionState().TLS, s.cfg.Domain, s.host, NextProto, Name)
	if err != nil {
		s.log.Debug("connection refused", "carrier", Name, "peer", q.RemoteAddr().String(), "error", err)
		q.CloseWithError(quic.ApplicationErrorCode(connect.CodeSessionRevoked), "not a session")
		return
	}
	sc := &serverConn{quic: q, peer: peer}
	stop := context.AfterFunc(ctx, func() { sc.Close(connect.CodeDraining, "the gateway is going away") })
	defer stop()
	released, err := s.cfg.Handler.Admit(ctx, sc)
	if err != nil {
		sc.Close(tunnel.AdmitCode(err), err.Error())
		return
	}
	if released != nil {
		defer released()
	}
	s.conns.Store(q, sc)
	defer s.conns.Delete(q)
	if err := s.h3.ServeQUICConn(q); err != nil {
		s.log.Debug("connection ended", "carrier", Name, "peer", q.RemoteAddr().String(), "error", err)
	}
}

// serve is the HTTP handler behind every stream.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	c := r.Context().Value(connKey{}).(*serverConn)
	w.Header()["Date"] = nil // nobody needs it, and it costs 30 bytes a flow
	switch {
	case r.Method != http.MethodConnect:
		s.serveAPI(w, r, c)
	case r.Proto != "HTTP/3.0":
		connect.WriteRefusal(w, refuseExtended(r))
	case malformed(r):
		resetMessageError(w)
	default:
		s.serveConnect(w, r, c)
	}
}

func (s *Server) serveAPI(w http.ResponseWriter, r *http.Request, c *serverConn) {
	if refusal := tunnel.RefuseAPI(s.host, r.Host, r.URL.Path); refusal != nil {
		connect.WriteRefusal(w, refusal)
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, tunnel.MaxBody)
	s.cfg.Handler.ServeAPI(w, r, c)
}

// malformed finds what http3 lets through: user info in the authority, and
// content, which CONNECT has none of.
func malformed(r *http.Request) bool {
	return strings.Contains(r.Host, "@") || r.Header.Get("Content-Length") != ""
}

// resetMessageError resets the stream with H3_MESSAGE_ERROR, without an answer
// (RFC 9114, section 4.1.2).
func resetMessageError(w http.ResponseWriter) {
	if str, err := w.(http3.HTTPStreamer).HTTPStream(); err == nil {
		cancelStream(str, uint64(http3.ErrCodeMessageError))
	}
}

// refuseExtended answers extended CONNECT (RFC 9220): there are no UDP routes.
func refuseExtended(r *http.Request) *sallyport.Error {
	if r.Proto != "connect-udp" {
		return tunnel.Unsupported("this protocol")
	}
	e := &sallyport.Error{Outcome: sallyport.OutcomeDenied, Code: connect.ProblemDenied, Message: "no route carries UDP"}
	// RFC 9298, section 3: /.well-known/masque/udp/{target_host}/{target_port}/
	host, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/.well-known/masque/udp/"), "/")
	a, err := netip.ParseAddr(host)
	if a = a.Unmap(); err == nil && (a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsUnspecified() || a.IsMulticast()) {
		e.Code, e.Message = connect.ProblemProhibited, "this address is never dialled"
	}
	return e
}

func (s *Server) serveConnect(w http.ResponseWriter, r *http.Request, c *serverConn) {
	target, err := sallyport.ParseAuthority(sallyport.TCP, r.Host)
	if err != nil {
		connect.WriteRefusal(w, tunnel.BadTarget(err))
		return
	}
	// The flow lives as long as the connection. Its stream's context ends with the
	// sending direction, so it counts only until the answer: then it tells that the
	// agent has given up.
	ctx, cancel := context.WithCancel(c.quic.Context())
	defer cancel()
	stop := context.AfterFunc(r.Context(), cancel)
	defer stop()
	st := &serverStream{c: c, w: w, target: target, header: r.Header, answering: func() { stop() }}
	defer st.finish()
	s.cfg.Handler.Connect(ctx, st)
}

// serverConn is a QUIC connection at the gateway.
type serverConn struct {
	quic *quic.Conn
	peer tunnel.Peer
}

func (c *serverConn) Peer() tunnel.Peer          { return c.peer }
func (c *serverConn) RemoteAddr() netip.AddrPort { return tunnel.AddrPortOf(c.quic.RemoteAddr()) }

// Close implements tunnel.ServerConn.
func (c *serverConn) Close(code uint64, reason string) {
	c.quic.CloseWithError(quic.ApplicationErrorCode(code), reason) // closed already: fine
}

// serverStream is a CONNECT at the gateway.
type serverStream struct {
	c         *serverConn
	w         http.ResponseWriter
	target    sallyport.Target
	header    http.Header
	answering func()

	mu       sync.Mutex
	answered bool
	flow     *conn
}

func (s *serverStream) Conn() tunnel.ServerConn  { return s.c }
func (s *serverStream) Target() sallyport.Target { return s.target }
func (s *serverStream) Header() http.Header      { return s.header }

func (s *serverStream) answer() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.answered {
		return errors.New("the CONNECT is answered already")
	}
	s.answered = true
	s.answering()
	return nil
}

// Accept implements tunnel.ServerStream.
func (s *serverStream) Accept(h http.Header) (tunnel.Conn, error) {
	if err := s.answer(); err != nil {
		return nil, err
	}
	for name, values := range h {
		s.w.Header()[name] = values
	}
	s.w.WriteHeader(http.StatusOK)
	str, err := s.w.(http3.HTTPStreamer).HTTPStream()
	if err != nil {
		return nil, flowError(err)
	}
	str.QUICStream().SetReliableBoundary() // the answer arrives even if the flow is cut at once
	s.flow = &conn{stream: str, quic: s.c.quic, onOver: func() {}}
	return s.flow, nil
}

// Refuse implements tunnel.ServerStream.
func (s *serverStream) Refuse(e *sallyport.Error) error {
	if err := s.answer(); err != nil {
		return err
	}
	s.refuse(e)
	return nil
}

func (s *serverStream) refuse(e *sallyport.Error) {
	http.NewResponseController(s.w).SetWriteDeadline(time.Now().Add(tunnel.HandshakeTimeout))
	connect.WriteRefusal(s.w, e)
}

// finish is what the handler may have left undone.
func (s *serverStream) finish() {
	if s.answer() == nil {
		s.refuse(tunnel.Unanswered())
		return
	}
	if s.flow != nil {
		s.flow.Close()
	}
}

package lane

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"sallyport"
	"sallyport/internal/logging"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

// NextProto is the ALPN protocol of a lane. A handshake that names others is
// refused; one that names none means this (RFC 7301, section 3.1, leaves that to
// the port), because curl 7 names none to a proxy: docs/adr/0011.
const NextProto = "http/1.1"

// Name is the carrier's name as people see it.
const Name = "tls"

const (
	// warmTimeout is how long an admitted connection may wait for its request.
	// Clients give up earlier (clientWarm), so that a warm connection does not die
	// under a request.
	warmTimeout = 6 * time.Minute
	// headTimeout is how long a head may take from its first byte on.
	headTimeout = 10 * time.Second
	// refusedWarm is how long a connection that was not admitted may wait for its
	// request. The end of the connection tells a client that keeps it warm to dial anew.
	refusedWarm = time.Second
	// atOnce is how much older than its request a refusal may be.
	atOnce = 5 * time.Millisecond
	// bodyTimeout is how long the body of a /v1 request may take.
	bodyTimeout = 30 * time.Second
)

// ServerConfig is what a Server needs.
type ServerConfig struct {
	// Domain is the trust domain of session certificates. This field is required.
	Domain string
	// Host is the tunnel host's name, with or without a port. This field is required.
	Host string
	// Handler serves what arrives. This field is required.
	Handler tunnel.Handler
	// Log gets one line a failed handshake at debug level; nil: none.
	Log logging.Logger
}

// Server serves lanes. Listening, the SNI switch and TLS configuration
// (tunnel.ServerTLS with NextProto) are the caller's.
type Server struct {
	cfg  ServerConfig
	host string // without port, lower case
	log  logging.Logger
}

// NewServer returns a Server.
func NewServer(cfg ServerConfig) *Server {
	s := &Server{cfg: cfg, host: tunnel.Hostname(cfg.Host), log: cfg.Log}
	if s.log == nil {
		s.log = logging.Discard()
	}
	return s
}

// ServeConn serves one connection and returns when it is over; it closes c. ctx
// ending closes it at once. c is a tls.Server over a Socket, or a forged end of
// the TCP stream passes for the end of a flow.
func (s *Server) ServeConn(ctx context.Context, c *tls.Conn) {
	defer c.Close()
	peer, err := s.peerOf(ctx, c)
	if err != nil {
		s.log.Debug("connection refused", "carrier", Name, "peer", c.RemoteAddr().String(), "error", err)
		return
	}
	ctx, cancelConn := context.WithCancel(ctx)
	defer cancelConn()
	sc := &serverConn{tls: c, raw: socket(c), peer: peer, addr: tunnel.AddrPortOf(c.RemoteAddr()), cancel: cancelConn}
	stop := context.AfterFunc(ctx, sc.abort)
	defer stop()

	released, first, admitted := s.admit(ctx, sc)
	if !admitted {
		return
	}
	if released != nil {
		defer released()
	}
	if first == nil {
		var ok bool
		if first, ok = s.await(sc); !ok {
			return
		}
	}
	s.serveRequest(ctx, sc, *first)
}

// peerOf completes the handshake. It is a function of its own so that its part of
// the stack does not live as long as the connection.
func (s *Server) peerOf(ctx context.Context, c *tls.Conn) (tunnel.Peer, error) {
	ctx, cancel := context.WithTimeout(ctx, tunnel.HandshakeTimeout)
	defer cancel()
	if err := c.HandshakeContext(ctx); err != nil {
		return tunnel.Peer{}, fmt.Errorf("handshake: %w", err)
	}
	state := c.ConnectionState()
	if state.NegotiatedProtocol == "" {
		state.NegotiatedProtocol = NextProto
	}
	return tunnel.PeerOf(state, s.cfg.Domain, s.host, NextProto, Name)
}

// admit has the handler let the connection in. A refusal is told in answer to the
// first request, whatever that is. If it comes later than at once, the handler is
// asked again: what could not be decided then perhaps can be now. first is the request
// if it was read here. A connection that is not admitted needs nothing more.
func (s *Server) admit(ctx context.Context, c *serverConn) (released func(), first *head, admitted bool) {
	released, err := s.cfg.Handler.Admit(ctx, c)
	if err == nil {
		return released, nil, true
	}
	refused, asked := time.Now(), time.Time{}
	c.tls.SetReadDeadline(refused.Add(refusedWarm))
	h, broken := readHead(c.tls, func() {
		asked = time.Now()
		c.tls.SetReadDeadline(asked.Add(headTimeout))
	})
	if broken != nil {
		return nil, nil, false
	}
	refusal := tunnel.AdmitRefusal(err)
	if refusal.Outcome == sallyport.OutcomeUnavailable && asked.Sub(refused) > atOnce {
		if released, err = s.cfg.Handler.Admit(ctx, c); err == nil {
			return released, &h, true
		}
		refusal = tunnel.AdmitRefusal(err)
	}
	c.refuse(refusal)
	return nil, nil, false
}

// await waits for the request of a connection that was admitted. ok is false if there
// is none to be served.
func (s *Server) await(c *serverConn) (h *head, ok bool) {
	c.tls.SetReadDeadline(time.Now().Add(warmTimeout))
	first, err := readHead(c.tls, func() { c.tls.SetReadDeadline(time.Now().Add(headTimeout)) })
	if errors.Is(err, errBadHead) || errors.Is(err, errHeadTooLarge) {
		c.refuse(tunnel.BadRequest(err))
	}
	return &first, err == nil // else it was never used, or went away
}

func (s *Server) serveRequest(ctx context.Context, c *serverConn, h head) {
	c.tls.SetReadDeadline(time.Time{})
	method, target, err := requestLine(h)
	if err != nil {
		c.refuse(tunnel.BadRequest(err))
		return
	}
	if method == http.MethodConnect {
		s.serveConnect(ctx, c, h, target)
		return
	}
	s.serveAPI(ctx, c, h, method, target)
}

func requestLine(h head) (method, target string, err error) {
	method, rest, ok := strings.Cut(h.line, " ")
	target, version, ok2 := strings.Cut(rest, " ")
	if !ok || !ok2 || !isToken(method) || target == "" || version != "HTTP/1.1" {
		return "", "", fmt.Errorf("%w: request line", errBadHead)
	}
	return method, target, nil
}

func (s *Server) serveConnect(ctx context.Context, c *serverConn, h head, authority string) {
	target, refusal := connectTarget(h, authority)
	if refusal != nil {
		c.refuse(refusal)
		return
	}
	st := &serverStream{c: c, target: target, header: h.fields, early: h.rest}
	defer st.finish()
	s.cfg.Handler.Connect(ctx, st)
}

func connectTarget(h head, authority string) (sallyport.Target, *sallyport.Error) {
	target, err := sallyport.ParseAuthority(sallyport.TCP, authority)
	if err != nil {
		return target, tunnel.BadTarget(err)
	}
	// RFC 9110, section 7.2: one Host, and for CONNECT it is the target.
	host, ok := h.one("Host")
	named, err := sallyport.ParseAuthority(sallyport.TCP, host)
	if !ok || err != nil || named != target {
		return target, tunnel.BadRequest(fmt.Errorf("%w: Host is not the target", errBadHead))
	}
	if len(h.fields["Content-Length"])+len(h.fields["Transfer-Encoding"]) > 0 {
		return target, tunnel.BadRequest(fmt.Errorf("%w: CONNECT has no content", errBadHead))
	}
	return target, nil
}

func (s *Server) serveAPI(ctx context.Context, c *serverConn, h head, method, target string) {
	host, ok := h.one("Host")
	length, err := h.contentLength()
	u, uerr := url.ParseRequestURI(target)
	if !ok || host == "" || err != nil || uerr != nil || !strings.HasPrefix(target, "/") {
		c.refuse(tunnel.BadRequest(errors.Join(errBadHead, err, uerr)))
		return
	}
	if refusal := tunnel.RefuseAPI(s.host, host, u.Path); refusal != nil {
		c.refuse(refusal)
		return
	}
	if len(h.fields["Upgrade"]) > 0 {
		c.refuse(tunnel.Unsupported("upgrades"))
		return
	}
	if length > tunnel.MaxBody {
		c.refuse(tunnel.BadRequest(errors.New("body too large")))
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := (&http.Request{
		Method: method, URL: u, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: h.fields,
		Host: host, RequestURI: target, RemoteAddr: c.tls.RemoteAddr().String(), ContentLength: max(length, 0), Close: true,
	}).WithContext(ctx)
	state := c.tls.ConnectionState()
	r.TLS = &state
	body, err := readBody(c.tls, h.rest, length)
	if err != nil {
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	watched := c.watchEnd(cancel)
	w := &response{w: c.tls, header: make(http.Header)}
	s.cfg.Handler.ServeAPI(w, r, c)
	err = w.finish()
	c.tls.SetReadDeadline(time.Unix(1, 0))
	<-watched
	if err != nil {
		c.abort()
		return
	}
	c.close()
}

func readBody(r *tls.Conn, rest []byte, length int64) ([]byte, error) {
	if length <= 0 {
		return nil, nil
	}
	r.SetReadDeadline(time.Now().Add(bodyTimeout))
	defer r.SetReadDeadline(time.Time{})
	body := make([]byte, length)
	_, err := io.ReadFull(io.MultiReader(bytes.NewReader(rest), r), body)
	return body, err
}

// serverConn is a lane at the gateway.
type serverConn struct {
	tls    *tls.Conn
	raw    net.Conn
	peer   tunnel.Peer
	addr   netip.AddrPort
	cancel context.CancelFunc

	mu   sync.Mutex
	flow *conn // after Accept
	done bool
}

func (c *serverConn) Peer() tunnel.Peer          { return c.peer }
func (c *serverConn) RemoteAddr() netip.AddrPort { return c.addr }

// Close implements tunnel.ServerConn. An open flow is reset, for an end would
// look as if the service had finished; what an event stream has sent still
// arrives. It does not wait: the end of the stream stands in line behind an
// answer that the client may not read.
func (c *serverConn) Close(uint64, string) {
	c.mu.Lock()
	flow := c.flow
	c.mu.Unlock()
	if flow != nil {
		flow.Reset(0)
		c.cancel()
		return
	}
	go func() {
		defer time.AfterFunc(linger, c.cancel).Stop()
		c.tls.CloseWrite()
		if tcp, ok := c.raw.(*net.TCPConn); ok {
			tcp.CloseWrite()
		}
		c.cancel()
	}()
}

// abort ends everything at once; it is what the end of ctx does.
func (c *serverConn) abort() {
	c.mu.Lock()
	flow, done := c.flow, c.done
	c.mu.Unlock()
	switch {
	case flow != nil:
		flow.Reset(0)
	case !done:
		c.raw.SetDeadline(time.Now())
	}
}

func (c *serverConn) close() {
	c.mu.Lock()
	c.done = true
	c.mu.Unlock()
	closeGently(c.tls, c.raw, false)
}

// refuse answers with e and closes; what follows on the connection is thrown
// away unparsed.
func (c *serverConn) refuse(e *sallyport.Error) error {
	w := &response{w: c.tls, header: make(http.Header)}
	connect.WriteRefusal(w, e)
	err := w.finish()
	c.close()
	return err
}

// watchEnd calls gone when the client goes away while its request is served. The
// caller ends the watch with a read deadline and waits for the channel.
func (c *serverConn) watchEnd(gone func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		var b [1]byte
		c.tls.Read(b[:]) // nothing may come: a byte is as good as an end
		gone()
	}()
	return done
}

// serverStream is a CONNECT at the gateway.
type serverStream struct {
	c      *serverConn
	target sallyport.Target
	header http.Header
	early  []byte

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
	return nil
}

// Accept implements tunnel.ServerStream.
func (s *serverStream) Accept(h http.Header) (tunnel.Conn, error) {
	if err := s.answer(); err != nil {
		return nil, err
	}
	b := append(make([]byte, 0, 512), "HTTP/1.1 200 OK\r\n"...)
	b = append(appendFields(b, h), "\r\n"...)
	flow := newConn(s.c.tls, s.early)
	s.c.mu.Lock()
	s.flow, s.c.flow = flow, flow
	s.c.mu.Unlock()
	s.c.tls.SetWriteDeadline(time.Now().Add(writeTimeout))
	if _, err := flow.Write(b); err != nil {
		return nil, err
	}
	return flow, s.c.tls.SetDeadline(time.Time{})
}

// Refuse implements tunnel.ServerStream.
func (s *serverStream) Refuse(e *sallyport.Error) error {
	if err := s.answer(); err != nil {
		return err
	}
	return s.c.refuse(e)
}

// finish is what the handler may have left undone.
func (s *serverStream) finish() {
	if s.answer() == nil {
		s.c.refuse(tunnel.Unanswered())
		return
	}
	if s.flow != nil {
		s.flow.Close()
	}
}

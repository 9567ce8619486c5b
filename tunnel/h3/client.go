package h3

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

// spread is how many QUIC connections an agent's flows are spread over at most.
const spread = 4

// refusalTimeout bounds the reading of a refusal's body.
const refusalTimeout = 10 * time.Second

// Dial reaches a gateway and returns a carrier. ctx bounds the dial only.
func Dial(ctx context.Context, cfg tunnel.DialConfig) (tunnel.Carrier, error) {
	endpoint, err := tunnel.EndpointOf(cfg.Gateway)
	if err != nil {
		return nil, err
	}
	conf := cfg.TLS.Clone()
	conf.MinVersion = tls.VersionTLS13
	conf.NextProtos = []string{NextProto}
	conf.ServerName = endpoint.Host
	conf.ClientSessionCache = nil
	ctx, cancel := context.WithTimeout(ctx, tunnel.HandshakeTimeout)
	defer cancel()
	c, err := tunnel.DialAny(ctx, endpoint.Addresses, func(ctx context.Context, address string) (*carrier, error) {
		return dial(ctx, endpoint, conf, address)
	})
	if err != nil {
		return nil, tunnel.DialFailure(endpoint.Authority, err)
	}
	return c, nil
}

// dial tries every address that the name has.
func dial(ctx context.Context, endpoint tunnel.Endpoint, conf *tls.Config, address string) (*carrier, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	n, err := net.DefaultResolver.LookupPort(ctx, "udp", port)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, a := range addrs {
		c, err := dialAddr(ctx, endpoint, conf, netip.AddrPortFrom(a.Unmap(), uint16(n)))
		if err == nil {
			return c, nil
		}
		if errs = append(errs, err); ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

func dialAddr(ctx context.Context, endpoint tunnel.Endpoint, conf *tls.Config, addr netip.AddrPort) (*carrier, error) {
	network := "udp4"
	if addr.Addr().Is6() {
		network = "udp6"
	}
	udp, err := net.ListenUDP(network, nil)
	if err != nil {
		return nil, err
	}
	c := &carrier{
		endpoint: endpoint, tls: conf, addr: net.UDPAddrFromAddrPort(addr), udp: udp,
		transport: &quic.Transport{Conn: batched(udp)},
		h3:        &http3.Transport{DisableCompression: true, MaxResponseHeaderBytes: tunnel.MaxHead},
		done:      make(chan struct{}),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	if err := c.add(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// carrier is a tunnel.Carrier over up to spread QUIC connections on one socket.
type carrier struct {
	endpoint  tunnel.Endpoint
	tls       *tls.Config
	addr      *net.UDPAddr
	udp       *net.UDPConn
	transport *quic.Transport
	h3        *http3.Transport
	done      chan struct{} // closed by fail
	ctx       context.Context
	cancel    context.CancelFunc
	wg        sync.WaitGroup // background dials and watchers

	mu      sync.Mutex
	conns   []*clientConn
	growing bool
	err     error
}

type clientConn struct {
	quic *quic.Conn
	h3   *http3.ClientConn
	busy int // flows and requests on it; guarded by carrier.mu
}

func (c *carrier) Name() string          { return Name }
func (c *carrier) Done() <-chan struct{} { return c.done }

func (c *carrier) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *carrier) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		close(c.done)
	}
}

// Close implements tunnel.Carrier.
func (c *carrier) Close() error {
	c.fail(&sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: connect.ProblemGatewayDown, Message: "the tunnel was closed"})
	c.cancel()
	c.mu.Lock()
	conns := c.conns
	c.mu.Unlock()
	for _, q := range conns {
		q.quic.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
	}
	c.wg.Wait()
	c.transport.Close()
	return c.udp.Close()
}

// add dials one more connection.
func (c *carrier) add(ctx context.Context) error {
	q, err := c.transport.Dial(ctx, c.addr, c.tls, clientConfig())
	if err != nil {
		return carrierError(c.endpoint.Authority, err)
	}
	conn := &clientConn{quic: q, h3: c.h3.NewClientConn(q)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		q.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "")
		return c.err
	}
	// A new slice each time: Close walks the old one without the lock.
	c.conns = append(append([]*clientConn(nil), c.conns...), conn)
	c.wg.Go(func() { c.watch(conn) })
	return nil
}

// watch takes a connection out of use when it has ended. The last one's end is
// the carrier's, and so is every end that another connection would meet too.
func (c *carrier) watch(conn *clientConn) {
	<-conn.quic.Context().Done()
	err := carrierError(c.endpoint.Authority, context.Cause(conn.quic.Context()))
	c.mu.Lock()
	var rest []*clientConn
	for _, q := range c.conns {
		if q != conn {
			rest = append(rest, q)
		}
	}
	c.conns = rest
	c.mu.Unlock()
	if len(rest) == 0 || sallyport.OutcomeOf(err) == sallyport.OutcomeLogin {
		c.fail(err)
	}
}

// take picks the connection with the least to do and counts one more on it. Once
// all are busy, another is dialled in the background.
func (c *carrier) take() (*clientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, c.err
	}
	if len(c.conns) == 0 {
		return nil, tunnel.DialFailure(c.endpoint.Authority, net.ErrClosed)
	}
	best := c.conns[0]
	for _, q := range c.conns[1:] {
		if q.busy < best.busy {
			best = q
		}
	}
	if best.busy > 0 && len(c.conns) < spread && !c.growing {
		c.growing = true
		c.wg.Go(c.grow)
	}
	best.busy++
	return best, nil
}

func (c *carrier) grow() {
	ctx, cancel := context.WithTimeout(c.ctx, tunnel.HandshakeTimeout)
	defer cancel()
	c.add(ctx) // that it failed shows in nothing but fewer connections
	c.mu.Lock()
	defer c.mu.Unlock()
	c.growing = false
}

func (c *carrier) give(q *clientConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	q.busy--
}

// Open implements tunnel.Carrier.
func (c *carrier) Open(ctx context.Context, target sallyport.Target, early []byte) (*tunnel.Flow, error) {
	if len(early) > connect.MaxEarlyBytes {
		return nil, fmt.Errorf("open %s: %d early bytes; at most %d", target, len(early), connect.MaxEarlyBytes)
	}
	q, err := c.take()
	if err != nil {
		return nil, err
	}
	flow, err := c.open(ctx, q, target, early)
	if err != nil {
		c.give(q)
		return nil, c.failure(ctx, q, err)
	}
	return flow, nil
}

// failure returns what people see of err. If the whole connection is gone, its
// reason says more than the stream's.
func (c *carrier) failure(ctx context.Context, q *clientConn, err error) error {
	if ctx.Err() != nil {
		return errors.Join(context.Cause(ctx), err)
	}
	if cause := context.Cause(q.quic.Context()); cause != nil {
		err = cause
	}
	return carrierError(c.endpoint.Authority, err)
}

func (c *carrier) open(ctx context.Context, q *clientConn, target sallyport.Target, early []byte) (*tunnel.Flow, error) {
	str, err := q.h3.OpenRequestStream(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { cancelStream(str, 0) })
	resp, err := c.connect(str, target, early)
	if !stop() {
		err = errors.Join(context.Cause(ctx), err)
	}
	if err == nil && (resp.StatusCode < 200 || resp.StatusCode > 299) {
		err = c.refusal(str, resp)
	}
	if err != nil {
		cancelStream(str, 0)
		return nil, err
	}
	return &tunnel.Flow{
		Conn:     &conn{stream: str, quic: q.quic, onOver: func() { c.give(q) }},
		ID:       sallyport.FlowID(resp.Header.Get(connect.HeaderFlow)),
		Decision: sallyport.DecisionID(resp.Header.Get(connect.HeaderDecision)),
		Rule:     resp.Header.Get(connect.HeaderRule),
		Header:   resp.Header,
	}, nil
}

// connect sends CONNECT with the early bytes in one flight and reads the answer.
func (c *carrier) connect(str *http3.RequestStream, target sallyport.Target, early []byte) (*http.Response, error) {
	authority := target.Authority()
	err := str.SendRequestHeader(&http.Request{
		Method: http.MethodConnect, Host: authority, URL: &url.URL{Host: authority},
		Header: http.Header{"User-Agent": nil},
	})
	if err == nil && len(early) > 0 {
		// The gateway may have refused, and stopped reading, in the meantime: the
		// answer tells.
		str.Write(early)
	}
	if err != nil {
		return nil, err
	}
	return str.ReadResponse()
}

// refusal reads a refusal. One that says the session is over ends the carrier.
func (c *carrier) refusal(str *http3.RequestStream, resp *http.Response) error {
	str.SetReadDeadline(time.Now().Add(refusalTimeout))
	e := connect.ReadRefusal(resp)
	if e.Outcome == sallyport.OutcomeLogin {
		c.fail(e)
	}
	return e
}

// RoundTrip implements http.RoundTripper for /v1 requests. A 401 is returned as
// an error: the gateway has no session for us.
func (c *carrier) RoundTrip(req *http.Request) (*http.Response, error) {
	q, err := c.take()
	if err != nil {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, err
	}
	defer c.give(q)
	out := req.Clone(req.Context())
	out.URL.Scheme, out.URL.Host, out.Host = "https", c.endpoint.Authority, ""
	resp, err := q.h3.RoundTrip(out)
	if err != nil {
		return nil, c.failure(req.Context(), q, err)
	}
	if resp.StatusCode == http.StatusUnauthorized {
		defer resp.Body.Close()
		e := connect.ReadRefusal(resp)
		c.fail(e)
		return nil, e
	}
	return resp, nil
}

// carrierError returns what people see of a connection that failed.
func carrierError(host string, err error) error {
	var (
		app       *quic.ApplicationError
		stream    *quic.StreamError
		transport *quic.TransportError
	)
	switch {
	case errors.As(err, &stream) && stream.Remote && ourCode(uint64(stream.ErrorCode)) != 0:
		return tunnel.CloseFailure(host, uint64(stream.ErrorCode), "")
	case errors.As(err, &app) && app.Remote:
		return tunnel.CloseFailure(host, uint64(app.ErrorCode), app.ErrorMessage)
	case errors.As(err, &transport) && transport.Remote && transport.ErrorCode.IsCryptoError():
		// RFC 9001, section 4.8: the TLS alert is the low byte.
		return tunnel.DialFailure(host, errors.Join(tls.AlertError(uint8(transport.ErrorCode)), err))
	}
	return tunnel.DialFailure(host, err)
}

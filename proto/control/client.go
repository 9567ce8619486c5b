package control

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"sallyport/internal/logging"
)

// Client calls one service, which may run at several addresses. It stays with one
// of them as long as that one answers, and goes on to the next when it is gone,
// silent, or says that it cannot serve (failover.go). It connects when it is first
// used. Records and Policy give the interfaces of what the service offers. Safe for
// concurrent use.
type Client struct {
	name      string // of the service, for people
	authority string
	addrs     []resolver.Address
	creds     credentials.TransportCredentials
	log       logging.Logger

	gather gatherer // of questions to policyd

	mu     sync.Mutex         // guards what follows
	conns  []*grpc.ClientConn // by address; nil: not connected yet
	at     int                // the address in use
	closed bool
}

// Times of connecting. A handshake may be slow on a busy machine; the sum of
// both is how long a recovered service goes unnoticed.
const (
	connectTimeout = 1500 * time.Millisecond
	firstBackoff   = 50 * time.Millisecond
	maxBackoff     = 400 * time.Millisecond
)

// Dial makes a client of the service at addrs: host:port, which needs a TLS
// configuration (tlsid.ClientConfig), or unix:/path. It does not connect; the
// first call does. An error means that the arguments cannot work.
func Dial(addrs []string, tlsConf *tls.Config, log logging.Logger) (*Client, error) {
	if len(addrs) == 0 {
		return nil, errors.New("dial: no address")
	}
	c := &Client{log: log, creds: unixCredentials{log}, authority: "localhost"}
	if tlsConf != nil {
		c.creds, c.authority = credentials.NewTLS(tlsConf), tlsConf.ServerName
		c.name, _, _ = strings.Cut(tlsConf.ServerName, ".")
	}
	for _, addr := range addrs {
		path, isUnix := strings.CutPrefix(addr, "unix:")
		if isUnix != (tlsConf == nil) {
			return nil, fmt.Errorf("dial %s: unix sockets go without TLS, everything else with it", addr)
		}
		if isUnix {
			c.name = strings.TrimSuffix(filepath.Base(path), ".sock")
		} else if _, _, err := net.SplitHostPort(addr); err != nil {
			return nil, fmt.Errorf("dial: %w", err)
		}
		c.addrs = append(c.addrs, resolver.Address{Addr: addr})
	}
	c.conns = make([]*grpc.ClientConn, len(c.addrs))
	c.gather.ask = c.Policy().ask
	return c, nil
}

// Close ends the connection and every call on it.
func (c *Client) Close() error {
	defer c.gather.close()
	return c.close()
}

func (c *Client) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	var errs []error
	for i, conn := range c.conns {
		if conn != nil {
			errs = append(errs, conn.Close())
			c.conns[i] = nil
		}
	}
	return errors.Join(errs...)
}

var errClosed = errors.New("the client is closed")

// current returns the connection in use; it makes one if there is none.
func (c *Client) current() (*grpc.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, unavailable(c.name, errClosed)
	}
	if c.conns[c.at] == nil {
		conn, err := c.connect(c.addrs[c.at])
		if err != nil {
			return nil, unavailable(c.name, err)
		}
		c.conns[c.at] = conn
	}
	return c.conns[c.at], nil
}

func (c *Client) connect(to resolver.Address) (*grpc.ClientConn, error) {
	addresses := manual.NewBuilderWithScheme("sallyport")
	addresses.InitialState(resolver.State{Addresses: []resolver.Address{to}})
	return grpc.NewClient("sallyport:///"+c.name,
		grpc.WithTransportCredentials(c.creds),
		grpc.WithAuthority(c.authority),
		grpc.WithResolvers(addresses),
		grpc.WithContextDialer(dialContext),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithIdleTimeout(0),
		grpc.WithMaxHeaderListSize(maxHeaderList),
		grpc.WithStaticStreamWindowSize(streamWindow),
		grpc.WithStaticConnWindowSize(connWindow),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: firstBackoff, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxBackoff},
			MinConnectTimeout: connectTimeout,
		}),
		// 10 s is the least that gRPC lets a client choose; streams notice earlier.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: Silence, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)),
	)
}

func dialContext(ctx context.Context, addr string) (net.Conn, error) {
	var d net.Dialer
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		return d.DialContext(ctx, "unix", path)
	}
	return d.DialContext(ctx, "tcp", addr)
}

// unaryConn is what the generated clients call through: the connection in use,
// deadlines for who has none, and errors that are ours.
type unaryConn struct{ *Client }

func (c unaryConn) Invoke(ctx context.Context, method string, request, response any, opts ...grpc.CallOption) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, CallTimeout)
		defer cancel()
	}
	return c.wherever(ctx, func(ctx context.Context, conn *grpc.ClientConn) (sent bool, err error) {
		var to peer.Peer // known once the request is on its way
		err = conn.Invoke(ctx, method, request, response, append(opts, grpc.Peer(&to))...)
		if err != nil {
			err = c.failed(ctx, err)
		}
		return to.Addr != nil, err
	}, repeatable[method])
}

// NewStream is for completeness: streams of this package go through receive and
// Lease, which have to know their connection.
func (c unaryConn) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	conn, err := c.current()
	if err != nil {
		return nil, err
	}
	return conn.NewStream(ctx, desc, method, opts...)
}

// failed turns the error of a call into ours. A Canceled that the caller did not
// ask for comes from a connection that was closed under the call.
func (c *Client) failed(ctx context.Context, err error) error {
	st := status.Convert(err)
	if remote, ok := failureFromWire(st); ok {
		return remote
	}
	if st.Code() == codes.Canceled && errors.Is(ctx.Err(), context.Canceled) {
		return context.Canceled
	}
	return transportError(c.name, err)
}

// Package upstream is the only place that dials inwards. It resolves what an
// allowed decision names, looks at every address after the resolution, dials
// exactly the addresses it looked at, and tells failures apart for the person
// who waits.
//
// It owns which addresses a gateway never dials. It knows no sessions and no
// policy: whoever calls Dial has an allow in the hand.
package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"sallyport"
	"sallyport/internal/relay"
	"sallyport/proto/connect"
)

const (
	// defaultTimeout bounds resolution and all connection attempts together.
	defaultTimeout = 10 * time.Second
	// attemptDelay is how long an attempt is alone before the next address is
	// tried beside it (RFC 8305, section 5).
	attemptDelay = 250 * time.Millisecond
	// maxAddresses bounds how many addresses of one name are tried.
	maxAddresses = 8
)

// Resolver turns a name into addresses; *net.Resolver is one.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Dialer dials services. Its methods may be called by several goroutines.
type Dialer struct {
	// Guard says which addresses are never dialled. This field is required.
	Guard *Guard
	// Resolver resolves names; nil: net.DefaultResolver.
	Resolver Resolver
	// Timeout bounds one Dial; 0: 10 s.
	Timeout time.Duration

	// dial and wrap replace the network in tests.
	dial func(ctx context.Context, addr netip.AddrPort) (net.Conn, error)
	wrap func(net.Conn) relay.Conn
}

// Dial connects to u and returns when the service has accepted. Every error is a
// *sallyport.Error: OutcomeDenied with connect.ProblemProhibited when no address of u may
// be dialled (no packet was sent then), OutcomeUpstream otherwise.
func (d *Dialer) Dial(ctx context.Context, u sallyport.Upstream) (relay.Conn, error) {
	if u.Network == sallyport.UDP {
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeUpstream, Code: connect.ProblemUnsupported,
			Message: "this gateway carries no UDP to " + authority(u),
		}
	}
	timeout := d.Timeout
	if timeout == 0 {
		timeout = defaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()

	addrs, err := d.resolve(ctx, u)
	if err != nil {
		return nil, explain(u, err)
	}
	permitted, err := d.permitted(ctx, u, addrs)
	if err != nil {
		return nil, prohibited(u, err)
	}
	c, err := d.race(ctx, permitted)
	if err != nil {
		return nil, explain(u, err)
	}
	return c, nil
}

// resolve returns the addresses of u, at least one.
func (d *Dialer) resolve(ctx context.Context, u sallyport.Upstream) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(u.Host); err == nil {
		return []netip.Addr{a}, nil
	}
	r := d.Resolver
	if r == nil {
		r = net.DefaultResolver
	}
	addrs, err := r.LookupNetIP(ctx, "ip", u.Host)
	if err == nil && len(addrs) == 0 {
		err = &net.DNSError{Err: "no addresses", Name: u.Host, IsNotFound: true}
	}
	return addrs, err
}

// permitted drops what must not be dialled: a name with one good and one bad
// address is dialled at the good one only. The error says why none is left.
func (d *Dialer) permitted(ctx context.Context, u sallyport.Upstream, addrs []netip.Addr) ([]netip.AddrPort, error) {
	var good []netip.AddrPort
	var why error
	for _, a := range addrs {
		ap := netip.AddrPortFrom(a.Unmap(), u.Port)
		if err := d.Guard.Check(ctx, ap, u.Literal); err != nil {
			why = err
			continue
		}
		if len(good) < maxAddresses {
			good = append(good, ap)
		}
	}
	if len(good) > 0 {
		return good, nil
	}
	return nil, why
}

func prohibited(u sallyport.Upstream, why error) *sallyport.Error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeDenied,
		Code:    connect.ProblemProhibited,
		Message: authority(u) + " leads to an address that a gateway never dials",
		Hint:    "ask an administrator: the route must name a service, not the gateway's own machine",
		Err:     why,
	}
}

// Prohibited returns the refusal that Dial would give for the literal address
// addr, or nil.
func (d *Dialer) Prohibited(t sallyport.Target, addr netip.Addr) *sallyport.Error {
	u := sallyport.Upstream{Network: t.Network, Host: t.Host, Port: t.Port}
	if err := d.Guard.Check(context.Background(), netip.AddrPortFrom(addr, t.Port), false); err != nil {
		return prohibited(u, err)
	}
	return nil
}

// race dials the addresses in order, each next one after attemptDelay or after
// the failure of all before it, and returns the first connection. The others are
// closed before it returns or soon after, never leaked.
func (d *Dialer) race(ctx context.Context, addrs []netip.AddrPort) (relay.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		conn net.Conn
		err  error
	}
	results := make(chan result, len(addrs))
	started, ended := 0, 0
	start := func() {
		addr := addrs[started]
		started++
		go func() {
			c, err := d.dialOne(ctx, addr)
			results <- result{c, err}
		}()
	}
	defer func() {
		if rest := started - ended; rest > 0 {
			go func() {
				for range rest {
					if r := <-results; r.conn != nil {
						r.conn.Close()
					}
				}
			}()
		}
	}()

	start()
	delay := time.NewTimer(attemptDelay)
	defer delay.Stop()
	var first error
	for {
		select {
		case r := <-results:
			ended++
			if r.err == nil {
				return d.conn(r.conn), nil
			}
			if first == nil {
				first = r.err
			}
			if ended == len(addrs) {
				return nil, first
			}
			if started < len(addrs) {
				start()
				delay.Reset(attemptDelay)
			}
		case <-delay.C:
			if started < len(addrs) {
				start()
				delay.Reset(attemptDelay)
			}
		case <-ctx.Done():
			if first == nil {
				first = ctx.Err()
			}
			return nil, first
		}
	}
}

func (d *Dialer) dialOne(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	if d.dial != nil {
		return d.dial(ctx, addr)
	}
	nd := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}}
	return nd.DialContext(ctx, "tcp", addr.String())
}

func (d *Dialer) conn(c net.Conn) relay.Conn {
	if d.wrap != nil {
		return d.wrap(c)
	}
	tcp := c.(*net.TCPConn) // dialOne dials "tcp" only
	tcp.SetNoDelay(true)
	return relay.TCP(tcp)
}

// explain turns a failure into what the waiting person may know: that they are
// allowed, and in which way the service did not answer.
func explain(u sallyport.Upstream, err error) *sallyport.Error {
	e := &sallyport.Error{Outcome: sallyport.OutcomeUpstream, Err: err}
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns):
		e.Code = connect.ProblemDNS
		e.Message = fmt.Sprintf("you are allowed; the gateway could not resolve %q", u.Host)
		if dns.IsTimeout {
			e.Hint = "the name server did not answer the gateway; try again"
		}
	case errors.Is(err, syscall.ECONNREFUSED):
		e.Code = connect.ProblemRefused
		e.Message = "you are allowed; the service refused the connection to " + authority(u)
		e.Hint = "check that it runs and listens there"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		e.Code = connect.ProblemTimeout
		e.Message = "you are allowed; the service at " + authority(u) + " did not answer"
		e.Hint = "check that it runs and that the gateway may reach it"
	case exhausted(err):
		e.Outcome, e.Code = sallyport.OutcomeUnavailable, "gateway.exhausted"
		e.Message = "the gateway has no descriptors, ports or memory left for another connection"
		e.Hint = "try again in a moment; if it stays, tell an administrator"
	default:
		e.Code = connect.ProblemUnreachable
		e.Message = "you are allowed; the gateway could not reach " + authority(u)
	}
	return e
}

// exhausted reports whether the gateway's own machine is at its end, which says
// nothing about the service.
func exhausted(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func authority(u sallyport.Upstream) string {
	return sallyport.Target{Network: u.Network, Host: u.Host, Port: u.Port}.Authority()
}

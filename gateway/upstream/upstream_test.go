package upstream

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"sallyport"
	"sallyport/internal/relay"
	"sallyport/proto/connect"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// names is a resolver with a fixed table.
type names map[string][]netip.Addr

func (n names) LookupNetIP(ctx context.Context, _, host string) ([]netip.Addr, error) {
	if addrs, ok := n[host]; ok {
		return addrs, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

func addrs(s ...string) (list []netip.Addr) {
	for _, a := range s {
		list = append(list, netip.MustParseAddr(a))
	}
	return list
}

// service listens on loopback, counts what it accepts and greets.
func service(t *testing.T) (addr netip.AddrPort, accepted *atomic.Int64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	accepted = new(atomic.Int64)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			c.Write([]byte("hi"))
			c.Close()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort(), accepted
}

func tcp(host string, port uint16, literal bool) sallyport.Upstream {
	return sallyport.Upstream{Network: sallyport.TCP, Host: host, Port: port, Literal: literal}
}

func TestDialReachesTheService(t *testing.T) {
	at, accepted := service(t)
	d := &Dialer{Guard: new(Guard)}
	c, err := d.Dial(t.Context(), tcp("127.0.0.1", at.Port(), true))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); string(b) != "hi" || err != nil {
		t.Errorf("read %q, %v", b, err)
	}
	if n := accepted.Load(); n != 1 {
		t.Errorf("accepted %d; want 1", n)
	}
}

func TestResetSendsRST(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := (&Dialer{Guard: new(Guard)}).Dial(t.Context(), tcp("127.0.0.1", l.Addr().(*net.TCPAddr).AddrPort().Port(), true))
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	c.Reset(connect.CodeFlowWithdrawn)
	if _, err := far.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v; want connection reset", err)
	}
}

// TestCase_G7_NeverDialled: whatever the route says, these get no packet. The
// dial function of the test would see it.
func TestCase_G7_NeverDialled(t *testing.T) {
	at, accepted := service(t)
	guard := new(Guard)
	guard.SetOwn([]netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:443"), netip.MustParseAddrPort("[::]:8443"), netip.AddrPortFrom(at.Addr(), at.Port())})
	guard.interfaces = func() ([]net.Addr, error) {
		return []net.Addr{&net.IPNet{IP: net.ParseIP("192.0.2.1"), Mask: net.CIDRMask(24, 32)}}, nil
	}
	resolve := names{
		"rebound.internal":    addrs("127.0.0.1"),
		"mapped.internal":     addrs("::ffff:127.0.0.1"),
		"metadata.internal":   addrs("169.254.169.254", "fd00:ec2::254"),
		"control.internal":    addrs("10.9.9.9"),
		"pol.corp":            addrs("10.9.9.9"),
		"translated.internal": addrs("64:ff9b::7f00:1"),
		"sixtofour.internal":  addrs("2002:a9fe:a9fe::1"),
		"compatible.internal": addrs("::7f00:1"),
	}
	guard.resolver = resolve
	if err := guard.SetForbidden([]string{"10.1.1.1:8445", ":8444", "pol.corp:8445", "[fd12::1]:8445"}); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		up   sallyport.Upstream
	}{
		{"own listener", tcp("10.0.0.1", 443, true)},
		{"own listener on every address", tcp("192.0.2.1", 8443, true)},
		{"own listener on every address, loopback", tcp("127.0.0.1", 8443, true)},
		{"own listener, loopback named by the route", tcp("127.0.0.1", at.Port(), true)},
		{"control plane", tcp("10.1.1.1", 8445, true)},
		{"control plane IPv6", tcp("fd12::1", 8445, true)},
		{"control plane on every address", tcp("192.0.2.1", 8444, true)},
		{"control plane by name", tcp("control.internal", 8445, false)},
		{"metadata", tcp("169.254.169.254", 80, true)},
		{"metadata IPv6", tcp("fd00:ec2::254", 80, true)},
		{"metadata elsewhere", tcp("100.100.100.200", 80, true)},
		{"metadata by name", tcp("metadata.internal", 80, false)},
		{"link-local", tcp("169.254.1.1", 80, true)},
		{"link-local IPv6", tcp("fe80::1", 80, true)},
		{"multicast", tcp("224.0.0.1", 80, true)},
		{"multicast IPv6", tcp("ff02::1", 80, true)},
		{"broadcast", tcp("255.255.255.255", 80, true)},
		{"unspecified", tcp("0.0.0.0", at.Port(), true)},
		{"unspecified IPv6", tcp("::", at.Port(), true)},
		{"this network", tcp("0.0.0.1", at.Port(), true)},
		{"loopback that the route does not name", tcp("127.0.0.1", at.Port(), false)},
		{"loopback, another", tcp("127.9.9.9", at.Port(), false)},
		{"loopback IPv6", tcp("::1", at.Port(), false)},
		{"loopback in a network that the route names", tcp("127.0.0.2", 22, false)},
		{"metadata in a network that the route names", tcp("169.254.169.254", 80, false)},
		{"own listener in a network that the route names", tcp("10.0.0.1", 443, false)},
		{"control plane in a network that the route names", tcp("10.1.1.1", 8445, false)},
		{"a name that leads to loopback", tcp("rebound.internal", at.Port(), false)},
		{"a name that leads to loopback, mapped", tcp("mapped.internal", at.Port(), false)},
		{"NAT64 to loopback", tcp("translated.internal", at.Port(), false)},
		{"6to4 to metadata", tcp("sixtofour.internal", 80, false)},
		{"IPv4-compatible loopback", tcp("compatible.internal", at.Port(), false)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dialled := 0
			d := &Dialer{Guard: guard, Resolver: resolve, dial: func(context.Context, netip.AddrPort) (net.Conn, error) {
				dialled++
				return nil, errors.New("dialled")
			}}
			_, err := d.Dial(t.Context(), tt.up)
			var e *sallyport.Error
			if !errors.As(err, &e) || e.Code != connect.ProblemProhibited {
				t.Fatalf("got %v; want prohibited", err)
			}
			if p := connect.ProblemOf(e); p.Status != 403 || p.ProxyError() != "destination_ip_prohibited" {
				t.Errorf("got %d %s; want 403 destination_ip_prohibited", p.Status, p.ProxyError())
			}
			if dialled != 0 {
				t.Errorf("dialled %d times", dialled)
			}
		})
	}
	if n := accepted.Load(); n != 0 {
		t.Errorf("the service saw %d connections", n)
	}
}

func TestOrdinaryAddressesAreDialled(t *testing.T) {
	guard := new(Guard)
	guard.SetOwn([]netip.AddrPort{netip.MustParseAddrPort("[::]:443")})
	guard.interfaces = func() ([]net.Addr, error) {
		return []net.Addr{&net.IPNet{IP: net.ParseIP("192.0.2.1"), Mask: net.CIDRMask(24, 32)}}, nil
	}
	for _, s := range []string{"10.0.3.7:5432", "192.0.2.1:5432", "192.0.2.2:443", "203.0.113.7:443", "[2001:db8::1]:443", "[fd00::1]:22", "100.64.0.1:22"} {
		if err := guard.Check(t.Context(), netip.MustParseAddrPort(s), false); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	if err := guard.Check(t.Context(), netip.MustParseAddrPort("127.0.0.1:5432"), true); err != nil {
		t.Errorf("loopback that the route names: %v", err)
	}
}

// TestMixedAnswer: of a name's addresses only the permitted ones are dialled.
func TestMixedAnswer(t *testing.T) {
	var dialled []netip.AddrPort
	d := &Dialer{
		Guard:    new(Guard),
		Resolver: names{"db.internal": addrs("127.0.0.1", "10.0.3.7", "169.254.169.254")},
		dial: func(_ context.Context, a netip.AddrPort) (net.Conn, error) {
			dialled = append(dialled, a)
			return nil, syscall.ECONNREFUSED
		},
	}
	d.Dial(t.Context(), tcp("db.internal", 5432, false))
	if len(dialled) != 1 || dialled[0] != netip.MustParseAddrPort("10.0.3.7:5432") {
		t.Errorf("dialled %v; want 10.0.3.7:5432 only", dialled)
	}
}

func TestCase_G10_FailuresAreToldApart(t *testing.T) {
	hang := func(ctx context.Context, _ netip.AddrPort) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
	fail := func(err error) func(context.Context, netip.AddrPort) (net.Conn, error) {
		return func(context.Context, netip.AddrPort) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: err}
		}
	}
	tests := []struct {
		name   string
		up     sallyport.Upstream
		dial   func(context.Context, netip.AddrPort) (net.Conn, error)
		status int
		proxy  string
	}{
		{"refused", tcp("10.0.3.7", 1, true), fail(syscall.ECONNREFUSED), 502, "connection_refused"},
		{"no answer", tcp("10.0.3.7", 1, true), hang, 504, "connection_timeout"},
		{"no answer, says the kernel", tcp("10.0.3.7", 1, true), fail(syscall.ETIMEDOUT), 504, "connection_timeout"},
		{"no route to host", tcp("10.0.3.7", 1, true), fail(syscall.EHOSTUNREACH), 502, "destination_unavailable"},
		{"network unreachable", tcp("10.0.3.7", 1, true), fail(syscall.ENETUNREACH), 502, "destination_unavailable"},
		{"no descriptors", tcp("10.0.3.7", 1, true), fail(syscall.EMFILE), 503, "proxy_internal_response"}, // S8
		{"no such name", tcp("nowhere.internal", 1, false), hang, 502, "dns_error"},
		{"name without addresses", tcp("empty.internal", 1, false), hang, 502, "dns_error"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				d := &Dialer{Guard: new(Guard), Resolver: names{"empty.internal": nil}, dial: tt.dial}
				_, err := d.Dial(t.Context(), tt.up)
				var e *sallyport.Error
				if !errors.As(err, &e) || (e.Outcome == sallyport.OutcomeUpstream) != (tt.status != 503) {
					t.Fatalf("got %v; want an upstream error", err)
				}
				if p := connect.ProblemOf(e); p.Status != tt.status || p.ProxyError() != tt.proxy {
					t.Errorf("got %d %s; want %d %s", p.Status, p.ProxyError(), tt.status, tt.proxy)
				}
				if took := time.Since(began); took > defaultTimeout {
					t.Errorf("took %s", took)
				}
			})
		})
	}
}

// TestRaceOfAddresses: a dead first address costs attemptDelay, and the attempt
// that lost is closed.
func TestRaceOfAddresses(t *testing.T) {
	at, _ := service(t)
	d := &Dialer{
		Guard:    new(Guard),
		Resolver: names{"two.internal": addrs("10.0.0.1", "10.0.0.2")},
		dial: func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
			if a.Addr() == netip.MustParseAddr("10.0.0.1") {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return new(net.Dialer).DialContext(ctx, "tcp", at.String())
		},
	}
	c, err := d.Dial(t.Context(), tcp("two.internal", at.Port(), false))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// TestRaceLosersAreClosed: both answer; one connection is returned, the other
// one closed.
func TestRaceLosersAreClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var closed atomic.Int64
		d := &Dialer{
			Guard:    new(Guard),
			Resolver: names{"two.internal": addrs("10.0.0.1", "10.0.0.2")},
			dial: func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
				<-time.After(300 * time.Millisecond) // both are under way by then
				return &countedConn{closed: &closed}, nil
			},
			wrap: func(c net.Conn) relay.Conn { return c.(*countedConn) },
		}
		c, err := d.Dial(t.Context(), tcp("two.internal", 1, false))
		if err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Second)
		if n := closed.Load(); n != 1 {
			t.Errorf("%d connections closed; want the one that lost", n)
		}
		c.Close()
	})
}

type countedConn struct {
	net.Conn
	closed *atomic.Int64
}

func (c *countedConn) Close() error      { c.closed.Add(1); return nil }
func (c *countedConn) CloseWrite() error { return nil }
func (c *countedConn) Reset(uint64)      {}

func TestBadForbidden(t *testing.T) {
	g := new(Guard)
	if err := g.SetForbidden([]string{"nonsense", "10.1.1.1:8445"}); err == nil {
		t.Error("no error")
	}
	if err := g.Check(t.Context(), netip.MustParseAddrPort("10.1.1.1:8445"), true); err == nil {
		t.Error("the good entry was dropped with the bad one")
	}
}

// TestUnresolvableForbiddenName: if the control plane's name does not resolve,
// nothing on its port is dialled.
func TestUnresolvableForbiddenName(t *testing.T) {
	g := &Guard{resolver: names{}}
	g.SetForbidden([]string{"pol.corp:8445"})
	if err := g.Check(t.Context(), netip.MustParseAddrPort("10.1.1.1:8445"), true); err == nil {
		t.Error("dialled")
	}
	if err := g.Check(t.Context(), netip.MustParseAddrPort("10.1.1.1:22"), true); err != nil {
		t.Errorf("another port: %v", err)
	}
}

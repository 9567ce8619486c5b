package gateway

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/tunnel"
	"sallyport/tunnel/h3"
	"sallyport/tunnel/lane"
	"sallyport/tunnel/tunneltest"
)

// site is a whole gateway on loopback, reached through lanes, in front of real
// services.
type site struct {
	*tunneltest.Site
	t       *testing.T
	gateway *Server
	policy  *policy
	journal *journal
	addr    string
	stop    func()
	dial    func(context.Context, tunnel.DialConfig) (tunnel.Carrier, error)
}

func newSite(t *testing.T, limits Limits) *site {
	t.Helper()
	s := &site{Site: tunneltest.NewSite(t), t: t, policy: newPolicy(), journal: new(journal), dial: lane.Dial}
	s.policy.trust = &sallyport.Trust{SessionCAs: string(s.Sessions.PEM())}
	var err error
	s.gateway, err = New(Config{PublicURL: "https://" + tunneltest.Host, Limits: limits}, Deps{
		Domain: tunneltest.Domain, Authorizer: s.policy, Explainer: s.policy, Changes: s.policy, Posture: s.policy, Audit: s.journal,
		Certificate: func() *tls.Certificate { return &s.Server },
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// carriers are the ways to the gateway; what is true of one is true of all.
var carriers = []struct {
	name string
	dial func(context.Context, tunnel.DialConfig) (tunnel.Carrier, error)
}{{"quic", h3.Dial}, {"tls", lane.Dial}}

// eachCarrier runs a test once for each carrier.
func eachCarrier(t *testing.T, limits Limits, test func(t *testing.T, s *site)) {
	for _, c := range carriers {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t, limits)
			s.dial = c.dial
			test(t, s)
		})
	}
}

// listenBoth listens on one port of TCP and UDP.
func listenBoth(t *testing.T) (net.Listener, net.PacketConn) {
	t.Helper()
	for range 20 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		udp, err := net.ListenPacket("udp", l.Addr().String())
		if err == nil {
			return l, udp
		}
		l.Close() // another program has that UDP port
	}
	t.Fatal("no port is free in TCP and UDP")
	return nil, nil
}

// start serves until the test ends, on a port that the system chooses.
func (s *site) start() {
	s.t.Helper()
	l, udp := listenBoth(s.t)
	s.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.gateway.Serve(ctx, l, udp) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			s.t.Errorf("Serve: %v", err)
		}
	})
	s.t.Cleanup(func() { s.stop() })
}

func (s *site) ready() {
	s.t.Helper()
	until(s.t, "the gateway is ready", func() bool { return s.gateway.Ready() == nil })
}

// agent returns a carrier of the session.
func (s *site) agent(session sallyport.SessionID) tunnel.Carrier {
	s.t.Helper()
	c, err := s.dial(s.t.Context(), s.DialConfig(s.addr, s.Session(s.t, session, nil)))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

// counting is a TCP service on loopback that counts what reaches it. The kernel
// accepts a connection before the program does, so what it counts is every SYN
// that got through.
type counting struct {
	target   sallyport.Target
	accepted atomic.Int64
}

// service starts a service and a route to it.
func (s *site) service(name string, serve func(net.Conn)) *counting {
	s.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	c := &counting{target: sallyport.Target{Network: sallyport.TCP, Host: name, Port: 5432}}
	var serving sync.WaitGroup
	s.t.Cleanup(func() { l.Close(); serving.Wait() })
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			c.accepted.Add(1)
			serving.Go(func() { defer conn.Close(); serve(conn) })
		}
	})
	s.route(c.target, l.Addr())
	return c
}

func (s *site) route(t sallyport.Target, to net.Addr) {
	at := to.(*net.TCPAddr).AddrPort()
	s.policy.set(func() {
		s.policy.upstreams[t.String()] = sallyport.Upstream{Network: sallyport.TCP, Host: at.Addr().String(), Port: at.Port(), Literal: true}
	})
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	(&bench{t: t}).until(what, ok)
}

func (s *Server) openCarriers() (n int) {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	for _, g := range s.table.carriers {
		if g.state == open {
			n++
		}
	}
	return n
}

func echo(c net.Conn) {
	io.Copy(c, c)
	c.(*net.TCPConn).CloseWrite()
}

// TestRefusedMeansNoPacket: of all the ways to be refused none reaches the
// service, and an allowed flow reaches it once.
func TestRefusedMeansNoPacket(t *testing.T) {
	eachCarrier(t, Limits{DecisionTimeout: 200 * time.Millisecond}, func(t *testing.T, s *site) {
		service := s.service("db.internal", echo)
		s.start()
		s.ready()

		refusals := []struct {
			name    string
			set     func()
			reset   func()
			outcome sallyport.Outcome
		}{
			{"denied", func() { s.policy.denied[service.target.String()] = true }, func() { clear(s.policy.denied) }, sallyport.OutcomeDenied},
			{"policyd fails", func() { s.policy.err = io.ErrUnexpectedEOF }, func() { s.policy.err = nil }, sallyport.OutcomeUnavailable},
			{"behind", func() { s.policy.lag = 1 }, func() { s.policy.lag = 0 }, sallyport.OutcomeUnavailable},
		}
		for _, r := range refusals {
			a := s.agent("s1")
			until(t, "its lane is admitted", func() bool { return s.gateway.openCarriers() == 1 })
			s.policy.set(r.set)
			if _, err := a.Open(t.Context(), service.target, nil); sallyport.OutcomeOf(err) != r.outcome {
				t.Errorf("%s: got %v; want outcome %d", r.name, err, r.outcome)
			}
			s.policy.set(r.reset)
			a.Close()
			until(t, "its lanes are gone", func() bool { return s.gateway.table.carrierCount() == 0 })
		}
		a := s.agent("s1")
		if _, err := a.Open(t.Context(), sallyport.Target{Network: sallyport.TCP, Host: "127.0.0.1", Port: 5432}, nil); sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
			t.Errorf("raw address: got %v", err)
		}
		if n := service.accepted.Load(); n != 0 {
			t.Fatalf("refusals reached the service %d times", n)
		}
		f, err := a.Open(t.Context(), service.target, []byte("early"))
		if err != nil {
			t.Fatal(err)
		}
		f.CloseWrite()
		if b, err := io.ReadAll(f); string(b) != "early" || err != nil {
			t.Errorf("read %q, %v", b, err)
		}
		if n := service.accepted.Load(); n != 1 {
			t.Errorf("the service was reached %d times; want once", n)
		}
		if f.Rule != "dba" || f.ID == "" || f.Decision == "" {
			t.Errorf("flow %+v lacks its rule, id or decision", f)
		}
	})
}

// TestCase_G11_HalfCloseKeepsTheReply: 1 MiB up, the end, then 1 MiB back.
func TestCase_G11_HalfCloseKeepsTheReply(t *testing.T) {
	eachCarrier(t, Limits{}, func(t *testing.T, s *site) {
		reply := make([]byte, 1<<20)
		rand.Read(reply)
		service := s.service("digest.internal", func(c net.Conn) {
			h := sha256.New()
			io.Copy(h, c)
			c.Write(h.Sum(nil))
			c.Write(reply)
		})
		s.start()
		s.ready()
		f, err := s.agent("s1").Open(t.Context(), service.target, nil)
		if err != nil {
			t.Fatal(err)
		}
		sent := make([]byte, 1<<20)
		rand.Read(sent)
		if _, err := f.Write(sent); err != nil {
			t.Fatal(err)
		}
		f.CloseWrite()
		got, err := io.ReadAll(f)
		if err != nil {
			t.Fatal(err)
		}
		if sum := sha256.Sum256(sent); !bytes.Equal(got, append(sum[:], reply...)) {
			t.Errorf("got %d bytes; want the sum and the reply", len(got))
		}
	})
}

// TestCase_G11_ResetIsNoEnd: a service that resets in the middle is an error to
// the agent, never the end of the stream.
func TestCase_G11_ResetIsNoEnd(t *testing.T) {
	eachCarrier(t, Limits{}, func(t *testing.T, s *site) {
		service := s.service("reset.internal", func(c net.Conn) {
			c.Write([]byte("half"))
			c.Read(make([]byte, 1)) // the agent has read it
			c.(*net.TCPConn).SetLinger(0)
		})
		s.start()
		s.ready()
		f, err := s.agent("s1").Open(t.Context(), service.target, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(f, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		f.Write([]byte("x"))
		if _, err := f.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("read after the service's reset: got %v; want an error", err)
		}
	})
}

// TestCase_G10_UpstreamFailures through a carrier: the agent learns which way
// the service failed.
func TestCase_G10_UpstreamFailures(t *testing.T) {
	eachCarrier(t, Limits{DialTimeout: 300 * time.Millisecond}, func(t *testing.T, s *site) {
		closed, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		refused := sallyport.Target{Network: sallyport.TCP, Host: "refused.internal", Port: 1}
		s.route(refused, closed.Addr())
		closed.Close()
		unresolved := sallyport.Target{Network: sallyport.TCP, Host: "nowhere.invalid", Port: 1}
		self := sallyport.Target{Network: sallyport.TCP, Host: "self.internal", Port: 1}
		s.start()
		s.ready()
		gatewayAddr, _ := net.ResolveTCPAddr("tcp", s.addr)
		s.route(self, gatewayAddr)
		s.policy.set(func() {
			s.policy.upstreams[unresolved.String()] = sallyport.Upstream{Network: sallyport.TCP, Host: "nowhere.invalid", Port: 1}
		})
		a := s.agent("s1")
		for _, tt := range []struct {
			target  sallyport.Target
			outcome sallyport.Outcome
			code    string
		}{
			{refused, sallyport.OutcomeUpstream, connect.ProblemRefused},
			{unresolved, sallyport.OutcomeUpstream, connect.ProblemDNS},
			{self, sallyport.OutcomeDenied, connect.ProblemProhibited}, // G7: its own listener
		} {
			_, err := a.Open(t.Context(), tt.target, nil)
			if sallyport.OutcomeOf(err) != tt.outcome || sallyport.CodeOf(err) != tt.code {
				t.Errorf("%s: got %v (%s); want %s", tt.target, err, sallyport.CodeOf(err), tt.code)
			}
		}
	})
}

// TestCase_N1_RevokedWithinASecond: revoking a session ends its flow within a second, at
// both ends, tells the agent why, and keeps it out.
func TestCase_N1_RevokedWithinASecond(t *testing.T) {
	eachCarrier(t, Limits{}, func(t *testing.T, s *site) {
		ended := make(chan error, 1)
		service := s.service("db.internal", func(c net.Conn) {
			io.Copy(c, c)
			_, err := c.Read(make([]byte, 1))
			ended <- err
		})
		s.start()
		s.ready()
		a := s.agent("s1")
		f, err := a.Open(t.Context(), service.target, []byte("ping"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(f, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		events := eventsOf(t, a)
		began := time.Now()
		s.policy.change(sessionSubject("s1"), "session revoked", func() { s.policy.dead["s1"] = true })
		if _, err := f.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("agent's end: got %v; want a reset", err)
		}
		if err := <-ended; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.EOF) {
			t.Errorf("service's end: %v", err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("took %s; want a second at most", took)
		}
		for _, want := range []string{connect.EventWithdrawn, connect.EventSession} {
			if e := next(t, events); e.Type != want || e.Code != "session_revoked" || e.Reason != "session revoked" {
				t.Errorf("event %+v; want %s", e, want)
			}
		}
		if _, err := a.Open(t.Context(), service.target, nil); sallyport.OutcomeOf(err) != sallyport.OutcomeLogin {
			t.Errorf("after the revocation: got %v; want login", err)
		}
	})
}

// eventsOf reads the event stream of a carrier until it ends.
func eventsOf(t *testing.T, c tunnel.Carrier) <-chan connect.Event {
	t.Helper()
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, connect.PathEvents, nil)
	resp, err := c.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(resp.Body)
	var hello connect.Event
	if err := dec.Decode(&hello); err != nil || hello.Type != connect.EventHello {
		t.Fatalf("first event %+v, %v; want hello", hello, err)
	}
	events := make(chan connect.Event, 100)
	go func() {
		defer close(events)
		defer resp.Body.Close()
		for {
			var e connect.Event
			if dec.Decode(&e) != nil {
				return
			}
			events <- e
		}
	}()
	return events
}

// TestCase_N12_NotReadyBeforeTheSnapshot: a gateway that has not heard policyd
// does no handshake at all.
func TestCase_N12_NotReadyBeforeTheSnapshot(t *testing.T) {
	s := newSite(t, Limits{})
	held := make(chan struct{})
	s.policy.set(func() { s.policy.hold = held })
	s.start()
	if s.gateway.Ready() == nil {
		t.Error("ready before policyd was heard")
	}
	_, err := s.handshake(tunneltest.Host, lane.NextProto)
	if err == nil {
		t.Error("handshake done before a session CA is known")
	}
	close(held)
	s.ready()
	if _, err := s.handshake(tunneltest.Host, lane.NextProto); err != nil {
		t.Errorf("ready: %v", err)
	}
}

// handshake shakes hands and reads until the gateway has said whether it takes
// the certificate (TLS 1.3 tells only then). The connection is closed.
func (s *site) handshake(name string, protos ...string) (tls.ConnectionState, error) {
	s.t.Helper()
	conf := s.DialConfig(s.addr, s.Session(s.t, "s1", nil)).TLS.Clone()
	conf.ServerName, conf.NextProtos = name, protos
	return s.handshakeWith(conf)
}

func (s *site) handshakeWith(conf *tls.Config) (tls.ConnectionState, error) {
	c, err := tls.Dial("tcp", s.addr, conf)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer c.Close()
	c.Write([]byte("GET /v1/me HTTP/1.1\r\nHost: " + tunneltest.Host + "\r\n\r\n"))
	_, err = c.Read(make([]byte, 1))
	return c.ConnectionState(), err
}

func TestCase_E1_Handshakes(t *testing.T) {
	s := newSite(t, Limits{})
	s.start()
	s.ready()
	stranger, err := lane.Dial(t.Context(), s.DialConfig(s.addr, tunneltest.SignSession(t, s.Public, "s1", nil)))
	if err == nil {
		_, err = stranger.Open(t.Context(), db, nil)
		stranger.Close()
	}
	if sallyport.OutcomeOf(err) != sallyport.OutcomeLogin {
		t.Errorf("E7: a certificate of another CA: got %v; want login", err)
	}
	base := s.DialConfig(s.addr, s.Session(t, "s1", nil)).TLS
	edit := func(f func(*tls.Config)) *tls.Config {
		c := base.Clone()
		c.ServerName, c.NextProtos = tunneltest.Host, []string{lane.NextProto}
		f(c)
		return c
	}
	tests := []struct {
		name string
		conf *tls.Config
		want string // in the alert's text; "" means it works
	}{
		{"right", edit(func(*tls.Config) {}), ""},
		{"upper case name", edit(func(c *tls.Config) { c.ServerName = strings.ToUpper(tunneltest.Host) }), ""},
		{"TLS 1.2", edit(func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }), "protocol version"},
		{"wrong ALPN", edit(func(c *tls.Config) { c.NextProtos = []string{"h2"} }), "no application protocol"},
		{"no ALPN, as curl 7", edit(func(c *tls.Config) { c.NextProtos = nil }), ""}, // docs/adr/0011
		{"no SNI", edit(func(c *tls.Config) { c.ServerName, c.InsecureSkipVerify = "", true }), "error"},
		{"unknown name", edit(func(c *tls.Config) { c.ServerName = "other.localhost" }), "unrecognized name"},
		{"no certificate", edit(func(c *tls.Config) { c.GetClientCertificate = nil }), "certificate required"},
	}
	for _, tt := range tests {
		_, err := s.handshakeWith(tt.conf)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: got %v; want %q", tt.name, err, tt.want)
		}
	}
}

// TestCase_E8_NoTickets: nothing can be resumed.
func TestCase_E8_NoTickets(t *testing.T) {
	s := newSite(t, Limits{})
	s.start()
	s.ready()
	cache := tickets{tls.NewLRUClientSessionCache(8), new(atomic.Int64)}
	conf := s.DialConfig(s.addr, s.Session(t, "s1", nil)).TLS.Clone()
	conf.ServerName, conf.NextProtos, conf.ClientSessionCache = tunneltest.Host, []string{lane.NextProto}, cache
	for range 2 {
		state, err := s.handshakeWith(conf)
		if err != nil {
			t.Fatal(err)
		}
		if state.DidResume {
			t.Error("resumed")
		}
	}
	if n := cache.put.Load(); n != 0 {
		t.Errorf("%d tickets issued", n)
	}
}

type tickets struct {
	tls.ClientSessionCache
	put *atomic.Int64
}

func (c tickets) Put(key string, s *tls.ClientSessionState) {
	if s != nil {
		c.put.Add(1)
	}
	c.ClientSessionCache.Put(key, s)
}

// TestTrustChanges: a new session CA counts from the next handshake on, without
// a restart, and the one that left does not any more.
func TestTrustChanges(t *testing.T) {
	s := newSite(t, Limits{})
	s.start()
	s.ready()
	old := s.Session(t, "s1", nil)
	next := tunneltest.NewSite(t)
	s.policy.set(func() {
		n := s.policy.notice()
		n.Trust = &sallyport.Trust{SessionCAs: string(next.Sessions.PEM())}
		for w := range s.policy.watchers {
			w <- n
		}
	})
	try := func(cert *tls.Certificate) error {
		conf := s.DialConfig(s.addr, cert).TLS.Clone()
		conf.ServerName, conf.NextProtos = tunneltest.Host, []string{lane.NextProto}
		_, err := s.handshakeWith(conf)
		return err
	}
	until(t, "the new CA counts", func() bool { return try(tunneltest.SignSession(t, next.Sessions, "s1", nil)) == nil })
	if err := try(old); err == nil {
		t.Error("a certificate of the CA that left is taken")
	}
}

// TestHandshakesAreBounded: connections that say nothing do not keep others out
// beyond their share, and the share of one address is a quarter.
func TestHandshakesAreBounded(t *testing.T) {
	b := newBudget(8)
	one, two := sourceOf(&net.TCPAddr{IP: net.ParseIP("192.0.2.1"), Port: 1}), sourceOf(&net.TCPAddr{IP: net.ParseIP("192.0.2.2")})
	if sourceOf(&net.TCPAddr{IP: net.ParseIP("192.0.2.1"), Port: 2}) != one {
		t.Error("another port is another source")
	}
	if sourceOf(&net.TCPAddr{IP: net.ParseIP("2001:db8::1")}) != sourceOf(&net.TCPAddr{IP: net.ParseIP("2001:db8::2")}) {
		t.Error("two addresses of one IPv6 network are two sources")
	}
	for i, want := range []bool{true, true, false} {
		if got := b.take(one); got != want {
			t.Errorf("handshake %d of one address: taken %v; want %v (two of eight)", i+1, got, want)
		}
	}
	if !b.take(two) {
		t.Error("another address is kept out")
	}
	b.give(one)
	if !b.take(one) {
		t.Error("what was given back cannot be taken")
	}
	for range 3 {
		b.give(one)
		b.give(two)
		b.take(one)
		b.take(two)
	}
	for range 2 {
		b.give(one)
	}
	b.give(two)
	if len(b.sources) != 0 || b.all != 0 {
		t.Errorf("%d sources, %d handshakes left", len(b.sources), b.all)
	}
}

func TestAcceptFailures(t *testing.T) {
	s := newSite(t, Limits{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	flaky := &flakyListener{Listener: l}
	flaky.fail.Store(3)
	s.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.gateway.Serve(ctx, flaky, nil) }()
	s.ready()
	if _, err := s.handshake(tunneltest.Host, lane.NextProto); err != nil {
		t.Errorf("after three failures to accept: %v", err)
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// flakyListener fails as one does that has no descriptors left.
type flakyListener struct {
	net.Listener
	fail atomic.Int64
}

func (l *flakyListener) Accept() (net.Conn, error) {
	if l.fail.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

// TestServeEndsWithItsListener: a listener that breaks for good ends the gateway
// with its error.
func TestServeEndsWithItsListener(t *testing.T) {
	s := newSite(t, Limits{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := s.gateway.Serve(t.Context(), l, nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v; want net.ErrClosed", err)
	}
}

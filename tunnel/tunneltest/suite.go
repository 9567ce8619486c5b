package tunneltest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

// Carrier is what a carrier's test hands to Run.
type Carrier struct {
	// Name is what Carrier.Name and Peer.Carrier say.
	Name string
	// NextProto is its ALPN protocol.
	NextProto string
	// WithoutALPN is set if a client that names no protocol means NextProto.
	WithoutALPN bool
	// Codes is set if a reset tells its code to the peer.
	Codes bool
	// Listen serves on loopback until the test ends, then waits for everything it
	// started, and returns the address.
	Listen func(t testing.TB, conf *tls.Config, domain, host string, h tunnel.Handler) (addr string)
	// Dial is the carrier's.
	Dial func(ctx context.Context, cfg tunnel.DialConfig) (tunnel.Carrier, error)
	// Handshake shakes hands with exactly conf, and reads until the server has
	// spoken or refused; it returns that error.
	Handshake func(ctx context.Context, addr string, conf *tls.Config) error
}

// Run is the conformance suite.
func Run(t *testing.T, c Carrier) {
	for _, tt := range []struct {
		name string
		test func(*testing.T, *setup)
	}{
		{"Answers", testAnswers},
		{"HalfClose", testHalfClose},
		{"EarlyBytes", testEarlyBytes},
		{"EarlyBytesWait", testEarlyBytesWait},
		{"Concurrent", testConcurrent},
		{"AbortedDownloads", testAbortedDownloads},
		{"GatewayResets", testGatewayResets},
		{"AgentResets", testAgentResets},
		{"CancelledOpen", testCancelledOpen},
		{"API", testAPI},
		{"APIStreams", testAPIStreams},
		{"Peer", testPeer},
		{"CloseEndsFlows", testCloseEndsFlows},
		{"Case_E6_RevokedBeforeTheFirstStream", testNotAdmitted},
		{"Case_E6_RevokedWhileOpen", testRevokedWhileOpen},
		{"Case_E12_TooManyRefusesTheNewOne", testTooMany},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkLeaks(t)
			tt.test(t, newSetup(t, c))
		})
	}
	t.Run("ClientCertificates", func(t *testing.T) { testClientCertificates(t, c) })
	t.Run("Case_E1_Handshakes", func(t *testing.T) { testHandshakes(t, c) })
	t.Run("Case_E2_ServerCertificates", func(t *testing.T) { testServerCertificates(t, c) })
	t.Run("Case_E8_NoTickets", func(t *testing.T) { testNoTickets(t, c) })
}

// checkLeaks fails the test if goroutines outlive everything it cleaned up.
func checkLeaks(t testing.TB) {
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		if err := goleak.Find(before); err != nil {
			t.Errorf("goroutines outlive the test: %v", err)
		}
	})
}

type setup struct {
	Carrier
	site    *Site
	gateway *Gateway
	addr    string
	carrier tunnel.Carrier
}

func newSetup(t testing.TB, c Carrier) *setup {
	s := &setup{Carrier: c, site: NewSite(t), gateway: NewGateway()}
	s.addr = c.Listen(t, s.site.ServerTLS(c.NextProto), Domain, Host, s.gateway)
	s.carrier = s.dial(t, "s-1")
	return s
}

func (s *setup) dial(t testing.TB, id sallyport.SessionID) tunnel.Carrier {
	t.Helper()
	carrier, err := s.Dial(t.Context(), s.site.DialConfig(s.addr, s.site.Session(t, id, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { carrier.Close() })
	return carrier
}

func target(host string) sallyport.Target {
	return sallyport.Target{Network: sallyport.TCP, Host: host, Port: 5432}
}

func (s *setup) open(t testing.TB, host string, early []byte) *tunnel.Flow {
	t.Helper()
	f, err := s.carrier.Open(t.Context(), target(host), early)
	if err != nil {
		t.Fatalf("open %s: %v", host, err)
	}
	t.Cleanup(func() { f.Close() })
	f.SetDeadline(time.Now().Add(20 * time.Second))
	return f
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func testAnswers(t *testing.T, s *setup) {
	if s.carrier.Name() != s.Name {
		t.Errorf("name %q; want %q", s.carrier.Name(), s.Name)
	}
	f := s.open(t, Echo, nil)
	if f.ID != "f-TEST" || f.Decision != "d-ALLOW" || f.Rule != "dba" {
		t.Errorf("flow %q decision %q rule %q; want f-TEST, d-ALLOW, dba", f.ID, f.Decision, f.Rule)
	}
	for _, tt := range []struct {
		host    string
		outcome sallyport.Outcome
		code    string
		message string
	}{
		{Deny, sallyport.OutcomeDenied, connect.ProblemDenied, `denied by rule "finance": device.disk_encrypted is false`},
		{Down, sallyport.OutcomeUpstream, connect.ProblemTimeout, "you are allowed; the service did not answer"},
		{Stale, sallyport.OutcomeUnavailable, connect.ProblemUnavailable, "policy is not available"},
		{"unknown.test", sallyport.OutcomeUsage, connect.ProblemNotFound, "no such target"},
	} {
		_, err := s.carrier.Open(t.Context(), target(tt.host), []byte("never read"))
		var e *sallyport.Error
		if !errors.As(err, &e) || e.Outcome != tt.outcome || e.Code != tt.code || e.Message != tt.message {
			t.Errorf("%s: %v (%+v); want outcome %d, %s, %q", tt.host, err, e, tt.outcome, tt.code, tt.message)
			continue
		}
		if tt.host == Deny && (e.Decision == nil || len(e.Decision.Reasons) != 1 || e.Hint == "") {
			t.Errorf("the denial lost its reasons: %+v", e)
		}
	}
}

func testHalfClose(t *testing.T, s *setup) {
	sent := randomBytes(1 << 20)
	f := s.open(t, Digest, nil)
	wrote := make(chan error, 1)
	go func() {
		_, err := f.Write(sent)
		wrote <- errors.Join(err, f.CloseWrite())
	}()
	got, err := io.ReadAll(f)
	if err := errors.Join(err, <-wrote); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(sent)
	if len(got) != len(sum)+len(Reply) || !bytes.Equal(got[:len(sum)], sum[:]) || !bytes.Equal(got[len(sum):], Reply) {
		t.Errorf("got %d bytes; want the digest of what was sent and the whole reply", len(got))
	}
}

func testEarlyBytes(t *testing.T, s *setup) {
	early := randomBytes(connect.MaxEarlyBytes)
	f := s.open(t, Echo, early)
	f.Write([]byte("and more"))
	f.CloseWrite()
	got, err := io.ReadAll(f)
	if err != nil || string(got) != string(early)+"and more" {
		t.Errorf("got %d bytes, %v; want the early ones first, then the rest", len(got), err)
	}
	if _, err := s.carrier.Open(t.Context(), target(Echo), make([]byte, connect.MaxEarlyBytes+1)); err == nil {
		t.Error("more early bytes than allowed were taken")
	}
}

func testEarlyBytesWait(t *testing.T, s *setup) {
	early := randomBytes(connect.MaxEarlyBytes)
	opened := make(chan *tunnel.Flow, 1)
	go func() {
		f, err := s.carrier.Open(t.Context(), target(Held), early)
		if err != nil {
			t.Error(err)
		}
		opened <- f
	}()
	Eventually(t, "the CONNECT arrives", func() bool { _, _, asked := s.gateway.Counts(); return asked == 1 })
	select {
	case <-opened:
		t.Fatal("the flow opened before the gateway allowed it")
	default:
	}
	s.gateway.Release()
	f := <-opened
	if f == nil {
		return
	}
	defer f.Close()
	f.SetDeadline(time.Now().Add(20 * time.Second))
	f.CloseWrite()
	if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, early) {
		t.Errorf("got %d bytes, %v; want the early ones", len(got), err)
	}
}

func testConcurrent(t *testing.T, s *setup) {
	var g errgroup.Group
	for i := range 200 {
		g.Go(func() error {
			f, err := s.carrier.Open(t.Context(), target(Echo), fmt.Appendf(nil, "flow %d:", i))
			if err != nil {
				return err
			}
			defer f.Close()
			f.SetDeadline(time.Now().Add(60 * time.Second))
			payload := randomBytes(10_000)
			go func() {
				f.Write(payload)
				f.CloseWrite()
			}()
			got, err := io.ReadAll(f)
			if want := fmt.Sprintf("flow %d:%s", i, payload); err == nil && string(got) != want {
				err = fmt.Errorf("flow %d: got %d bytes that are not its own", i, len(got))
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// Peers' tunnels froze after a number of downloads that nobody read to the end.
func testAbortedDownloads(t *testing.T, s *setup) {
	for range 18 {
		f := s.open(t, Download, nil)
		if _, err := io.ReadFull(f, make([]byte, 300_000)); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	Eventually(t, "the gateway stops all 18", func() bool { return len(s.gateway.Resets()) == 18 })
	testHalfClose(t, s)
}

func testGatewayResets(t *testing.T, s *setup) {
	f := s.open(t, Cut, []byte("x"))
	_, err := io.ReadAll(f)
	var reset *tunnel.ResetError
	if !errors.As(err, &reset) {
		t.Fatalf("read: %v; want a *tunnel.ResetError, never an end", err)
	}
	if s.Codes && reset.Code != connect.CodeFlowWithdrawn {
		t.Errorf("code %#x; want %#x", reset.Code, connect.CodeFlowWithdrawn)
	}
	testHalfClose(t, s) // the carrier lives on
}

func testAgentResets(t *testing.T, s *setup) {
	f := s.open(t, Echo, []byte("x"))
	if _, err := io.ReadFull(f, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	f.Reset(connect.CodeUpstreamReset)
	Eventually(t, "the gateway sees the reset", func() bool { return len(s.gateway.Resets()) == 1 })
	var reset *tunnel.ResetError
	if err := s.gateway.Resets()[0]; !errors.As(err, &reset) {
		t.Errorf("the gateway read: %v; want a *tunnel.ResetError", err)
	} else if s.Codes && reset.Code != connect.CodeUpstreamReset {
		t.Errorf("code %#x; want %#x", reset.Code, connect.CodeUpstreamReset)
	}
	if _, err := f.Write([]byte("x")); err == nil {
		t.Error("a write after Reset succeeded")
	}
}

func testCancelledOpen(t *testing.T, s *setup) {
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() {
		_, err := s.carrier.Open(ctx, target(Held), nil)
		failed <- err
	}()
	Eventually(t, "the CONNECT arrives", func() bool { _, _, asked := s.gateway.Counts(); return asked == 1 })
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("open: %v; want the context's error", err)
	}
	s.gateway.Release()
	testHalfClose(t, s)
}

func (s *setup) request(t testing.TB, method, path string, body io.Reader) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, path, body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.carrier.RoundTrip(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

func testAPI(t *testing.T, s *setup) {
	resp := s.request(t, http.MethodGet, connect.PathMe+"?all=1", nil)
	var me map[string]string
	if err := json.NewDecoder(resp.Body).Decode(&me); err != nil || me["session"] != "s-1" || me["carrier"] != s.Name || me["query"] != "all=1" {
		t.Errorf("%v %v; want session s-1 over %s", me, err, s.Name)
	}
	if !strings.HasPrefix(me["addr"], "127.0.0.1:") {
		t.Errorf("the gateway sees %s", me["addr"])
	}
	resp = s.request(t, http.MethodPost, connect.PathPosture, strings.NewReader(strings.Repeat("x", 60_000)))
	if resp.StatusCode != http.StatusNoContent || resp.Header.Get("X-Length") != "60000" {
		t.Errorf("posture: %d, length %s; want 204 and 60000", resp.StatusCode, resp.Header.Get("X-Length"))
	}
	resp = s.request(t, http.MethodGet, "/v1/unknown", nil)
	if e := connect.ReadRefusal(resp); resp.StatusCode != http.StatusNotFound || e.Code != connect.ProblemNotFound {
		t.Errorf("unknown path: %d %+v; want 404", resp.StatusCode, e)
	}
}

func testAPIStreams(t *testing.T, s *setup) {
	resp := s.request(t, http.MethodGet, connect.PathEvents, nil)
	lines := json.NewDecoder(resp.Body)
	for i := range 3 { // they arrive although the answer has no end
		var e connect.Event
		if err := lines.Decode(&e); err != nil || e.AfterMS != int64(i) {
			t.Fatalf("event %d: %+v, %v", i, e, err)
		}
	}
	resp.Body.Close() // ends the handler: else the server's cleanup hangs
}

func testPeer(t *testing.T, s *setup) {
	s.open(t, Echo, nil)
	conns := s.gateway.Conns()
	if len(conns) == 0 {
		t.Fatal("no connection")
	}
	p := conns[0].Peer()
	if p.Session != "s-1" || p.Carrier != s.Name || p.Certificate == nil {
		t.Errorf("peer %+v; want session s-1 with its certificate", p)
	}
	if a := conns[0].RemoteAddr(); !a.Addr().Is4() || a.Port() == 0 {
		t.Errorf("address %v; want 127.0.0.1 with a port", a)
	}
	s.carrier.Close()
	Eventually(t, "every admitted connection is released", func() bool {
		admitted, released, _ := s.gateway.Counts()
		return admitted == released
	})
}

func testCloseEndsFlows(t *testing.T, s *setup) {
	f := s.open(t, Echo, nil)
	s.carrier.Close()
	if _, err := f.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("read after Close: %v; want an error that is no end", err)
	}
	select {
	case <-s.carrier.Done():
	default:
		t.Error("Done is not closed")
	}
	if _, err := s.carrier.Open(t.Context(), target(Echo), nil); sallyport.OutcomeOf(err) != sallyport.OutcomeUnavailable {
		t.Errorf("open after Close: %v; want unavailable", err)
	}
}

func wantLogin(t *testing.T, what string, err error, code string) {
	t.Helper()
	if sallyport.OutcomeOf(err) != sallyport.OutcomeLogin || sallyport.CodeOf(err) != code {
		t.Errorf("%s: %v (outcome %d, code %q); want login and %s", what, err, sallyport.OutcomeOf(err), sallyport.CodeOf(err), code)
	}
}

func testNotAdmitted(t *testing.T, s *setup) {
	s.gateway.Refuse(func(p tunnel.Peer) error {
		if p.Session == "s-revoked" {
			return &tunnel.AdmitError{Code: connect.CodeSessionRevoked, Reason: "session revoked"}
		}
		return nil
	})
	cert := s.site.Session(t, "s-revoked", nil)
	open := func() error {
		c, err := s.Dial(t.Context(), s.site.DialConfig(s.addr, cert))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Open(t.Context(), target(Echo), []byte("early"))
		if err == nil {
			return nil
		}
		<-c.Done()
		return errors.Join(err, c.Err())
	}
	wantLogin(t, "open", open(), connect.ProblemSessionRevoked)
	c, err := s.Dial(t.Context(), s.site.DialConfig(s.addr, cert))
	if err == nil {
		defer c.Close()
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, connect.PathMe, nil)
		_, err = c.RoundTrip(req)
	}
	wantLogin(t, "round trip", err, connect.ProblemSessionRevoked)
	if _, _, asked := s.gateway.Counts(); asked != 0 {
		t.Errorf("%d CONNECTs reached the handler; want none", asked)
	}
}

func testRevokedWhileOpen(t *testing.T, s *setup) {
	f := s.open(t, Echo, nil)
	s.gateway.Refuse(func(tunnel.Peer) error { return errors.New("session revoked") })
	for _, c := range s.gateway.Conns() {
		c.Close(connect.CodeSessionRevoked, "session revoked")
	}
	_, err := f.Read(make([]byte, 1))
	var reset *tunnel.ResetError
	if !errors.As(err, &reset) || s.Codes && reset.Code != connect.CodeSessionRevoked {
		t.Errorf("read: %v; want a *tunnel.ResetError with %#x where codes are told", err, connect.CodeSessionRevoked)
	}
	_, err = s.carrier.Open(t.Context(), target(Echo), nil)
	wantLogin(t, "open", err, connect.ProblemSessionRevoked)
}

func testTooMany(t *testing.T, s *setup) {
	s.gateway.Refuse(func(p tunnel.Peer) error {
		if p.Session == "s-greedy" {
			return &tunnel.AdmitError{Code: connect.CodeTooMany, Reason: "too many connections"}
		}
		return nil
	})
	c, err := s.Dial(t.Context(), s.site.DialConfig(s.addr, s.site.Session(t, "s-greedy", nil)))
	if err == nil {
		defer c.Close()
		_, err = c.Open(t.Context(), target(Echo), nil)
	}
	if sallyport.OutcomeOf(err) != sallyport.OutcomeUnavailable || sallyport.CodeOf(err) != connect.ProblemTooMany {
		t.Errorf("%v; want unavailable, %s", err, connect.ProblemTooMany)
	}
	testHalfClose(t, s)
}

func testClientCertificates(t *testing.T, c Carrier) {
	checkLeaks(t)
	s := newSetup(t, c)
	for name, cert := range map[string]*tls.Certificate{
		"none":          nil,
		"expired":       s.site.Session(t, "s-1", func(x *x509.Certificate) { x.NotAfter = time.Now().Add(-time.Minute) }),
		"of another CA": SignSession(t, newCA(t, "foreign"), "s-1", nil),
		"for servers only": s.site.Session(t, "s-1", func(x *x509.Certificate) {
			x.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}),
	} {
		t.Run(name, func(t *testing.T) {
			carrier, err := s.Dial(t.Context(), s.site.DialConfig(s.addr, cert))
			if err == nil {
				defer carrier.Close()
				_, err = carrier.Open(t.Context(), target(Echo), []byte("early"))
			}
			wantLogin(t, "open", err, connect.ProblemLogin)
		})
	}
	// It chains to the session CA, but names no session: a service (E7), another
	// domain, or a session beside something else.
	for name, edit := range map[string]func(*x509.Certificate){
		"a service":         func(x *x509.Certificate) { x.URIs[0].Path = "/svc/gateway/eu1" },
		"another domain":    func(x *x509.Certificate) { x.URIs[0].Host = "evil.example" },
		"two names":         func(x *x509.Certificate) { x.URIs = append(x.URIs, x.URIs[0]) },
		"a DNS name beside": func(x *x509.Certificate) { x.DNSNames = []string{"x"} },
	} {
		t.Run(name, func(t *testing.T) {
			carrier, err := s.Dial(t.Context(), s.site.DialConfig(s.addr, s.site.Session(t, "s-1", edit)))
			if err == nil {
				defer carrier.Close()
				_, err = carrier.Open(t.Context(), target(Echo), nil)
			}
			if err == nil {
				t.Error("opened a flow")
			}
		})
	}
	if _, _, asked := s.gateway.Counts(); asked != 0 {
		t.Errorf("%d CONNECTs reached the handler; want none", asked)
	}
	testHalfClose(t, s)
}

func (s *setup) clientTLS(t testing.TB) *tls.Config {
	return &tls.Config{
		RootCAs: s.site.Public.Pool(), ServerName: Host, NextProtos: []string{s.NextProto},
		Certificates: []tls.Certificate{*s.site.Session(t, "s-1", nil)},
	}
}

func testHandshakes(t *testing.T, c Carrier) {
	checkLeaks(t)
	s := newSetup(t, c)
	for name, edit := range map[string]func(*tls.Config){
		"TLS 1.2":            func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
		"no ALPN":            func(c *tls.Config) { c.NextProtos = nil },
		"wrong ALPN":         func(c *tls.Config) { c.NextProtos = []string{"\x1b[31mevil"} },
		"no SNI":             func(c *tls.Config) { c.ServerName = "127.0.0.1"; c.InsecureSkipVerify = true },
		"another host's SNI": func(c *tls.Config) { c.ServerName = "wiki.corp.example"; c.InsecureSkipVerify = true },
	} {
		t.Run(name, func(t *testing.T) {
			conf := s.clientTLS(t)
			edit(conf)
			taken := s.Handshake(t.Context(), s.addr, conf) == nil
			if want := name == "no ALPN" && s.WithoutALPN; taken != want {
				t.Errorf("the server took the connection: %t; want %t", taken, want)
			}
		})
	}
	if err := s.Handshake(t.Context(), s.addr, s.clientTLS(t)); err != nil {
		t.Errorf("the good handshake fails: %v", err)
	}
}

func testServerCertificates(t *testing.T, c Carrier) {
	checkLeaks(t)
	s := newSetup(t, c)
	for name, edit := range map[string]func(*tunnel.DialConfig){
		"another CA": func(d *tunnel.DialConfig) { d.TLS.RootCAs = newCA(t, "other").Pool() },
		"expired":    func(d *tunnel.DialConfig) { d.TLS.Time = func() time.Time { return time.Now().Add(48 * time.Hour) } },
		"no roots":   func(d *tunnel.DialConfig) { d.TLS.RootCAs = x509.NewCertPool() },
	} {
		t.Run(name, func(t *testing.T) {
			d := s.site.DialConfig(s.addr, s.site.Session(t, "s-1", nil))
			edit(&d)
			carrier, err := s.Dial(t.Context(), d)
			if err == nil {
				carrier.Close()
			}
			if sallyport.OutcomeOf(err) != sallyport.OutcomeUnavailable || sallyport.CodeOf(err) != connect.ProblemUntrusted {
				t.Errorf("%v; want unavailable, %s", err, connect.ProblemUntrusted)
			}
		})
	}
	t.Run("wrong name", func(t *testing.T) {
		other := *s.site
		var err error
		if other.Server, err = s.site.Public.IssueServer([]string{"other.localhost"}, time.Hour); err != nil {
			t.Fatal(err)
		}
		addr := s.Listen(t, other.ServerTLS(s.NextProto), Domain, Host, s.gateway)
		carrier, err := s.Dial(t.Context(), other.DialConfig(addr, s.site.Session(t, "s-1", nil)))
		if err == nil {
			carrier.Close()
		}
		if sallyport.CodeOf(err) != connect.ProblemUntrusted {
			t.Errorf("%v; want %s", err, connect.ProblemUntrusted)
		}
	})
	t.Run("nobody listens", func(t *testing.T) {
		d := s.site.DialConfig(deadAddress(t), s.site.Session(t, "s-1", nil))
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		carrier, err := s.Dial(ctx, d)
		if err == nil {
			carrier.Close()
		}
		if sallyport.OutcomeOf(err) != sallyport.OutcomeUnavailable || sallyport.CodeOf(err) != connect.ProblemGatewayDown {
			t.Errorf("%v; want unavailable, %s", err, connect.ProblemGatewayDown)
		}
	})
}

// deadAddress returns a loopback address that nobody listens on.
func deadAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// ticketCounter is a client session cache that only counts.
type ticketCounter struct{ puts atomic.Int32 }

func (*ticketCounter) Get(string) (*tls.ClientSessionState, bool) { return nil, false }
func (c *ticketCounter) Put(string, *tls.ClientSessionState)      { c.puts.Add(1) }

func testNoTickets(t *testing.T, c Carrier) {
	checkLeaks(t)
	s := newSetup(t, c)
	cache := new(ticketCounter)
	conf := s.clientTLS(t)
	conf.ClientSessionCache = cache
	if err := s.Handshake(t.Context(), s.addr, conf); err != nil {
		t.Fatal(err)
	}
	if n := cache.puts.Load(); n != 0 {
		t.Errorf("%d session tickets; want none", n)
	}
}

package control_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport"
	"sallyport/internal/logging"
	"sallyport/internal/tlsid"
	"sallyport/proto/control"
)

const domain = "corp.example"

// pki is one internal CA and what it has issued.
type pki struct {
	t  testing.TB
	ca *tlsid.CA
}

func newPKI(t testing.TB) pki {
	t.Helper()
	ca, err := tlsid.NewCA("internal", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return pki{t, ca}
}

func (p pki) issue(kind string) tls.Certificate {
	p.t.Helper()
	cert, err := p.ca.IssueService(domain, kind, "one", nil, 0)
	if err != nil {
		p.t.Fatal(err)
	}
	return cert
}

func (p pki) server(kind string) *tls.Config { return tlsid.ServerConfig(p.issue(kind), p.ca.Pool()) }

func (p pki) client(kind, to string) *tls.Config {
	return tlsid.ClientConfig(p.issue(kind), p.ca.Pool(), domain, to)
}

// all is what both daemons together offer.
func all(s *site) control.Services {
	return control.Services{
		Records: s, Lister: lister{s}, Revoker: s, Backuper: s,
		Authorizer: policy{s}, Explainer: policy{s}, Changes: policy{s}, Posture: policy{s},
	}
}

// serve runs a server until the test ends, or until stop is called.
func serve(t testing.TB, ln net.Listener, conf *tls.Config, s control.Services) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	server := control.NewServer(conf, domain, s, logging.Discard())
	go func() { done <- server.Serve(ctx, ln) }()
	stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		done <- nil
	}
	t.Cleanup(stop)
	return stop
}

func listen(t testing.TB, addr string) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

func dial(t testing.TB, conf *tls.Config, addrs ...string) *control.Client {
	t.Helper()
	c, err := control.Dial(addrs, conf, logging.Discard())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func remote(c *control.Client) services {
	r, p := c.Records(), c.Policy()
	return services{r, r, r, r, p, p, p, p}
}

func overTLS(t *testing.T, s *site) services {
	p := newPKI(t)
	ln := listen(t, "127.0.0.1:0")
	serve(t, ln, p.server(control.KindPolicyd), all(s))
	return remote(dial(t, p.client(control.KindOperator, control.KindPolicyd), ln.Addr().String()))
}

func overUnix(t *testing.T, s *site) services {
	dir, err := os.MkdirTemp("", "c")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "cached.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, ln, nil, all(s))
	return remote(dial(t, nil, "unix:"+path))
}

// eventually polls until ok, for at most limit, and returns how long it took.
func eventually(t *testing.T, limit time.Duration, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Since(start) > limit {
			t.Fatalf("still not so after %v", limit)
		}
		<-tick.C
	}
	return time.Since(start)
}

func within(t *testing.T, limit time.Duration, what string, start time.Time) {
	t.Helper()
	if took := time.Since(start); took > limit {
		t.Errorf("%s took %v; want at most %v", what, took, limit)
	}
}

// The table of access.go, tried over real connections for one method each that
// a service may and may not call.
func TestServicesHaveTheirRights(t *testing.T) {
	p := newPKI(t)
	ln := listen(t, "127.0.0.1:0")
	serve(t, ln, p.server(control.KindCached), all(newSite()))
	as := func(kind string) services {
		return remote(dial(t, p.client(kind, control.KindCached), ln.Addr().String()))
	}
	ctx := t.Context()
	apply := func(s services, kind sallyport.Kind) error {
		_, err := s.Apply(ctx, []sallyport.Op{{Kind: kind, ID: "x", Payload: []byte("{}")}})
		return err
	}
	watch := func(s services) error {
		enough := errors.New("enough")
		err := s.Watch(ctx, sallyport.WatchRequest{}, func(sallyport.WatchEvent) error { return enough })
		if err == enough {
			return nil
		}
		return err
	}
	authorize := func(s services) error {
		_, err := s.authorize.Authorize(ctx, []sallyport.Request{question("a", 22)})
		return err
	}
	backup := func(s services) error { return s.backuper.Backup(ctx, io.Discard) }
	tests := []struct {
		name string
		err  error
		ok   bool
	}{
		{"gateway asks", authorize(as("gateway")), true},
		{"gateway reads records", watch(as("gateway")), false},
		{"gateway makes a session", apply(as("gateway"), sallyport.KindSession), false},
		{"gateway takes a lease", as("gateway").Lease(ctx, "x", time.Second, func(context.Context) error { return nil }), false},
		{"policyd reads records", watch(as("policyd")), true},
		{"policyd makes a session", apply(as("policyd"), sallyport.KindSession), false},
		{"policyd stores posture", apply(as("policyd"), sallyport.KindPosture), true},
		{"authd makes a session", apply(as("authd"), sallyport.KindSession), true},
		{"authd changes the policy", apply(as("authd"), sallyport.KindConfig), false},
		{"authd decides", authorize(as("authd")), false},
		{"operator changes the policy", apply(as("operator"), sallyport.KindConfig), true},
		{"gateway takes a backup", backup(as("gateway")), false},
		{"policyd takes a backup", backup(as("policyd")), false},
		{"authd takes a backup", backup(as("authd")), false},
		{"operator takes a backup", backup(as("operator")), true},
		{"nobody we know asks", authorize(as("printer")), false},
	}
	for _, tt := range tests {
		if tt.ok && tt.err != nil || !tt.ok && sallyport.CodeOf(tt.err) != control.CodeForbidden {
			t.Errorf("%s: got %v; want ok %t", tt.name, tt.err, tt.ok)
		}
	}
}

func TestCase_E7_StrangersAreRefused(t *testing.T) {
	ours, theirs := newPKI(t), newPKI(t)
	ln := listen(t, "127.0.0.1:0")
	serve(t, ln, ours.server(control.KindPolicyd), all(newSite()))
	foreign, err := ours.ca.IssueService("evil.example", "operator", "one", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	confs := map[string]*tls.Config{
		"of another CA":       ours.client("operator", "policyd"),
		"without certificate": ours.client("operator", "policyd"),
		"of another domain":   ours.client("operator", "policyd"),
		"wants another kind":  ours.client("operator", "cached"),
		"trusts another CA":   theirs.client("operator", "policyd"),
	}
	other := theirs.issue("operator")
	confs["of another CA"].GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &other, nil }
	confs["without certificate"].Certificates = nil
	confs["of another domain"].Certificates = []tls.Certificate{foreign}
	for name, conf := range confs {
		_, err := dial(t, conf, ln.Addr().String()).Policy().Authorize(t.Context(), nil)
		if sallyport.CodeOf(err) != control.CodeUnavailable {
			t.Errorf("a client %s: got %v; want no connection", name, err)
		}
	}
}

// Without TLS there is no name: a server for unix sockets must not answer
// anything else.
func TestPlainTCPIsRefused(t *testing.T) {
	ln := listen(t, "127.0.0.1:0")
	serve(t, ln, nil, all(newSite()))
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")); err != nil {
		return
	}
	if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the server answered %d bytes, %v; want a closed connection", n, err)
	}
}

func TestDialRefusesArguments(t *testing.T) {
	conf := newPKI(t).client("gateway", "policyd")
	for name, dial := range map[string]func() (*control.Client, error){
		"no address":      func() (*control.Client, error) { return control.Dial(nil, conf, logging.Discard()) },
		"no port":         func() (*control.Client, error) { return control.Dial([]string{"policyd"}, conf, logging.Discard()) },
		"TCP without TLS": func() (*control.Client, error) { return control.Dial([]string{"h:1"}, nil, logging.Discard()) },
		"socket with TLS": func() (*control.Client, error) { return control.Dial([]string{"unix:/x"}, conf, logging.Discard()) },
		"one of two wrong": func() (*control.Client, error) {
			return control.Dial([]string{"h:1", "unix:/x"}, conf, logging.Discard())
		},
	} {
		if _, err := dial(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestWhatIsNotOfferedIsRefused(t *testing.T) {
	p := newPKI(t)
	ln := listen(t, "127.0.0.1:0")
	serve(t, ln, p.server("policyd"), control.Services{Authorizer: policy{newSite()}})
	s := remote(dial(t, p.client("operator", "policyd"), ln.Addr().String()))
	_, getErr := s.Get(t.Context(), "user", "x")
	_, explainErr := s.explain.Explain(t.Context(), question("a", 22))
	for _, err := range []error{getErr, explainErr} {
		if sallyport.CodeOf(err) != control.CodeUnsupported {
			t.Errorf("got %v; want %s", err, control.CodeUnsupported)
		}
	}
	if _, err := s.authorize.Authorize(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

func TestMessagesAreBounded(t *testing.T) {
	s := newSite()
	svc := overTLS(t, s)
	op := sallyport.Op{Kind: sallyport.KindUser, ID: "big", Payload: make([]byte, control.MaxMessage)}
	if _, err := svc.Apply(t.Context(), []sallyport.Op{op}); sallyport.CodeOf(err) != control.CodeTooLarge {
		t.Errorf("got %v; want %s", err, control.CodeTooLarge)
	}
	if _, err := svc.Get(t.Context(), sallyport.KindUser, "big"); !errors.Is(err, sallyport.ErrNotFound) {
		t.Errorf("after it: got %v; want ErrNotFound", err)
	}
}

// A service that is down fails at once, and is found again by itself.
func TestDownFailsFastAndRecovers(t *testing.T) {
	p := newPKI(t)
	ln := listen(t, "127.0.0.1:0")
	addr := ln.Addr().String()
	conf := p.server("policyd")
	stop := serve(t, ln, conf, all(newSite()))
	svc := remote(dial(t, p.client("gateway", "policyd"), addr))
	ask := func() error {
		_, err := svc.authorize.Authorize(t.Context(), []sallyport.Request{question("a", 22)})
		return err
	}
	if err := ask(); err != nil {
		t.Fatal(err)
	}
	stop()
	for range 20 {
		start := time.Now()
		err := ask()
		if sallyport.CodeOf(err) != control.CodeUnavailable || !strings.Contains(err.Error(), "policyd is out of reach") {
			t.Errorf("got %v; want %s", err, control.CodeUnavailable)
		}
		within(t, time.Second, "a call on a dead service", start)
	}
	serve(t, listen(t, addr), conf, all(newSite()))
	if took := eventually(t, 2*time.Second, func() bool { return ask() == nil }); testing.Verbose() {
		t.Logf("recovered after %v", took)
	}
}

func TestSecondAddressTakesOver(t *testing.T) {
	p := newPKI(t)
	first, second := listen(t, "127.0.0.1:0"), listen(t, "127.0.0.1:0")
	a, b := newSite(), newSite()
	stop := serve(t, first, p.server("cached"), all(a))
	serve(t, second, p.server("cached"), all(b))
	svc := remote(dial(t, p.client("authd", "cached"), first.Addr().String(), second.Addr().String()))
	must(t, svc, sallyport.Op{Kind: sallyport.KindUser, ID: "u"})
	if _, err := a.Get(t.Context(), sallyport.KindUser, "u"); err != nil {
		t.Fatalf("the first address was not used: %v", err)
	}
	stop()
	eventually(t, 2*time.Second, func() bool {
		_, err := svc.Apply(t.Context(), []sallyport.Op{{Kind: sallyport.KindUser, ID: "u"}})
		return err == nil
	})
	if _, err := b.Get(t.Context(), sallyport.KindUser, "u"); err != nil {
		t.Errorf("the second address was not used: %v", err)
	}
}

// A server that stops ends its streams, so that it can stop, and lets calls finish.
func TestStopEndsStreams(t *testing.T) {
	p := newPKI(t)
	ln := listen(t, "127.0.0.1:0")
	s := newSite()
	stop := serve(t, ln, p.server("cached"), all(s))
	svc := remote(dial(t, p.client("operator", "cached"), ln.Addr().String()))
	events, ended := follow(t.Context(), svc, sallyport.WatchRequest{})
	next(t, events)
	lost := make(chan error, 1)
	holding := make(chan struct{})
	go func() {
		lost <- svc.Lease(t.Context(), "x", time.Second, func(ctx context.Context) error {
			close(holding)
			<-ctx.Done()
			return context.Cause(ctx)
		})
	}()
	next(t, holding)
	start := time.Now()
	stop()
	if err := next(t, ended); sallyport.CodeOf(err) != control.CodeUnavailable {
		t.Errorf("watch: got %v; want %s", err, control.CodeUnavailable)
	}
	if err := next(t, lost); !errors.Is(err, context.Canceled) || s.held("x") {
		t.Errorf("lease: got %v, held %t; want it lost", err, s.held("x"))
	}
	within(t, 2*time.Second, "stopping", start)
}

// A receiver that is slow holds the sender back, and the stream lives on: the
// clock of Silence stands still meanwhile.
func TestSlowReceiverHoldsSenderBack(t *testing.T) {
	t.Parallel()
	s := newSite()
	svc := overTLS(t, s)
	for range 200 {
		must(t, services{Records: s}, sallyport.Op{Kind: sallyport.KindUser, ID: "u", Payload: make([]byte, 64<<10)})
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	first, goOn := make(chan struct{}), make(chan struct{})
	got, ended := 0, make(chan error, 1)
	go func() {
		ended <- svc.Watch(ctx, sallyport.WatchRequest{Epoch: epoch, Since: 1}, func(e sallyport.WatchEvent) error {
			if e.Type != sallyport.WatchChange {
				return nil
			}
			if got++; got == 1 {
				close(first)
				<-goOn
			}
			if e.Revision == 200 {
				cancel()
			}
			return nil
		})
	}()
	next(t, first)
	<-time.After(control.Silence + control.Pulse) // longer than a silent stream lives
	close(goOn)
	if err := next(t, ended); !errors.Is(err, context.Canceled) || got != 199 {
		t.Errorf("got %d changes, then %v; want 199", got, err)
	}
}

// Nothing to say is no silence: streams and leases live on while nothing happens.
func TestQuietStreamsLive(t *testing.T) {
	t.Parallel()
	svc := overTLS(t, newSite())
	events, ended := follow(t.Context(), svc, sallyport.WatchRequest{})
	for range 3 {
		next(t, events)
	}
	err := svc.Lease(t.Context(), "x", time.Second, func(held context.Context) error {
		select {
		case <-held.Done():
			return errors.New("the lease is lost")
		case err := <-ended:
			return err
		case <-time.After(control.Silence + control.Pulse):
			return nil
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	must(t, svc, sallyport.Op{Kind: sallyport.KindUser, ID: "u"})
	next(t, events)
}

func TestClosedClientFails(t *testing.T) {
	p := newPKI(t)
	ln := listen(t, "127.0.0.1:0")
	serve(t, ln, p.server("cached"), all(newSite()))
	c := dial(t, p.client("authd", "cached"), ln.Addr().String())
	svc := remote(c)
	events, ended := follow(t.Context(), svc, sallyport.WatchRequest{})
	next(t, events)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := next(t, ended); sallyport.CodeOf(err) != control.CodeUnavailable {
		t.Errorf("watch: got %v; want %s", err, control.CodeUnavailable)
	}
	if _, err := svc.Get(t.Context(), "user", "x"); sallyport.CodeOf(err) != control.CodeUnavailable {
		t.Errorf("get: got %v; want %s", err, control.CodeUnavailable)
	}
}

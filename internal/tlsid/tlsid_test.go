package tlsid_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/tlsid"
)

const domain = "corp.example"

func newCA(t *testing.T, name string) *tlsid.CA {
	t.Helper()
	ca, err := tlsid.NewCA(name, 0)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func service(t *testing.T, ca *tlsid.CA, kind string) tls.Certificate {
	t.Helper()
	c, err := ca.IssueService(domain, kind, "one", []string{"127.0.0.1"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// sessionCertificate is what authd gives to an agent: client-auth only, with a
// session's SPIFFE id, from a CA of its own.
func sessionCertificate(t *testing.T, ca *tlsid.CA) tls.Certificate {
	t.Helper()
	return leaf(t, ca, &x509.Certificate{
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: domain, Path: "/session/s-1"}},
	})
}

func leaf(t *testing.T, ca *tlsid.CA, template *x509.Certificate) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(7)
	if template.NotAfter.IsZero() {
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Certificate(), key.Public(), ca.Signer())
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// handshake connects a client to a server over loopback and returns what each
// of them saw; after a good handshake both have read a byte of the other.
func handshake(t *testing.T, server, client *tls.Config) (state tls.ConnectionState, serverErr, clientErr error) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	done := make(chan error, 1)
	go func() {
		raw, err := ln.Accept()
		if err != nil {
			done <- err
			return
		}
		defer raw.Close()
		raw.SetDeadline(time.Now().Add(10 * time.Second))
		c := tls.Server(raw, server)
		err = swap(c)
		state = c.ConnectionState()
		done <- err
	}()
	raw, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	raw.SetDeadline(time.Now().Add(10 * time.Second))
	clientErr = swap(tls.Client(raw, client))
	raw.Close()
	return state, <-done, clientErr
}

func swap(c *tls.Conn) error {
	if err := c.Handshake(); err != nil {
		return err
	}
	if _, err := c.Write([]byte{1}); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

func TestServicesMeet(t *testing.T) {
	ca := newCA(t, "internal")
	server := tlsid.ServerConfig(service(t, ca, "policyd"), ca.Pool())
	client := tlsid.ClientConfig(service(t, ca, "gateway"), ca.Pool(), domain, "policyd")

	state, serverErr, clientErr := handshake(t, server, client)
	if serverErr != nil || clientErr != nil {
		t.Fatalf("server: %v; client: %v", serverErr, clientErr)
	}
	if state.Version != tls.VersionTLS13 {
		t.Errorf("version: got %#x; want TLS 1.3", state.Version)
	}
	kind, name, err := tlsid.PeerService(state, domain)
	if err != nil || kind != "gateway" || name != "one" {
		t.Errorf("peer: got %q, %q, %v; want gateway, one", kind, name, err)
	}
}

// The order in a certificate file decides what is presented; only the leaf that
// was verified names anybody.
func TestPeerServiceIgnoresFiller(t *testing.T) {
	ca := newCA(t, "internal")
	mine, other := service(t, ca, "gateway"), service(t, ca, "operator")
	mine.Certificate = append(mine.Certificate, other.Certificate[0])
	server := tlsid.ServerConfig(service(t, ca, "policyd"), ca.Pool())
	client := tlsid.ClientConfig(mine, ca.Pool(), domain, "policyd")

	state, serverErr, clientErr := handshake(t, server, client)
	if serverErr != nil || clientErr != nil {
		t.Fatalf("server: %v; client: %v", serverErr, clientErr)
	}
	if kind, _, err := tlsid.PeerService(state, domain); err != nil || kind != "gateway" {
		t.Errorf("got %q, %v; want gateway", kind, err)
	}
	if _, _, err := tlsid.PeerService(tls.ConnectionState{PeerCertificates: state.PeerCertificates}, domain); err == nil {
		t.Error("an unverified certificate named a service")
	}
}

func TestCase_E7_CertificatesOfTheOtherCA(t *testing.T) {
	internal, session := newCA(t, "internal"), newCA(t, "session")
	gateway := service(t, internal, "gateway")

	// An agent at a service's port.
	port := tlsid.ServerConfig(service(t, internal, "policyd"), internal.Pool())
	agent := tlsid.ClientConfig(sessionCertificate(t, session), internal.Pool(), domain, "policyd")
	insist(agent)
	if _, err, _ := handshake(t, port, agent); !unknownAuthority(err) {
		t.Errorf("session certificate on a service port: got %v; want unknown authority", err)
	}
	// A service at the port of the agents.
	port = tlsid.ServerConfig(service(t, internal, "gateway"), session.Pool())
	svc := tlsid.ClientConfig(gateway, internal.Pool(), domain, "gateway")
	insist(svc)
	if _, err, _ := handshake(t, port, svc); !unknownAuthority(err) {
		t.Errorf("service certificate on the agents' port: got %v; want unknown authority", err)
	}
	// Signed by the right CA, and still no service.
	if _, _, err := tlsid.Service(parse(t, sessionCertificate(t, internal)), domain); err == nil {
		t.Error("a session certificate named a service")
	}
}

// insist makes a client present its certificate even where the server asks for
// those of other CAs; Go's client would hold it back.
func insist(c *tls.Config) {
	cert := c.Certificates[0]
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
}

func unknownAuthority(err error) bool {
	var unknown x509.UnknownAuthorityError
	return errors.As(err, &unknown)
}

func parse(t *testing.T, c tls.Certificate) *x509.Certificate {
	t.Helper()
	cert, err := x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestClientRefusesServer(t *testing.T) {
	ca, other := newCA(t, "internal"), newCA(t, "other")
	public, err := ca.IssueServer([]string{"policyd.svc." + domain}, 0)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := ca.IssueService("evil.example", "policyd", "one", []string{"policyd.svc." + domain}, 0)
	if err != nil {
		t.Fatal(err)
	}
	disguised, err := ca.IssueService(domain, "gateway", "one", []string{"policyd.svc." + domain}, 0)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		server tls.Certificate
		want   string
	}{
		{"of another kind", service(t, ca, "cached"), "policyd.svc.corp.example"},
		{"of another CA", service(t, other, "policyd"), "unknown authority"},
		{"with the host name only", public, "URI names"},
		{"of another domain", foreign, "trust domain"},
		{"with the host name of another kind", disguised, "want a policyd"},
		{"that is a session", sessionCertificate(t, ca), "policyd.svc.corp.example"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			client := tlsid.ClientConfig(service(t, ca, "gateway"), ca.Pool(), domain, "policyd")
			_, _, err := handshake(t, tlsid.ServerConfig(tt.server, ca.Pool()), client)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v; want %q", err, tt.want)
			}
		})
	}
}

func TestServerRefusesClient(t *testing.T) {
	ca := newCA(t, "internal")
	server := tlsid.ServerConfig(service(t, ca, "policyd"), ca.Pool())
	public, err := ca.IssueServer([]string{"gw"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	expired := leaf(t, ca, &x509.Certificate{
		NotBefore:   time.Now().Add(-time.Hour),
		NotAfter:    time.Now().Add(-time.Minute),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: domain, Path: "/svc/gateway/one"}},
	})
	tests := []struct {
		name   string
		change func(*tls.Config)
		want   string
	}{
		{"without certificate", func(c *tls.Config) { c.Certificates = nil }, "didn't provide a certificate"},
		{"with a server's certificate", func(c *tls.Config) { c.Certificates = []tls.Certificate{public} }, "incompatible key usage"},
		{"with an expired certificate", func(c *tls.Config) { c.Certificates = []tls.Certificate{expired} }, "expired"},
		{"with TLS 1.2", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }, "unsupported versions"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			client := tlsid.ClientConfig(service(t, ca, "gateway"), ca.Pool(), domain, "policyd")
			tt.change(client)
			if _, err, _ := handshake(t, server, client); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v; want %q", err, tt.want)
			}
		})
	}
}

// A ticket would let a connection live on the identity that an earlier one proved.
func TestCase_E8_NoSessionTickets(t *testing.T) {
	ca := newCA(t, "internal")
	server := tlsid.ServerConfig(service(t, ca, "policyd"), ca.Pool())
	client := tlsid.ClientConfig(service(t, ca, "gateway"), ca.Pool(), domain, "policyd")
	tickets := &countingCache{}
	client.SessionTicketsDisabled, client.ClientSessionCache = false, tickets
	for range 2 {
		state, serverErr, clientErr := handshake(t, server, client)
		if serverErr != nil || clientErr != nil {
			t.Fatalf("server: %v; client: %v", serverErr, clientErr)
		}
		if state.DidResume {
			t.Error("the second connection resumed the first")
		}
	}
	if tickets.puts > 0 {
		t.Errorf("the server issued %d session tickets; want 0", tickets.puts)
	}
}

type countingCache struct{ puts int }

func (c *countingCache) Get(string) (*tls.ClientSessionState, bool) { return nil, false }

func (c *countingCache) Put(_ string, s *tls.ClientSessionState) {
	if s != nil {
		c.puts++
	}
}

func TestServiceNames(t *testing.T) {
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	good := uri("spiffe://corp.example/svc/gateway/eu1")
	tests := []struct {
		uris []*url.URL
		ok   bool
	}{
		{[]*url.URL{good}, true},
		{nil, false},
		{[]*url.URL{good, good}, false},
		{[]*url.URL{uri("spiffe://corp.example/session/s-1")}, false},
		{[]*url.URL{uri("spiffe://corp.example/svc/gateway")}, false},
		{[]*url.URL{uri("spiffe://corp.example/svc/gateway/")}, false},
		{[]*url.URL{uri("spiffe://corp.example/svc//eu1")}, false},
		{[]*url.URL{uri("spiffe://corp.example/svc/gateway/eu1/x")}, false},
		{[]*url.URL{uri("spiffe://corp.example//svc/gateway/eu1")}, false},
		{[]*url.URL{uri("spiffe://corp.example/svc/gate%77ay/eu1")}, false},
		{[]*url.URL{uri("spiffe://corp.example/svc/gateway%2Feu1")}, false},
		{[]*url.URL{uri("spiffe://corp.example/svc/Gateway/eu1")}, false},
		{[]*url.URL{uri("spiffe://corp.example/svc/gateway/eu1?x=1")}, false},
		{[]*url.URL{uri("spiffe://corp.example/svc/gateway/eu1#x")}, false},
		{[]*url.URL{uri("spiffe://corp.example:443/svc/gateway/eu1")}, false},
		{[]*url.URL{uri("spiffe://x@corp.example/svc/gateway/eu1")}, false},
		{[]*url.URL{uri("spiffe://evil.example/svc/gateway/eu1")}, false},
		{[]*url.URL{uri("https://corp.example/svc/gateway/eu1")}, false},
	}
	for _, tt := range tests {
		kind, name, err := tlsid.Service(&x509.Certificate{URIs: tt.uris}, domain)
		if ok := err == nil; ok != tt.ok || ok && (kind != "gateway" || name != "eu1") {
			t.Errorf("%v: got %q, %q, %v; want ok %t", tt.uris, kind, name, err, tt.ok)
		}
	}
}

func TestIssueRefusesNames(t *testing.T) {
	ca := newCA(t, "internal")
	for _, id := range [][3]string{{"", "gateway", "x"}, {"Corp.example", "gateway", "x"}, {domain, "", "x"}, {domain, "gateway", ""}, {domain, "gate/way", "x"}, {domain, "gateway", ".."}, {domain, "gateway", "ä"}} {
		if _, err := ca.IssueService(id[0], id[1], id[2], nil, 0); err == nil {
			t.Errorf("%q: issued", id)
		}
	}
	if _, err := ca.IssueServer(nil, 0); err == nil {
		t.Error("issued a server certificate without names")
	}
}

func TestIssuedCertificates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t, "internal")
		c := service(t, ca, "gateway").Leaf
		if got, want := c.NotAfter.Sub(time.Now().Truncate(time.Second)), tlsid.ServiceLife; got != want {
			t.Errorf("life: got %v; want %v", got, want)
		}
		if got := time.Since(c.NotBefore); got != tlsid.BackDate {
			t.Errorf("back-dated by %v; want %v", got, tlsid.BackDate)
		}
		if c.IsCA || !ca.Certificate().IsCA || !ca.Certificate().MaxPathLenZero {
			t.Error("leaf or CA with the wrong basic constraints")
		}
		short, err := tlsid.NewCA("short", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if got := service(t, short, "gateway").Leaf.NotAfter; got.After(short.Certificate().NotAfter) {
			t.Errorf("leaf ends at %v, after its CA", got)
		}
		public, err := ca.IssueServer([]string{"gw.localhost", "::1"}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(public.Leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}) || len(public.Leaf.URIs) != 0 {
			t.Error("a public certificate can be used as a service's")
		}
		if public.Leaf.VerifyHostname("gw.localhost") != nil || public.Leaf.VerifyHostname("[::1]") != nil {
			t.Error("a public certificate lacks its hosts")
		}
	})
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	ca := newCA(t, "internal")
	if err := ca.Save(certFile, keyFile); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(keyFile)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file: got %v, %v; want mode 0600", info.Mode(), err)
	}
	again, err := tlsid.LoadCA(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	if !again.Certificate().Equal(ca.Certificate()) {
		t.Error("another CA came back")
	}
	if _, err := tlsid.LoadPool(certFile); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("temporary files left behind: %v", left)
	}
}

func TestCase_J5_FilesRefused(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) (string, string) {
		return filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	}
	save := func(name string, c tls.Certificate) {
		t.Helper()
		certFile, keyFile := file(name)
		if err := tlsid.SaveKeyPair(c, certFile, keyFile); err != nil {
			t.Fatal(err)
		}
	}
	ca := newCA(t, "internal")
	save("good", service(t, ca, "gateway"))
	save("other", service(t, ca, "gateway"))
	save("expired", leaf(t, ca, &x509.Certificate{NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour)}))
	save("early", leaf(t, ca, &x509.Certificate{NotBefore: time.Now().Add(time.Hour), NotAfter: time.Now().Add(2 * time.Hour)}))
	save("open", service(t, ca, "gateway"))
	if err := os.Chmod(filepath.Join(dir, "open.key"), 0o640); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("empty.crt", "")
	write("huge.crt", strings.Repeat("x", 2<<20))

	pair := func(cert, key string) func() error {
		return func() error {
			_, err := tlsid.LoadKeyPair(filepath.Join(dir, cert), filepath.Join(dir, key))
			return err
		}
	}
	pool := func(cert string) func() error {
		return func() error { _, err := tlsid.LoadPool(filepath.Join(dir, cert)); return err }
	}
	tests := []struct {
		name string
		load func() error
		want string
	}{
		{"good", pair("good.crt", "good.key"), ""},
		{"expired", pair("expired.crt", "expired.key"), "expired at"},
		{"not yet valid", pair("early.crt", "early.key"), "is not valid before"},
		{"key of another", pair("good.crt", "other.key"), "does not match"},
		{"readable key", pair("open.crt", "open.key"), "chmod 600"},
		{"missing key", pair("good.crt", "none.key"), "no such file"},
		{"directory as key", pair("good.crt", "."), "no regular file"},
		{"empty certificate", pair("empty.crt", "good.key"), "empty.crt"},
		{"huge certificate", pair("huge.crt", "good.key"), "larger than"},
		{"leaf as CA bundle", pool("good.crt"), "CA:TRUE"},
		{"key as CA bundle", pool("good.key"), "holds certificates"},
		{"empty CA bundle", pool("empty.crt"), "no PEM certificate"},
		{"leaf as CA", func() error { certFile, keyFile := file("good"); _, err := tlsid.LoadCA(certFile, keyFile); return err }, "CA:TRUE"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.load()
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v; want %q", err, tt.want)
			}
		})
	}
}

func TestPairFollowsItsFiles(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "a.crt"), filepath.Join(dir, "a.key")
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t, "internal")
		first, second := service(t, ca, "gateway"), service(t, ca, "gateway")
		save := func(c tls.Certificate, at time.Time) {
			t.Helper()
			if err := tlsid.SaveKeyPair(c, certFile, keyFile); err != nil {
				t.Fatal(err)
			}
			for _, f := range []string{certFile, keyFile} {
				if err := os.Chtimes(f, at, at); err != nil {
					t.Fatal(err)
				}
			}
		}
		save(first, time.Now())
		pair, err := tlsid.OpenPair(certFile, keyFile)
		if err != nil {
			t.Fatal(err)
		}
		inUse := func() tls.Certificate {
			<-time.After(2 * time.Second)
			c, err := pair.GetCertificate(nil)
			if err != nil {
				t.Fatal(err)
			}
			return *c
		}
		if !inUse().Leaf.Equal(first.Leaf) {
			t.Fatal("the first pair is not in use")
		}
		if err := os.WriteFile(certFile, []byte("half a certif"), 0o600); err != nil {
			t.Fatal(err)
		}
		if !inUse().Leaf.Equal(first.Leaf) || pair.Err() == nil {
			t.Errorf("broken replacement: in use or not told (%v)", pair.Err())
		}
		save(second, time.Now().Add(-time.Hour))
		if !inUse().Leaf.Equal(second.Leaf) || pair.Err() != nil {
			t.Errorf("the second pair is not in use: %v", pair.Err())
		}
	})
}

// There is one way to write a service's name.
func FuzzService(f *testing.F) {
	f.Add("spiffe://corp.example/svc/gateway/eu1")
	f.Add("spiffe://corp.example/svc/gate%77ay/eu1?#")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.Parse(s)
		if err != nil {
			return
		}
		kind, name, err := tlsid.Service(&x509.Certificate{URIs: []*url.URL{u}}, domain)
		if err == nil && u.String() != "spiffe://"+domain+"/svc/"+kind+"/"+name {
			t.Errorf("%q names %s/%s", u, kind, name)
		}
	})
}

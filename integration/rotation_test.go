package integration

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport"
	"sallyport/integration/stack"
	"sallyport/internal/tlsid"
	"sallyport/proto/connect"
	"sallyport/proto/control"
)

// undisturbed are connections over both carriers that must live through whatever
// the test does, and ports at which each new one must work.
type undisturbed struct {
	tunnels []*stack.Tunnel
	conns   []net.Conn
}

func openUndisturbed(t *testing.T, a *stack.Agent) *undisturbed {
	t.Helper()
	u := &undisturbed{}
	for _, transport := range []string{"quic", "tls"} {
		tun := a.Connect("db.internal:5432", "--transport", transport)
		u.tunnels, u.conns = append(u.tunnels, tun), append(u.conns, tun.Dial(t))
	}
	return u
}

// check fails the test if a connection is gone or no new one is let in.
func (u *undisturbed) check(t *testing.T) {
	t.Helper()
	for i, tun := range u.tunnels {
		if err := stack.Echo(u.conns[i], "still"); err != nil {
			t.Fatalf("%s: a live connection: %v\n%s", tun.Carrier, err, tun.Stderr())
		}
		if err := dialEcho(tun, "new"); err != nil {
			t.Fatalf("%s: a new connection: %v\n%s", tun.Carrier, err, tun.Stderr())
		}
	}
}

// until checks again and again until done returns nil.
func (u *undisturbed) until(t *testing.T, limit time.Duration, done func() error) {
	t.Helper()
	stack.Eventually(t, limit, func() error {
		u.check(t)
		return done()
	})
}

// TestCase_O1_SessionCARotatedUnderLoad: the operator rotates the session CA while
// people work. Nobody notices; certificates of the old one count until it retires,
// and no longer.
func TestCase_O1_SessionCARotatedUnderLoad(t *testing.T) {
	t.Parallel() // it waits, mostly
	w := newWorldWith(t, stack.Apart, func(c *stack.Config) {
		c.Session = map[string]any{"certificate_lifetime": "20s"}
		c.Policyd = map[string]any{"max_stale": "3s"}
	})
	a := w.loggedIn(t, "alice")
	u := openUndisturbed(t, a)
	old, err := tlsid.LoadCA(caFiles(w, "session-ca"))
	if err != nil {
		t.Fatal(err)
	}
	stolen := sessionCertificate(t, old, sallyport.SessionID(sessionOf(t, w, "alice@test.example")))
	if err := w.asksWith(t, stolen); err != nil {
		t.Fatalf("before the rotation: %v", err)
	}

	w.Operator("init", "--rotate", "session-ca", "--config", w.File)
	r := stack.Run(t, stack.Command{Program: "sallyport", Args: []string{"init", "--rotate", "session-ca", "--config", w.File}})
	if wantExit(t, r, stack.ExitUsage); !strings.Contains(r.Stderr, "session_ca.rotating") {
		t.Errorf("a second rotation right away says %s", r.Stderr)
	}
	records := operator(t, w)
	var retires time.Time
	u.until(t, 20*time.Second, func() error {
		retires = trust(t, records).Terms[sallyport.CertificateID(old.Certificate().Raw)].Retires
		if retires.IsZero() {
			return errors.New("the new CA does not sign yet")
		}
		return nil
	})
	if left := time.Until(retires); left < 35*time.Second || left > 40*time.Second {
		t.Errorf("the old one retires in %s; want 2 certificate lifetimes of 20 s", left)
	}
	w.NewAgent(t, "bob").Login()
	var began time.Time
	u.until(t, time.Minute, func() error {
		began = time.Now()
		if err := w.asksWith(t, stolen); err == nil {
			return errors.New("the old CA still counts")
		}
		return nil
	})
	if late := began.Sub(retires); late < -time.Second || late > 2*time.Second {
		t.Errorf("refused %s after its end; want about a second at most", late)
	}
	u.check(t)
	w.Restart("authd", 15) // SIGTERM
	w.NewAgent(t, "bob").Login()
	u.check(t)
}

func caFiles(w *world, name string) (cert, key string) {
	base := filepath.Join(w.Dir, "data", "keys", name)
	return base + ".crt", base + ".key"
}

func trust(t *testing.T, records *control.Records) sallyport.Trust {
	t.Helper()
	r, err := records.Get(t.Context(), sallyport.KindTrust, "current")
	if err != nil {
		t.Fatal(err)
	}
	v, err := sallyport.Decode[sallyport.Trust](r)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// sessionCertificate is what whoever has the CA's key can make.
func sessionCertificate(t *testing.T, ca *tlsid.CA, session sallyport.SessionID) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs: []*url.URL{connect.SessionURI("test.example", session)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Certificate(), key.Public(), ca.Signer())
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// asksWith connects to the tunnel host with the certificate and asks who that is.
func (w *world) asksWith(t *testing.T, cert tls.Certificate) error {
	t.Helper()
	conf := &tls.Config{
		RootCAs: w.Roots(t), MinVersion: tls.VersionTLS13, ServerName: "gw.localhost", NextProtos: []string{"http/1.1"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil },
	}
	c, err := tls.Dial("tcp", w.Ready("gateway").Gateway.TCP, conf)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, "GET /v1/me HTTP/1.1\r\nHost: gw.localhost\r\n\r\n"); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if !strings.Contains(line, " 200 ") {
		t.Errorf("/v1/me answers %q", line)
	}
	return nil
}

// TestCase_O1_ServiceCertificatesReplaced: daemons use a certificate that was
// replaced on disk from the next connection on, at either end of it.
func TestCase_O1_ServiceCertificatesReplaced(t *testing.T) {
	t.Parallel() // it waits, mostly
	w := newWorldWith(t, stack.Apart, func(c *stack.Config) { c.Links = true })
	u := openUndisturbed(t, w.loggedIn(t, "alice"))
	ca, err := tlsid.LoadCA(caFiles(w, "internal-ca"))
	if err != nil {
		t.Fatal(err)
	}
	const short = 8 * time.Second
	w.replaceServices(t, ca, short)
	expired := time.Now().Add(short + time.Second)
	w.breakLinks(t, u)
	w.replaceServices(t, ca, tlsid.ServiceLife)
	u.until(t, 2*short, func() error {
		if left := time.Until(expired); left > 0 {
			return fmt.Errorf("the short-lived certificates count for another %s", left)
		}
		return nil
	})
	w.breakLinks(t, u)   // who had kept an earlier certificate could not connect now
	w.SetGroups("alice") // and what comes through these connections has an effect
	for i, c := range u.conns {
		stack.CutWithin(t, c, 5*time.Second)
		u.tunnels[i].Signal(15) // SIGTERM
	}
}

// replaceServices gives every daemon a new certificate, and waits until those that
// are connected to show it.
func (w *world) replaceServices(t *testing.T, ca *tlsid.CA, life time.Duration) {
	t.Helper()
	serials := map[string]*big.Int{}
	for _, kind := range []string{"cached", "policyd", "authd", "gateway"} {
		pair, err := ca.IssueService("test.example", kind, kind, nil, life)
		if err != nil {
			t.Fatal(err)
		}
		base := filepath.Join(w.Dir, "data", "svc", kind)
		if err := tlsid.SaveKeyPair(pair, base+".crt", base+".key"); err != nil {
			t.Fatal(err)
		}
		serials[kind] = pair.Leaf.SerialNumber
	}
	id, err := ca.IssueService("test.example", "operator", "test", nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for kind, addr := range map[string]string{"cached": w.Ready("cached").Cached.Listen, "policyd": w.Ready("policyd").Policyd.Listen} {
		conf := tlsid.ClientConfig(id, ca.Pool(), "test.example", kind)
		conf.NextProtos = []string{"h2"}
		stack.Eventually(t, 5*time.Second, func() error {
			c, err := tls.Dial("tcp", addr, conf)
			if err != nil {
				return err
			}
			defer c.Close()
			if got := c.ConnectionState().PeerCertificates[0].SerialNumber; got.Cmp(serials[kind]) != 0 {
				return fmt.Errorf("%s shows an earlier certificate", kind)
			}
			return nil
		})
	}
}

// breakLinks closes every connection between daemons, and returns when all works
// again. A question that was on its way is lost; what lives must live on.
func (w *world) breakLinks(t *testing.T, u *undisturbed) {
	t.Helper()
	for _, name := range []string{"cached", "policyd"} {
		w.Link(name).Break()
	}
	for _, tun := range u.tunnels {
		stack.Eventually(t, backWithin+slack, func() error { return dialEcho(tun, "new") })
	}
	for _, name := range []string{"cached", "policyd", "authd", "gateway"} {
		w.WaitReady(name)
	}
	u.check(t)
}

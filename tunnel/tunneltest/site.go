// Package tunneltest is the suite that every carrier passes, and the small site
// it runs against: certificates, and a gateway without policy whose targets each
// show one behaviour. Tests of other packages use the site too.
package tunneltest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"testing"
	"time"

	"sallyport"
	"sallyport/internal/tlsid"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

// Names of the site.
const (
	Domain = "corp.example"
	Host   = "gw.localhost"
)

// Site is a gateway's certificate and a session CA.
type Site struct {
	Public   *tlsid.CA // signs the gateway's certificate
	Sessions *tlsid.CA
	Server   tls.Certificate
}

// NewSite makes a site.
func NewSite(t testing.TB) *Site {
	t.Helper()
	s := &Site{Public: newCA(t, "public"), Sessions: newCA(t, "sessions")}
	var err error
	if s.Server, err = s.Public.IssueServer([]string{Host}, time.Hour); err != nil {
		t.Fatal(err)
	}
	return s
}

func newCA(t testing.TB, name string) *tlsid.CA {
	t.Helper()
	ca, err := tlsid.NewCA(name, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// ServerTLS is the tunnel host's configuration for the protocol.
func (s *Site) ServerTLS(proto string) *tls.Config {
	return tunnel.ServerTLS(func() *tls.Certificate { return &s.Server }, s.Sessions.Pool(), proto)
}

// Session returns a session certificate signed by the site's session CA, after
// edit has changed the template.
func (s *Site) Session(t testing.TB, id sallyport.SessionID, edit func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	return SignSession(t, s.Sessions, id, edit)
}

// SignSession returns a session certificate signed by ca.
func SignSession(t testing.TB, ca *tlsid.CA, id sallyport.SessionID, edit func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	template := &x509.Certificate{
		SerialNumber: serial,
		NotBefore:    time.Now().Add(-2 * time.Minute),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	template.URIs = append(template.URIs, connect.SessionURI(Domain, id))
	if edit != nil {
		edit(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Certificate(), key.Public(), ca.Signer())
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// DialConfig returns how an agent with that certificate (nil: none) reaches the
// gateway at addr.
func (s *Site) DialConfig(addr string, cert *tls.Certificate) tunnel.DialConfig {
	return tunnel.DialConfig{
		Gateway: sallyport.GatewayInfo{Name: "test", URL: "https://" + Host, Addresses: []string{addr}},
		TLS: &tls.Config{
			RootCAs: s.Public.Pool(),
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				if cert == nil {
					return new(tls.Certificate), nil
				}
				return cert, nil
			},
		},
	}
}

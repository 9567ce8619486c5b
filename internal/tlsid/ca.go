// Package tlsid is the X.509 side of trust between services: certificate
// authorities, the certificates they give to services and listeners, the files
// these are kept in, and TLS configurations that accept nothing else. A service
// is named by one URI SAN, spiffe://<domain>/svc/<kind>/<name>; who may do what
// with that name is decided elsewhere (proto/control). Session certificates have
// a CA of their own and are issued by authd; their form is proto/connect's.
package tlsid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"time"
)

// Lives and leeway of certificates.
const (
	// ServiceLife is how long a service's certificate is valid.
	ServiceLife = 90 * 24 * time.Hour
	// CALife is how long a CA made by NewCA is valid unless told otherwise.
	CALife = 10 * 365 * 24 * time.Hour
	// BackDate is how far NotBefore lies in the past, for peers whose clock is
	// behind.
	BackDate = 2 * time.Minute
)

// CA is a certificate authority: an ECDSA P-256 key and its self-signed
// certificate, which may sign leaves only. It is safe for concurrent use.
type CA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes a CA with a fresh key. The name is the subject's common name, for
// people; life is CALife if it is not above zero.
func NewCA(name string, life time.Duration) (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make CA %q: %w", name, err)
	}
	if life <= 0 {
		life = CALife
	}
	template := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-BackDate),
		NotAfter:              time.Now().Add(life),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	cert, err := sign(template, template, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("make CA %q: %w", name, err)
	}
	return &CA{cert: cert, key: key}, nil
}

// LoadCA reads what Save wrote. It refuses a certificate that is no CA, has
// expired, or does not belong to the key, and a key file that others can read.
func LoadCA(certFile, keyFile string) (*CA, error) {
	pair, err := LoadKeyPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	if err := checkCA(pair.Leaf); err != nil {
		return nil, fmt.Errorf("%s: %w", certFile, err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%s: a CA key must be ECDSA P-256", keyFile)
	}
	return &CA{cert: pair.Leaf, key: key}, nil
}

// Save writes certificate and key (PKCS #8, mode 0600) in PEM. Neither file is
// ever seen half-written.
func (ca *CA) Save(certFile, keyFile string) error {
	return SaveKeyPair(tls.Certificate{Certificate: [][]byte{ca.cert.Raw}, PrivateKey: ca.key}, certFile, keyFile)
}

// Certificate returns the CA's own certificate.
func (ca *CA) Certificate() *x509.Certificate { return ca.cert }

// Made returns when NewCA made it.
func (ca *CA) Made() time.Time { return ca.cert.NotBefore.Add(BackDate) }

// Signer returns the CA's key, for issuers of other kinds of certificates.
func (ca *CA) Signer() crypto.Signer { return ca.key }

// PEM returns the CA's certificate in PEM.
func (ca *CA) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: ca.cert.Raw})
}

// Pool returns a pool that holds this CA and nothing else.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// IssueService gives a fresh key pair to the service kind/name of the trust
// domain, good for both ends of a connection. Besides its URI SAN it carries the
// DNS name <kind>.svc.<domain>, which ClientConfig asks for, and hosts (names or
// addresses). Life is ServiceLife if it is not above zero, and never longer than
// the CA's.
func (ca *CA) IssueService(domain, kind, name string, hosts []string, life time.Duration) (tls.Certificate, error) {
	id, err := serviceURI(domain, kind, name)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := leafTemplate(life)
	template.Subject = pkix.Name{CommonName: kind + "/" + name}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	template.URIs = []*url.URL{id}
	addHosts(template, append([]string{serviceHost(domain, kind)}, hosts...))
	return ca.issue(template)
}

// IssueServer gives a fresh key pair to a public listener that answers for
// hosts (names or addresses). It authenticates servers only, and no service.
func (ca *CA) IssueServer(hosts []string, life time.Duration) (tls.Certificate, error) {
	if len(hosts) == 0 {
		return tls.Certificate{}, errors.New("issue server certificate: no host names")
	}
	template := leafTemplate(life)
	template.Subject = pkix.Name{CommonName: hosts[0]}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	addHosts(template, hosts)
	return ca.issue(template)
}

func leafTemplate(life time.Duration) *x509.Certificate {
	if life <= 0 {
		life = ServiceLife
	}
	return &x509.Certificate{
		SerialNumber:          serial(),
		NotBefore:             time.Now().Add(-BackDate),
		NotAfter:              time.Now().Add(life),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
	}
}

func addHosts(template *x509.Certificate, hosts []string) {
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, h)
		}
	}
}

func (ca *CA) issue(template *x509.Certificate) (tls.Certificate, error) {
	if template.NotAfter.After(ca.cert.NotAfter) {
		template.NotAfter = ca.cert.NotAfter
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("issue %s: %w", template.Subject.CommonName, err)
	}
	leaf, err := sign(template, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("issue %s: %w", template.Subject.CommonName, err)
	}
	return tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

func sign(template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// serial returns 127 random bits: positive and short enough for RFC 5280,
// section 4.1.2.2.
func serial() *big.Int {
	var b [16]byte
	rand.Read(b[:])
	b[0] &= 0x7f
	b[15] |= 1 // never zero
	return new(big.Int).SetBytes(b[:])
}

package authd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"sallyport"
	"sallyport/proto/connect"
)

// maxCSR bounds a certificate request in bytes; ours have about 250.
const maxCSR = 4 << 10

// backdate lets a certificate work on machines whose clock is a little slow.
const backdate = 2 * time.Minute

var oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}

// checkCSR returns the key of a certificate request that asks for nothing but
// that: ECDSA P-256, signed by itself, no names but at most the session's own,
// not a CA. Everything else in the certificate is ours to say.
func checkCSR(der []byte, session *url.URL) (*ecdsa.PublicKey, error) {
	if len(der) > maxCSR {
		return nil, errors.New("request is too long")
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, err
	}
	pub, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, errors.New("key is not ECDSA P-256")
	}
	if len(csr.DNSNames)+len(csr.IPAddresses)+len(csr.EmailAddresses) > 0 || len(csr.URIs) > 1 {
		return nil, errors.New("request asks for names")
	}
	if len(csr.URIs) == 1 && (session == nil || csr.URIs[0].String() != session.String()) {
		return nil, errors.New("request asks for another session")
	}
	for _, ext := range csr.Extensions {
		if !ext.Id.Equal(oidBasicConstraints) {
			continue
		}
		var constraints struct {
			IsCA       bool `asn1:"optional"`
			MaxPathLen int  `asn1:"optional,default:-1"`
		}
		if _, err := asn1.Unmarshal(ext.Value, &constraints); err != nil || constraints.IsCA {
			return nil, errors.New("request asks to be a CA")
		}
	}
	return pub, nil
}

// issue signs a session certificate (DESIGN section 3, "Session certificate"):
// client authentication only, one URI name, nothing about the person. It ends
// with the session if that is sooner. It returns the certificate in PEM and how
// long it lives.
func (s *Server) issue(ctx ctx, pub *ecdsa.PublicKey, session sallyport.Session) (string, time.Duration, error) {
	now := s.now()
	life := min(s.session.Load().certificateLifetime(), session.Expires.Sub(now))
	if life <= 0 {
		return "", 0, errors.New("session has expired")
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return "", 0, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial.Add(serial, big.NewInt(1)),
		Subject:               pkix.Name{},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(life),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{connect.SessionURI(s.deps.Domain, session.ID)},
	}
	ca, err := s.signer(ctx)
	if err != nil {
		return "", 0, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Certificate(), pub, ca.Signer())
	if err != nil {
		return "", 0, fmt.Errorf("sign session certificate: %w", err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), life, nil
}

package login

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	wire "sallyport/proto/login"
)

// Session is what a login or a renewal gives: a certificate for a key that
// exists only in this process's memory.
type Session struct {
	wire.Grant
	Certificate tls.Certificate
	// Obtained is when it was granted, by this machine's wall clock: durations of
	// the Grant count from here, also over a sleep of the machine.
	Obtained time.Time
}

// RenewAt is when to ask for the next certificate.
func (s *Session) RenewAt() time.Time { return s.Obtained.Add(s.RenewIn) }

// Ends is when the session ends.
func (s *Session) Ends() time.Time { return s.Obtained.Add(s.ExpiresIn) }

// Expired reports whether the certificate is no longer valid at t, or will be
// within ten seconds.
func (s *Session) Expired(t time.Time) bool {
	return t.Add(10 * time.Second).After(s.Certificate.Leaf.NotAfter)
}

// sessionKey is a fresh key and its certificate request.
type sessionKey struct {
	private *ecdsa.PrivateKey
	csr     []byte // PKCS #10, DER
}

func newSessionKey() (*sessionKey, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make session key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA256}, private)
	if err != nil {
		return nil, fmt.Errorf("make certificate request: %w", err)
	}
	return &sessionKey{private, csr}, nil
}

func hashOf(csr []byte) []byte {
	if csr == nil {
		return nil
	}
	sum := sha256.Sum256(csr)
	return sum[:]
}

// session joins the key with the granted chain.
func (k *sessionKey) session(g wire.Grant) (*Session, error) {
	s := &Session{Grant: g, Obtained: time.Now().Round(0), Certificate: tls.Certificate{PrivateKey: k.private}}
	rest := []byte(g.Certificate)
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type == "CERTIFICATE" {
			s.Certificate.Certificate = append(s.Certificate.Certificate, block.Bytes)
		}
	}
	if len(s.Certificate.Certificate) == 0 {
		return nil, badAnswer("no certificate", nil)
	}
	leaf, err := x509.ParseCertificate(s.Certificate.Certificate[0])
	if err != nil {
		return nil, badAnswer("a certificate that cannot be read", err)
	}
	if !k.private.PublicKey.Equal(leaf.PublicKey) {
		return nil, badAnswer("a certificate for another key", errors.New("public keys differ"))
	}
	if g.Session == "" || len(g.Gateways) == 0 {
		return nil, badAnswer("no session or no gateway", nil)
	}
	s.Certificate.Leaf = leaf
	return s, nil
}

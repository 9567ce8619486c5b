package connect

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"sallyport"
)

const sessionPath = "/session/"

// SessionURI is the URI SAN of a session certificate: spiffe://<domain>/session/<id>
// (SPIFFE-ID, section 2). It says which session speaks and nothing about whether
// that session still lives.
func SessionURI(domain string, id sallyport.SessionID) *url.URL {
	return &url.URL{Scheme: "spiffe", Host: domain, Path: sessionPath + string(id)}
}

// SessionOf returns the session that cert stands for. cert must be the leaf of a
// verified chain (tls.ConnectionState.VerifiedChains[0][0]); exactly one URI SAN,
// of that domain and in its one spelling, is accepted.
func SessionOf(cert *x509.Certificate, domain string) (sallyport.SessionID, error) {
	if len(cert.URIs) != 1 {
		return "", fmt.Errorf("session certificate: %d URI names; want 1", len(cert.URIs))
	}
	id, ok := strings.CutPrefix(cert.URIs[0].Path, sessionPath)
	if !ok || id == "" || strings.Contains(id, "/") {
		return "", errors.New("session certificate: its URI names no session")
	}
	session := sallyport.SessionID(id)
	if cert.URIs[0].String() != SessionURI(domain, session).String() {
		return "", errors.New("session certificate: foreign domain or odd spelling")
	}
	return session, nil
}

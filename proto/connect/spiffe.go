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

// SessionURI returns the SPIFFE id of a session, spiffe://<domain>/session/<id>:
// the only URI SAN of a session certificate (DESIGN section 3).
func SessionURI(domain string, id sallyport.SessionID) *url.URL {
	return &url.URL{Scheme: "spiffe", Host: domain, Path: sessionPath + string(id)}
}

// SessionOf returns the session that a certificate stands for. The caller has
// verified cert (VerifiedChains[0][0]); SessionOf refuses every certificate that
// is not exactly a session's: more or fewer names than its one SPIFFE id, another
// trust domain, or a path that is not /session/<id>.
func SessionOf(cert *x509.Certificate, domain string) (sallyport.SessionID, error) {
	if cert == nil {
		return "", errors.New("no certificate")
	}
	if len(cert.URIs) != 1 || len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.EmailAddresses) != 0 {
		return "", errors.New("certificate: a session certificate has one URI name and no other")
	}
	u := cert.URIs[0]
	id, ok := strings.CutPrefix(u.Path, sessionPath)
	if !ok || u.Scheme != "spiffe" || u.Host != domain || domain == "" {
		return "", fmt.Errorf("certificate: %.100q is no session of %s", u, domain)
	}
	// Comparing the whole text refuses user info, queries, fragments and escapes
	// that the fields above do not show.
	if !validSessionID(id) || u.String() != SessionURI(domain, sallyport.SessionID(id)).String() {
		return "", fmt.Errorf("certificate: %.100q is no session of %s", u, domain)
	}
	return sallyport.SessionID(id), nil
}

func validSessionID(id string) bool {
	if id == "" || len(id) > 128 {
		return false
	}
	for i := range len(id) {
		c := id[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
			return false
		}
	}
	return true
}

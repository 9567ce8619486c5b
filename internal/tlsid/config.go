package tlsid

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// ServerConfig accepts only TLS 1.3 peers with a certificate that chains to
// roots. It issues no session tickets: every connection proves itself anew, so
// a withdrawn CA or certificate counts from the next handshake on. Whoever
// serves asks Service for the peer's name.
func ServerConfig(cert tls.Certificate, roots *x509.CertPool) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{cert},
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              roots,
		SessionTicketsDisabled: true,
	}
}

// ClientConfig connects only to services of the kind in the domain, wherever
// they listen: the peer's certificate must chain to roots, hold the DNS name
// <kind>.svc.<domain>, and its URI SAN must say the same. An empty kind matches
// no service.
func ClientConfig(cert tls.Certificate, roots *x509.CertPool, domain, wantKind string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{cert},
		RootCAs:                roots,
		ServerName:             serviceHost(domain, wantKind),
		SessionTicketsDisabled: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			kind, name, err := PeerService(state, domain)
			if err != nil {
				return err
			}
			if kind != wantKind {
				return fmt.Errorf("peer is service %s/%s; want a %s", kind, name, wantKind)
			}
			return nil
		},
	}
}

// PeerService returns the service at the other end of a connection. It looks at
// VerifiedChains[0][0] only: what else a peer presented proves nothing.
func PeerService(state tls.ConnectionState, domain string) (kind, name string, err error) {
	if len(state.VerifiedChains) == 0 || len(state.VerifiedChains[0]) == 0 {
		return "", "", errors.New("peer has no verified certificate")
	}
	return Service(state.VerifiedChains[0][0], domain)
}

// Service reads spiffe://<domain>/svc/<kind>/<name> from a verified leaf. A
// certificate with another number of URI SANs than one, of another trust domain
// or of another form (a session's, for example) names no service.
func Service(cert *x509.Certificate, domain string) (kind, name string, err error) {
	if len(cert.URIs) != 1 {
		return "", "", fmt.Errorf("certificate has %d URI names; a service has one", len(cert.URIs))
	}
	parts := strings.Split(strings.TrimPrefix(cert.URIs[0].Path, "/"), "/")
	if len(parts) != 3 || parts[0] != "svc" {
		return "", "", fmt.Errorf("certificate of %.200q names no service", cert.URIs[0])
	}
	want, err := serviceURI(domain, parts[1], parts[2])
	if err != nil {
		return "", "", fmt.Errorf("certificate of %.200q: %w", cert.URIs[0], err)
	}
	// One form and no other: a query, a port, user info or an escape makes it
	// another name.
	if cert.URIs[0].String() != want.String() {
		return "", "", fmt.Errorf("certificate of %.200q is not of the trust domain %s", cert.URIs[0], domain)
	}
	return parts[1], parts[2], nil
}

// serviceHost is the DNS name that every service of a kind answers to. It is
// never resolved.
func serviceHost(domain, kind string) string { return kind + ".svc." + domain }

func serviceURI(domain, kind, name string) (*url.URL, error) {
	if !plain(domain) {
		return nil, fmt.Errorf("trust domain %.80q: want lower-case letters, digits, dots and hyphens", domain)
	}
	if !plain(kind) || !plain(name) {
		return nil, fmt.Errorf("service %.80q: want kind and name of lower-case letters, digits, dots and hyphens", kind+"/"+name)
	}
	return &url.URL{Scheme: "spiffe", Host: domain, Path: "/svc/" + kind + "/" + name}, nil
}

// plain reports whether s can stand in a SPIFFE id and a DNS name unescaped
// (SPIFFE-ID 1.0, sections 2.1 and 2.2, less the underscore).
func plain(s string) bool {
	if s == "" || len(s) > 200 || s[0] == '.' || s[len(s)-1] == '.' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '.') {
			return false
		}
	}
	return true
}

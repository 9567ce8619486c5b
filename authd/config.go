package authd

import (
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"sallyport/authd/idp"
	"sallyport/internal/fault"
	"sallyport/internal/oidcrp"
)

// Config is the section "authd" of the configuration file.
type Config struct {
	// PublicURL is where browsers and agents reach authd: https, a host and
	// perhaps a port, no path. Required.
	PublicURL string `yaml:"public_url"`
	// Listen is the address of the HTTPS listener, host:port; empty: whoever
	// listens has a default.
	Listen string `yaml:"listen"`
	// TLS is the listener's own certificate; without it, one signed by our own CA.
	TLS TLS `yaml:"tls"`
	// IDP is the company's identity provider.
	IDP IDP `yaml:"idp"`
	// Users turns on the embedded identity provider instead.
	Users   []idp.User `yaml:"users"`
	Session Session    `yaml:"session"`
	// DeviceGrant would allow logins from machines without a browser (RFC 8628).
	DeviceGrant bool `yaml:"device_grant"`
}

// TLS names a PEM chain and its key.
type TLS struct {
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
}

// IDP says how authd is registered at the identity provider. The redirect URI to
// register there is PublicURL + "/callback".
type IDP struct {
	// Issuer is compared exactly with what the provider says of itself.
	Issuer           string `yaml:"issuer"`
	ClientID         string `yaml:"client_id"`
	ClientSecretFile string `yaml:"client_secret_file"` // none: a public client
	// CAFile verifies the provider's certificate; none: the system's roots.
	CAFile string `yaml:"ca_file"`
	// Scopes beside openid; empty: profile, email.
	Scopes []string `yaml:"scopes"`
	// GroupsClaim lists the user's groups; empty: groups.
	GroupsClaim string `yaml:"groups_claim"`
	// GroupsString takes a string in that claim for one group; else such a login
	// is refused.
	GroupsString bool `yaml:"groups_string"`
}

// Session bounds what a login gives.
type Session struct {
	// Lifetime of a login and its sessions; 0: 12 h.
	Lifetime time.Duration `yaml:"lifetime"`
	// Idle ends a session that was not renewed for so long; 0: never. Agents
	// renew at half the certificate's lifetime.
	Idle time.Duration `yaml:"idle"`
	// SingleLogout ends all sessions of the login when one logs out.
	SingleLogout bool `yaml:"single_logout"`
	// CertificateLifetime of session certificates; 0: 1 h.
	CertificateLifetime time.Duration `yaml:"certificate_lifetime"`
}

// Defaults and bounds of Session.
const (
	defaultLifetime    = 12 * time.Hour
	defaultCertificate = time.Hour
	minCertificate     = 20 * time.Second // half of it is the agents' margin for the way and the clock
	maxCertificate     = 24 * time.Hour
)

// pathIDP is where the embedded provider lives; its issuer is PublicURL + pathIDP.
const pathIDP = "/idp"

// embeddedClient is authd's client id at the embedded provider.
const embeddedClient = "sallyport"

// Validate returns every fault of the section, keys relative to it. It reads no
// files.
func (c Config) Validate() fault.List {
	var faults fault.List
	checkPublicURL(&faults, c.PublicURL)
	if _, _, err := net.SplitHostPort(c.Listen); c.Listen != "" && err != nil {
		faults.Addf("listen", "%q is not host:port", c.Listen)
	}
	if (c.TLS.CertFile == "") != (c.TLS.KeyFile == "") {
		faults.Addf("tls", "wants both cert_file and key_file, or neither")
	}
	switch {
	case c.IDP.Issuer != "" && len(c.Users) > 0:
		faults.Addf("users", "the embedded identity provider does not run beside another: remove users or idp")
	case len(c.Users) > 0:
		for _, f := range idp.Validate(c.Users) {
			f.Key = "users" + f.Key
			faults = append(faults, f)
		}
	case c.IDP.Issuer == "":
		faults.Addf("idp.issuer", "is missing: the identity provider's issuer URL (or list users for the embedded one)")
	default:
		faults.Under("idp", c.IDP.validate())
	}
	faults.Under("session", c.Session.validate())
	if c.DeviceGrant {
		faults.Addf("device_grant", "is not there yet: log in with agent login --no-browser on machines without one")
	}
	return faults
}

func checkPublicURL(faults *fault.List, raw string) {
	u, err := url.Parse(raw)
	switch {
	case raw == "":
		faults.Addf("public_url", "is missing: https://auth.corp.example")
	case err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil:
		faults.Addf("public_url", "%q must be https://host[:port]", raw)
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		faults.Addf("public_url", "%q must have no path, query or fragment", raw)
	}
}

func (i IDP) validate() fault.List {
	var faults fault.List
	if err := oidcrp.CheckIssuer(i.Issuer); err != nil {
		faults.Addf("issuer", "%q %v", i.Issuer, err)
	}
	if i.ClientID == "" {
		faults.Addf("client_id", "is missing: authd's client id at the identity provider")
	}
	for n, scope := range i.Scopes {
		if scope == "" || strings.ContainsAny(scope, " \t\r\n\"\\") {
			faults.Addf(fmt.Sprintf("scopes[%d]", n), "%q is no scope", scope)
		}
	}
	return faults
}

func (s Session) validate() fault.List {
	var faults fault.List
	certificate := s.certificateLifetime()
	if s.Lifetime < 0 || s.Lifetime > 0 && s.Lifetime < time.Minute {
		faults.Addf("lifetime", "%v must be at least 1m", s.Lifetime)
	}
	if certificate < minCertificate || certificate > maxCertificate {
		faults.Addf("certificate_lifetime", "%v must be between %v and %v", certificate, minCertificate, maxCertificate)
	}
	if s.Idle < 0 || s.Idle > 0 && s.Idle < certificate {
		faults.Addf("idle", "%v must be 0 or at least certificate_lifetime (%v): agents renew at half of that", s.Idle, certificate)
	}
	return faults
}

func (s Session) lifetime() time.Duration {
	if s.Lifetime == 0 {
		return defaultLifetime
	}
	return s.Lifetime
}

func (s Session) certificateLifetime() time.Duration {
	if s.CertificateLifetime == 0 {
		return defaultCertificate
	}
	return s.CertificateLifetime
}

// embedded reports whether the embedded identity provider is to run.
func (c Config) embedded() bool { return len(c.Users) > 0 }

// publicURL is PublicURL in the one form that proofs name as their audience.
func (c Config) publicURL() string { return strings.TrimRight(c.PublicURL, "/") }

// maxSecretFile bounds the client secret's file.
const maxSecretFile = 4 << 10

// readSecret reads a secret file, less its final line break.
func readSecret(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	secret := strings.TrimRight(string(b), "\r\n")
	if secret == "" || len(secret) > maxSecretFile {
		return "", fmt.Errorf("%s: holds no secret", file)
	}
	return secret, nil
}

package sallyport

import (
	"encoding/json"
	"fmt"
	"time"
)

// Login is the payload of KindLogin: one login at the IdP. Its sessions live
// only while it does.
type Login struct {
	ID      LoginID   `json:"id"`
	User    UserID    `json:"user"`
	Issuer  string    `json:"issuer"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	// Authenticated is when the person last logged in for it: later than Created
	// once the session was extended; zero: at Created.
	Authenticated time.Time `json:"authenticated,omitzero"`
	// AuthMethods is the ID token's "amr" (RFC 8176), plus "acr" if there is one.
	AuthMethods []string `json:"auth_methods,omitempty"`
	// TokenVersion counts the identity provider's tokens that were stored for the
	// login, in a KindIDPToken of the same id; 0: none.
	TokenVersion uint64 `json:"token_version,omitzero"`
}

// SessionKind is what holds a session.
type SessionKind string

// The kinds of sessions.
const (
	AgentSession   SessionKind = "agent"
	BrowserSession SessionKind = "browser"
)

// Session is the payload of KindSession.
type Session struct {
	ID      SessionID   `json:"id"`
	Login   LoginID     `json:"login"`
	User    UserID      `json:"user"`
	Device  DeviceID    `json:"device,omitempty"`
	Kind    SessionKind `json:"kind"`
	Created time.Time   `json:"created"`
	Expires time.Time   `json:"expires"`
	// Claims are those of the ID token and userinfo at this login, without the
	// protocol's own (iss, aud, nonce, …).
	Claims map[string]any `json:"claims,omitempty"`
	// AuthMethods is a copy of the login's.
	AuthMethods []string `json:"auth_methods,omitempty"`
	// Address is where the login came from, for the operator's list.
	Address string `json:"address,omitempty"`
}

// User is the payload of KindUser: what the IdP last said.
type User struct {
	ID            UserID         `json:"id"`
	Issuer        string         `json:"issuer"`
	Email         string         `json:"email,omitempty"`
	EmailVerified bool           `json:"email_verified,omitempty"`
	Name          string         `json:"name,omitempty"`
	Claims        map[string]any `json:"claims,omitempty"`
	// Disabled users have no live session, whatever their records say.
	Disabled bool `json:"disabled,omitempty"`
}

// Group is a directory group.
type Group struct {
	ID   string `json:"id"`
	Name string `json:"name,omitempty"`
}

// DirectoryUser is the payload of KindDirectoryUser: what the directory says.
type DirectoryUser struct {
	User   UserID  `json:"user"`
	Email  string  `json:"email,omitempty"`
	Groups []Group `json:"groups,omitempty"`
}

// Device is the payload of KindDevice.
type Device struct {
	ID DeviceID `json:"id"`
	// PublicKey is the device key in PKIX DER; ECDSA P-256.
	PublicKey []byte `json:"public_key"`
	// Name is the host name as the agent claimed it.
	Name string `json:"name,omitempty"`
	// Type is how its key is kept: tpm, secure_enclave, keyring, file.
	Type string `json:"type,omitempty"`
	// Users are the users who confirmed this key, and when.
	Users map[UserID]time.Time `json:"users,omitempty"`
	// Approved is set by an administrator.
	Approved bool `json:"approved,omitempty"`
	// Revoked devices have no live session.
	Revoked bool `json:"revoked,omitempty"`
}

// Posture is the payload of KindPosture: the last accepted report of a device.
type Posture struct {
	Device   DeviceID        `json:"device"`
	Session  SessionID       `json:"session"`
	Sequence int64           `json:"sequence"`
	Received time.Time       `json:"received"` // policyd's clock
	Facts    map[string]Fact `json:"facts"`
}

// Route is one entry of the configuration's routes.
type Route struct {
	// From is what people ask for: "tcp://db.internal:5432",
	// "tcp://*.svc.internal:22", "tcp://10.0.0.0/8:22", "tcp://[2001:db8::/32]:22",
	// "tcp://db.internal:5000-5010", "https://wiki.corp.example".
	From string `json:"from"`
	// To is what the gateway dials; empty: the asked-for host itself. Under a range
	// of ports it has the same range, and the asked-for port is dialled.
	To string `json:"to,omitempty"`
	// Name is a short name people may type; empty: none.
	Name string `json:"name,omitempty"`
	// Policy is the policy's YAML text.
	Policy string `json:"policy"`
	// Hidden routes answer those they do not allow as if they did not exist.
	Hidden bool `json:"hidden,omitempty"`
	// Carrier is "bulk" to prefer lanes, or empty.
	Carrier string `json:"carrier,omitempty"`
}

// GatewayInfo tells agents where a gateway is.
type GatewayInfo struct {
	Name string `json:"name"`
	// URL is the tunnel host, "https://gw.corp.example[:port]".
	URL string `json:"url"`
	// Addresses to dial instead of resolving the URL's host, host:port; optional.
	Addresses []string `json:"addresses,omitempty"`
	// CA is the PEM bundle that signs its certificate; empty: the system's roots.
	CA string `json:"ca,omitempty"`
}

// Config is the payload of KindConfig: routes and policy as one record, whose
// revision is the policy revision.
type Config struct {
	Domain   string        `json:"domain"`
	Routes   []Route       `json:"routes"`
	Gateways []GatewayInfo `json:"gateways,omitempty"`
	// ExplainGroups lets explanations name the groups a rule asks for.
	ExplainGroups bool `json:"explain_groups,omitempty"`
	// PostureSources are the sources whose facts count unless a criterion names
	// its own; empty: os, attested.
	PostureSources []string `json:"posture_sources,omitempty"`
	// PostureTTL is how long a fact counts without a newer report; 0: 10 min.
	PostureTTL time.Duration `json:"posture_ttl,omitempty"`
	// Forbidden are addresses that no route may point to: the control plane's and
	// the gateways' own listeners, host:port.
	Forbidden []string `json:"forbidden,omitempty"`
	// Applied, By and Source say when, by which user of the operator's machine and
	// from which file it was applied, for people.
	Applied time.Time `json:"applied,omitzero"`
	By      string    `json:"by,omitempty"`
	Source  string    `json:"source,omitempty"`
	// RollbackTo is the earlier revision that was brought back; 0: it came from
	// Source itself.
	RollbackTo Revision `json:"rollback_to,omitempty"`
}

// PastConfig is the payload of KindConfigHistory. The record's revision is that
// of the configuration, because both are written in one batch.
type PastConfig struct {
	Applied    time.Time `json:"applied"`
	By         string    `json:"by,omitempty"`
	Source     string    `json:"source,omitempty"`
	RollbackTo Revision  `json:"rollback_to,omitempty"`
	Routes     int       `json:"routes"`
	// Packed is the Config's JSON in gzip (RFC 1952): of 10,000 routes megabytes
	// become kilobytes.
	Packed []byte `json:"packed"`
}

// External is the payload of KindRecord: data about somebody or something from
// outside, for the policy's criterion record.
type External struct {
	// Type says what it is ("risk"), ID whom it is about: a user id, device id or
	// address.
	Type string `json:"type"`
	ID   string `json:"id"`
	// Fields are JSON values.
	Fields map[string]any `json:"fields"`
}

// ExternalID is the id of the record that holds the External of a type and id.
func ExternalID(typ, id string) string { return typ + "/" + id }

// Decode reads the JSON payload of a live record into a value of type T.
func Decode[T any](r Record) (T, error) {
	var v T
	if r.Deleted {
		return v, fmt.Errorf("%s %s: %w", r.Kind, r.ID, ErrNotFound)
	}
	if err := json.Unmarshal(r.Payload, &v); err != nil {
		return v, fmt.Errorf("%s %s: payload: %w", r.Kind, r.ID, err)
	}
	return v, nil
}

// Put returns the Op that writes v as the payload of kind and id.
func Put(kind Kind, id string, v any) Op {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("payload of %s does not marshal: %v", kind, err)) // our own types always do
	}
	return Op{Kind: kind, ID: id, Version: 1, Payload: b}
}

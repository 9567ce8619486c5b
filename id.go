package sallyport

import (
	"crypto/rand"
	"encoding/base32"
	"strings"
)

// Identifiers are types of their own so that the compiler keeps them apart.
// All of them are printable ASCII without blanks and safe in a URL path, a log
// line and a SPIFFE id. The empty identifier means "none".
type (
	// LoginID names one act of logging in at the IdP; it is the parent of sessions.
	LoginID string
	// SessionID names what a session certificate stands for. It is an
	// identifier, not a secret: possession of the session key proves it.
	SessionID string
	// UserID is the IdP's "sub" (OpenID Connect Core 1.0, section 2): 1 to 255
	// bytes, no control characters.
	UserID string
	// DeviceID is the lower-case base32 SHA-256 of the device's public key in
	// PKIX DER, without padding: 52 characters.
	DeviceID string
	// FlowID names one proxied connection on one gateway, "f-" and 80 random bits.
	FlowID string
	// DecisionID names one answer of policyd, "d-" and 80 random bits.
	DecisionID string
)

var idEncoding = base32.NewEncoding("0123456789ABCDEFGHJKMNPQRSTVWXYZ").WithPadding(base32.NoPadding)

// NewID returns prefix, a hyphen and 80 bits from crypto/rand in Crockford's
// base32 (16 characters): unguessable enough for names, not meant as a secret.
func NewID(prefix string) string {
	var b [10]byte
	rand.Read(b[:]) // never fails: crypto/rand.Read ends the process instead
	return prefix + "-" + idEncoding.EncodeToString(b[:])
}

// NewSecret returns 256 random bits in lower-case base32 (52 characters), for
// codes and nonces.
func NewSecret() string {
	var b [32]byte
	rand.Read(b[:])
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b[:]))
}

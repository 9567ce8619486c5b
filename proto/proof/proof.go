// Package proof is what a device key signs: compact JWS (RFC 7515) with ES256
// and typed payloads. One key, one purpose: the "typ" header separates a login
// proof from a posture report, so neither can be passed off as the other.
package proof

import (
	"crypto"
	"crypto/ecdsa"

	"sallyport"
)

// The typ headers.
const (
	TypeLogin   = "sallyport-login+jwt"
	TypePosture = "sallyport-posture+jwt"
)

// Login is the payload of a login, renewal or logout proof.
type Login struct {
	Nonce string `json:"nonce"`
	// Audience is authd's public URL.
	Audience string `json:"aud"`
	// Action is "token", "renew" or "logout".
	Action string `json:"act"`
	// Session is set for renew and logout.
	Session sallyport.SessionID `json:"session,omitempty"`
	// CSRHash is the SHA-256 of the CSR's DER; empty for logout.
	CSRHash []byte `json:"csr_hash,omitempty"`
}

// Signer is a device key: crypto.Signer over ECDSA P-256 (a TPM, a keyring entry
// or a file stands behind it).
type Signer interface{ crypto.Signer }

// Key is a verified public device key.
type Key struct {
	Public *ecdsa.PublicKey
	// ID is the device id, Thumbprint the RFC 7638 thumbprint in base64url.
	ID         sallyport.DeviceID
	Thumbprint string
}

// Fingerprint is a thumbprint as people compare it: on authd's page about a new
// device and in the terminal beside it.
func Fingerprint(thumbprint string) string { return "SHA256:" + thumbprint }

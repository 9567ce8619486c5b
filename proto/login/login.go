// Package login is the wire between an agent and authd: paths, parameters and
// JSON messages of DESIGN.md, section 4. A code (RFC 6749, section 4.1, with PKCE
// S256, RFC 7636) is redeemed for a session certificate, never for a token. Both
// sides bind everything to the device key, whose signatures are package proof's.
package login

import (
	"time"

	"sallyport"
)

// Paths under authd's public URL. Agent-facing ones take and give JSON; errors
// are connect.Problem documents with status 400, 401, 429 or 503.
const (
	PathMetadata  = "/.well-known/sallyport" // GET: Metadata
	PathAuthorize = "/authorize"             // GET in the browser, parameters below
	PathCallback  = "/callback"              // the IdP's redirect_uri
	PathConsent   = "/consent"               // POST from authd's own page
	PathNonce     = "/nonce"                 // POST: Nonce
	PathToken     = "/token"                 // POST TokenRequest: Grant
	PathRenew     = "/renew"                 // POST RenewRequest: Grant
	PathLogout    = "/logout"                // POST LogoutRequest: 204
)

// Parameters of PathAuthorize (RFC 6749, 7636, 9449) beside response_type=code,
// client_id=agent, redirect_uri, state, code_challenge, code_challenge_method=S256.
const (
	ParamDPoPJKT    = "dpop_jkt"    // RFC 7638 thumbprint of the device key, base64url
	ParamDevice     = "device_id"   // device id of that key, so that a confirmed one is recognised
	ParamDeviceName = "device_name" // host name as the agent claims it
	ParamDeviceOS   = "device_os"
	ParamExtend     = "extend" // session id to prolong: same ids, same user, later end
)

// The end of the browser's way is a GET of the agent's redirect_uri with "state"
// and "iss" (authd's public URL, RFC 9207) and either "code", or "error" (RFC 6749,
// section 4.1.2.1) with one of the stable codes ("oidc.bad_sub", "login.denied")
// as "error_description". A failure that authd cannot tie to a flow of this
// browser stays on authd's own page: the agent gives up at its own time limit.

// Metadata is what an agent reads first.
type Metadata struct {
	// Issuer is authd's public URL; must equal the one that was asked.
	Issuer string `json:"issuer"`
	Domain string `json:"domain"`
}

// Nonce is a single-use value for the next proof; it lives two minutes.
type Nonce struct {
	Nonce string `json:"nonce"`
}

// TokenRequest redeems a code. A wrong verifier, redirect or key burns the code.
type TokenRequest struct {
	Code         string `json:"code"`
	CodeVerifier string `json:"code_verifier"`
	RedirectURI  string `json:"redirect_uri"`
	// CSR is the PKCS #10 request of the fresh session key, DER; ECDSA P-256.
	// Subject and extensions are ignored by authd except that it refuses what E9 lists.
	CSR []byte `json:"csr"`
	// Proof is a JWS by the device key over proof.Login; its header carries the
	// public key (jwk), whose thumbprint must be the dpop_jkt of the flow.
	Proof string `json:"proof"`
	// KeyProtection is how the agent keeps its device key: tpm, keyring, file.
	KeyProtection string `json:"key_protection,omitempty"`
}

// RenewRequest asks for the next certificate of a live session; also with an
// expired certificate, since no certificate is looked at.
type RenewRequest struct {
	Session sallyport.SessionID `json:"session"`
	CSR     []byte              `json:"csr"`
	Proof   string              `json:"proof"`
}

// LogoutRequest ends the session (and its login with authd.session.single_logout).
type LogoutRequest struct {
	Session sallyport.SessionID `json:"session"`
	Proof   string              `json:"proof"` // over proof.Login with an empty CSR hash
}

// Grant is the answer to a token or renew request.
type Grant struct {
	Session sallyport.SessionID `json:"session"`
	User    sallyport.UserID    `json:"user"`
	Email   string              `json:"email,omitempty"`
	Name    string              `json:"name,omitempty"`
	Domain  string              `json:"domain"`
	// Certificate is the chain, leaf first, PEM.
	Certificate string `json:"certificate"`
	// RenewIn is when to ask for the next one: half the certificate's life.
	RenewIn time.Duration `json:"renew_in"`
	// ExpiresIn is how long the session lives.
	ExpiresIn time.Duration           `json:"expires_in"`
	Gateways  []sallyport.GatewayInfo `json:"gateways"`
}

package sallyport

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"maps"
	"slices"
	"strings"
	"time"
)

// Trust is the payload of KindTrust: whom gateways believe.
type Trust struct {
	// SessionCAs is the PEM bundle of authd's session CAs, the newest first.
	SessionCAs string `json:"session_cas"`
	// Terms say since when a CA is known and when it retires, by the CertificateID
	// of its certificate. A CA without a term is known to everybody and retires
	// never. The terms of retired CAs stay, so that none of them comes back.
	Terms map[string]TrustTerm `json:"terms,omitempty"`
}

// TrustTerm is the time in which a session CA counts.
type TrustTerm struct {
	// Since is when gateways were first told of the CA; zero: before there were
	// terms, or together with the deployment.
	Since time.Time `json:"since,omitzero"`
	// Retires is when gateways cease to believe it; zero: that is not known yet.
	Retires time.Time `json:"retires,omitzero"`
}

// Retired reports whether the term is over at now.
func (t TrustTerm) Retired(now time.Time) bool { return !t.Retires.IsZero() && !now.Before(t.Retires) }

// Believed returns the PEM bundle of the session CAs that count at now.
func (t Trust) Believed(now time.Time) string {
	retired := func(term TrustTerm) bool { return term.Retired(now) }
	if !slices.ContainsFunc(slices.Collect(maps.Values(t.Terms)), retired) {
		return t.SessionCAs
	}
	var kept strings.Builder
	for rest := []byte(t.SessionCAs); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return kept.String()
		}
		if !retired(t.Terms[CertificateID(block.Bytes)]) {
			kept.Write(pem.EncodeToMemory(block))
		}
	}
}

// CertificateID names a certificate by its content: the SHA-256 of its DER, in
// hex.
func CertificateID(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

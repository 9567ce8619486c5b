package oidcrp

import (
	"errors"
	"strings"
	"unicode"
)

// Codes of refusals. They are stable: people search for them.
const (
	CodeIssuerMismatch   = "oidc.issuer_mismatch" // discovery names another issuer
	CodeBadDiscovery     = "oidc.bad_discovery"
	CodeUnavailable      = "oidc.unavailable" // the provider cannot be reached: try later
	CodeTokenRefused     = "oidc.token_refused"
	CodeRejected         = "login.code_rejected" // the provider does not take this code
	CodeMalformed        = "oidc.malformed"
	CodeBadAlg           = "oidc.bad_alg"
	CodeBadSignature     = "oidc.bad_signature"
	CodeWeakKey          = "oidc.weak_key"
	CodeKidRequired      = "oidc.kid_required"
	CodeBadJWKS          = "oidc.bad_jwks"
	CodeIssMismatch      = "oidc.iss_mismatch"
	CodeAudMismatch      = "oidc.aud_mismatch"
	CodeNonceMismatch    = "oidc.nonce_mismatch"
	CodeBadSub           = "oidc.bad_sub"
	CodeBadIat           = "oidc.bad_iat"
	CodeBadExp           = "oidc.bad_exp"
	CodeNotYetValid      = "oidc.not_yet_valid"
	CodeAtHashMismatch   = "oidc.at_hash_mismatch"
	CodeUserinfoMismatch = "oidc.userinfo_sub_mismatch"
	CodeBadUserinfo      = "oidc.bad_userinfo"
	CodeBadGroups        = "oidc.bad_groups"
	CodeTooManyGroups    = "oidc.groups_too_many"
	CodeGroupsOverage    = "oidc.groups_overage" // the provider left the groups out
	CodeClaimsTooLarge   = "oidc.claims_too_large"
)

// Error is why a login is refused.
type Error struct {
	Code string
	// Detail is for the operator: our own words, perhaps a short clipping of the
	// provider's. Never show it to a browser.
	Detail string
	Err    error
}

func (e *Error) Error() string {
	s := e.Code
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	if e.Err != nil {
		s += ": " + Clip(e.Err.Error())
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// CodeOf returns the code of the first *Error in err's chain, or "".
func CodeOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

func refuse(code, detail string, err error) error { return &Error{code, detail, err} }

func unreachable(what string, err error) error { return &Error{CodeUnavailable, what, err} }

// maxClip is how much of foreign text goes into a log or an audit record.
const maxClip = 200

// Clip makes foreign text fit for a log line: at most 200 characters, all of
// them printable.
func Clip(s string) string {
	var b strings.Builder
	n := 0
	for _, r := range s {
		if n++; n > maxClip {
			break
		}
		if !unicode.IsPrint(r) {
			r = '·'
		}
		b.WriteRune(r)
	}
	return b.String()
}

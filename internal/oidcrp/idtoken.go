package oidcrp

import (
	"bytes"
	"context"
	"crypto"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	strictjson "github.com/go-jose/go-jose/v4/json"
)

// Bounds on an ID token.
const (
	leeway       = 60 * time.Second // of clocks, both ways
	maxTokenAge  = 10 * time.Minute
	maxHeaderLen = 8 << 10
	maxSubLen    = 255             // OpenID Connect Core 1.0, section 2
	maxUnixTime  = 253_402_300_799 // the end of year 9999
)

// expected is what this login knows and the token must match.
type expected struct{ nonce, accessToken, code string }

type verifiedToken struct {
	claims claims
	late   bool // expired, within the leeway
}

// verifyIDToken makes every check of OpenID Connect Core 1.0, section 3.1.3.7,
// in the order of its steps as far as the codes allow: form, algorithm, key,
// signature, then claims.
func (c *Client) verifyIDToken(ctx context.Context, p *provider, raw string, want expected) (verifiedToken, error) {
	header, err := parseHeader(raw)
	if err != nil {
		return verifiedToken{}, refuse(CodeMalformed, "", err)
	}
	if !slices.Contains(p.algs, header.Alg) {
		return verifiedToken{}, refuse(CodeBadAlg, Clip(header.Alg), nil)
	}
	jws, err := jose.ParseSignedCompact(raw, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(header.Alg)})
	if err != nil {
		return verifiedToken{}, refuse(CodeMalformed, "", err)
	}
	payload, err := p.keys.verify(ctx, jws, header.Kid, header.Alg)
	if err != nil {
		return verifiedToken{}, err
	}
	claims, err := parseClaims(payload)
	if err != nil {
		return verifiedToken{}, refuse(CodeMalformed, "payload", err)
	}
	late, err := c.checkClaims(claims, header.Alg, want)
	if err != nil {
		return verifiedToken{}, err
	}
	if err := c.secondOpinion(ctx, raw, payload, header.Alg, claims); err != nil {
		return verifiedToken{}, refuse(CodeMalformed, "go-oidc reads it differently", err)
	}
	return verifiedToken{claims, late}, nil
}

// secondOpinion asks go-oidc, with the signature already checked, whether it
// reads the same token: two parsers that disagree are how such bugs start.
func (c *Client) secondOpinion(ctx context.Context, raw string, payload []byte, alg string, ours claims) error {
	verifier := oidc.NewVerifier(c.cfg.Issuer, checkedPayload(payload), &oidc.Config{
		ClientID:             c.cfg.ClientID,
		SupportedSigningAlgs: []string{alg},
		Now:                  func() time.Time { return c.cfg.Now().Add(-leeway) },
	})
	token, err := verifier.Verify(ctx, raw)
	if err != nil {
		return err
	}
	if token.Subject != ours.text("sub") || token.Nonce != ours.text("nonce") {
		return errors.New("other sub or nonce")
	}
	return nil
}

// checkedPayload is a key set for a token whose signature is already checked.
type checkedPayload []byte

func (p checkedPayload) VerifySignature(context.Context, string) ([]byte, error) { return p, nil }

type tokenHeader struct{ Alg, Kid string }

// parseHeader accepts a compact JWS (RFC 7515, section 3.1) whose header asks for
// nothing beyond a signature: no other serialisation, no encryption, no key or
// address of a key brought along.
func parseHeader(raw string) (tokenHeader, error) {
	if strings.Count(raw, ".") != 2 || strings.ContainsAny(raw, "\r\n") {
		return tokenHeader{}, errors.New("not a compact JWS")
	}
	first, _, _ := strings.Cut(raw, ".")
	if len(first) > maxHeaderLen {
		return tokenHeader{}, errors.New("header too long")
	}
	text, err := base64.RawURLEncoding.DecodeString(first)
	if err != nil {
		return tokenHeader{}, errors.New("header is not base64url")
	}
	var members map[string]any
	if err := decodeStrict(text, &members); err != nil {
		return tokenHeader{}, err
	}
	for _, name := range []string{"crit", "jku", "jwk", "x5u", "x5c", "b64", "enc", "zip", "p2c", "p2s", "epk"} {
		if _, ok := members[name]; ok {
			return tokenHeader{}, errors.New("header has " + name)
		}
	}
	if typ, ok := members["typ"]; ok {
		// at+jwt, logout+jwt and others are not ID tokens (RFC 8725, section 3.11).
		if s, isText := typ.(string); !isText || !strings.EqualFold(s, "JWT") {
			return tokenHeader{}, errors.New("header has another typ")
		}
	}
	alg, _ := members["alg"].(string)
	kid, isText := members["kid"].(string)
	if _, ok := members["kid"]; ok && (!isText || kid == "") {
		return tokenHeader{}, errors.New("header has a bad kid")
	}
	return tokenHeader{alg, kid}, nil
}

func (c *Client) checkClaims(t claims, alg string, want expected) (late bool, err error) {
	if iss, ok := t["iss"].(string); !ok || iss != c.cfg.Issuer {
		return false, refuse(CodeIssMismatch, "", nil)
	}
	if !c.audienceIsUs(t) {
		return false, refuse(CodeAudMismatch, "", nil)
	}
	if subtle.ConstantTimeCompare([]byte(t.text("nonce")), []byte(want.nonce)) != 1 {
		return false, refuse(CodeNonceMismatch, "", nil)
	}
	if !validSub(t["sub"]) {
		return false, refuse(CodeBadSub, "", nil)
	}
	late, err = c.checkTimes(t)
	if err != nil {
		return false, err
	}
	for claim, secret := range map[string]string{"at_hash": want.accessToken, "c_hash": want.code} {
		if got, ok := t[claim]; ok && got != halfHash(alg, secret) {
			return false, refuse(CodeAtHashMismatch, claim, nil)
		}
	}
	return late, nil
}

// audienceIsUs wants us, alone: a token that others may use too is one that
// others can bring here.
func (c *Client) audienceIsUs(t claims) bool {
	if azp, ok := t["azp"]; ok && azp != c.cfg.ClientID {
		return false
	}
	switch aud := t["aud"].(type) {
	case string:
		return aud == c.cfg.ClientID
	case []any:
		return len(aud) == 1 && aud[0] == c.cfg.ClientID
	}
	return false
}

func validSub(v any) bool {
	sub, ok := v.(string)
	if !ok || sub == "" || len(sub) > maxSubLen || !utf8.ValidString(sub) {
		return false
	}
	return !strings.ContainsFunc(sub, func(r rune) bool { return !unicode.IsPrint(r) })
}

func (c *Client) checkTimes(t claims) (late bool, err error) {
	now := c.cfg.Now()
	iat, ok := t.time("iat")
	if !ok || iat.After(now.Add(leeway)) || iat.Before(now.Add(-maxTokenAge)) {
		return false, refuse(CodeBadIat, "", nil)
	}
	exp, ok := t.time("exp")
	if !ok || now.After(exp.Add(leeway)) {
		return false, refuse(CodeBadExp, "", nil)
	}
	if _, present := t["nbf"]; present {
		nbf, ok := t.time("nbf")
		if !ok || nbf.After(now.Add(leeway)) {
			return false, refuse(CodeNotYetValid, "", nil)
		}
	}
	return now.After(exp), nil
}

// halfHash is at_hash and c_hash: the left half of the hash that belongs to alg,
// in base64url (OpenID Connect Core 1.0, section 3.1.3.6).
func halfHash(alg, secret string) string {
	hash := crypto.SHA512 // 512 and, by its own hash, Ed25519
	switch {
	case strings.HasSuffix(alg, "256"):
		hash = crypto.SHA256
	case strings.HasSuffix(alg, "384"):
		hash = crypto.SHA384
	}
	h := hash.New()
	h.Write([]byte(secret))
	sum := h.Sum(nil)
	return base64.RawURLEncoding.EncodeToString(sum[:len(sum)/2])
}

// claims is a decoded JSON object; its numbers are json.Number.
type claims map[string]any

func parseClaims(payload []byte) (claims, error) {
	var strict any
	if err := decodeStrict(payload, &strict); err != nil {
		return nil, err
	}
	var c claims
	d := json.NewDecoder(bytes.NewReader(payload)) // for its Number, which marshals as one
	d.UseNumber()
	if err := d.Decode(&c); err != nil {
		return nil, err
	}
	if c == nil {
		return nil, errors.New("not an object")
	}
	for name := range c {
		// Whoever reads this with encoding/json takes "SUB" for "sub".
		if lower := strings.ToLower(name); lower != name && slices.Contains(protocolClaims, lower) {
			return nil, errors.New("a claim of the protocol in another case")
		}
	}
	return c, nil
}

// text returns a string claim, "" if there is none of that type.
func (c claims) text(name string) string {
	s, _ := c[name].(string)
	return s
}

// time reads whole seconds since 1970 that a calendar can hold. Strings, and
// numbers with fraction or exponent, are none.
func (c claims) time(name string) (time.Time, bool) {
	n, ok := c[name].(json.Number)
	if !ok {
		return time.Time{}, false
	}
	sec, err := strconv.ParseInt(n.String(), 10, 64)
	if err != nil || sec < 0 || sec > maxUnixTime {
		return time.Time{}, false
	}
	return time.Unix(sec, 0), true
}

// decodeStrict reads one JSON value in which no object has a member twice and no
// member matches in another case, both of which encoding/json lets pass. It
// refuses nesting beyond encoding/json's limit first, which the strict decoder
// does not have.
func decodeStrict(data []byte, v any) error {
	if !json.Valid(data) {
		return errors.New("not JSON")
	}
	return strictjson.Unmarshal(data, v)
}

// Package oidcrptest is an OpenID Provider for tests that does everything right
// until it is told otherwise: a small real implementation of discovery, code flow
// with PKCE, keys and userinfo over loopback HTTP, whose every answer a test can
// bend. It logs the one person in without asking.
package oidcrptest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// ClientID and Secret are the registered client's; see Provider.RotateSecret.
const (
	ClientID = "client"
	Secret   = "oidcrptest-secret-of-no-other-use"
)

// Provider is the server. Set the hooks before the login that they shall bend.
type Provider struct {
	Server *httptest.Server
	// Key signs ID tokens with Alg under KeyID.
	Key   crypto.Signer
	Alg   jose.SignatureAlgorithm
	KeyID string

	// Discovery changes the metadata.
	Discovery func(map[string]any)
	// Callback changes the parameters of the redirect back.
	Callback func(url.Values)
	// Claims changes the ID token's claims before it is signed.
	Claims func(map[string]any)
	// Sign replaces the signing of the ID token.
	Sign func(claims map[string]any) string
	// Token changes the token endpoint's answer, whose status is Status if set.
	Token  func(map[string]any)
	Status int
	// Keys replaces the JWK Set.
	Keys func() []byte
	// Userinfo turns the userinfo endpoint on.
	Userinfo map[string]any

	t  testing.TB
	mu sync.Mutex
	// Seen lists the queries of /authorize, Paths all requested paths.
	Seen   []url.Values
	Paths  []string
	codes  map[string]url.Values
	secret string
}

// New starts a provider that the test's end stops.
func New(t testing.TB) *Provider {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := &Provider{t: t, Key: key, Alg: jose.ES256, KeyID: "k1", secret: Secret, codes: make(map[string]url.Values)}
	p.Server = httptest.NewServer(p)
	t.Cleanup(p.Server.Close)
	return p
}

// RotateSecret replaces the client's secret: the earlier one counts no more.
func (p *Provider) RotateSecret(secret string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.secret = secret
}

// Issuer is the issuer URL.
func (p *Provider) Issuer() string { return p.Server.URL }

// Count returns how often path was requested.
func (p *Provider) Count(path string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, seen := range p.Paths {
		if seen == path {
			n++
		}
	}
	return n
}

// LastQuery returns the parameters of the last /authorize.
func (p *Provider) LastQuery() url.Values {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.Seen) == 0 {
		return nil
	}
	return p.Seen[len(p.Seen)-1]
}

func (p *Provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.Paths = append(p.Paths, r.URL.Path)
	p.mu.Unlock()
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		p.discovery(w)
	case "/authorize":
		p.authorize(w, r)
	case "/token":
		p.token(w, r)
	case "/keys":
		w.Header().Set("Content-Type", "application/json")
		w.Write(p.keys())
	case "/userinfo":
		p.json(w, http.StatusOK, p.Userinfo)
	default:
		http.NotFound(w, r)
	}
}

func (p *Provider) json(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		p.t.Errorf("oidcrptest: %v", err)
	}
}

func (p *Provider) discovery(w http.ResponseWriter) {
	m := map[string]any{
		"issuer":                                p.Issuer(),
		"authorization_endpoint":                p.Issuer() + "/authorize",
		"token_endpoint":                        p.Issuer() + "/token",
		"jwks_uri":                              p.Issuer() + "/keys",
		"id_token_signing_alg_values_supported": []string{"RS256", "ES256", "EdDSA", "none", "HS256"},
		"code_challenge_methods_supported":      []string{"S256"},
	}
	if p.Userinfo != nil {
		m["userinfo_endpoint"] = p.Issuer() + "/userinfo"
	}
	if p.Discovery != nil {
		p.Discovery(m)
	}
	p.json(w, http.StatusOK, m)
}

func (p *Provider) authorize(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	code := rand.Text()
	p.mu.Lock()
	p.Seen = append(p.Seen, q)
	p.codes[code] = q
	p.mu.Unlock()
	back := url.Values{"code": {code}, "state": {q.Get("state")}}
	if p.Callback != nil {
		p.Callback(back)
	}
	http.Redirect(w, r, q.Get("redirect_uri")+"?"+back.Encode(), http.StatusFound)
}

func (p *Provider) token(w http.ResponseWriter, r *http.Request) {
	id, secret, _ := r.BasicAuth()
	p.mu.Lock()
	q, ok := p.codes[r.FormValue("code")]
	delete(p.codes, r.FormValue("code"))
	wantSecret := p.secret
	p.mu.Unlock()
	sum := sha256.Sum256([]byte(r.FormValue("code_verifier")))
	switch {
	case p.Status != 0:
		p.json(w, p.Status, map[string]any{"error": "server_error"})
		return
	case id != ClientID || secret != wantSecret:
		p.json(w, http.StatusUnauthorized, map[string]any{"error": "invalid_client"})
		return
	case !ok || q.Get("code_challenge") != base64.RawURLEncoding.EncodeToString(sum[:]) || q.Get("redirect_uri") != r.FormValue("redirect_uri"):
		p.json(w, http.StatusBadRequest, map[string]any{"error": "invalid_grant"})
		return
	}
	answer := map[string]any{
		"access_token": "at-" + rand.Text(), "token_type": "Bearer", "expires_in": 60,
		"id_token": p.idToken(q.Get("nonce")),
	}
	if p.Token != nil {
		p.Token(answer)
	}
	p.json(w, http.StatusOK, answer)
}

func (p *Provider) idToken(nonce string) string {
	now := time.Now().Unix()
	claims := map[string]any{
		"iss": p.Issuer(), "aud": ClientID, "sub": "alice", "nonce": nonce,
		"iat": now, "exp": now + 300,
		"email": "alice@corp.example", "email_verified": true, "name": "Alice", "groups": []any{"staff", "dba"},
	}
	if p.Claims != nil {
		p.Claims(claims)
	}
	if p.Sign != nil {
		return p.Sign(claims)
	}
	return p.SignWith(p.Key, p.Alg, map[string]any{"kid": p.KeyID, "typ": "JWT"}, claims)
}

// SignWith makes a compact JWS with extra header members; a nil member is left
// out.
func (p *Provider) SignWith(key any, alg jose.SignatureAlgorithm, header, claims map[string]any) string {
	p.t.Helper()
	opts := &jose.SignerOptions{ExtraHeaders: make(map[jose.HeaderKey]any)}
	for name, v := range header {
		if v != nil {
			opts.ExtraHeaders[jose.HeaderKey(name)] = v
		}
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, opts)
	if err != nil {
		p.t.Errorf("oidcrptest: signer: %v", err)
		return ""
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		p.t.Errorf("oidcrptest: %v", err)
		return ""
	}
	return Compact(p.t, signer, payload)
}

// Compact signs payload as it is.
func Compact(t testing.TB, signer jose.Signer, payload []byte) string {
	t.Helper()
	signed, err := signer.Sign(payload)
	if err != nil {
		t.Errorf("oidcrptest: sign: %v", err)
		return ""
	}
	raw, err := signed.CompactSerialize()
	if err != nil {
		t.Errorf("oidcrptest: %v", err)
	}
	return raw
}

func (p *Provider) keys() []byte {
	if p.Keys != nil {
		return p.Keys()
	}
	return KeySet(p.t, jose.JSONWebKey{Key: p.Key.Public(), KeyID: p.KeyID, Algorithm: string(p.Alg), Use: "sig"})
}

// KeySet is the JSON of a JWK Set.
func KeySet(t testing.TB, keys ...jose.JSONWebKey) []byte {
	t.Helper()
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
	if err != nil {
		t.Errorf("oidcrptest: %v", err)
	}
	return b
}

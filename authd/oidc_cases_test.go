package authd_test

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"sallyport"
	"sallyport/authd"
	"sallyport/internal/oidcrp/oidcrptest"
)

// The cases of SECURITY-CASES.md, A, through the browser: an identity provider
// that we did not write right, authd, and what the person sees.

var rsaKeys = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

// loginEnds runs one login up to authd's last word.
func loginEnds(w *world) answer {
	w.t.Helper()
	browser := w.browser()
	return w.follow(browser, w.get(browser, w.agent().authorizeURL()))
}

// accepted wants the consent page, which comes after all checks.
func (w *world) accepted(a answer) {
	w.t.Helper()
	if a.status != http.StatusOK || !strings.Contains(a.body, "Is this your computer?") {
		w.t.Errorf("got %d %s; want the login accepted", a.status, text(a.body))
	}
}

func segment(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

func TestCase_A1_DiscoveryIssuerMismatch(t *testing.T) {
	for name, issuer := range map[string]string{"other": "https://evil.example", "slash": "SAME/", "missing": ""} {
		t.Run(name, func(t *testing.T) {
			w := withProvider(t)
			w.idp.Discovery = func(m map[string]any) {
				m["issuer"] = strings.ReplaceAll(issuer, "SAME", w.idp.Issuer())
			}
			a := w.get(w.browser(), w.agent().authorizeURL())
			if a.header.Get("Location") != "" {
				t.Errorf("the browser was sent to %s", a.header.Get("Location"))
			}
			w.pageRefused(a, "oidc.issuer_mismatch")
			if err := w.server.Ready(); err == nil {
				t.Error("authd says that it is ready")
			}
		})
	}
}

func TestCase_A2_DiscoveryOverPlainHTTP(t *testing.T) {
	for issuer, ok := range map[string]bool{
		"http://login.corp.example": false, "http://192.0.2.1": false, "http://localhost.corp.example": false,
		"ftp://127.0.0.1": false, "login.corp.example": false, "https://user@login.corp.example": false, "https://login.corp.example?x": false,
		"https://login.corp.example": true, "http://127.0.0.1:8080": true, "http://[::1]:8080": true, "http://idp.localhost:8080/x": true,
	} {
		cfg := authd.Config{PublicURL: "https://auth.corp.example", Listen: ":443", IDP: authd.IDP{Issuer: issuer, ClientID: "c"}}
		faults := cfg.Validate()
		if (len(faults) == 0) != ok {
			t.Errorf("%s: got faults %v; want accepted: %v", issuer, faults, ok)
		}
		if !ok && len(faults) > 0 && faults[0].Key != "idp.issuer" {
			t.Errorf("%s: fault is at %s; want idp.issuer", issuer, faults[0].Key)
		}
	}
}

func TestCase_A_DiscoveryWithBadEndpoints(t *testing.T) {
	for name, endpoint := range map[string]string{"plain http": "http://login.corp.example/token", "relative": "/token", "user": "https://u:p@login.corp.example/token", "none": ""} {
		w := withProvider(t)
		w.idp.Discovery = func(m map[string]any) { m["token_endpoint"] = endpoint }
		a := w.get(w.browser(), w.agent().authorizeURL())
		if a.status != http.StatusBadRequest || !strings.Contains(a.body, "oidc.bad_discovery") {
			t.Errorf("%s: got %d %s; want oidc.bad_discovery", name, a.status, text(a.body))
		}
	}
}

// claimCases bend one claim of an otherwise perfect ID token. An empty code
// means that it must be accepted.
func TestCase_A10_A18_Claims(t *testing.T) {
	now := func(d time.Duration) int64 { return time.Now().Add(d).Unix() }
	set := func(name string, v any) func(*world, map[string]any) {
		return func(_ *world, c map[string]any) { c[name] = v }
	}
	del := func(name string) func(*world, map[string]any) {
		return func(_ *world, c map[string]any) { delete(c, name) }
	}
	cases := []struct {
		name string
		bend func(*world, map[string]any)
		code string
	}{
		{"A10 iss wrong", set("iss", "https://evil.example"), "oidc.iss_mismatch"},
		{"A10 iss missing", del("iss"), "oidc.iss_mismatch"},
		{"A10 iss with slash", func(w *world, c map[string]any) { c["iss"] = w.idp.Issuer() + "/" }, "oidc.iss_mismatch"},
		{"A10 iss in other case", func(w *world, c map[string]any) { c["iss"] = strings.ToUpper(w.idp.Issuer()) }, "oidc.iss_mismatch"},
		{"A10 iss array", func(w *world, c map[string]any) { c["iss"] = []string{w.idp.Issuer()} }, "oidc.iss_mismatch"},

		{"A11 aud wrong", set("aud", "other"), "oidc.aud_mismatch"},
		{"A11 aud missing", del("aud"), "oidc.aud_mismatch"},
		{"A11 aud empty", set("aud", []string{}), "oidc.aud_mismatch"},
		{"A11 aud us and other", set("aud", []string{oidcrptest.ClientID, "other"}), "oidc.aud_mismatch"},
		{"A11 aud us twice, azp other", func(_ *world, c map[string]any) {
			c["aud"], c["azp"] = []string{oidcrptest.ClientID, oidcrptest.ClientID}, "other"
		}, "oidc.aud_mismatch"},
		{"A11 azp other", set("azp", "other"), "oidc.aud_mismatch"},
		{"A11 aud array of one", set("aud", []string{oidcrptest.ClientID}), ""},
		{"A11 azp us", set("azp", oidcrptest.ClientID), ""},

		{"A12 nonce missing", del("nonce"), "oidc.nonce_mismatch"},
		{"A12 nonce wrong", set("nonce", "wrong"), "oidc.nonce_mismatch"},
		{"A12 nonce empty", set("nonce", ""), "oidc.nonce_mismatch"},

		{"A13 sub missing", del("sub"), "oidc.bad_sub"},
		{"A13 sub empty", set("sub", ""), "oidc.bad_sub"},
		{"A13 sub 256 long", set("sub", strings.Repeat("a", 256)), "oidc.bad_sub"},
		{"A13 sub with NUL", set("sub", "a\x00b"), "oidc.bad_sub"},
		{"A13 sub with newline", set("sub", "a\nb"), "oidc.bad_sub"},
		{"A13 sub number", set("sub", 7), "oidc.bad_sub"},
		{"A13 sub 255 long", set("sub", strings.Repeat("a", 255)), ""},
		{"A13 SUB in other case", func(_ *world, c map[string]any) { c["SUB"] = "admin" }, "oidc.malformed"},

		{"A14 iat missing", del("iat"), "oidc.bad_iat"},
		{"A15 iat in 70 s", set("iat", now(70*time.Second)), "oidc.bad_iat"},
		{"A15 iat 11 min ago", set("iat", now(-11*time.Minute)), "oidc.bad_iat"},
		{"A15 iat in 30 s", set("iat", now(30*time.Second)), ""},
		{"A15 iat text", set("iat", fmt.Sprint(now(0))), "oidc.bad_iat"},

		{"A16 exp missing", del("exp"), "oidc.bad_exp"},
		{"A16 exp 61 s ago", set("exp", now(-61*time.Second)), "oidc.bad_exp"},
		{"A16 exp text", set("exp", fmt.Sprint(now(time.Hour))), "oidc.bad_exp"},
		{"A16 exp float", set("exp", json.RawMessage(fmt.Sprintf("%d.5", now(time.Hour)))), "oidc.bad_exp"},
		{"A16 exp exponent", set("exp", json.RawMessage("9e9")), "oidc.bad_exp"},
		{"A16 exp 2^62", set("exp", int64(1)<<62), "oidc.bad_exp"},
		{"A16 exp negative", set("exp", -1), "oidc.bad_exp"},
		{"A16 exp 30 s ago", set("exp", now(-30*time.Second)), ""},

		{"A17 nbf in 70 s", set("nbf", now(70*time.Second)), "oidc.not_yet_valid"},
		{"A17 nbf text", set("nbf", "soon"), "oidc.not_yet_valid"},
		{"A17 nbf in 30 s", set("nbf", now(30*time.Second)), ""},

		{"A18 at_hash wrong", set("at_hash", "AAAAAAAAAAAAAAAAAAAAAA"), "oidc.at_hash_mismatch"},
		{"A18 at_hash number", set("at_hash", 1), "oidc.at_hash_mismatch"},
		{"A18 c_hash wrong", set("c_hash", "AAAAAAAAAAAAAAAAAAAAAA"), "oidc.at_hash_mismatch"},

		{"A30 groups string", set("groups", "dba"), "oidc.bad_groups"},
		{"A30 groups nested", set("groups", []any{[]any{"dba"}}), "oidc.bad_groups"},
		{"A30 groups object", set("groups", map[string]any{"dba": true}), "oidc.bad_groups"},
		{"A30 groups 4,097", set("groups", many(4097)), "oidc.groups_too_many"},
		{"A30 groups 5,000", set("groups", many(5000)), "oidc.groups_too_many"},
		{"A30 groups 4,096", set("groups", many(4096)), ""},
		{"A30 groups absent", del("groups"), ""},
		{"A30 overage", func(_ *world, c map[string]any) {
			delete(c, "groups")
			c["_claim_names"] = map[string]any{"groups": "src1"}
			c["_claim_sources"] = map[string]any{"src1": map[string]any{"endpoint": "https://graph.example/x"}}
		}, "oidc.groups_overage"},
		{"A30 hasgroups", func(_ *world, c map[string]any) { delete(c, "groups"); c["hasgroups"] = true }, "oidc.groups_overage"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			w := withProvider(t)
			w.idp.Claims = func(c map[string]any) { tc.bend(w, c) }
			end := loginEnds(w)
			if tc.code == "" {
				w.accepted(end)
				return
			}
			w.pageRefused(end, tc.code)
		})
	}
}

func many(n int) []string {
	groups := make([]string, n)
	for i := range groups {
		groups[i] = fmt.Sprintf("group-%d", i)
	}
	return groups
}

func TestCase_A12_NonceOfAnOlderLogin(t *testing.T) {
	w := withProvider(t)
	browser := w.browser()
	a := w.agent()
	var nonces []string
	w.idp.Claims = func(c map[string]any) {
		nonces = append(nonces, c["nonce"].(string))
		c["nonce"] = nonces[0]
	}
	w.accepted(w.follow(browser, w.get(browser, a.authorizeURL())))
	w.pageRefused(w.follow(browser, w.get(browser, a.authorizeURL())), "oidc.nonce_mismatch")
}

func TestCase_A18_RightAtHash(t *testing.T) {
	w := withProvider(t)
	var access string
	w.idp.Token = func(answer map[string]any) {
		access = "access"
		answer["access_token"] = access
	}
	w.idp.Claims = func(c map[string]any) {
		h := crypto.SHA256.New()
		h.Write([]byte("access"))
		c["at_hash"] = base64.RawURLEncoding.EncodeToString(h.Sum(nil)[:16])
	}
	w.accepted(loginEnds(w))
}

func TestCase_A5_A9_A22_Signatures(t *testing.T) {
	cases := []struct {
		name, code string
		sign       func(w *world, claims map[string]any) string
	}{
		{"A5 alg none", "oidc.bad_alg", func(_ *world, c map[string]any) string {
			return segment(map[string]any{"alg": "none"}) + "." + segment(c) + "."
		}},
		{"A5 alg None", "oidc.bad_alg", func(_ *world, c map[string]any) string {
			return segment(map[string]any{"alg": "nOnE"}) + "." + segment(c) + "."
		}},
		{"A6 HS256 keyed with the client secret", "oidc.bad_alg", func(w *world, c map[string]any) string {
			return w.idp.SignWith([]byte(oidcrptest.Secret), jose.HS256, map[string]any{"kid": "k1"}, c)
		}},
		{"A7 ES256 by another key", "oidc.bad_signature", func(w *world, c map[string]any) string {
			return w.idp.SignWith(newP256(w.t), jose.ES256, map[string]any{"kid": "k1"}, c)
		}},
		{"A7 ES256 changed afterwards", "oidc.bad_signature", func(w *world, c map[string]any) string {
			parts := strings.Split(w.idp.SignWith(w.idp.Key, jose.ES256, map[string]any{"kid": "k1"}, c), ".")
			c["sub"] = "admin"
			return parts[0] + "." + segment(c) + "." + parts[2]
		}},
		{"A7 unknown kid", "oidc.bad_signature", func(w *world, c map[string]any) string {
			return w.idp.SignWith(w.idp.Key, jose.ES256, map[string]any{"kid": "k2"}, c)
		}},
		{"A22 crit", "oidc.malformed", func(w *world, c map[string]any) string {
			return w.idp.SignWith(w.idp.Key, jose.ES256, map[string]any{"kid": "k1", "crit": []string{"x"}, "x": 1}, c)
		}},
		{"A22 jwk of the attacker", "oidc.malformed", func(w *world, c map[string]any) string {
			key := newP256(w.t)
			return w.idp.SignWith(key, jose.ES256, map[string]any{"jwk": jose.JSONWebKey{Key: key.Public()}}, c)
		}},
		{"A22 typ at+jwt", "oidc.malformed", func(w *world, c map[string]any) string {
			return w.idp.SignWith(w.idp.Key, jose.ES256, map[string]any{"kid": "k1", "typ": "at+jwt"}, c)
		}},
		{"A22 typ logout+jwt", "oidc.malformed", func(w *world, c map[string]any) string {
			return w.idp.SignWith(w.idp.Key, jose.ES256, map[string]any{"kid": "k1", "typ": "logout+jwt"}, c)
		}},
		{"A22 JSON serialisation", "oidc.malformed", func(w *world, c map[string]any) string { return general(w, c, 1) }},
		{"A22 two signatures", "oidc.malformed", func(w *world, c map[string]any) string { return general(w, c, 2) }},
		{"A31 JWE", "oidc.malformed", func(_ *world, _ map[string]any) string {
			return segment(map[string]any{"alg": "PBES2-HS512+A256KW", "enc": "A256GCM", "p2c": 1_000_000_000, "p2s": "AAAA"}) + ".AA.AA.AA.AA"
		}},
		{"A31 JWE as JWS", "oidc.malformed", func(_ *world, _ map[string]any) string {
			return segment(map[string]any{"alg": "PBES2-HS512+A256KW", "enc": "A256GCM", "zip": "DEF", "p2c": 1_000_000_000}) + ".AA.AA"
		}},
		{"payload twice", "oidc.malformed", func(w *world, c map[string]any) string {
			b, err := json.Marshal(c)
			if err != nil {
				w.t.Fatal(err)
			}
			return signBytes(w, strings.Replace(string(b), "{", `{"sub":"admin",`, 1))
		}},
		{"payload nested 20,000 deep", "oidc.malformed", func(w *world, _ map[string]any) string {
			return signBytes(w, `{"a":`+strings.Repeat("[", 20_000)+strings.Repeat("]", 20_000)+"}")
		}},
		{"payload array", "oidc.malformed", func(w *world, _ map[string]any) string { return signBytes(w, "[]") }},
		{"payload null", "oidc.malformed", func(w *world, _ map[string]any) string { return signBytes(w, "null") }},
		{"empty", "oidc.malformed", func(*world, map[string]any) string { return "" }},
		{"garbage", "oidc.malformed", func(*world, map[string]any) string { return "a.b.c" }},
		{"claims of 40 KiB", "oidc.claims_too_large", func(w *world, c map[string]any) string {
			c["photo"] = strings.Repeat("x", 40<<10)
			return w.idp.SignWith(w.idp.Key, jose.ES256, map[string]any{"kid": "k1"}, c)
		}},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			w := withProvider(t)
			w.idp.Sign = func(c map[string]any) string { return tc.sign(w, c) }
			began := time.Now()
			w.pageRefused(loginEnds(w), tc.code)
			if took := time.Since(began); strings.HasPrefix(tc.name, "A31") && took > 2*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

func signBytes(w *world, payload string) string {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: w.idp.Key, KeyID: "k1"}}, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return oidcrptest.Compact(w.t, signer, []byte(payload))
}

// general is the JSON serialisation of a good token, with one or two signatures.
func general(w *world, c map[string]any, signatures int) string {
	parts := strings.Split(w.idp.SignWith(w.idp.Key, jose.ES256, map[string]any{"kid": "k1"}, c), ".")
	one := map[string]any{"protected": parts[0], "signature": parts[2]}
	full := map[string]any{"payload": parts[1]}
	if signatures == 1 {
		maps.Copy(full, one)
	} else {
		full["signatures"] = []any{one, one}
	}
	b, err := json.Marshal(full)
	if err != nil {
		w.t.Fatal(err)
	}
	return string(b)
}

func TestCase_A6_HS256KeyedWithThePublicKey(t *testing.T) {
	w := withProvider(t)
	w.idp.Key, w.idp.Alg = rsaKeys(), jose.RS256
	public, err := json.Marshal(jose.JSONWebKey{Key: rsaKeys().Public()})
	if err != nil {
		t.Fatal(err)
	}
	w.idp.Sign = func(c map[string]any) string {
		return w.idp.SignWith(public, jose.HS256, map[string]any{"kid": "k1"}, c)
	}
	w.pageRefused(loginEnds(w), "oidc.bad_alg")
}

func TestCase_A7_RS256(t *testing.T) {
	w := withProvider(t)
	w.idp.Key, w.idp.Alg = rsaKeys(), jose.RS256
	w.accepted(loginEnds(w))

	bad := withProvider(t)
	bad.idp.Key, bad.idp.Alg = rsaKeys(), jose.RS256
	bad.idp.Sign = func(c map[string]any) string {
		raw := bad.idp.SignWith(rsaKeys(), jose.RS256, map[string]any{"kid": "k1"}, c)
		return raw[:len(raw)-8] + "AAAAAAAA"
	}
	bad.pageRefused(loginEnds(bad), "oidc.bad_signature")
}

func TestCase_A_EdDSA(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w := withProvider(t)
	w.idp.Key, w.idp.Alg = key, jose.EdDSA
	w.accepted(loginEnds(w))
}

// A key may only be used with its own family of algorithms, and its own curve.
func TestCase_A6_KeyOfAnotherAlgorithm(t *testing.T) {
	w := withProvider(t)
	w.idp.Discovery = func(m map[string]any) {
		m["id_token_signing_alg_values_supported"] = []string{"RS256", "PS256", "ES256"}
	}
	w.idp.Key, w.idp.Alg = rsaKeys(), jose.RS256 // published for RS256
	w.idp.Sign = func(c map[string]any) string {
		return w.idp.SignWith(rsaKeys(), jose.PS256, map[string]any{"kid": "k1"}, c)
	}
	w.pageRefused(loginEnds(w), "oidc.bad_alg")
}

func TestCase_A9_WeakKeys(t *testing.T) {
	t.Setenv("GODEBUG", "rsa1024min=0")
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	cube := &rsa.PublicKey{N: rsaKeys().N, E: 3}
	p224 := `{"keys":[{"kty":"EC","crv":"P-224","kid":"k1","x":"` + strings.Repeat("A", 38) + `","y":"` + strings.Repeat("A", 38) + `"}]}`
	cases := map[string]func(w *world) []byte{
		"RSA-1024": func(w *world) []byte {
			return oidcrptest.KeySet(w.t, jose.JSONWebKey{Key: small.Public(), KeyID: "k1"})
		},
		"RSA e=3": func(w *world) []byte {
			return oidcrptest.KeySet(w.t, jose.JSONWebKey{Key: cube, KeyID: "k1"})
		},
		"EC P-224": func(*world) []byte { return []byte(p224) },
	}
	for name, keys := range cases {
		t.Run(name, func(t *testing.T) {
			w := withProvider(t)
			w.idp.Keys = func() []byte { return keys(w) }
			w.idp.Sign = func(c map[string]any) string {
				return w.idp.SignWith(small, jose.RS256, map[string]any{"kid": "k1"}, c)
			}
			w.pageRefused(loginEnds(w), "oidc.weak_key")
		})
	}
}

func TestCase_A22_NoRequestToJKU(t *testing.T) {
	var hits atomic.Int32
	evil := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hits.Add(1) }))
	t.Cleanup(evil.Close)
	for _, member := range []string{"jku", "x5u"} {
		w := withProvider(t)
		w.idp.Sign = func(c map[string]any) string {
			return w.idp.SignWith(newP256(t), jose.ES256, map[string]any{"kid": "k1", member: evil.URL}, c)
		}
		w.pageRefused(loginEnds(w), "oidc.malformed")
	}
	if n := hits.Load(); n != 0 {
		t.Errorf("%d requests to the attacker's address", n)
	}
}

func TestCase_A23_Kid(t *testing.T) {
	w := withProvider(t)
	w.idp.Sign = func(c map[string]any) string { return w.idp.SignWith(w.idp.Key, jose.ES256, nil, c) }
	w.accepted(loginEnds(w))

	several := withProvider(t)
	several.idp.Sign = func(c map[string]any) string { return several.idp.SignWith(several.idp.Key, jose.ES256, nil, c) }
	several.idp.Keys = func() []byte {
		return oidcrptest.KeySet(t,
			jose.JSONWebKey{Key: several.idp.Key.Public(), KeyID: "k1"}, jose.JSONWebKey{Key: newP256(t).Public(), KeyID: "k2"})
	}
	several.pageRefused(loginEnds(several), "oidc.kid_required")
}

func TestCase_A24_Rotation(t *testing.T) {
	w := withProvider(t)
	w.accepted(loginEnds(w))
	if n := w.idp.Count("/keys"); n != 1 {
		t.Fatalf("got %d fetches of the keys for the first login; want 1", n)
	}
	w.accepted(loginEnds(w))
	if n := w.idp.Count("/keys"); n != 1 {
		t.Errorf("got %d fetches for two logins with one key; want 1", n)
	}
	w.idp.Key, w.idp.KeyID = newP256(t), "k2" // between logins
	w.accepted(loginEnds(w))
	if n := w.idp.Count("/keys"); n != 2 {
		t.Errorf("got %d fetches after a rotation; want 2", n)
	}
	next := newP256(t)
	w.idp.Claims = func(map[string]any) { w.idp.Key, w.idp.KeyID = next, "k3" } // just before signing
	w.accepted(loginEnds(w))
	if n := w.idp.Count("/keys"); n != 3 {
		t.Errorf("got %d fetches after another; want 3", n)
	}
	w.idp.Key = newP256(t) // the kid stays
	w.accepted(loginEnds(w))
}

func TestCase_A24_ForgedKidsCauseNoFetchStorm(t *testing.T) {
	w := withProvider(t)
	n := 0
	w.idp.Sign = func(c map[string]any) string {
		n++
		return w.idp.SignWith(newP256(t), jose.ES256, map[string]any{"kid": fmt.Sprint("forged-", n)}, c)
	}
	for range 40 { // as many logins as one address may begin at once
		loginEnds(w)
	}
	if n < 30 {
		t.Fatalf("only %d tokens were made", n)
	}
	if got := w.idp.Count("/keys"); got > 8 {
		t.Errorf("%d forged tokens caused %d fetches of the keys; want at most 8", n, got)
	}
}

func TestCase_A26_KeySets(t *testing.T) {
	own := func(w *world) jose.JSONWebKey { return jose.JSONWebKey{Key: w.idp.Key.Public(), KeyID: "k1"} }
	with := func(w *world, more string) []byte {
		set := string(oidcrptest.KeySet(w.t, own(w)))
		return []byte(strings.Replace(set, `"keys":[`, `"keys":[`+more+`,`, 1))
	}
	cases := []struct {
		name, code string
		keys       func(w *world) []byte
	}{
		{"unknown kty", "", func(w *world) []byte { return with(w, `{"kty":"XYZ","kid":"z"}`) }},
		{"Ed448", "", func(w *world) []byte { return with(w, `{"kty":"OKP","crv":"Ed448","kid":"z","x":"AAAA"}`) }},
		{"symmetric", "", func(w *world) []byte { return with(w, `{"kty":"oct","kid":"z","k":"AAAA"}`) }},
		{"no object", "", func(w *world) []byte { return with(w, `7`) }},
		{"use enc with the same kid", "", func(w *world) []byte {
			return oidcrptest.KeySet(w.t, jose.JSONWebKey{Key: newP256(w.t).Public(), KeyID: "k1", Use: "enc"}, own(w))
		}},
		{"same key twice", "", func(w *world) []byte { return oidcrptest.KeySet(w.t, own(w), own(w)) }},
		{"duplicate kid", "oidc.bad_jwks", func(w *world) []byte {
			return oidcrptest.KeySet(w.t, own(w), jose.JSONWebKey{Key: newP256(w.t).Public(), KeyID: "k1"})
		}},
		{"only for encryption", "oidc.bad_signature", func(w *world) []byte {
			key := own(w)
			key.Use = "enc"
			return oidcrptest.KeySet(w.t, key)
		}},
		{"101 keys", "oidc.bad_jwks", func(w *world) []byte { return with(w, strings.TrimSuffix(strings.Repeat(`{"kty":"XYZ"},`, 100), ",")) }},
		{"10,000 keys", "oidc.bad_jwks", func(w *world) []byte {
			return with(w, strings.TrimSuffix(strings.Repeat(`{"kty":"XYZ","pad":"`+strings.Repeat("x", 200)+`"},`, 10_000), ","))
		}},
		{"no JSON", "oidc.bad_jwks", func(*world) []byte { return []byte("<html>") }},
		{"private key published", "oidc.bad_signature", func(w *world) []byte {
			return oidcrptest.KeySet(w.t, jose.JSONWebKey{Key: w.idp.Key, KeyID: "k1"})
		}},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			w := withProvider(t)
			w.idp.Keys = func() []byte { return tc.keys(w) }
			if end := loginEnds(w); tc.code == "" {
				w.accepted(end)
			} else {
				w.pageRefused(end, tc.code)
			}
		})
	}
}

func TestCase_A27_Userinfo(t *testing.T) {
	for name, info := range map[string]map[string]any{
		"other sub": {"sub": "bob"}, "no sub": {"email": "x"},
	} {
		t.Run(name, func(t *testing.T) {
			w := withProvider(t)
			w.idp.Userinfo = info
			w.pageRefused(loginEnds(w), "oidc.userinfo_sub_mismatch")
		})
	}
	t.Run("too long", func(t *testing.T) {
		w := withProvider(t)
		w.idp.Userinfo = map[string]any{"sub": "alice", "x": strings.Repeat("x", 2<<20)}
		w.pageRefused(loginEnds(w), "oidc.bad_userinfo")
	})
	t.Run("fills what the ID token lacks", func(t *testing.T) {
		w := withProvider(t)
		w.idp.Claims = func(c map[string]any) { delete(c, "groups"); delete(c, "email"); c["name"] = "From the token" }
		w.idp.Userinfo = map[string]any{
			"sub": "alice", "groups": []string{"dba"}, "email": "alice@userinfo.example", "name": "From userinfo",
			"amr": []string{"hwk"}, "department": "x",
		}
		g := w.agent().login(w.browser())
		if g.Email != "alice@userinfo.example" || g.Name != "From the token" {
			t.Errorf("got %q %q", g.Email, g.Name)
		}
		groups := record[sallyport.DirectoryUser](w, sallyport.KindDirectoryUser, "alice").Groups
		if diff := cmp.Diff([]sallyport.Group{{ID: "dba"}}, groups); diff != "" {
			t.Errorf("groups (-want +got):\n%s", diff)
		}
		s := record[sallyport.Session](w, sallyport.KindSession, string(g.Session))
		if len(s.AuthMethods) != 0 {
			t.Errorf("userinfo decided how the person logged in: %v", s.AuthMethods)
		}
		want := map[string]any{"department": "x", "email": "alice@userinfo.example", "email_verified": true, "name": "From the token"}
		if diff := cmp.Diff(want, s.Claims); diff != "" {
			t.Errorf("claims (-want +got):\n%s", diff)
		}
	})
}

func TestCase_A28_DistributedClaimsAreNotFetched(t *testing.T) {
	var hits atomic.Int32
	evil := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hits.Add(1) }))
	t.Cleanup(evil.Close)
	w := withProvider(t)
	w.idp.Claims = func(c map[string]any) {
		c["_claim_names"] = map[string]any{"department": "src"}
		c["_claim_sources"] = map[string]any{"src": map[string]any{"endpoint": evil.URL, "access_token": "x"}}
	}
	g := w.agent().login(w.browser())
	s := record[sallyport.Session](w, sallyport.KindSession, string(g.Session))
	for name := range s.Claims {
		if name == "department" || strings.HasPrefix(name, "_") {
			t.Errorf("claim %s is there", name)
		}
	}
	if n := hits.Load(); n != 0 {
		t.Errorf("%d requests to the foreign endpoint", n)
	}
}

func TestCase_A30_GroupString(t *testing.T) {
	w := withProvider(t, func(c *authd.Config) { c.IDP.GroupsString = true })
	w.idp.Claims = func(c map[string]any) { c["groups"] = "dba, staff" }
	w.agent().login(w.browser())
	groups := record[sallyport.DirectoryUser](w, sallyport.KindDirectoryUser, "alice").Groups
	if diff := cmp.Diff([]sallyport.Group{{ID: "dba, staff"}}, groups); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
}

func TestCase_A30_OtherClaim(t *testing.T) {
	w := withProvider(t, func(c *authd.Config) { c.IDP.GroupsClaim = "https://corp.example/roles" })
	w.idp.Claims = func(c map[string]any) { c["https://corp.example/roles"] = []string{"x", "x", "y"} }
	w.agent().login(w.browser())
	groups := record[sallyport.DirectoryUser](w, sallyport.KindDirectoryUser, "alice").Groups
	if diff := cmp.Diff([]sallyport.Group{{ID: "x"}, {ID: "y"}}, groups); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
}

// RFC 9207: an issuer in the callback must be the right one, and must be there
// once the provider says that it sends it.
func TestCase_A_MixUp(t *testing.T) {
	cases := []struct {
		name, code string
		announce   bool
		iss        string
	}{
		{"not announced, absent", "", false, ""},
		{"not announced, right", "", false, "own"},
		{"not announced, wrong", "oidc.iss_mismatch", false, "https://evil.example"},
		{"announced, right", "", true, "own"},
		{"announced, absent", "oidc.iss_mismatch", true, ""},
		{"announced, wrong", "oidc.iss_mismatch", true, "https://evil.example"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			w := withProvider(t)
			w.idp.Discovery = func(m map[string]any) { m["authorization_response_iss_parameter_supported"] = tc.announce }
			w.idp.Callback = func(q url.Values) {
				if iss := strings.Replace(tc.iss, "own", w.idp.Issuer(), 1); iss != "" {
					q.Set("iss", iss)
				}
			}
			if end := loginEnds(w); tc.code == "" {
				w.accepted(end)
			} else {
				w.pageRefused(end, tc.code)
			}
		})
	}
}

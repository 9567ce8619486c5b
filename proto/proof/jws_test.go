package proof

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestSignVerify(t *testing.T) {
	key := newKey(t)
	want := Login{Nonce: "n", Audience: "https://auth.example", Action: "renew", Session: "s-1", CSRHash: []byte{1, 2}}
	jws, err := Sign(key, TypeLogin, want)
	if err != nil {
		t.Fatal(err)
	}
	var got Login
	verified, err := Verify(jws, TypeLogin, &got)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("payload (-want +got):\n%s", diff)
	}
	own, err := KeyOf(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if verified.ID != own.ID || verified.Thumbprint != own.Thumbprint || len(verified.ID) != 52 {
		t.Errorf("got key %s %s; want %s %s", verified.ID, verified.Thumbprint, own.ID, own.Thumbprint)
	}
}

// RFC 7638 gives no EC vector; this one is from RFC 9449, section 6.1 and 4.1.
func TestThumbprintVector(t *testing.T) {
	var jwk jose.JSONWebKey
	err := json.Unmarshal([]byte(`{"kty":"EC","x":"l8tFrhx-34tV3hRICRDY9zCkDlpBhF42UQUfWVAWBFs","y":"9VE4jf_Ok_o64zbTTlcuNJajHmt6v9TDVrU0CdvGRDA","crv":"P-256"}`), &jwk)
	if err != nil {
		t.Fatal(err)
	}
	key, err := KeyOf(jwk.Key)
	if err != nil {
		t.Fatal(err)
	}
	if want := "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"; key.Thumbprint != want {
		t.Errorf("got %s; want %s", key.Thumbprint, want)
	}
}

func TestKeyOfRefusesOtherKeys(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, pub := range []crypto.PublicKey{p384.Public(), weak.Public(), ed, nil, (*ecdsa.PublicKey)(nil)} {
		if _, err := KeyOf(pub); err == nil {
			t.Errorf("KeyOf(%T) accepted", pub)
		}
	}
}

// custom signs payload with go-jose directly, for headers that Sign never makes.
func custom(t *testing.T, alg jose.SignatureAlgorithm, key any, embed bool, headers map[jose.HeaderKey]any, payload string) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, &jose.SignerOptions{EmbedJWK: embed, ExtraHeaders: headers})
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign([]byte(payload))
	if err != nil {
		t.Fatal(err)
	}
	jws, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return jws
}

func rewriteHeader(t *testing.T, jws string, edit func(map[string]any)) string {
	t.Helper()
	first, rest, _ := strings.Cut(jws, ".")
	raw, err := base64.RawURLEncoding.DecodeString(first)
	if err != nil {
		t.Fatal(err)
	}
	var header map[string]any
	if err := json.Unmarshal(raw, &header); err != nil {
		t.Fatal(err)
	}
	edit(header)
	raw, err = json.Marshal(header)
	if err != nil {
		t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(raw) + "." + rest
}

func TestVerifyRefuses(t *testing.T) {
	key := newKey(t)
	good, err := Sign(key, TypeLogin, Login{Nonce: "n"})
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	typ := map[jose.HeaderKey]any{jose.HeaderType: TypeLogin}
	parts := strings.Split(good, ".")
	otherPayload := base64.RawURLEncoding.EncodeToString([]byte(`{"nonce":"other"}`))
	full, err := jose.ParseSignedCompact(good, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	posture, err := Sign(key, TypePosture, Login{Nonce: "n"})
	if err != nil {
		t.Fatal(err)
	}
	cases := map[string]string{
		"empty":               "",
		"one part":            "abc",
		"other typ":           posture,
		"no typ":              custom(t, jose.ES256, key, true, nil, `{}`),
		"json serialisation":  full.FullSerialize(),
		"alg none":            rewriteHeader(t, good, func(h map[string]any) { h["alg"] = "none" }),
		"alg HS256":           custom(t, jose.HS256, []byte(strings.Repeat("k", 32)), false, typ, `{}`),
		"RS256":               custom(t, jose.RS256, rsaKey, true, typ, `{}`),
		"ES384":               custom(t, jose.ES384, p384, true, typ, `{}`),
		"no jwk":              custom(t, jose.ES256, key, false, typ, `{}`),
		"kid":                 custom(t, jose.ES256, jose.JSONWebKey{Key: key, KeyID: "k"}, false, typ, `{}`),
		"crit":                rewriteHeader(t, good, func(h map[string]any) { h["crit"] = []string{"x"} }),
		"jku":                 rewriteHeader(t, good, func(h map[string]any) { h["jku"] = "https://evil.example/jwks" }),
		"private key in jwk":  rewriteHeader(t, good, func(h map[string]any) { h["jwk"].(map[string]any)["d"] = strings.Repeat("A", 43) }),
		"point off the curve": rewriteHeader(t, good, func(h map[string]any) { h["jwk"].(map[string]any)["x"] = strings.Repeat("A", 43) }),
		"payload swapped":     parts[0] + "." + otherPayload + "." + parts[2],
		"signature cut":       parts[0] + "." + parts[1] + "." + parts[2][:20],
		"duplicate key":       custom(t, jose.ES256, key, true, typ, `{"nonce":"a","nonce":"b"}`),
		"payload no object":   custom(t, jose.ES256, key, true, typ, `[]`),
		"whitespace":          parts[0] + ".\n" + parts[1] + "." + parts[2],
		"too long":            good + strings.Repeat("A", MaxSize),
	}
	for name, jws := range cases {
		t.Run(name, func(t *testing.T) {
			var got Login
			if _, err := Verify(jws, TypeLogin, &got); !errors.Is(err, ErrInvalid) {
				t.Errorf("got %v, payload %+v; want ErrInvalid", err, got)
			}
		})
	}
	if _, err := Verify(good, TypeLogin, new(Login)); err != nil {
		t.Errorf("the unchanged proof: %v", err)
	}
}

func TestVerifyKeepsCase(t *testing.T) {
	jws := custom(t, jose.ES256, newKey(t), true, map[jose.HeaderKey]any{jose.HeaderType: TypeLogin}, `{"NONCE":"folded"}`)
	var got Login
	if _, err := Verify(jws, TypeLogin, &got); err != nil {
		t.Fatal(err)
	}
	if got.Nonce != "" {
		t.Errorf("got nonce %q from a key in other case; want none", got.Nonce)
	}
}

func FuzzVerify(f *testing.F) {
	good, err := Sign(newKey(f), TypeLogin, Login{Nonce: "n", Audience: "a"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add("e30.e30.e30")
	f.Add(`{"payload":"","signatures":[]}`)
	f.Fuzz(func(t *testing.T, jws string) {
		var got Login
		key, err := Verify(jws, TypeLogin, &got)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("error outside ErrInvalid: %v", err)
			}
			return
		}
		again, err := KeyOf(key.Public)
		if err != nil || again.ID != key.ID {
			t.Fatalf("accepted key %v does not describe itself: %v", key.ID, err)
		}
	})
}

package oidcrp

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/time/rate"
)

// Limits of a provider's key set (RFC 7517).
const (
	maxKeys       = 100
	keysMaxAge    = 15 * time.Minute // then a withdrawn key is noticed
	refetchEvery  = 10 * time.Second // sustained, however many tokens name unknown keys
	refetchBurst  = 5
	minRSABits    = 2048
	minRSAExpo    = 65537
	keyUseSigning = "sig"
)

// errNoKey says that a newer key set might help.
var errNoKey = errors.New("no key of the provider made this signature")

// keySet holds a provider's keys and fetches them again when a token needs a key
// that it lacks, within limits.
type keySet struct {
	url   string
	http  *http.Client
	now   func() time.Time
	limit *rate.Limiter

	mu      sync.Mutex // also makes concurrent logins share one fetch
	keys    []signingKey
	fetched time.Time // zero: never
}

func newKeySet(url string, client *http.Client, now func() time.Time) *keySet {
	return &keySet{url: url, http: client, now: now, limit: rate.NewLimiter(rate.Every(refetchEvery), refetchBurst)}
}

// signingKey is one usable entry of the set, or one that is known but too weak.
type signingKey struct {
	kid, alg string
	public   crypto.PublicKey
	weak     bool
}

// verify returns the payload of a JWS whose header names alg and perhaps kid.
func (s *keySet) verify(ctx context.Context, jws *jose.JSONWebSignature, kid, alg string) ([]byte, error) {
	keys, at, err := s.current(ctx)
	if err != nil {
		return nil, err
	}
	payload, err := verifyWith(keys, jws, kid, alg)
	if !errors.Is(err, errNoKey) {
		return payload, err
	}
	newer, ok, fetchErr := s.newerThan(ctx, at)
	if fetchErr != nil {
		return nil, fetchErr
	}
	if !ok {
		return nil, err
	}
	return verifyWith(newer, jws, kid, alg)
}

// current returns the keys and when they were fetched.
func (s *keySet) current(ctx context.Context) ([]signingKey, time.Time, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fetched.IsZero() || s.now().Sub(s.fetched) > keysMaxAge {
		if err := s.fetch(ctx); err != nil {
			return nil, time.Time{}, err
		}
	}
	return s.keys, s.fetched, nil
}

// newerThan returns keys fetched after at; ok is false if the limit forbids to
// look for them now.
func (s *keySet) newerThan(ctx context.Context, at time.Time) (keys []signingKey, ok bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fetched.After(at) { // another login was faster
		return s.keys, true, nil
	}
	if !s.limit.AllowN(s.now(), 1) {
		return nil, false, nil
	}
	if err := s.fetch(ctx); err != nil {
		return nil, false, err
	}
	return s.keys, true, nil
}

// fetch needs the lock.
func (s *keySet) fetch(ctx context.Context) error {
	body, _, err := get(ctx, s.http, s.url, "")
	if errors.Is(err, errTooLarge) {
		return refuse(CodeBadJWKS, "", err)
	}
	if err != nil {
		return unreachable("keys", err)
	}
	keys, err := parseKeys(body)
	if err != nil {
		return refuse(CodeBadJWKS, "", err)
	}
	s.keys, s.fetched = keys, s.now()
	return nil
}

// verifyWith picks the one key that may have signed and tries it. Without a kid
// there must be just one key: trying several would let any of them speak for all.
func verifyWith(keys []signingKey, jws *jose.JSONWebSignature, kid, alg string) ([]byte, error) {
	if kid == "" && len(keys) > 1 {
		return nil, refuse(CodeKidRequired, fmt.Sprintf("%d keys and no kid", len(keys)), nil)
	}
	i := slices.IndexFunc(keys, func(k signingKey) bool { return kid == "" || k.kid == kid })
	if i < 0 {
		return nil, refuse(CodeBadSignature, "unknown kid", errNoKey)
	}
	key := keys[i]
	if key.weak {
		return nil, refuse(CodeWeakKey, "", nil)
	}
	if !fits(key, alg) {
		return nil, refuse(CodeBadAlg, "the key is not one for "+alg, nil)
	}
	payload, err := jws.Verify(key.public)
	if err != nil {
		return nil, refuse(CodeBadSignature, "", errNoKey)
	}
	return payload, nil
}

// fits keeps a key to its own family of algorithms, and to the one it is
// published for.
func fits(key signingKey, alg string) bool {
	if key.alg != "" && key.alg != alg {
		return false
	}
	switch pub := key.public.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(alg, "RS") || strings.HasPrefix(alg, "PS")
	case *ecdsa.PublicKey:
		return alg == map[elliptic.Curve]string{elliptic.P256(): "ES256", elliptic.P384(): "ES384", elliptic.P521(): "ES512"}[pub.Curve]
	case ed25519.PublicKey:
		return alg == "EdDSA"
	}
	return false
}

// parseKeys reads a JWK Set. Keys of unknown types and for other uses are
// skipped; too many keys, and two different keys with one kid, spoil the set.
func parseKeys(body []byte) ([]signingKey, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := decodeStrict(body, &set); err != nil {
		return nil, err
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("%d keys; at most %d", len(set.Keys), maxKeys)
	}
	var keys []signingKey
	for _, raw := range set.Keys {
		key, ok := parseKey(raw)
		if !ok {
			continue
		}
		same := slices.IndexFunc(keys, func(k signingKey) bool { return k.kid == key.kid && k.kid != "" })
		if same < 0 {
			keys = append(keys, key)
		} else if !equalKeys(keys[same].public, key.public) {
			return nil, errors.New("two different keys with one kid")
		}
	}
	return keys, nil
}

// parseKey reads one entry; ok is false if it is to be skipped.
func parseKey(raw json.RawMessage) (key signingKey, ok bool) {
	var head struct {
		Kty    string   `json:"kty"`
		Crv    string   `json:"crv"`
		Kid    string   `json:"kid"`
		Use    string   `json:"use"`
		Alg    string   `json:"alg"`
		KeyOps []string `json:"key_ops"`
	}
	if err := decodeStrict(raw, &head); err != nil {
		return key, false
	}
	if head.Use != "" && head.Use != keyUseSigning || len(head.KeyOps) > 0 && !slices.Contains(head.KeyOps, "verify") {
		return key, false
	}
	key = signingKey{kid: head.Kid, alg: head.Alg}
	if head.Kty == "EC" && (head.Crv == "P-192" || head.Crv == "P-224") {
		key.weak = true
		return key, true
	}
	var jwk jose.JSONWebKey
	if err := jwk.UnmarshalJSON(raw); err != nil || !jwk.IsPublic() {
		return key, false
	}
	key.public = jwk.Key
	switch pub := jwk.Key.(type) {
	case *rsa.PublicKey:
		key.weak = pub.N.BitLen() < minRSABits || pub.E < minRSAExpo || pub.E%2 == 0
	case *ecdsa.PublicKey, ed25519.PublicKey:
	default:
		return key, false
	}
	return key, true
}

func equalKeys(a, b crypto.PublicKey) bool {
	x, errX := (&jose.JSONWebKey{Key: a}).Thumbprint(crypto.SHA256)
	y, errY := (&jose.JSONWebKey{Key: b}).Thumbprint(crypto.SHA256)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

package proof

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base32"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strings"

	"github.com/go-jose/go-jose/v4"
	strictjson "github.com/go-jose/go-jose/v4/json"

	"sallyport"
)

// MaxSize is the longest compact JWS that Verify looks at, in bytes: room for a
// payload of 64 KiB in base64 and a header.
const MaxSize = 92 << 10

// ErrInvalid is in the chain of every error of Verify: whatever was wrong, the
// proof proves nothing.
var ErrInvalid = errors.New("invalid proof")

var deviceIDEncoding = base32.StdEncoding.WithPadding(base32.NoPadding)

// KeyOf describes pub, which must be ECDSA P-256, the only curve that every
// keeper of device keys has.
func KeyOf(pub crypto.PublicKey) (Key, error) {
	ec, ok := pub.(*ecdsa.PublicKey)
	if !ok || ec == nil || ec.Curve != elliptic.P256() {
		return Key{}, fmt.Errorf("device key: want ECDSA P-256, got %T", pub)
	}
	der, err := x509.MarshalPKIXPublicKey(ec) // refuses points that are not on the curve
	if err != nil {
		return Key{}, fmt.Errorf("device key: %w", err)
	}
	thumbprint, err := (&jose.JSONWebKey{Key: ec}).Thumbprint(crypto.SHA256)
	if err != nil {
		return Key{}, fmt.Errorf("device key: thumbprint: %w", err)
	}
	sum := sha256.Sum256(der)
	return Key{
		Public:     ec,
		ID:         sallyport.DeviceID(strings.ToLower(deviceIDEncoding.EncodeToString(sum[:]))),
		Thumbprint: base64.RawURLEncoding.EncodeToString(thumbprint),
	}, nil
}

// Sign returns payload, as JSON, in a compact JWS signed by key with ES256. The
// header carries typ and the public key (jwk).
func Sign(key Signer, typ string, payload any) (string, error) {
	k, err := KeyOf(key.Public())
	if err != nil {
		return "", err
	}
	body, err := json.Marshal(payload)
	if err != nil {
		return "", fmt.Errorf("sign %s: %w", typ, err)
	}
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: deviceSigner{key, k.Public}},
		(&jose.SignerOptions{EmbedJWK: true}).WithType(jose.ContentType(typ)))
	if err != nil {
		return "", fmt.Errorf("sign %s: %w", typ, err)
	}
	signed, err := signer.Sign(body)
	if err != nil {
		return "", fmt.Errorf("sign %s: %w", typ, err)
	}
	return signed.CompactSerialize()
}

// Verify checks that jws is a compact JWS (RFC 7515, section 3.1) of at most
// MaxSize bytes with alg ES256, the given typ and the public key that signed it,
// and nothing else, in its header. It reads the payload into payload; duplicate
// and case-folded keys are errors. The caller must still compare the returned
// key with the one it expects: by itself, the signature proves only that
// somebody holds that key.
func Verify(jws, typ string, payload any) (Key, error) {
	if len(jws) > MaxSize {
		return Key{}, fmt.Errorf("%w: longer than %d bytes", ErrInvalid, MaxSize)
	}
	if strings.ContainsAny(jws, "\r\n") { // encoding/base64 would skip them
		return Key{}, fmt.Errorf("%w: line break", ErrInvalid)
	}
	if err := checkHeader(jws, typ); err != nil {
		return Key{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	parsed, err := jose.ParseSignedCompact(jws, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return Key{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	jwk := parsed.Signatures[0].Protected.JSONWebKey
	if jwk == nil {
		return Key{}, fmt.Errorf("%w: no key in the header", ErrInvalid)
	}
	key, err := KeyOf(jwk.Key) // a private key in the header fails here
	if err != nil {
		return Key{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	body, err := parsed.Verify(key.Public)
	if err != nil {
		return Key{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if err := decodeStrict(body, payload); err != nil {
		return Key{}, fmt.Errorf("%w: payload: %w", ErrInvalid, err)
	}
	return key, nil
}

// checkHeader accepts exactly {alg, typ, jwk}: a header that asks for more (crit,
// jku, x5c, kid) asks for something that we do not do.
func checkHeader(jws, typ string) error {
	first, _, ok := strings.Cut(jws, ".")
	if !ok {
		return errors.New("not a compact JWS")
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(first)
	if err != nil {
		return fmt.Errorf("header: %w", err)
	}
	var members map[string]json.RawMessage
	if err := decodeStrict(raw, &members); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	var got string
	if err := json.Unmarshal(members["typ"], &got); err != nil || got != typ {
		return fmt.Errorf("header: typ is not %s", typ)
	}
	if members["alg"] == nil || members["jwk"] == nil || len(members) != 3 {
		return errors.New("header: wants alg, typ and jwk only")
	}
	return nil
}

// decodeStrict refuses duplicate keys and keys in another case, which
// encoding/json lets pass, and before that nesting beyond encoding/json's limit,
// which the strict decoder does not have.
func decodeStrict(data []byte, v any) error {
	if !json.Valid(data) {
		return errors.New("not JSON")
	}
	return strictjson.Unmarshal(data, v)
}

// deviceSigner lets go-jose sign with a key that it never sees.
type deviceSigner struct {
	key    Signer
	public *ecdsa.PublicKey
}

func (s deviceSigner) Public() *jose.JSONWebKey { return &jose.JSONWebKey{Key: s.public} }

func (s deviceSigner) Algs() []jose.SignatureAlgorithm {
	return []jose.SignatureAlgorithm{jose.ES256}
}

// SignPayload turns the signature that crypto.Signer makes (ASN.1, RFC 3279) into
// the one that JWS wants (R and S as 32 bytes each, RFC 7518, section 3.4).
func (s deviceSigner) SignPayload(payload []byte, _ jose.SignatureAlgorithm) ([]byte, error) {
	digest := sha256.Sum256(payload)
	der, err := s.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	r, t, err := parseSignature(der)
	if err != nil {
		return nil, err
	}
	out := make([]byte, 64)
	r.FillBytes(out[:32])
	t.FillBytes(out[32:])
	return out, nil
}

func parseSignature(der []byte) (r, s *big.Int, err error) {
	var sig struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &sig); err != nil {
		return nil, nil, fmt.Errorf("signature of the device key: %w", err)
	}
	for _, n := range []*big.Int{sig.R, sig.S} {
		if n.Sign() <= 0 || n.BitLen() > 256 {
			return nil, nil, errors.New("signature of the device key: out of range")
		}
	}
	return sig.R, sig.S, nil
}

package authd

import (
	"context"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"sallyport"
)

// sealKeySize is the length of Deps.SealKey in bytes.
const sealKeySize = 32

// purpose keeps single-use secrets of different kinds apart: a state is never
// taken for a code.
type purpose string

// The purposes, and how long each lives.
const (
	forState   purpose = "state"   // between /authorize and /callback
	forConsent purpose = "consent" // between the consent page and its answer
	forCode    purpose = "code"    // between the browser's last redirect and /token

	stateLife   = 10 * time.Minute
	consentLife = 5 * time.Minute
	codeLife    = time.Minute
	nonceLife   = 2 * time.Minute
)

// vault keeps single-use secrets and other people's tokens in the records. A
// record's id is the hash of its secret and its payload is sealed, bound to kind
// and id: a stolen database holds nothing that works, and records that are
// swapped do not open.
type vault struct {
	records sallyport.Records
	now     func() time.Time
	aead    cipher.AEAD // XChaCha20-Poly1305
	nonces  []byte      // HMAC key
}

func newVault(records sallyport.Records, sealKey []byte, now func() time.Time) (*vault, error) {
	if len(sealKey) != sealKeySize {
		return nil, fmt.Errorf("authd: seal key has %d bytes; want %d", len(sealKey), sealKeySize)
	}
	derive := func(use string) ([]byte, error) {
		return hkdf.Key(sha256.New, sealKey, nil, "sallyport authd "+use, 32)
	}
	sealing, err := derive("seal")
	if err != nil {
		return nil, err
	}
	nonces, err := derive("nonce")
	if err != nil {
		return nil, err
	}
	aead, err := chacha20poly1305.NewX(sealing)
	if err != nil {
		return nil, err
	}
	return &vault{records, now, aead, nonces}, nil
}

var lowerBase32 = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// recordID is what a secret is stored under.
func recordID(p purpose, secret string) string {
	sum := sha256.Sum256([]byte(string(p) + ":" + secret))
	return string(p) + "-" + lowerBase32.EncodeToString(sum[:])
}

// sealed is the payload of a code record.
type sealed struct {
	Sealed []byte `json:"sealed"`
}

func (v *vault) seal(kind sallyport.Kind, id string, plain []byte) []byte {
	nonce := make([]byte, v.aead.NonceSize(), v.aead.NonceSize()+len(plain)+v.aead.Overhead())
	rand.Read(nonce)
	return v.aead.Seal(nonce, nonce, plain, []byte(string(kind)+"/"+id))
}

func (v *vault) open(kind sallyport.Kind, id string, box []byte) ([]byte, error) {
	if len(box) < v.aead.NonceSize() {
		return nil, errors.New("sealed record is cut")
	}
	n := v.aead.NonceSize()
	return v.aead.Open(nil, box[:n], box[n:], []byte(string(kind)+"/"+id))
}

// keep stores value under a fresh secret and returns the secret.
func (v *vault) keep(ctx context.Context, p purpose, life time.Duration, value any) (string, error) {
	secret := sallyport.NewSecret()
	return secret, v.keepAs(ctx, p, secret, life, value)
}

// keepAs stores value under a secret that somebody else made.
func (v *vault) keepAs(ctx context.Context, p purpose, secret string, life time.Duration, value any) error {
	plain, err := json.Marshal(value)
	if err != nil {
		return err
	}
	id := recordID(p, secret)
	op := sallyport.Put(sallyport.KindCode, id, sealed{v.seal(sallyport.KindCode, id, plain)})
	op.Expires = v.now().Add(life)
	op.If.Absent = true
	_, err = v.records.Apply(ctx, []sallyport.Op{op})
	return err
}

// look reads what stands under a secret into value without consuming it. The
// returned op consumes it: it belongs into the batch that acts on it, which then
// fails with ErrConflict if somebody else was faster.
func (v *vault) look(ctx context.Context, p purpose, secret string, value any) (consume sallyport.Op, err error) {
	id := recordID(p, secret)
	rec, err := v.records.Get(ctx, sallyport.KindCode, id)
	if err != nil {
		return consume, err
	}
	box, err := sallyport.Decode[sealed](rec)
	if err != nil {
		return consume, err
	}
	plain, err := v.open(sallyport.KindCode, id, box.Sealed)
	if err != nil {
		return consume, fmt.Errorf("code %s: %w", id, err)
	}
	consume = sallyport.Op{Kind: sallyport.KindCode, ID: id, Delete: true, If: sallyport.Condition{Revision: rec.Revision}}
	return consume, json.Unmarshal(plain, value)
}

// take reads what stands under a secret and consumes it. ErrNotFound means that
// nothing stands there, any more or at all.
func (v *vault) take(ctx context.Context, p purpose, secret string, value any) error {
	consume, err := v.look(ctx, p, secret, value)
	if err != nil {
		return err
	}
	_, err = v.records.Apply(ctx, []sallyport.Op{consume})
	if errors.Is(err, sallyport.ErrConflict) {
		return sallyport.ErrNotFound
	}
	return err
}

// token returns the op that stores the identity provider's refresh token of a
// login.
func (v *vault) token(id sallyport.LoginID, token string, expires time.Time) sallyport.Op {
	return sallyport.Op{
		Kind: sallyport.KindIDPToken, ID: string(id), Expires: expires,
		Payload: v.seal(sallyport.KindIDPToken, string(id), []byte(token)),
	}
}

// A nonce is its time of making, 16 random bytes and a MAC over both: asking for
// one writes nothing, so nobody can fill the database by asking. Only a used one
// becomes a record.
const nonceRandom = 16

func (v *vault) nonce() string {
	body := binary.BigEndian.AppendUint64(nil, uint64(v.now().UnixMilli()))
	body = append(body, make([]byte, nonceRandom)...)
	rand.Read(body[8:])
	return lowerBase32.EncodeToString(append(body, v.nonceMAC(body)...))
}

func (v *vault) nonceMAC(body []byte) []byte {
	mac := hmac.New(sha256.New, v.nonces)
	mac.Write(body)
	return mac.Sum(nil)
}

var errNonce = errors.New("nonce is not ours, used, or older than two minutes")

// useNonce returns the op that uses a nonce up. It fails with ErrConflict if the
// nonce was used before.
func (v *vault) useNonce(nonce string) (sallyport.Op, error) {
	raw, err := lowerBase32.DecodeString(nonce)
	if err != nil || len(raw) != 8+nonceRandom+sha256.Size || strings.ContainsAny(nonce, "\r\n") {
		return sallyport.Op{}, errNonce
	}
	body, mac := raw[:8+nonceRandom], raw[8+nonceRandom:]
	if !hmac.Equal(mac, v.nonceMAC(body)) {
		return sallyport.Op{}, errNonce
	}
	made := time.UnixMilli(int64(binary.BigEndian.Uint64(body)))
	age := v.now().Sub(made)
	if age > nonceLife || age < -nonceLife {
		return sallyport.Op{}, errNonce
	}
	op := sallyport.Put(sallyport.KindCode, recordID("nonce", lowerBase32.EncodeToString(body)), struct{}{})
	op.Expires = made.Add(2 * nonceLife) // longer than it could be shown again
	op.If.Absent = true
	return op, nil
}

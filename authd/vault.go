package authd

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"sallyport"
	"sallyport/internal/keyring"
)

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
// record's id is the hash of its secret and its payload is sealed (keys.go): a
// stolen database holds nothing that works, and records that are swapped do not
// open.
type vault struct {
	vaultRing
	// resealed is the ring's revision for which every token was looked at.
	resealed atomic.Uint64
}

func newVault(records sallyport.Records, kek keyring.KEK, now func() time.Time) (*vault, error) {
	if kek.IsZero() {
		return nil, errors.New("authd: no key-encryption key")
	}
	return &vault{vaultRing: vaultRing{records: records, now: now, kek: kek}}, nil
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

// open opens a sealed payload, looking once more at the ring if its key is new.
func (v *vault) open(ctx context.Context, b binding, box []byte) ([]byte, error) {
	keys, err := v.keys(ctx)
	if err != nil {
		return nil, err
	}
	if id, ok := keyOfSealed(box); ok && keys.byID[id] == nil {
		if keys, err = v.fresh(ctx, ringAsk); err != nil {
			return nil, err
		}
	}
	return keys.open(b, box)
}

// codeOf is what a code record is bound to. Its id is used once, so it needs no
// version.
func codeOf(id string) binding { return binding{kind: sallyport.KindCode, id: id} }

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
	keys, err := v.keys(ctx)
	if err != nil {
		return err
	}
	id := recordID(p, secret)
	op := sallyport.Put(sallyport.KindCode, id, sealed{keys.seal(codeOf(id), plain)})
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
	plain, err := v.open(ctx, codeOf(id), box.Sealed)
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
// login, and notes in the login which one of them it is: the login's record, whose
// code covers it, then vouches for no other.
func (v *vault) token(ctx context.Context, l *sallyport.Login, token string) (sallyport.Op, error) {
	keys, err := v.keys(ctx)
	if err != nil {
		return sallyport.Op{}, err
	}
	l.TokenVersion++
	b := tokenOf(*l)
	return sallyport.Op{Kind: b.kind, ID: b.id, Expires: l.Expires, Payload: keys.seal(b, []byte(token))}, nil
}

// A nonce is its time of making, 16 random bytes and a MAC over both: asking for
// one writes nothing, so nobody can fill the database by asking. Only a used one
// becomes a record.
const nonceRandom = 16

func (v *vault) nonce(ctx context.Context) (string, error) {
	keys, err := v.keys(ctx)
	if err != nil {
		return "", err
	}
	body := binary.BigEndian.AppendUint64(nil, uint64(v.now().UnixMilli()))
	body = append(body, make([]byte, nonceRandom)...)
	rand.Read(body[8:])
	return lowerBase32.EncodeToString(append(body, keys.active.nonceMAC(body)...)), nil
}

var errNonce = errors.New("nonce is not ours, used, or older than two minutes")

// useNonce returns the op that uses a nonce up. It fails with ErrConflict if the
// nonce was used before.
func (v *vault) useNonce(ctx context.Context, nonce string) (sallyport.Op, error) {
	raw, err := lowerBase32.DecodeString(nonce)
	if err != nil || len(raw) != 8+nonceRandom+sha256.Size || strings.ContainsAny(nonce, "\r\n") {
		return sallyport.Op{}, errNonce
	}
	body, mac := raw[:8+nonceRandom], raw[8+nonceRandom:]
	if err := v.checkNonce(ctx, body, mac); err != nil {
		return sallyport.Op{}, err
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

// checkNonce returns errNonce unless an authd made the nonce. Its key may be newer
// than what we know.
func (v *vault) checkNonce(ctx context.Context, body, mac []byte) error {
	for _, age := range []time.Duration{ringFresh, ringAsk} {
		keys, err := v.fresh(ctx, age)
		if err != nil {
			return err
		}
		if keys.made(body, mac) {
			return nil
		}
	}
	return errNonce
}

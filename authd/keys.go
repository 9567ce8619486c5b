package authd

import (
	"context"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"sallyport"
	"sallyport/internal/keyring"
)

// authd's data keys are a record that every authd reads: wrapped by the key-encryption
// key that all of them were given, and never streamed. Whoever finds none makes some;
// the record store decides who was first.
const (
	ringPurpose = "authd vault"
	ringID      = "authd"
)

// Intervals of the ring.
const (
	ringEvery = 5 * time.Second // it is looked at in the background
	// ringFresh is how old what a request goes by may be while the records can be
	// read: an authd that was frozen looks before it seals under a key of long ago.
	ringFresh = 30 * time.Second
	// ringSettled is when every authd that runs has noticed a new key.
	ringSettled = 2 * ringFresh
	// ringRetired is when nothing single-use that an old key sealed is left.
	ringRetired = stateLife + 5*time.Minute
	ringAsk     = time.Second // between two looks because of what a stranger sent
)

const codeWrongKey = "keys.wrong"

// vaultKeys are the keys of one reading of the ring. They are never changed.
type vaultKeys struct {
	ring     keyring.Ring
	revision sallyport.Revision
	read     time.Time
	stale    bool // an older key of the KEK wraps the ring
	foreign  bool // a KEK that we were not given yet wraps the same ring by now
	active   *vaultKey
	byID     map[keyring.ID]*vaultKey
}

// vaultKey is one data key with what is derived from it: one key, one purpose.
type vaultKey struct {
	id     keyring.ID
	aead   cipher.AEAD // XChaCha20-Poly1305
	nonces []byte      // HMAC key
}

func newVaultKeys(ring keyring.Ring) (*vaultKeys, error) {
	k := &vaultKeys{ring: ring, read: time.Now(), byID: map[keyring.ID]*vaultKey{}}
	for _, key := range ring.Keys() {
		aead, err := chacha20poly1305.NewX(key.Secret.Derive("sallyport authd seal"))
		if err != nil {
			return nil, err
		}
		k.byID[key.ID] = &vaultKey{key.ID, aead, key.Secret.Derive("sallyport authd nonce")}
	}
	k.active = k.byID[ring.Active().ID]
	return k, nil
}

// vaultRing follows the ring of data keys.
type vaultRing struct {
	records sallyport.Records
	now     func() time.Time

	current atomic.Pointer[vaultKeys] // nil: not read yet

	mu  sync.Mutex // one reads at a time; guards kek
	kek keyring.KEK
}

// keys returns keys to work with, reading the ring if that was not done lately.
func (r *vaultRing) keys(ctx ctx) (*vaultKeys, error) {
	return r.fresh(ctx, ringFresh)
}

func (r *vaultRing) fresh(ctx ctx, age time.Duration) (*vaultKeys, error) {
	k := r.current.Load()
	if k != nil && time.Since(k.read) < age {
		return k, nil
	}
	next, err := r.refresh(ctx)
	if err != nil && k != nil && sallyport.CodeOf(err) != codeWrongKey {
		return k, nil // nothing can be written now anyway
	}
	return next, err
}

// refresh reads the ring, and makes it if there is none.
func (r *vaultRing) refresh(ctx ctx) (*vaultKeys, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec, err := r.records.Get(ctx, sallyport.KindKeyring, ringID)
	if errors.Is(err, sallyport.ErrNotFound) {
		if err := r.make(ctx); err != nil {
			return nil, err
		}
		rec, err = r.records.Get(ctx, sallyport.KindKeyring, ringID)
	}
	if err != nil {
		return nil, err
	}
	k, err := openRing(rec, r.kek)
	if sallyport.CodeOf(err) == codeWrongKey {
		if again := r.current.Load().wrappedAnew(rec); again != nil {
			k, err = again, nil
		}
	}
	if err != nil {
		return nil, err
	}
	r.current.Store(k)
	return k, nil
}

// wrappedAnew returns the keys again if the record holds the same active one under
// another wrapping: another authd got the new key-encryption key first. Else nil.
func (k *vaultKeys) wrappedAnew(rec sallyport.Record) *vaultKeys {
	if k == nil {
		return nil
	}
	about, err := keyring.Describe(rec.Payload, ringPurpose)
	if err != nil || about.Keys[0].ID != k.active.id {
		return nil
	}
	again := *k
	again.revision, again.read, again.stale, again.foreign = rec.Revision, time.Now(), false, true
	return &again
}

// make writes the ring that is missing: the one in use, if there is one.
func (r *vaultRing) make(ctx ctx) error {
	ring := keyring.New(ringPurpose, r.now())
	if k := r.current.Load(); k != nil {
		ring = k.ring
	}
	err := r.put(ctx, ring, sallyport.Condition{Absent: true})
	if errors.Is(err, sallyport.ErrConflict) {
		return nil // another authd was faster
	}
	return err
}

// put writes a ring; the caller holds mu.
func (r *vaultRing) put(ctx ctx, ring keyring.Ring, as sallyport.Condition) error {
	doc, err := ring.Seal(r.kek)
	if err != nil {
		return err
	}
	_, err = r.records.Apply(ctx, []sallyport.Op{{Kind: sallyport.KindKeyring, ID: ringID, Payload: doc, If: as}})
	return err
}

func openRing(rec sallyport.Record, kek keyring.KEK) (*vaultKeys, error) {
	ring, stale, err := keyring.Open(rec.Payload, ringPurpose, kek)
	if errors.Is(err, keyring.ErrWrongKEK) {
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeUsage,
			Code:    codeWrongKey,
			Message: "the seal key is not the one that protects what authd has stored",
			Hint:    "nothing was changed; put back the key that belongs to it (docs/configuration.md, keys), from a backup if need be",
			Err:     err,
		}
	}
	if err != nil {
		return nil, err
	}
	k, err := newVaultKeys(ring)
	if err != nil {
		return nil, err
	}
	k.revision, k.stale = rec.Revision, stale
	return k, nil
}

// change replaces the ring if nobody else did meanwhile.
func (r *vaultRing) change(ctx ctx, from *vaultKeys, to keyring.Ring) error {
	r.mu.Lock()
	err := r.put(ctx, to, sallyport.Condition{Revision: from.revision})
	r.mu.Unlock()
	if err != nil {
		return err
	}
	_, err = r.refresh(ctx)
	return err
}

// setKEK takes another key-encryption key, if it opens the ring.
func (r *vaultRing) setKEK(ctx ctx, kek keyring.KEK) error {
	rec, err := r.records.Get(ctx, sallyport.KindKeyring, ringID)
	if err == nil {
		_, err = openRing(rec, kek)
	}
	if err != nil && !errors.Is(err, sallyport.ErrNotFound) {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kek = kek
	return nil
}

// A sealed payload is a format, the id of its key, a nonce and the box, bound to
// kind and id of its record and to a version of its own: what is moved to another
// record or brought back as it was before does not open.
const (
	sealFormat  = 1
	sealKeyAt   = 1
	sealNonceAt = sealKeyAt + len(keyring.ID{})
	sealBoxAt   = sealNonceAt + chacha20poly1305.NonceSizeX
)

var errSealed = errors.New("sealed record does not open")

// binding is what a sealed payload is bound to.
type binding struct {
	kind    sallyport.Kind
	id      string
	version uint64
}

func (b binding) bytes() []byte {
	data := append([]byte("sallyport authd sealed v1\x00"), b.kind...) // kinds have no zero byte
	data = binary.BigEndian.AppendUint64(append(data, 0), b.version)
	return append(data, b.id...)
}

func (k *vaultKeys) seal(b binding, plain []byte) []byte {
	box := make([]byte, sealBoxAt, sealBoxAt+len(plain)+chacha20poly1305.Overhead)
	box[0] = sealFormat
	copy(box[sealKeyAt:], k.active.id[:])
	rand.Read(box[sealNonceAt:])
	return k.active.aead.Seal(box, box[sealNonceAt:sealBoxAt], plain, b.bytes())
}

func (k *vaultKeys) open(b binding, box []byte) ([]byte, error) {
	id, ok := keyOfSealed(box)
	if !ok {
		return nil, errSealed
	}
	key := k.byID[id]
	if key == nil {
		return nil, fmt.Errorf("%w: it needs the key %v", errSealed, id)
	}
	plain, err := key.aead.Open(nil, box[sealNonceAt:sealBoxAt], box[sealBoxAt:], b.bytes())
	if err != nil {
		return nil, errSealed
	}
	return plain, nil
}

// keyOfSealed names the key of a sealed payload.
func keyOfSealed(box []byte) (keyring.ID, bool) {
	if len(box) < sealBoxAt || box[0] != sealFormat {
		return keyring.ID{}, false
	}
	return keyring.ID(box[sealKeyAt:]), true
}

func (k *vaultKey) nonceMAC(body []byte) []byte {
	mac := hmac.New(sha256.New, k.nonces)
	mac.Write(body)
	return mac.Sum(nil)
}

// made reports whether a nonce has the MAC of one of the keys.
func (k *vaultKeys) made(body, mac []byte) bool {
	for _, key := range k.byID {
		if hmac.Equal(mac, key.nonceMAC(body)) {
			return true
		}
	}
	return false
}

// keepKeys follows the ring, wraps it anew after a change of the KEK, and replaces
// its key when an operator asked for that, until ctx ends. It fails only if the KEK
// is the wrong one.
func (s *Server) keepKeys(ctx ctx) error {
	for {
		k, err := s.vault.refresh(ctx)
		if err == nil {
			err = s.tendKeys(ctx, k)
		}
		switch {
		case sallyport.CodeOf(err) == codeWrongKey:
			return err
		case err != nil && ctx.Err() == nil && !errors.Is(err, sallyport.ErrConflict) && !errors.Is(err, sallyport.ErrLeaseHeld):
			s.log.Warn("keys of stored secrets are not kept up", "error", err)
		}
		if !wait(ctx, ringEvery) {
			return ctx.Err()
		}
	}
}

// tendKeys does the next thing that the ring is waiting for.
func (s *Server) tendKeys(ctx ctx, k *vaultKeys) error {
	age := s.now().Sub(k.ring.Active().Created)
	switch {
	case k.foreign:
		s.log.Warn("keys of stored secrets are wrapped by a key-encryption key that is not here: a restart would fail")
		return nil // who has it tends them
	case !k.ring.Asked.IsZero():
		s.log.Info("secrets are sealed by a new key from now on")
		return s.vault.change(ctx, k, k.ring.Rotate(s.now()))
	case k.stale:
		s.log.Info("keys of stored secrets are wrapped anew")
		return s.vault.change(ctx, k, k.ring)
	case len(k.byID) == 1 || age < ringSettled:
		return nil
	case age < ringRetired && s.vault.resealed.Load() == uint64(k.revision):
		return nil // what is left ends by itself
	}
	return s.deps.Records.Lease(ctx, "authd-keys", ringFresh, func(ctx context.Context) error {
		n, err := s.vault.reseal(ctx, k)
		if err != nil {
			return err
		}
		s.vault.resealed.Store(uint64(k.revision))
		s.log.Info("stored secrets are sealed by the new key", "records", n)
		if n > 0 || age < ringRetired {
			return nil
		}
		return s.vault.change(ctx, k, k.ring.Retire())
	})
}

// resealMax is how many tokens are written at once.
const resealMax = 200

// reseal seals identity provider's tokens of older keys by the active one, and says
// how many there were. The version stays: it is the same token.
func (v *vault) reseal(ctx ctx, k *vaultKeys) (done int, err error) {
	logins, err := v.loginsWithTokens(ctx)
	if err != nil {
		return 0, err
	}
	var batch []sallyport.Op
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		done += len(batch)
		_, err := v.records.Apply(ctx, batch)
		batch = batch[:0]
		if errors.Is(err, sallyport.ErrConflict) {
			return nil // the next look finds what somebody wrote meanwhile
		}
		return err
	}
	for _, l := range logins {
		op, needed, err := v.resealOne(ctx, k, l)
		if err != nil {
			return done, err
		}
		if needed {
			batch = append(batch, op)
		}
		if len(batch) == resealMax {
			if err := flush(); err != nil {
				return done, err
			}
		}
	}
	return done, flush()
}

// resealOne returns the op that seals a login's token anew, if it has to be and can.
func (v *vault) resealOne(ctx ctx, k *vaultKeys, l sallyport.Login) (op sallyport.Op, needed bool, err error) {
	rec, err := v.records.Get(ctx, sallyport.KindIDPToken, string(l.ID))
	if errors.Is(err, sallyport.ErrNotFound) {
		return op, false, nil
	}
	if err != nil {
		return op, false, err
	}
	b := tokenOf(l)
	if id, ok := keyOfSealed(rec.Payload); !ok || id == k.active.id {
		return op, false, nil
	}
	plain, err := k.open(b, rec.Payload)
	if err != nil {
		return op, false, nil // nobody can open it, with or without the old key
	}
	defer clear(plain)
	return sallyport.Op{
		Kind: b.kind, ID: b.id, Expires: rec.Expires, Payload: k.seal(b, plain),
		If: sallyport.Condition{Revision: rec.Revision},
	}, true, nil
}

// loginsWithTokens are the logins whose identity provider gave a token. Tokens
// themselves are never listed.
func (v *vault) loginsWithTokens(ctx ctx) ([]sallyport.Login, error) {
	var logins []sallyport.Login
	errEnd := errors.New("snapshot is complete")
	q := sallyport.WatchRequest{Kinds: []sallyport.Kind{sallyport.KindLogin}}
	err := v.records.Watch(ctx, q, func(e sallyport.WatchEvent) error {
		for _, rec := range e.Records {
			if l, err := sallyport.Decode[sallyport.Login](rec); err == nil && l.TokenVersion > 0 {
				logins = append(logins, l)
			}
		}
		if e.Type == sallyport.WatchEnd {
			return errEnd
		}
		return nil
	})
	if !errors.Is(err, errEnd) {
		return nil, err
	}
	return logins, nil
}

// tokenOf is what the token of a login is bound to.
func tokenOf(l sallyport.Login) binding {
	return binding{sallyport.KindIDPToken, string(l.ID), l.TokenVersion}
}

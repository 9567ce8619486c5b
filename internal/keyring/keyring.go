// Package keyring is envelope encryption: data is protected by data keys, which
// lie beside the data in a [Ring], wrapped by a key-encryption key ([KEK]) that
// lies elsewhere. A new KEK wraps the same data keys again, so that nothing else
// has to be written; a new data key is taken up while the old one still opens
// what it closed.
//
// It owns the form of both and what may be a key. It does not own where a KEK
// comes from (cmd/internal/config), where a ring is kept and when it changes
// (cached, authd), or what data keys are used for.
package keyring

import (
	"cmp"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
)

// Bounds of a ring's document.
const (
	maxKeys     = 16
	maxDocument = 16 << 10 // bytes
	version     = 1
)

// ErrWrongKEK: the KEK is not the one that a ring is wrapped by.
var ErrWrongKEK = errors.New("keys are wrapped by another key-encryption key")

// Key is a data key.
type Key struct {
	ID      ID
	Created time.Time
	Secret  Secret
}

// Ring is a list of data keys for one purpose, the active one first. It is never
// changed once made, and has always one key. Open and New make one.
type Ring struct {
	purpose string
	keys    []Key
	// Asked is when somebody asked for a new active key; zero: nobody, or it was
	// made. It is not secret and proves nothing.
	Asked time.Time
}

// New makes a ring with one fresh key.
func New(purpose string, now time.Time) Ring { return Ring{purpose: purpose}.Rotate(now) }

// Adopt makes a ring of a key that is in use already.
func Adopt(purpose string, key Key) Ring { return Ring{purpose: purpose, keys: []Key{key}} }

// Active is the key for new data.
func (r Ring) Active() Key { return r.keys[0] }

// Keys returns all keys, the active one first.
func (r Ring) Keys() []Key { return slices.Clone(r.keys) }

// Has reports whether the ring has the key.
func (r Ring) Has(id ID) bool {
	return slices.ContainsFunc(r.keys, func(k Key) bool { return k.ID == id })
}

// Rotate returns the ring with a fresh active key in front.
func (r Ring) Rotate(now time.Time) Ring {
	k := Key{Created: now.UTC().Round(0), Secret: newSecret()}
	for k.ID == (ID{}) || r.Has(k.ID) {
		rand.Read(k.ID[:])
	}
	if len(r.keys) > 0 && !k.Created.After(r.keys[0].Created) {
		k.Created = r.keys[0].Created.Add(1) // the clock went back; the order must not
	}
	return Ring{purpose: r.purpose, keys: append([]Key{k}, r.keys[:min(len(r.keys), maxKeys-1)]...)}
}

// Retire returns the ring with its active key only.
func (r Ring) Retire() Ring { return Ring{purpose: r.purpose, keys: r.keys[:1:1], Asked: r.Asked} }

// document is a ring as it is stored.
type document struct {
	Version int          `json:"version"`
	Purpose string       `json:"purpose"`
	KEK     ID           `json:"kek"`
	Keys    []wrappedKey `json:"keys"`
	Asked   time.Time    `json:"rotation_asked,omitzero"`
}

type wrappedKey struct {
	ID      ID        `json:"id"`
	Created time.Time `json:"created"`
	Wrapped []byte    `json:"wrapped"` // nonce and box: XChaCha20-Poly1305
}

// Seal returns the ring as a JSON document, its keys wrapped by the newest key of
// the KEK.
func (r Ring) Seal(kek KEK) ([]byte, error) {
	if kek.IsZero() {
		return nil, errors.New("seal keys: there is no key-encryption key")
	}
	by := kek.keys[0]
	aead, err := wrapping(by)
	if err != nil {
		return nil, err
	}
	doc := document{Version: version, Purpose: r.purpose, KEK: idOf(by), Asked: r.Asked}
	for _, k := range r.keys {
		w := wrappedKey{ID: k.ID, Created: k.Created, Wrapped: make([]byte, aead.NonceSize(), aead.NonceSize()+Size+aead.Overhead())}
		rand.Read(w.Wrapped)
		w.Wrapped = aead.Seal(w.Wrapped, w.Wrapped, k.Secret.key(), w.bound(r.purpose))
		doc.Keys = append(doc.Keys, w)
	}
	return json.Marshal(doc)
}

// Open reads what Seal made, for the same purpose. stale means that an older key
// of the KEK wraps it: to Seal it again makes the older one dispensable. The error
// is ErrWrongKEK if no key of the KEK does.
func Open(doc []byte, purpose string, kek KEK) (r Ring, stale bool, err error) {
	d, err := parse(doc, purpose)
	if err != nil {
		return Ring{}, false, err
	}
	by, ok := kek.find(d.KEK)
	if !ok {
		return Ring{}, false, fmt.Errorf("%w (it has %v, they want %v)", ErrWrongKEK, kek.IDs(), d.KEK)
	}
	aead, err := wrapping(by)
	if err != nil {
		return Ring{}, false, err
	}
	r = Ring{purpose: purpose, Asked: d.Asked}
	for i := range d.Keys {
		k, err := d.Keys[i].open(aead, purpose)
		if err != nil || r.Has(k.ID) {
			return Ring{}, false, errors.New("ring of keys is damaged")
		}
		r.keys = append(r.keys, k)
	}
	// The order is bound to the keys, not to how they lie in the document.
	slices.SortStableFunc(r.keys, func(a, b Key) int { return b.Created.Compare(a.Created) })
	return r, d.KEK != idOf(kek.keys[0]), nil
}

// Description is what a ring's document says in plain.
type Description struct {
	KEK   ID
	Keys  []Key // without their secrets, the active one first
	Asked time.Time
}

// Describe reads a document without opening it.
func Describe(doc []byte, purpose string) (Description, error) {
	d, err := parse(doc, purpose)
	if err != nil {
		return Description{}, err
	}
	about := Description{KEK: d.KEK, Asked: d.Asked}
	for _, w := range d.Keys {
		about.Keys = append(about.Keys, Key{ID: w.ID, Created: w.Created})
	}
	slices.SortStableFunc(about.Keys, func(a, b Key) int { return b.Created.Compare(a.Created) })
	return about, nil
}

// Ask returns the document with the wish for a new active key noted in it, which
// takes no KEK.
func Ask(doc []byte, purpose string, now time.Time) ([]byte, error) {
	d, err := parse(doc, purpose)
	if err != nil {
		return nil, err
	}
	d.Asked = now.UTC().Round(0)
	return json.Marshal(d)
}

func parse(doc []byte, purpose string) (d document, err error) {
	if len(doc) > maxDocument {
		return d, errors.New("ring of keys is too large")
	}
	if err := json.Unmarshal(doc, &d); err != nil {
		return d, errors.New("ring of keys is not readable")
	}
	switch {
	case d.Version != version:
		return d, fmt.Errorf("ring of keys has version %d, want %d", d.Version, version)
	case d.Purpose != purpose:
		return d, fmt.Errorf("ring of keys is for %.20q, not for %s", d.Purpose, purpose)
	case len(d.Keys) == 0 || len(d.Keys) > maxKeys:
		return d, fmt.Errorf("ring of keys has %d keys, want 1 to %d", len(d.Keys), maxKeys)
	}
	return d, nil
}

func (w *wrappedKey) open(aead cipher.AEAD, purpose string) (Key, error) {
	n := min(aead.NonceSize(), len(w.Wrapped))
	if n < aead.NonceSize() {
		return Key{}, errors.New("wrapped key is cut")
	}
	plain, err := aead.Open(nil, w.Wrapped[:n], w.Wrapped[n:], w.bound(purpose))
	if err != nil || len(plain) != Size {
		return Key{}, cmp.Or(err, errors.New("wrapped key has another size"))
	}
	return Key{ID: w.ID, Created: w.Created.UTC(), Secret: secretOf(plain)}, nil
}

// bound is what a wrapped key is bound to.
func (w *wrappedKey) bound(purpose string) []byte {
	b := append([]byte("sallyport keyring v1\x00"), purpose...)
	b = append(append(b, 0), w.ID[:]...)
	return binary.BigEndian.AppendUint64(b, uint64(w.Created.UnixNano()))
}

func wrapping(by Secret) (cipher.AEAD, error) {
	return chacha20poly1305.NewX(by.Derive("sallyport keyring wrap v1"))
}

package keyring

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
)

// maxKEK bounds a KEK: the newest, and those that it replaces.
const maxKEK = 3

// KEK is a key-encryption key: the newest wraps, and the older ones, kept for as
// long as something may still be wrapped by them, only open. The zero KEK opens
// nothing. A KEK is never changed once made.
type KEK struct{ keys []Secret }

// NewKEK makes a fresh one.
func NewKEK() KEK { return KEK{[]Secret{newSecret()}} }

// ParseKEK reads a KEK: Size random bytes as they are, or lines of 64 hexadecimal
// digits, the newest first.
func ParseKEK(data []byte) (KEK, error) {
	if len(data) == Size {
		return kekOf(data)
	}
	var raw [][]byte
	for line := range bytes.Lines(data) {
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		key := make([]byte, hex.DecodedLen(len(line)))
		if _, err := hex.Decode(key, line); err != nil || len(key) != Size {
			return KEK{}, fmt.Errorf("line %d is no key: want %d hexadecimal digits (make one with: openssl rand -hex %d)", len(raw)+1, 2*Size, Size)
		}
		if raw = append(raw, key); len(raw) > maxKEK {
			return KEK{}, fmt.Errorf("holds more than %d keys", maxKEK)
		}
	}
	return kekOf(raw...)
}

// kekOf makes a KEK of keys of Size bytes.
func kekOf(raw ...[]byte) (KEK, error) {
	if len(raw) == 0 {
		return KEK{}, errors.New("holds no key")
	}
	var k KEK
	for _, key := range raw {
		if err := plausible(key); err != nil {
			return KEK{}, err
		}
		s := secretOf(key)
		for _, other := range k.keys {
			if bytes.Equal(other.key(), s.key()) {
				return KEK{}, errors.New("holds one key twice")
			}
		}
		k.keys = append(k.keys, s)
	}
	return k, nil
}

// plausible refuses what nobody draws at random: words, and few bytes over and
// over (SECURITY-CASES J2). Of 2^40 random keys not one is refused.
func plausible(key []byte) error {
	var seen [256]bool
	distinct, text := 0, true
	for _, b := range key {
		if !seen[b] {
			seen[b] = true
			distinct++
		}
		text = text && b >= ' ' && b <= '~'
	}
	switch {
	case text:
		return errors.New("is text, which is no key: want random bytes")
	case distinct < 12:
		return errors.New("repeats itself, which is no key: want random bytes")
	}
	return nil
}

// Pack is the KEK in the fewest bytes, for UnpackKEK. It is secret.
func (k KEK) Pack() []byte {
	var b []byte
	for _, s := range k.keys {
		b = append(b, s.key()...)
	}
	return b
}

// UnpackKEK reads what Pack made.
func UnpackKEK(b []byte) (KEK, error) {
	if len(b)%Size != 0 || len(b) > maxKEK*Size {
		return KEK{}, fmt.Errorf("has %d bytes, which is no number of keys", len(b))
	}
	return kekOf(slices.Collect(slices.Chunk(b, Size))...)
}

// Text is what ParseKEK reads. It is secret.
func (k KEK) Text() []byte {
	var b []byte
	for _, s := range k.keys {
		b = append(hex.AppendEncode(b, s.key()), '\n')
	}
	return b
}

// Rotated returns the KEK with a fresh key in front, and of those before only the
// one that was the newest.
func (k KEK) Rotated() KEK {
	next := NewKEK()
	if len(k.keys) > 0 {
		next.keys = append(next.keys, k.keys[0])
	}
	return next
}

// Newest returns the KEK without its older keys.
func (k KEK) Newest() KEK { return KEK{k.keys[:min(1, len(k.keys))]} }

// IDs names the keys, the newest first.
func (k KEK) IDs() []ID {
	ids := make([]ID, len(k.keys))
	for i, s := range k.keys {
		ids[i] = idOf(s)
	}
	return ids
}

// IsZero reports whether there is no key.
func (k KEK) IsZero() bool { return len(k.keys) == 0 }

// Legacy returns the keys themselves. Stores from before there was a Ring used
// them for their data.
func (k KEK) Legacy() []Secret { return append([]Secret(nil), k.keys...) }

// idOf names a key of a KEK.
func idOf(s Secret) ID { return ID(s.Derive("sallyport keyring id v1")) }

// find returns the key with the id.
func (k KEK) find(id ID) (Secret, bool) {
	for _, s := range k.keys {
		if idOf(s) == id {
			return s, true
		}
	}
	return Secret{}, false
}

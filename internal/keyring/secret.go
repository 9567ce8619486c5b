package keyring

import (
	"bytes"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

// Size is the length of a key in bytes.
const Size = 32

// Secret is a key. A function has it: package fmt follows every pointer of a struct's
// hidden fields, but calls nothing, so that no way of printing whatever holds a
// Secret shows the key. The zero Secret is none.
type Secret struct{ key func() []byte }

func newSecret() Secret {
	b := make([]byte, Size)
	rand.Read(b)
	return Secret{func() []byte { return b }}
}

// secretOf copies b, which has Size bytes.
func secretOf(b []byte) Secret {
	b = bytes.Clone(b)
	return Secret{func() []byte { return b }}
}

// Derive returns Size bytes for one purpose (HKDF-SHA256, RFC 5869).
func (s Secret) Derive(purpose string) []byte {
	b, err := hkdf.Key(sha256.New, s.key(), nil, purpose, Size)
	if err != nil {
		panic(err) // only of lengths that HKDF cannot give
	}
	return b
}

// Format implements fmt.Formatter.
func (Secret) Format(f fmt.State, _ rune) { io.WriteString(f, "[redacted]") }

// MarshalText keeps secrets out of JSON.
func (Secret) MarshalText() ([]byte, error) { return nil, errors.New("a secret is not written down") }

// ID names a key. It tells nothing about it.
type ID [4]byte

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *ID) UnmarshalText(text []byte) error {
	b, err := hex.DecodeString(string(text))
	if err != nil || len(b) != len(id) {
		return fmt.Errorf("%.20q is no key id", text)
	}
	*id = ID(b)
	return nil
}

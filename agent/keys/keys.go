// Package keys keeps the device key: the P-256 key that proves at each login,
// renewal and posture report that this is the machine that logged in. It owns
// where the key lives (the operating system's keyring, else a file of mode 0600)
// and that this choice, once made, is never changed silently: a keyring that
// cannot be reached is an error, not a reason for a file. It does not know what
// is signed; package proto/proof does.
package keys

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"time"

	"sallyport"
	"sallyport/agent/state"
	"sallyport/proto/proof"
)

// Where a key is kept; the values of the fact key_protection.
const (
	Keyring = "keyring"
	File    = "file"
)

const (
	choiceFile = "key.json"
	keyFile    = "key.pem"
	lockName   = "key.lock"
)

// keyringTimeout bounds each keyring call: a locked keyring asks the person for
// its password, and nobody may be there.
const keyringTimeout = 30 * time.Second

// Key is the device key. It implements crypto.Signer; the private half stays
// inside.
type Key struct {
	proof.Key
	// Protection is Keyring or File.
	Protection string
	private    *ecdsa.PrivateKey
}

// Public implements crypto.Signer.
func (k *Key) Public() crypto.PublicKey { return &k.private.PublicKey }

// Sign implements crypto.Signer.
func (k *Key) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.private.Sign(random, digest, opts)
}

// Options say where a new key goes. They do not move one that exists.
type Options struct {
	// Where is Keyring, File, or empty for the keyring if there is one.
	Where string
	// Ring is the keyring; nil is the operating system's.
	Ring Ring
}

// Ring is a keyring: a secret for each name. A missing secret is fs.ErrNotExist.
type Ring interface {
	Get(name string) (string, error)
	Set(name, secret string) error
}

// choice is what key.json says: where the key is, and which key it is.
type choice struct {
	Version    int                `json:"version"`
	Protection string             `json:"protection"`
	Device     sallyport.DeviceID `json:"device"`
	// Name is that of the keyring's entry.
	Name string `json:"name,omitempty"`
}

// ErrNone is Load's error for a profile that never had a key. It is an error of
// its own so that a key that has gone missing is never taken for one.
var ErrNone = errors.New("this profile has no device key yet")

// Load returns the profile's key from its directory, or ErrNone. A key that was
// made but cannot be had is an *sallyport.Error with code keystore.unavailable
// (OutcomeUsage).
func Load(ctx context.Context, dir *state.Dir, o Options) (*Key, error) {
	var c choice
	if err := dir.ReadJSON(choiceFile, &c); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, ErrNone
		}
		return nil, unavailable(dir, "the device key's description cannot be read", err)
	}
	private, err := fetch(ctx, dir, c, o)
	if err != nil {
		return nil, err
	}
	k, err := newKey(private, c.Protection)
	if err != nil {
		return nil, err
	}
	if k.ID != c.Device {
		return nil, unavailable(dir, "the "+c.Protection+" holds another device key than the one this profile was made with", nil)
	}
	return k, nil
}

// LoadOrCreate returns the profile's key and makes one if there is none.
func LoadOrCreate(ctx context.Context, dir *state.Dir, o Options) (*Key, error) {
	k, err := Load(ctx, dir, o)
	if !errors.Is(err, ErrNone) {
		return k, err
	}
	unlock, err := dir.Lock(ctx, lockName)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if k, err := Load(ctx, dir, o); !errors.Is(err, ErrNone) {
		return k, err // another process was first
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make device key: %w", err)
	}
	return store(ctx, dir, private, o)
}

func newKey(private *ecdsa.PrivateKey, protection string) (*Key, error) {
	public, err := proof.KeyOf(&private.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("device key: %w", err)
	}
	return &Key{Key: public, Protection: protection, private: private}, nil
}

// store puts a new key where o says, and only then writes down where that is.
func store(ctx context.Context, dir *state.Dir, private *ecdsa.PrivateKey, o Options) (*Key, error) {
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, fmt.Errorf("encode device key: %w", err)
	}
	c := choice{Version: 1, Protection: Keyring}
	k, err := newKey(private, Keyring)
	if err != nil {
		return nil, err
	}
	c.Device, c.Name = k.ID, "device key "+string(k.ID)
	if o.Where != File {
		err = putInRing(ctx, ringOf(o), c.Name, base64.StdEncoding.EncodeToString(der))
		if err != nil && o.Where == Keyring {
			return nil, unavailable(dir, "the keyring does not take the device key", err)
		}
	}
	if o.Where == File || err != nil {
		c.Protection, c.Name, k.Protection = File, "", File
		text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		if err := dir.Write(keyFile, text); err != nil {
			return nil, err
		}
	}
	if err := dir.WriteJSON(choiceFile, c); err != nil {
		return nil, err
	}
	return k, nil
}

func ringOf(o Options) Ring {
	if o.Ring != nil {
		return o.Ring
	}
	return systemRing{}
}

// putInRing also reads the secret back: some keyrings take what they then lose.
func putInRing(ctx context.Context, ring Ring, name, secret string) error {
	_, err := bounded(ctx, func() (string, error) {
		if err := ring.Set(name, secret); err != nil {
			return "", err
		}
		got, err := ring.Get(name)
		if err == nil && got != secret {
			err = errors.New("the keyring gave back something else")
		}
		return "", err
	})
	return err
}

// bounded runs one keyring call, which knows no context. The goroutine of a call
// that hangs ends with the call.
func bounded(ctx context.Context, call func() (string, error)) (string, error) {
	type answer struct {
		secret string
		err    error
	}
	ctx, cancel := context.WithTimeoutCause(ctx, keyringTimeout, errors.New("the keyring does not answer (locked?)"))
	defer cancel()
	done := make(chan answer, 1)
	go func() {
		secret, err := call()
		done <- answer{secret, err}
	}()
	select {
	case a := <-done:
		return a.secret, a.err
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

func fetch(ctx context.Context, dir *state.Dir, c choice, o Options) (*ecdsa.PrivateKey, error) {
	switch c.Protection {
	case Keyring:
		text, err := bounded(ctx, func() (string, error) { return ringOf(o).Get(c.Name) })
		if err != nil {
			return nil, unavailable(dir, "the device key is in the keyring, and the keyring does not give it", err)
		}
		der, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, unavailable(dir, "the keyring's entry is no key", nil)
		}
		return parse(dir, der)
	case File:
		text, err := dir.Read(keyFile)
		if err != nil {
			return nil, unavailable(dir, "the device key's file cannot be used", err)
		}
		block, _ := pem.Decode(text)
		if block == nil || block.Type != "PRIVATE KEY" {
			return nil, unavailable(dir, "the device key's file holds no key", nil)
		}
		return parse(dir, block.Bytes)
	}
	return nil, unavailable(dir, fmt.Sprintf("the device key is kept in a way that this version does not know (%q)", c.Protection), nil)
}

func parse(dir *state.Dir, der []byte) (*ecdsa.PrivateKey, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, unavailable(dir, "the device key cannot be read", nil) // err might quote the key
	}
	private, ok := key.(*ecdsa.PrivateKey)
	if !ok || private.Curve != elliptic.P256() {
		return nil, unavailable(dir, "the device key is no P-256 key", nil)
	}
	return private, nil
}

// unavailable is case E13. The hint is the state directory's own where it has
// one (the chmod to type), and how to start over otherwise.
func unavailable(dir *state.Dir, message string, cause error) error {
	hint := "unlock the keyring and try again; to start over with a new key: rm " + filepath.Join(dir.Path(), choiceFile)
	var e *sallyport.Error
	if errors.As(cause, &e) {
		message, hint = message+": "+e.Message, e.Hint
		cause = e.Err
	}
	return &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: "keystore.unavailable", Message: message, Hint: hint, Err: cause}
}

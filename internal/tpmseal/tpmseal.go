// Package tpmseal keeps a short secret so that only one TPM 2.0 gives it back: a
// copy of the file on another machine is worth nothing. It owns the form of the
// sealed file and the talk with the TPM. It does not own what is sealed, and binds
// it to no state of the machine: whoever may use the TPM of a running machine gets
// the secret.
package tpmseal

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// MaxSecret is how many bytes a TPM seals (MAX_SYM_DATA).
const MaxSecret = 128

// blob is a sealed secret as it lies in its file.
type blob struct {
	Version int    `json:"version"`
	Public  []byte `json:"public"`
	Private []byte `json:"private"` // encrypted by the TPM's storage key
}

// Seal returns what gives the secret back by means of the TPM at device (/dev/tpmrm0,
// or the unix socket of a TPM in software).
func Seal(device string, secret []byte) (sealed []byte, err error) {
	if len(secret) == 0 || len(secret) > MaxSecret {
		return nil, fmt.Errorf("seal: %d bytes; a TPM takes 1 to %d", len(secret), MaxSecret)
	}
	err = withStorageKey(device, func(t transport.TPM, parent storageKey) error {
		made, err := tpm2.Create{
			ParentHandle: parent.auth(inwards),
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: secret}),
			}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type:             tpm2.TPMAlgKeyedHash,
				NameAlg:          tpm2.TPMAlgSHA256,
				ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, UserWithAuth: true, NoDA: true},
			}),
		}.Execute(t)
		if err != nil {
			return fmt.Errorf("seal: %w", err)
		}
		sealed, err = json.Marshal(blob{1, tpm2.Marshal(made.OutPublic), tpm2.Marshal(made.OutPrivate)})
		return err
	})
	return sealed, err
}

// Unseal returns the secret. It fails with every TPM but the one that sealed it.
func Unseal(device string, sealed []byte) (secret []byte, err error) {
	public, private, err := parse(sealed)
	if err != nil {
		return nil, err
	}
	err = withStorageKey(device, func(t transport.TPM, parent storageKey) error {
		loaded, err := tpm2.Load{ParentHandle: parent.auth(inwards), InPrivate: *private, InPublic: *public}.Execute(t)
		if err != nil {
			return fmt.Errorf("unseal: not sealed by this TPM, or damaged: %w", err)
		}
		defer flush(t, loaded.ObjectHandle)
		got, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{
			Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: parent.session(outwards),
		}}.Execute(t)
		if err != nil {
			return fmt.Errorf("unseal: %w", err)
		}
		secret = got.OutData.Buffer
		return nil
	})
	return secret, err
}

func parse(sealed []byte) (*tpm2.TPM2BPublic, *tpm2.TPM2BPrivate, error) {
	var b blob
	if err := json.Unmarshal(sealed, &b); err != nil || b.Version != 1 {
		return nil, nil, errors.New("unseal: not a sealed file of this version")
	}
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](b.Public)
	if err != nil {
		return nil, nil, fmt.Errorf("unseal: %w", err)
	}
	private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](b.Private)
	if err != nil {
		return nil, nil, fmt.Errorf("unseal: %w", err)
	}
	return public, private, nil
}

// storageKey is the TPM's primary storage key (TCG's ECC template). It is derived
// from the TPM's own seed, so that making it again gives the same one.
type storageKey struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public tpm2.TPMTPublic
}

// Which way a command's secret goes.
var (
	inwards  = tpm2.AESEncryption(128, tpm2.EncryptIn)
	outwards = tpm2.AESEncryption(128, tpm2.EncryptOut)
)

// session keeps what goes over the bus in cipher: salted by the storage key, whose
// private half never leaves the TPM.
func (k storageKey) session(cipher tpm2.AuthOption) tpm2.Session {
	return tpm2.HMAC(tpm2.TPMAlgSHA256, 16, cipher, tpm2.Salted(k.handle, k.public))
}

func (k storageKey) auth(cipher tpm2.AuthOption) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: k.handle, Name: k.name, Auth: k.session(cipher)}
}

func withStorageKey(device string, do func(transport.TPM, storageKey) error) error {
	t, err := open(device)
	if err != nil {
		return fmt.Errorf("open TPM %s: %w", device, err)
	}
	defer t.Close()
	made, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(t)
	if err != nil {
		return fmt.Errorf("storage key of TPM %s: %w", device, err)
	}
	defer flush(t, made.ObjectHandle)
	public, err := made.OutPublic.Contents()
	if err != nil {
		return fmt.Errorf("storage key of TPM %s: %w", device, err)
	}
	return do(t, storageKey{made.ObjectHandle, made.Name, *public})
}

// flush frees a slot of the TPM. What it leaves behind ends with the connection.
func flush(t transport.TPM, h tpm2.TPMHandle) { _, _ = tpm2.FlushContext{FlushHandle: h}.Execute(t) }

func open(device string) (transport.TPMCloser, error) {
	fi, err := os.Stat(device)
	if err != nil {
		return nil, err
	}
	if fi.Mode().Type() == os.ModeSocket {
		return linuxudstpm.Open(device)
	}
	return linuxtpm.Open(device)
}

package config

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"sallyport"
	"sallyport/internal/fault"
	"sallyport/internal/keyring"
	"sallyport/internal/tlsid"
	"sallyport/internal/tpmseal"
)

// Keys says where the key-encryption keys of data at rest come from.
type Keys struct {
	// Source is file (data_dir/keys/NAME.key), credential (systemd's
	// LoadCredential or LoadCredentialEncrypted, sallyport.NAME) or tpm
	// (data_dir/keys/NAME.tpm, which only this machine's TPM opens) (file). NAME is
	// records for cached and seal for authd.
	Source string `yaml:"source"`
	// TPMDevice is the TPM, a device or a unix socket (/dev/tpmrm0).
	TPMDevice string `yaml:"tpm_device"`
}

// Sources of key-encryption keys.
const (
	FromFile       = "file"
	FromCredential = "credential"
	FromTPM        = "tpm"
)

func (k Keys) validate() fault.List {
	var l fault.List
	switch k.Source {
	case "", FromFile, FromCredential, FromTPM:
	default:
		l.Addf("source", "%.40q is none of file, credential, tpm", k.Source)
	}
	if k.TPMDevice != "" && k.Source != FromTPM {
		l.Addf("tpm_device", "says nothing without source: tpm")
	}
	return l
}

// KeySource is where key-encryption keys come from.
func (l Layout) KeySource() string { return cmp.Or(l.Keys.Source, FromFile) }

func (l Layout) tpm() string { return cmp.Or(l.Keys.TPMDevice, "/dev/tpmrm0") }

// KEKFile is where a key-encryption key lies. Of credentials it is the file that
// systemd shows to the daemon; empty: it shows none.
func (l Layout) KEKFile(name string) string {
	switch l.KeySource() {
	case FromTPM:
		return filepath.Join(l.Dir, "keys", name+".tpm")
	case FromCredential:
		if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" {
			return filepath.Join(dir, "sallyport."+name)
		}
		return ""
	}
	return l.secret(name)
}

// KEK loads a key-encryption key.
func (l Layout) KEK(name string) (keyring.KEK, error) {
	file := l.KEKFile(name)
	var kek keyring.KEK
	var err error
	switch l.KeySource() {
	case FromTPM:
		kek, err = l.kekOfTPM(file)
	case FromCredential:
		kek, err = kekOfCredential(name, file)
	default:
		var b []byte
		if b, err = tlsid.ReadKeyFile(file); err == nil {
			kek, err = keyring.ParseKEK(b)
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return kek, Missing(err)
	case sallyport.CodeOf(err) != "":
		return kek, err
	case err != nil:
		return kek, &sallyport.Error{
			Outcome: sallyport.OutcomeUsage, Code: "keys.unusable", Message: "the " + name + " key cannot be used",
			Err: fmt.Errorf("%s: %w", file, err), Hint: "restore it from a backup (docs/configuration.md, keys)",
		}
	}
	return kek, nil
}

func (l Layout) kekOfTPM(file string) (keyring.KEK, error) {
	sealed, err := tlsid.ReadKeyFile(file)
	if err != nil {
		return keyring.KEK{}, err
	}
	packed, err := tpmseal.Unseal(l.tpm(), sealed)
	if err != nil {
		// A TPM that is not there is another matter than a file that is not.
		return keyring.KEK{}, fmt.Errorf("%v", err)
	}
	defer clear(packed)
	return keyring.UnpackKEK(packed)
}

// maxCredential bounds what is read of a credential.
const maxCredential = 4 << 10

// kekOfCredential reads a credential. Who may read it is systemd's business: its
// access list looks like a group's permission.
func kekOfCredential(name, file string) (keyring.KEK, error) {
	missing := func(err error) error {
		return &sallyport.Error{
			Outcome: sallyport.OutcomeUsage, Code: "keys.missing", Message: "systemd gives no credential sallyport." + name, Err: err,
			Hint: "add LoadCredentialEncrypted=sallyport." + name + " to the unit; make one with: openssl rand -hex 32 | systemd-creds encrypt --name=sallyport." +
				name + " - /etc/credstore.encrypted/sallyport." + name,
		}
	}
	if file == "" {
		return keyring.KEK{}, missing(errors.New("CREDENTIALS_DIRECTORY is not set"))
	}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return keyring.KEK{}, missing(err)
	}
	if err != nil {
		return keyring.KEK{}, err
	}
	if len(b) > maxCredential {
		return keyring.KEK{}, errors.New("is too large for a key")
	}
	return keyring.ParseKEK(b)
}

// ensureKEK makes a key-encryption key that does not exist. Credentials are made by
// whoever writes the unit.
func (l Layout) ensureKEK(name string) error {
	switch l.KeySource() {
	case FromCredential:
		return nil
	case FromTPM:
		if !exists(l.KEKFile(name)) {
			return l.writeKEK(name, keyring.NewKEK())
		}
		return nil
	}
	return ensureFile(l.secret(name), randomKey)
}

// writeKEK replaces a key-encryption key at once or not at all.
func (l Layout) writeKEK(name string, kek keyring.KEK) error {
	switch l.KeySource() {
	case FromCredential:
		return &sallyport.Error{
			Outcome: sallyport.OutcomeUsage, Code: "keys.credential", Message: "a credential is replaced where it was made",
			Hint: "put `openssl rand -hex 32` as a new first line before the old key, encrypt both with systemd-creds, restart the daemon; without the old line the next time",
		}
	case FromTPM:
		packed := kek.Pack()
		defer clear(packed)
		sealed, err := tpmseal.Seal(l.tpm(), packed)
		if err != nil {
			return err
		}
		return tlsid.WriteKeyFile(l.KEKFile(name), sealed)
	}
	return tlsid.WriteKeyFile(l.KEKFile(name), kek.Text())
}

// RotateKEK puts a fresh key in front of a key-encryption key and keeps the one that
// was the newest. It returns the new one's id.
func (l Layout) RotateKEK(name string) (keyring.ID, error) {
	kek, err := l.KEK(name)
	if err != nil {
		return keyring.ID{}, err
	}
	next := kek.Rotated()
	return next.IDs()[0], l.writeKEK(name, next)
}

// RetireKEK drops all keys of a key-encryption key but the newest.
func (l Layout) RetireKEK(name string) error {
	kek, err := l.KEK(name)
	if err != nil {
		return err
	}
	return l.writeKEK(name, kek.Newest())
}

package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"sallyport/internal/tlsid"
)

// files makes the file names in v (keys that end in _file) absolute, relative to
// the configuration's own directory, and checks what they name: secrets belong
// to their owner alone and are no examples, certificates belong to their keys
// and are valid, CA files hold CAs.
func (d *decoder) files(v reflect.Value, key, dir string) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			d.files(v.Elem(), key, dir)
		}
	case reflect.Slice:
		for i := range v.Len() {
			d.files(v.Index(i), index(key, i), dir)
		}
	case reflect.Struct:
		if v.Type() == policyType {
			return
		}
		names := map[string]reflect.Value{}
		for _, f := range fieldsOf(v.Type()) {
			field := v.FieldByIndex(f.index)
			if f.typ.Kind() == reflect.String && strings.HasSuffix(f.name, "_file") {
				names[f.name] = field
				if s := field.String(); s != "" && !filepath.IsAbs(s) {
					field.SetString(filepath.Join(dir, s))
				}
			}
			d.files(field, join(key, f.name), dir)
		}
		d.named(names, key)
	}
}

// named checks the files that stand in one section.
func (d *decoder) named(names map[string]reflect.Value, key string) {
	for name, v := range names {
		path, at := v.String(), join(key, name)
		if path == "" {
			continue
		}
		var err error
		switch {
		case name == "ca_file":
			_, err = tlsid.LoadPool(path)
		case name == "cert_file" || name == "key_file":
			continue // as a pair, below
		case strings.Contains(name, "secret") || strings.Contains(name, "key") || strings.Contains(name, "password"):
			err = checkSecret(path)
		default:
			_, err = os.Stat(path)
		}
		if err != nil {
			d.fault(d.line(at), at, "%v", plainly(err))
		}
	}
	d.keyPair(names["cert_file"], names["key_file"], key)
}

func (d *decoder) keyPair(cert, private reflect.Value, key string) {
	if !cert.IsValid() || !private.IsValid() || cert.String() == "" && private.String() == "" {
		return
	}
	at := join(key, "cert_file")
	if cert.String() == "" || private.String() == "" {
		d.fault(d.line(key), key, "cert_file and key_file belong together: give both or neither")
		return
	}
	if _, err := tlsid.LoadKeyPair(cert.String(), private.String()); err != nil {
		d.fault(d.line(at), at, "%v", plainly(err))
	}
}

// minSecret is how long a secret must be to be no guess: 32 characters.
const minSecret = 32

// examples are secrets that people copy from manuals.
var examples = []string{"changeme", "change-me", "change_me", "secret", "password", "example", "your-client-secret", "insert-your-secret-here"}

// checkSecret refuses secrets that are none: readable by others, too short, or
// taken from an example (SECURITY-CASES J2).
func checkSecret(path string) error {
	text, err := tlsid.ReadKeyFile(path)
	if err != nil {
		return err
	}
	secret := strings.TrimSpace(string(text))
	rest, example := strings.ToLower(secret), ""
	for _, e := range examples {
		if strings.Contains(rest, e) {
			rest, example = strings.ReplaceAll(rest, e, ""), e
		}
	}
	if example != "" && strings.Trim(rest, "-_0123456789.! ") == "" {
		return fmt.Errorf("%s holds %q, which is an example and no secret", path, example)
	}
	switch {
	case len(secret) < minSecret:
		return fmt.Errorf("%s holds %d characters: a secret has at least %d", path, len(secret), minSecret)
	case strings.Count(secret, secret[:1]) == len(secret):
		return fmt.Errorf("%s holds one character over and over, which is no secret", path)
	}
	return nil
}

// plainly drops the system call's name from an error about a file.
func plainly(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) && errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: no such file", pe.Path)
	}
	return err
}

package keys

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"github.com/zalando/go-keyring"
)

const service = "sallyport"

// systemRing is the Secret Service on Linux, the keychain on macOS, the
// credential manager on Windows.
type systemRing struct{}

var errNoRing = errors.New("there is no keyring here (no D-Bus session)")

func (systemRing) Get(name string) (string, error) {
	if !haveRing() {
		return "", errNoRing
	}
	secret, err := keyring.Get(service, name)
	if errors.Is(err, keyring.ErrNotFound) {
		return "", fs.ErrNotExist
	}
	return secret, err
}

func (systemRing) Set(name, secret string) error {
	if !haveRing() {
		return errNoRing
	}
	return keyring.Set(service, name, secret)
}

// haveRing keeps the D-Bus library from starting a bus of its own with
// dbus-launch where there is none: a key in a keyring that ends with this
// process would be a lost key.
func haveRing() bool {
	if runtime.GOOS == "darwin" || runtime.GOOS == "windows" || os.Getenv("DBUS_SESSION_BUS_ADDRESS") != "" {
		return true
	}
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		dir = "/run/user/" + strconv.Itoa(os.Geteuid())
	}
	_, err := os.Stat(filepath.Join(dir, "bus"))
	return err == nil
}

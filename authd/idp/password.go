package idp

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/argon2"
)

// maxPassword bounds what is hashed, in bytes.
const maxPassword = 1024

// costs of argon2id (RFC 9106): memory in KiB, passes, lanes.
type costs struct {
	memory, time uint32
	threads      uint8
}

// defaultCosts are OWASP's first choice for argon2id: 19 MiB, 2 passes, 1 lane.
var defaultCosts = costs{memory: 19 << 10, time: 2, threads: 1}

// Bounds of the costs that a configuration may ask for: below is guessable,
// above lets each attempt take the machine.
var (
	minCosts = costs{memory: 8 << 10, time: 1, threads: 1}
	maxCosts = costs{memory: 256 << 10, time: 16, threads: 8}
)

type passwordHash struct {
	costs
	salt, key []byte
}

// HashPassword returns the argon2id hash of password in the PHC string format,
// for User.PasswordHash. The password must have 1 to 1,024 bytes.
func HashPassword(password string) (string, error) {
	if password == "" || len(password) > maxPassword {
		return "", fmt.Errorf("password must have 1 to %d bytes", maxPassword)
	}
	return newHash(password, defaultCosts).String(), nil
}

func newHash(password string, c costs) passwordHash {
	h := passwordHash{costs: c, salt: make([]byte, 16), key: make([]byte, 32)}
	rand.Read(h.salt)
	h.key = h.derive(password)
	return h
}

func (h passwordHash) derive(password string) []byte {
	return argon2.IDKey([]byte(password), h.salt, h.time, h.memory, h.threads, uint32(len(h.key)))
}

func (h passwordHash) matches(password string) bool {
	return subtle.ConstantTimeCompare(h.derive(password), h.key) == 1
}

// String returns $argon2id$v=19$m=…,t=…,p=…$salt$key.
func (h passwordHash) String() string {
	enc := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s",
		argon2.Version, h.memory, h.time, h.threads, enc.EncodeToString(h.salt), enc.EncodeToString(h.key))
}

var errNoHash = errors.New("must be an argon2id hash: $argon2id$v=19$m=…,t=…,p=…$salt$key")

func parseHash(s string) (passwordHash, error) {
	var h passwordHash
	parts := strings.Split(s, "$")
	if len(parts) != 6 || parts[0] != "" || parts[1] != "argon2id" || parts[2] != fmt.Sprintf("v=%d", argon2.Version) {
		return h, errNoHash
	}
	if _, err := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &h.memory, &h.time, &h.threads); err != nil {
		return h, errNoHash
	}
	var errSalt, errKey error
	h.salt, errSalt = base64.RawStdEncoding.DecodeString(parts[4])
	h.key, errKey = base64.RawStdEncoding.DecodeString(parts[5])
	if errSalt != nil || errKey != nil || len(h.salt) < 8 || len(h.key) < 16 || len(h.key) > 64 || h.String() != s {
		return h, errNoHash
	}
	if h.memory < minCosts.memory || h.time < minCosts.time || h.threads < minCosts.threads {
		return h, fmt.Errorf("hash is too cheap: want at least m=%d,t=%d,p=%d", minCosts.memory, minCosts.time, minCosts.threads)
	}
	if h.memory > maxCosts.memory || h.time > maxCosts.time || h.threads > maxCosts.threads {
		return h, fmt.Errorf("hash is too costly: want at most m=%d,t=%d,p=%d", maxCosts.memory, maxCosts.time, maxCosts.threads)
	}
	return h, nil
}

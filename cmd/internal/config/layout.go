package config

import (
	"cmp"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"sallyport"
	"sallyport/internal/tlsid"
)

// Layout is where everything lies in the data directory. No other package knows
// a file name in it.
//
//	keys/{internal-ca,public-ca,session-ca}.{crt,key}  one CA, one purpose
//	keys/session-ca-previous.{crt,key}                 the one before, after a rotation
//	keys/{records,seal}.key                            key-encryption keys (or .tpm, or a credential)
//	keys/reset.key                                     32 random bytes
//	keys/audit-<daemon>.{key,pub}                      Ed25519, signs audit heads
//	svc/<kind>.{crt,key}                               daemon to daemon
//	svc/{gateway,authd}-public.{crt,key}               listeners without a certificate of their own
//	postgres.marker                                    where cached's store is PostgreSQL
//	cached.db, cached.sock, policyd.sock, audit/<daemon>/
type Layout struct {
	Dir string // absolute
	// Audit is the directory of the audit logs; empty: audit under Dir.
	Audit string
	// From is the directory whose CAs sign what is made here; empty: Dir.
	From string
	// Keys says where key-encryption keys come from; zero: from files under Dir.
	Keys Keys
}

// issuer is where the CAs are.
func (l Layout) issuer() Layout { return Layout{Dir: cmp.Or(l.From, l.Dir)} }

// Daemons are the four services, in the order in which they start.
var Daemons = []string{"cached", "policyd", "authd", "gateway"}

// Names of the CAs and secrets of a Layout.
const (
	InternalCA = "internal-ca" // signs service certificates
	PublicCA   = "public-ca"   // signs public listeners that have no certificate of their own
	SessionCA  = "session-ca"  // signs session certificates

	previousSessionCA = "session-ca-previous" // signs until gateways know SessionCA

	RecordsKey = "records" // wraps the keys of cached's rows
	SealKey    = "seal"    // wraps the keys of what authd stores of others' secrets
	ResetKey   = "reset"   // tells agents that a gateway has restarted
)

// Database is the file of cached's SQLite store.
func (l Layout) Database() string { return filepath.Join(l.Dir, "cached.db") }

// PostgresMarker is the file that remembers which store in PostgreSQL is cached's.
func (l Layout) PostgresMarker() string { return filepath.Join(l.Dir, "postgres.marker") }

// Socket is the admin socket of cached or policyd.
func (l Layout) Socket(daemon string) string { return filepath.Join(l.Dir, daemon+".sock") }

// AuditDir is the directory of a daemon's audit chain.
func (l Layout) AuditDir(daemon string) string {
	if l.Audit != "" {
		return filepath.Join(l.Audit, daemon)
	}
	return filepath.Join(l.Dir, "audit", daemon)
}

// ServicePair is where the certificate and key of a service lie.
func (l Layout) ServicePair(kind string) (cert, key string) { return l.pair("svc", kind) }

// PublicPair is where certificate and key of a public listener lie that was
// given none.
func (l Layout) PublicPair(daemon string) (cert, key string) { return l.pair("svc", daemon+"-public") }

// CAPair is where a CA lies.
func (l Layout) CAPair(name string) (cert, key string) { return l.pair("keys", name) }

func (l Layout) pair(dir, name string) (cert, key string) {
	base := filepath.Join(l.Dir, dir, name)
	return base + ".crt", base + ".key"
}

// FilesOf returns the files of keys and certificates that a daemon, or the
// operator's tool, needs on its machine.
func (l Layout) FilesOf(who string) []string {
	ca, _ := l.CAPair(InternalCA)
	cert, key := l.ServicePair(who)
	files := []string{ca, cert, key}
	if slices.Contains(Daemons, who) {
		_, audit := l.pair("keys", "audit-"+who)
		files = append(files, audit)
	}
	switch who {
	case "cached":
		files = append(files, l.kekFiles(RecordsKey)...)
	case "authd":
		files = append(append(files, l.sessionCAFiles()...), l.kekFiles(SealKey)...)
	}
	if who == "gateway" {
		files = append(files, l.secret(ResetKey))
	}
	if who == "authd" || who == "gateway" {
		publicCA, _ := l.CAPair(PublicCA)
		publicCert, publicKey := l.PublicPair(who)
		files = append(files, publicCA, publicCert, publicKey)
	}
	return files
}

// kekFiles are the files of a key-encryption key that have to be on the machine: no
// file of ours for a credential.
func (l Layout) kekFiles(name string) []string {
	if l.KeySource() == FromCredential {
		return nil
	}
	return []string{l.KEKFile(name)}
}

// CA loads one of the CAs.
func (l Layout) CA(name string) (*tlsid.CA, error) {
	ca, err := tlsid.LoadCA(l.CAPair(name))
	if err != nil {
		return nil, Missing(err)
	}
	return ca, nil
}

// SessionCAs loads the session CA and, where a rotation has left one, the one
// before it, in this order.
func (l Layout) SessionCAs() ([]*tlsid.CA, error) {
	newest, err := l.CA(SessionCA)
	if err != nil {
		return nil, err
	}
	if cert, _ := l.CAPair(previousSessionCA); !exists(cert) {
		return []*tlsid.CA{newest}, nil
	}
	previous, err := l.CA(previousSessionCA)
	if err != nil {
		return nil, err
	}
	return []*tlsid.CA{newest, previous}, nil
}

// RotateSessionCA makes a new session CA and keeps the one in force as the
// previous one. At no moment is there none that loads.
func (l Layout) RotateSessionCA() error {
	if old, err := l.CA(SessionCA); err == nil {
		if err := old.Save(l.CAPair(previousSessionCA)); err != nil {
			return err
		}
	} else if _, previous := l.CA(previousSessionCA); previous != nil {
		return err
	} // else an earlier rotation was cut short between key and certificate
	next, err := tlsid.NewCA("Sallyport sessions", 0)
	if err != nil {
		return err
	}
	return next.Save(l.CAPair(SessionCA))
}

// SessionCAFiles are the files that change with the session CA: certificates,
// each of which is written after its key.
func (l Layout) SessionCAFiles() []string {
	var certs []string
	for _, name := range []string{SessionCA, previousSessionCA} {
		cert, _ := l.CAPair(name)
		certs = append(certs, cert)
	}
	return certs
}

// sessionCAFiles are the files of the session CAs that there are.
func (l Layout) sessionCAFiles() []string {
	cert, key := l.CAPair(SessionCA)
	files := []string{cert, key}
	if cert, key = l.CAPair(previousSessionCA); exists(cert) {
		files = append(files, cert, key)
	}
	return files
}

// Secret loads one of the 32-byte keys.
func (l Layout) Secret(name string) ([]byte, error) {
	b, err := tlsid.ReadKeyFile(l.secret(name))
	if err != nil {
		return nil, Missing(err)
	}
	if len(b) != 32 {
		return nil, fmt.Errorf("%s: %d bytes, want 32: the file is damaged; restore it from a backup", l.secret(name), len(b))
	}
	return b, nil
}

func (l Layout) secret(name string) string { return filepath.Join(l.Dir, "keys", name+".key") }

// AuditKey loads the key that signs a daemon's audit heads.
func (l Layout) AuditKey(daemon string) (ed25519.PrivateKey, error) {
	_, file := l.pair("keys", "audit-"+daemon)
	b, err := tlsid.ReadKeyFile(file)
	if err != nil {
		return nil, Missing(err)
	}
	key, err := parsePEM(b, "PRIVATE KEY", x509.ParsePKCS8PrivateKey)
	private, ok := key.(ed25519.PrivateKey)
	if err != nil || !ok {
		return nil, fmt.Errorf("%s: holds no Ed25519 key in PKCS #8", file)
	}
	return private, nil
}

// AuditPublicKey loads the public half; unlike the key itself it is no secret,
// so that audit logs can be verified elsewhere.
func (l Layout) AuditPublicKey(daemon string) (ed25519.PublicKey, error) {
	b, err := os.ReadFile(l.auditPublic(daemon))
	if err != nil {
		return nil, Missing(err)
	}
	key, err := parsePEM(b, "PUBLIC KEY", x509.ParsePKIXPublicKey)
	public, ok := key.(ed25519.PublicKey)
	if err != nil || !ok {
		return nil, fmt.Errorf("%s: holds no Ed25519 public key", l.auditPublic(daemon))
	}
	return public, nil
}

func (l Layout) auditPublic(daemon string) string {
	return filepath.Join(l.Dir, "keys", "audit-"+daemon+".pub")
}

func parsePEM(b []byte, typ string, parse func([]byte) (any, error)) (any, error) {
	block, rest := pem.Decode(b)
	if block == nil || block.Type != typ || len(rest) > 0 {
		return nil, errors.New("no PEM block of type " + typ)
	}
	return parse(block.Bytes)
}

// Missing tells how a key file that does not exist is made; other errors pass.
func Missing(err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal, Code: "keys.missing", Message: "a key file is missing", Err: err,
		Hint: "run `sallyport init --config FILE` on the machine that keeps the keys, and copy what it names",
	}
}

// EnsureKeys makes the directory and every CA and key that does not exist yet.
// It never replaces one, and refuses to make a new key for data that an old one
// protects.
func (l Layout) EnsureKeys() error {
	if err := l.ensureDirs(); err != nil {
		return err
	}
	if err := l.checkRecordsKey(); err != nil {
		return err
	}
	for name, purpose := range map[string]string{
		InternalCA: "Sallyport services", PublicCA: "Sallyport listeners", SessionCA: "Sallyport sessions",
	} {
		if err := l.ensureCA(name, purpose); err != nil {
			return err
		}
	}
	for _, name := range []string{RecordsKey, SealKey} {
		if err := l.ensureKEK(name); err != nil {
			return err
		}
	}
	if err := ensureFile(l.secret(ResetKey), randomKey); err != nil {
		return err
	}
	for _, daemon := range Daemons {
		if err := l.ensureAuditKey(daemon); err != nil {
			return err
		}
	}
	return nil
}

// EnsureCopy makes the directory for a further process of a daemon: it gets what it
// shares with the others from the directory From, and an audit key of its own. Its
// certificates are made by EnsureService and EnsurePublic.
func (l Layout) EnsureCopy(who string) error {
	if err := l.ensureDirs(); err != nil {
		return err
	}
	own := []string{}
	for _, pair := range []func(string) (string, string){l.ServicePair, l.PublicPair} {
		cert, key := pair(who)
		own = append(own, cert, key)
	}
	if slices.Contains(Daemons, who) {
		if err := l.ensureAuditKey(who); err != nil {
			return err
		}
	}
	for _, file := range l.FilesOf(who) {
		if slices.Contains(own, file) {
			continue
		}
		rel, err := filepath.Rel(l.Dir, file)
		if err != nil {
			return err
		}
		err = ensureFile(file, func() ([]byte, error) { return os.ReadFile(filepath.Join(l.From, rel)) })
		if err != nil {
			return Missing(err)
		}
	}
	return nil
}

// EnsureService makes or renews the certificate of a service kind. name tells it
// from others of its kind; empty: there are none.
func (l Layout) EnsureService(domain, kind, name string, now time.Time) error {
	name = cmp.Or(name, kind)
	cert, key := l.ServicePair(kind)
	return l.ensureLeaf(cert, key, InternalCA, now, func(have *x509.Certificate) bool {
		k, n, err := tlsid.Service(have, domain)
		return err == nil && k == kind && n == name
	}, func(ca *tlsid.CA) (tls.Certificate, error) {
		return ca.IssueService(domain, kind, name, nil, tlsid.ServiceLife)
	})
}

// EnsurePublic makes or renews the certificate of a public listener that was
// given none.
func (l Layout) EnsurePublic(daemon, host string, now time.Time) error {
	cert, key := l.PublicPair(daemon)
	return l.ensureLeaf(cert, key, PublicCA, now, func(have *x509.Certificate) bool {
		return have.VerifyHostname(host) == nil
	}, func(ca *tlsid.CA) (tls.Certificate, error) {
		return ca.IssueServer([]string{host}, tlsid.ServiceLife)
	})
}

// ensureLeaf keeps a pair that its CA signed, that fits and that has half of its
// life before it, and replaces any other.
func (l Layout) ensureLeaf(cert, key, caName string, now time.Time, fits func(*x509.Certificate) bool, issue func(*tlsid.CA) (tls.Certificate, error)) error {
	ca, err := l.issuer().CA(caName)
	if err != nil {
		return err
	}
	have, err := tlsid.LoadKeyPair(cert, key)
	if err == nil && have.Leaf.CheckSignatureFrom(ca.Certificate()) == nil && fits(have.Leaf) {
		life := have.Leaf.NotAfter.Sub(have.Leaf.NotBefore)
		if now.Before(have.Leaf.NotAfter.Add(-life / 2)) {
			return nil
		}
	}
	fresh, err := issue(ca)
	if err != nil {
		return err
	}
	return tlsid.SaveKeyPair(fresh, cert, key)
}

func (l Layout) ensureDirs() error {
	for _, dir := range []string{l.Dir, filepath.Join(l.Dir, "keys"), filepath.Join(l.Dir, "svc")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("data_dir: %w", err)
		}
		if err := closeDir(dir); err != nil {
			return fmt.Errorf("data_dir: %w", err)
		}
	}
	return nil
}

// closeDir makes an empty directory ours alone, and refuses one with contents
// that others could read or change.
func closeDir(dir string) error {
	fi, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return fmt.Errorf("%s is no directory (symbolic links are not followed)", dir)
	}
	if fi.Mode().Perm()&0o077 == 0 {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		return &sallyport.Error{
			Outcome: sallyport.OutcomeUsage, Message: fmt.Sprintf("%s may be read by others (mode %04o)", dir, fi.Mode().Perm()),
			Hint: "chmod 700 " + dir,
		}
	}
	return os.Chmod(dir, 0o700)
}

// checkRecordsKey refuses to go on with records whose key is gone: with a new
// key every one of them would count as forged.
func (l Layout) checkRecordsKey() error {
	file := l.KEKFile(RecordsKey)
	if l.KeySource() == FromCredential || exists(file) {
		return nil
	}
	for _, store := range []string{l.Database(), l.PostgresMarker()} {
		if exists(store) {
			return &sallyport.Error{
				Outcome: sallyport.OutcomeInternal, Code: "keys.missing",
				Message: store + " exists, but not the key that protects the records",
				Hint:    "restore " + file + " from a backup, or move " + store + " away to start empty (everybody logs in again)",
			}
		}
	}
	return nil
}

func (l Layout) ensureCA(name, purpose string) error {
	cert, key := l.CAPair(name)
	if exists(cert) || exists(key) {
		_, err := l.CA(name)
		return err
	}
	ca, err := tlsid.NewCA(purpose, 0)
	if err != nil {
		return err
	}
	return ca.Save(cert, key)
}

func (l Layout) ensureAuditKey(daemon string) error {
	_, file := l.pair("keys", "audit-"+daemon)
	if !exists(file) {
		public, private, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return err
		}
		if err := writePEM(l.auditPublic(daemon), "PUBLIC KEY", public, x509.MarshalPKIXPublicKey); err != nil {
			return err
		}
		return writePEM(file, "PRIVATE KEY", private, x509.MarshalPKCS8PrivateKey)
	}
	_, err := l.AuditKey(daemon)
	return err
}

func writePEM[K any](file, typ string, key K, marshal func(any) ([]byte, error)) error {
	der, err := marshal(key)
	if err != nil {
		return err
	}
	return tlsid.WriteKeyFile(file, pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}))
}

func randomKey() ([]byte, error) {
	b := make([]byte, 32)
	_, err := rand.Read(b)
	return b, err
}

func ensureFile(path string, content func() ([]byte, error)) error {
	if exists(path) {
		return nil
	}
	b, err := content()
	if err != nil {
		return err
	}
	return tlsid.WriteKeyFile(path, b)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

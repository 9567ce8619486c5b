package tlsid

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"
)

const (
	pemCertificate = "CERTIFICATE"
	pemKey         = "PRIVATE KEY"

	// maxFile bounds what is read of a file: a bundle of some hundred CAs.
	maxFile = 1 << 20
)

// SaveKeyPair writes the chain of c (mode 0644) and its key (PKCS #8, mode 0600)
// in PEM. The key is written first, so that whoever sees a new certificate finds
// its key.
func SaveKeyPair(c tls.Certificate, certFile, keyFile string) error {
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		return fmt.Errorf("save %s: %w", keyFile, err)
	}
	var chain bytes.Buffer
	for _, cert := range c.Certificate {
		if err := pem.Encode(&chain, &pem.Block{Type: pemCertificate, Bytes: cert}); err != nil {
			return fmt.Errorf("save %s: %w", certFile, err)
		}
	}
	if err := WriteKeyFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der})); err != nil {
		return err
	}
	return writeFile(certFile, chain.Bytes(), 0o644)
}

// LoadKeyPair reads a chain and its key in PEM, with Leaf set. It refuses a pair
// that does not belong together, has expired or is not valid yet, and a key file
// that others can read.
func LoadKeyPair(certFile, keyFile string) (tls.Certificate, error) {
	chain, err := readFile(certFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := ReadKeyFile(keyFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("%s with %s: %w", certFile, keyFile, err)
	}
	if pair.Leaf, err = x509.ParseCertificate(pair.Certificate[0]); err != nil {
		return tls.Certificate{}, fmt.Errorf("%s: %w", certFile, err)
	}
	if err := checkTime(pair.Leaf); err != nil {
		return tls.Certificate{}, fmt.Errorf("%s: %w", certFile, err)
	}
	return pair, nil
}

// LoadPool reads a PEM bundle of CAs. Every certificate in it must be a CA that
// is valid now, or the whole file is refused.
func LoadPool(file string) (*x509.CertPool, error) {
	bundle, err := readFile(file)
	if err != nil {
		return nil, err
	}
	pool, err := ParsePool(bundle)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return pool, nil
}

// ParsePool is LoadPool for a bundle in memory.
func ParsePool(bundle []byte) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	n := 0
	for rest := bundle; ; n++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != pemCertificate {
			return nil, fmt.Errorf("a CA bundle holds certificates, not %q", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		if err := checkCA(cert); err != nil {
			return nil, err
		}
		if err := checkTime(cert); err != nil {
			return nil, err
		}
		pool.AddCert(cert)
	}
	if n == 0 {
		return nil, errors.New("holds no PEM certificate")
	}
	return pool, nil
}

func checkCA(cert *x509.Certificate) error {
	if !cert.BasicConstraintsValid || !cert.IsCA {
		return fmt.Errorf("certificate %q is no CA (basic constraints lack CA:TRUE)", cert.Subject)
	}
	if cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return fmt.Errorf("certificate %q is no CA (key usage lacks certificate signing)", cert.Subject)
	}
	return nil
}

func checkTime(cert *x509.Certificate) error {
	now := time.Now()
	if now.After(cert.NotAfter) {
		return fmt.Errorf("certificate %q expired at %s", cert.Subject, cert.NotAfter.UTC().Format(time.RFC3339))
	}
	if now.Before(cert.NotBefore) {
		return fmt.Errorf("certificate %q is not valid before %s (is this machine's clock right?)", cert.Subject, cert.NotBefore.UTC().Format(time.RFC3339))
	}
	return nil
}

// ReadKeyFile reads a file that only its owner may read. One that its group or
// the world can read is refused: what has been readable is no secret any more.
func ReadKeyFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("key file %s is no regular file", path)
	}
	// Windows has no such bits; Go makes them up.
	if mode := info.Mode().Perm(); mode&0o077 != 0 && runtime.GOOS != "windows" {
		return nil, fmt.Errorf("key file %s has mode %04o, others may read it; make a new key, or: chmod 600 %s", path, mode, path)
	}
	return readAll(f)
}

// WriteKeyFile writes a file that only its owner may read (mode 0600), at once
// or not at all, and durably.
func WriteKeyFile(path string, data []byte) error { return writeFile(path, data, 0o600) }

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f)
}

func readAll(f *os.File) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%s is larger than %d bytes", f.Name(), maxFile)
	}
	return b, nil
}

// writeFile replaces path by rename. os.CreateTemp makes the file 0600, so that
// there is no moment in which a key could be read by others.
func writeFile(path string, data []byte, mode os.FileMode) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

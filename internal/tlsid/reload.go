package tlsid

import (
	"crypto/tls"
	"os"
	"sync"
	"time"
)

// Pair is a key pair in files that may be replaced while the process runs. Its
// methods GetCertificate and GetClientCertificate are made for tls.Config: each
// handshake uses what the files held within the last second. A replacement that
// does not load (half-copied, expired) leaves the earlier pair in use.
type Pair struct {
	certFile, keyFile string

	mu      sync.Mutex // guards what follows
	current tls.Certificate
	stamp   [2]time.Time // modification times of the files at the last load
	checked time.Time
	err     error
}

// recheck is how often the files are looked at.
const recheck = time.Second

// OpenPair loads a pair as LoadKeyPair does.
func OpenPair(certFile, keyFile string) (*Pair, error) {
	p := &Pair{certFile: certFile, keyFile: keyFile}
	stamp := p.modified()
	current, err := LoadKeyPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	p.current, p.stamp, p.checked = current, stamp, time.Now()
	return p, nil
}

// Certificate returns the pair in use.
func (p *Pair) Certificate() *tls.Certificate {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.checked) >= recheck {
		p.checked = time.Now()
		p.reload()
	}
	c := p.current
	return &c
}

// Err returns why the last replacement was refused; nil if the files in place
// are in use.
func (p *Pair) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// GetCertificate is for tls.Config.GetCertificate.
func (p *Pair) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return p.Certificate(), nil
}

// GetClientCertificate is for tls.Config.GetClientCertificate.
func (p *Pair) GetClientCertificate(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return p.Certificate(), nil
}

func (p *Pair) reload() {
	stamp := p.modified()
	if stamp == p.stamp && p.err == nil {
		return
	}
	next, err := LoadKeyPair(p.certFile, p.keyFile)
	if p.err = err; err == nil {
		p.current, p.stamp = next, stamp
	}
}

// modified returns the modification times of the files; zero for a missing one.
func (p *Pair) modified() (stamp [2]time.Time) {
	for i, file := range []string{p.certFile, p.keyFile} {
		if info, err := os.Stat(file); err == nil {
			stamp[i] = info.ModTime()
		}
	}
	return stamp
}

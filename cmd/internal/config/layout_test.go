package config

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"sallyport"
	"sallyport/internal/tlsid"
)

// contents maps the files below dir to what they hold.
func contents(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		all[path], err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestEnsureKeys(t *testing.T) {
	l := Layout{Dir: filepath.Join(t.TempDir(), "data")}
	if err := l.EnsureKeys(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{InternalCA, PublicCA, SessionCA} {
		if _, err := l.CA(name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{RecordsKey, SealKey, ResetKey} {
		if k, err := l.Secret(name); err != nil || len(k) != 32 {
			t.Errorf("%s: %d bytes, %v", name, len(k), err)
		}
	}
	for _, daemon := range Daemons {
		key, err := l.AuditKey(daemon)
		if err != nil {
			t.Fatal(err)
		}
		pub, err := l.AuditPublicKey(daemon)
		if err != nil || !pub.Equal(key.Public()) {
			t.Errorf("audit keys of %s do not belong together, %v", daemon, err)
		}
	}
	before := contents(t, l.Dir)
	if err := l.EnsureKeys(); err != nil {
		t.Fatal(err)
	}
	after := contents(t, l.Dir)
	for path, b := range before {
		if !bytes.Equal(b, after[path]) {
			t.Errorf("%s was replaced", path)
		}
	}
}

func TestKeysAreNotMadeForDataOfOthers(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, l Layout){
		"records without their key": func(t *testing.T, l Layout) {
			write(t, l.Database(), "SQLite format 3", 0o600)
			remove(t, l.secret(RecordsKey))
		},
		"a CA without its key": func(t *testing.T, l Layout) {
			_, key := l.CAPair(SessionCA)
			remove(t, key)
		},
		"a readable key": func(t *testing.T, l Layout) {
			_, key := l.CAPair(SessionCA)
			if err := os.Chmod(key, 0o644); err != nil {
				t.Fatal(err)
			}
		},
		"a readable directory": func(t *testing.T, l Layout) {
			if err := os.Chmod(l.Dir, 0o755); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := Layout{Dir: filepath.Join(t.TempDir(), "data")}
			if err := l.EnsureKeys(); err != nil {
				t.Fatal(err)
			}
			damage(t, l)
			if err := l.EnsureKeys(); err == nil {
				t.Error("accepted")
			}
		})
	}
}

func TestMissingKeysSayHowToMakeThem(t *testing.T) {
	l := Layout{Dir: t.TempDir()}
	for what, load := range map[string]func() error{
		"CA":        func() error { _, err := l.CA(SessionCA); return err },
		"secret":    func() error { _, err := l.Secret(SealKey); return err },
		"audit key": func() error { _, err := l.AuditKey("cached"); return err },
	} {
		if err := load(); sallyport.CodeOf(err) != "keys.missing" {
			t.Errorf("%s: got %v; want keys.missing", what, err)
		}
	}
}

func TestCertificatesAreRenewedAtHalfTheirLife(t *testing.T) {
	l := Layout{Dir: filepath.Join(t.TempDir(), "data")}
	if err := l.EnsureKeys(); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	serial := func() string {
		pair, err := tlsid.LoadKeyPair(l.ServicePair("gateway"))
		if err != nil {
			t.Fatal(err)
		}
		return pair.Leaf.SerialNumber.String()
	}
	ensure := func(domain string, at time.Time) string {
		if err := l.EnsureService(domain, "gateway", "", at); err != nil {
			t.Fatal(err)
		}
		return serial()
	}
	first := ensure("corp.example", now)
	if ensure("corp.example", now.Add(tlsid.ServiceLife/2-time.Hour)) != first {
		t.Error("renewed before half of its life")
	}
	second := ensure("corp.example", now.Add(tlsid.ServiceLife/2+time.Hour))
	if second == first {
		t.Error("not renewed after half of its life")
	}
	if ensure("other.example", now) == second {
		t.Error("a certificate of another domain was kept")
	}
	if err := l.EnsurePublic("gateway", "gw.corp.example", now); err != nil {
		t.Fatal(err)
	}
	pair, err := tlsid.LoadKeyPair(l.PublicPair("gateway"))
	if err != nil || pair.Leaf.VerifyHostname("gw.corp.example") != nil {
		t.Errorf("public certificate: %v", err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// A rotation keeps the session CA in force beside the new one, and one that was
// cut short leaves a state that the next one repairs.
func TestRotateSessionCA(t *testing.T) {
	l := Layout{Dir: filepath.Join(t.TempDir(), "data")}
	if err := l.RotateSessionCA(); err == nil {
		t.Error("there is nothing to rotate")
	}
	if err := l.EnsureKeys(); err != nil {
		t.Fatal(err)
	}
	held := func(n int) []string {
		t.Helper()
		cas, err := l.SessionCAs()
		if err != nil || len(cas) != n {
			t.Fatalf("%d session CAs, %v; want %d", len(cas), err, n)
		}
		var all []string
		for _, ca := range cas {
			all = append(all, string(ca.PEM()))
		}
		return all
	}
	first := held(1)
	if err := l.RotateSessionCA(); err != nil {
		t.Fatal(err)
	}
	second := held(2)
	if second[1] != first[0] || second[0] == first[0] {
		t.Error("the one before is not kept")
	}
	// Killed between key and certificate: the key is the next one's already.
	_, publicKey := l.CAPair(PublicCA)
	other, err := os.ReadFile(publicKey)
	if err != nil {
		t.Fatal(err)
	}
	_, key := l.CAPair(SessionCA)
	if err := os.WriteFile(key, other, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.RotateSessionCA(); err != nil {
		t.Fatal(err)
	}
	if third := held(2); third[1] != first[0] || third[0] == second[0] {
		t.Error("the one that signs was lost")
	}
	if files := l.FilesOf("authd"); !slices.ContainsFunc(files, func(f string) bool { return filepath.Base(f) == "session-ca-previous.key" }) {
		t.Errorf("authd's files: %q", files)
	}
}

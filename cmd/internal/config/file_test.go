package config

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"sallyport"
	"sallyport/internal/tlsid"
)

// TestFaults runs testdata/faults.txtar: a file's name is reader/name, and it
// ends with the problems that the reader must be told of.
func TestFaults(t *testing.T) {
	path := filepath.Join("testdata", "faults.txtar")
	archive, err := txtar.ParseFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range archive.Files {
		text, want, _ := strings.Cut(string(f.Data), "---- problems\n")
		reader, name, _ := strings.Cut(f.Name, "/")
		_, err := parse(name, []byte(text), reader)
		got := ""
		if err != nil {
			got = err.Error() + "\n"
		}
		if *update {
			archive.Files[i].Data = []byte(text + "---- problems\n" + got)
			continue
		}
		t.Run(f.Name, func(t *testing.T) {
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	if *update {
		if err := os.WriteFile(path, txtar.Format(archive), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// minimal is a file that everybody accepts; %s is put at its end.
const minimal = `domain: corp.example
data_dir: data
gateway: {public_url: "https://gw.corp.example:0", listen: "127.0.0.1:0"}
authd:
  public_url: https://auth.corp.example:0
  listen: 127.0.0.1:0
  idp: {issuer: "https://login.corp.example", client_id: sallyport%s}
`

func TestPathsAreRelativeToTheFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sallyport.yaml")
	write(t, filepath.Join(dir, "idp.secret"), hexBytes(32), 0o600)
	write(t, path, fmt.Sprintf(minimal, ", client_secret_file: idp.secret")+"audit: {dir: trail}\n", 0o644)
	f, err := Load(path, AllInOne)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ what, got, want string }{
		{"data_dir", f.DataDir, filepath.Join(dir, "data")},
		{"audit.dir", f.Audit.Dir, filepath.Join(dir, "data", "trail")},
		{"client_secret_file", f.Authd.IDP.ClientSecretFile, filepath.Join(dir, "idp.secret")},
		{"gateway's audit", f.Layout().AuditDir("gateway"), filepath.Join(dir, "data", "trail", "gateway")},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %s; want %s", c.what, c.got, c.want)
		}
	}
}

func TestLoadWithoutFile(t *testing.T) {
	_, err := Load(filepath.Join(t.TempDir(), "none.yaml"), Checker)
	if sallyport.OutcomeOf(err) != sallyport.OutcomeUsage || !strings.Contains(err.Error(), "none.yaml: no such file") {
		t.Errorf("got %v; want a usage error that names the file", err)
	}
}

// TestCase_J2_Secrets: what is no secret is not taken for one.
func TestCase_J2_Secrets(t *testing.T) {
	for name, c := range map[string]struct {
		content string
		mode    os.FileMode
		want    string // part of the problem; empty: accepted
	}{
		"good":           {hexBytes(32), 0o600, ""},
		"read-only":      {hexBytes(32), 0o400, ""},
		"changeme":       {"changeme\n", 0o600, "example"},
		"padded example": {"changeme-changeme-changeme-000000000", 0o600, "example"},
		"short":          {hexBytes(8), 0o600, "16 characters"},
		"empty":          {"\n", 0o600, "0 characters"},
		"one character":  {strings.Repeat("a", 40), 0o600, "over and over"},
		"world-readable": {hexBytes(32), 0o644, "chmod"},
		"group-readable": {hexBytes(32), 0o640, "chmod"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, filepath.Join(dir, "s"), c.content, c.mode)
			path := filepath.Join(dir, "f.yaml")
			write(t, path, fmt.Sprintf(minimal, ", client_secret_file: s"), 0o644)
			_, err := Load(path, AllInOne)
			switch {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), "f.yaml:7: authd.idp.client_secret_file: ") || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v; want a problem at line 7 with %q", err, c.want)
			}
		})
	}
}

// TestCase_J5_Certificates: a pair that cannot serve is refused at startup.
func TestCase_J5_Certificates(t *testing.T) {
	dir := t.TempDir()
	ca, err := tlsid.NewCA("test", 0)
	if err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"a", "b"} {
		pair, err := ca.IssueServer([]string{"gw.corp.example"}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if err := tlsid.SaveKeyPair(pair, at(name+".crt"), at(name+".key")); err != nil {
			t.Fatal(err)
		}
	}
	writeExpired(t, at("old.crt"), at("old.key"))
	if err := ca.Save(at("ca.crt"), at("ca.key")); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ tls, want string }{
		"good":           {"gateway.tls {cert_file: a.crt, key_file: a.key}", ""},
		"mismatched":     {"gateway.tls {cert_file: a.crt, key_file: b.key}", "gateway.tls.cert_file: "},
		"expired":        {"gateway.tls {cert_file: old.crt, key_file: old.key}", "expired"},
		"no key":         {"gateway.tls {cert_file: a.crt}", "gateway.tls: cert_file and key_file belong together"},
		"no file":        {"gateway.tls {cert_file: none.crt, key_file: a.key}", "none.crt: no such file"},
		"CA is a leaf":   {"tls {ca_file: a.crt, cert_file: a.crt, key_file: a.key}", "is no CA"},
		"service pair":   {"tls {ca_file: ca.crt, cert_file: a.crt, key_file: a.key}", ""},
		"half a service": {"tls {ca_file: ca.crt}", "tls: ca_file, cert_file and key_file belong together"},
	} {
		t.Run(name, func(t *testing.T) {
			section, value, _ := strings.Cut(c.tls, " ")
			text := fmt.Sprintf(minimal, "")
			if section == "tls" {
				text += "tls: " + value + "\n"
			} else {
				text = strings.Replace(text, `listen: "127.0.0.1:0"}`, `listen: "127.0.0.1:0", tls: `+value+"}", 1)
			}
			path := at("f.yaml")
			write(t, path, text, 0o644)
			_, err := Load(path, AllInOne)
			switch {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v; want %q", err, c.want)
			}
		})
	}
}

func TestChanged(t *testing.T) {
	load := func(text string) *File {
		f, err := parse("f", []byte(text), AllInOne)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	base := fmt.Sprintf(minimal, "")
	route := "routes: [{from: \"tcp://a.internal:1\", policy: {allow: {or: [{accept: true}]}}}]\n"
	for name, c := range map[string]struct {
		after, changed, fixed string
	}{
		"nothing":   {base, "", ""},
		"comment":   {base + "# words\n", "", ""},
		"routes":    {base + route, "routes", ""},
		"listen":    {strings.Replace(base, `listen: "127.0.0.1:0"`, `listen: "127.0.0.1:1"`, 1), "gateway", "gateway.listen"},
		"log":       {base + "log: {level: debug}\n", "log", "log.level"},
		"lifetime":  {base + "  session: {lifetime: 1h}\n", "authd", ""},
		"max_stale": {base + "policyd: {max_stale: 10s, posture_ttl: 1m}\n", "policyd", "policyd.max_stale"},
	} {
		t.Run(name, func(t *testing.T) {
			changed, fixed := Changed(load(base), load(c.after))
			if got := strings.Join(changed, " "); got != c.changed {
				t.Errorf("changed: got %q; want %q", got, c.changed)
			}
			if got := strings.Join(fixed, " "); got != c.fixed {
				t.Errorf("needs restart: got %q; want %q", got, c.fixed)
			}
		})
	}
}

func TestRecord(t *testing.T) {
	f, err := parse("f.yaml", []byte(fmt.Sprintf(minimal, "")+`
cached: {listen: "0.0.0.0:8444"}
connect: {policyd: ["policyd.corp.example:8445"]}
admin: {gateway: "127.0.0.1:9601"}
policyd: {posture_ttl: 1m, posture_sources: [os]}
explain_groups: true
routes:
  - from: tcp://db.internal:5432
    to: tcp://10.0.3.7:5432
    name: db
    carrier: bulk
    hidden: true
    policy:
      - name: dba   # who keeps it running
        allow: {and: [{groups: {has: dba}}]}
`), AllInOne)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	f.DataDir = t.TempDir()
	if err := f.Layout().EnsureKeys(); err != nil {
		t.Fatal(err)
	}
	caFile, _ := f.Layout().CAPair(PublicCA)
	ca, err := os.ReadFile(caFile)
	if err != nil {
		t.Fatal(err)
	}
	gateways, err := f.GatewayInfos("https://gw.corp.example:4443")
	if err != nil {
		t.Fatal(err)
	}
	got := f.Record(gateways, []string{"127.0.0.1:4443"}, now)
	if text := got.Routes[0].Policy; !strings.Contains(text, "name: dba") || !strings.Contains(text, "has: dba") {
		t.Errorf("policy text %q", text)
	}
	got.Routes[0].Policy = ""
	want := sallyport.Config{
		Domain:        "corp.example",
		Routes:        []sallyport.Route{{From: "tcp://db.internal:5432", To: "tcp://10.0.3.7:5432", Name: "db", Carrier: "bulk", Hidden: true}},
		Gateways:      []sallyport.GatewayInfo{{Name: "gw.corp.example", URL: "https://gw.corp.example:4443", CA: string(ca)}},
		ExplainGroups: true, PostureSources: []string{"os"}, PostureTTL: time.Minute,
		Forbidden: []string{"127.0.0.1:4443", "127.0.0.1:9601", ":8444", "policyd.corp.example:8445"},
		Applied:   now, Source: "f.yaml",
	}
	slices.Sort(want.Forbidden)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestGatewaysOfARecord: agents are told of every gateway that is listed, in that
// order, and of no other; no route leads to one.
func TestGatewaysOfARecord(t *testing.T) {
	f, err := parse("f.yaml", []byte(fmt.Sprintf(minimal, "")+`
gateways:
  - {name: eu1, url: "https://gw1.corp.example", addresses: ["192.0.2.1:443"]}
  - {url: "https://gw2.corp.example:4443"}
`), AllInOne)
	if err != nil {
		t.Fatal(err)
	}
	f.Gateway.TLS.CertFile = "by a CA that everybody knows"
	got, err := f.GatewayInfos("https://gw.corp.example")
	if err != nil {
		t.Fatal(err)
	}
	want := []sallyport.GatewayInfo{
		{Name: "eu1", URL: "https://gw1.corp.example", Addresses: []string{"192.0.2.1:443"}},
		{Name: "gw2.corp.example", URL: "https://gw2.corp.example:4443"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := f.Record(got, nil, time.Time{}).Forbidden; !slices.Contains(got, "192.0.2.1:443") {
		t.Errorf("forbidden: got %v; want 192.0.2.1:443 among them", got)
	}
	for _, host := range []string{"gw1.corp.example:443", "gw2.corp.example:4443"} {
		if got := f.publicHosts(); !slices.Contains(got, host) {
			t.Errorf("public hosts: got %v; want %s among them", got, host)
		}
	}
}

func FuzzParse(f *testing.F) {
	archive, err := txtar.ParseFile(filepath.Join("testdata", "faults.txtar"))
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range archive.Files {
		text, _, _ := strings.Cut(string(file.Data), "---- problems\n")
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, reader := range []string{AllInOne, "gateway", Checker} {
			_, err := parse("f", text, reader)
			var ps Problems
			if err != nil && (!errors.As(err, &ps) || len(ps) == 0) {
				t.Fatalf("%v is no list of problems", err)
			}
		}
	})
}

func write(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil { // the umask may have taken bits away
		t.Fatal(err)
	}
}

func hexBytes(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return hex.EncodeToString(b)
}

func writeExpired(t *testing.T, certFile, keyFile string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "old"},
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(-24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, certFile, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), 0o644)
	write(t, keyFile, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})), 0o600)
}

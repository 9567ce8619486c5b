package integration

import (
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport/integration/stack"
	"sallyport/internal/tlsid"
)

// TestCase_E2_ImpostorGateway: whoever listens where the gateway was, without its
// certificate, gets not one request, and the person no way to go on.
func TestCase_E2_ImpostorGateway(t *testing.T) {
	w := newWorld(t, stack.Apart)
	alice := w.loggedIn(t, "alice")
	addr := w.Ready("gateway").Gateway.TCP
	gateway := w.Daemon("gateway")
	gateway.Signal(syscall.SIGTERM)
	gateway.Wait(15 * time.Second)

	right, err := tlsid.LoadCA(w.CAFile(), strings.TrimSuffix(w.CAFile(), ".crt")+".key")
	if err != nil {
		t.Fatal(err)
	}
	other, err := tlsid.NewCA("public", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		ca   *tlsid.CA
		host string
		life time.Duration
	}{
		"another authority": {other, "gw.localhost", time.Hour},
		"another name":      {right, "auth.localhost", time.Hour},
		"expired":           {right, "gw.localhost", time.Nanosecond},
	} {
		t.Run(name, func(t *testing.T) {
			cert, err := c.ca.IssueServer([]string{c.host}, c.life)
			if err != nil {
				t.Fatal(err)
			}
			seen := impostor(t, addr, cert)
			for _, transport := range []string{"auto", "tls"} {
				r := alice.In(t).Run("connect", "--stdio", "db.internal:5432", "--transport", transport)
				wantExit(t, r, stack.ExitUnavailable)
				// The headline says it, whatever else failed beside it.
				if first := lineWith(r.Stderr, "agent: gateway"); !strings.Contains(first, "not to be trusted") {
					t.Errorf("%s: says\n%s", transport, r.Stderr)
				}
			}
			if seen.handshakes.Load() == 0 || seen.bytes.Load() != 0 {
				t.Errorf("the impostor saw %d handshakes and got %d bytes; want some and none", seen.handshakes.Load(), seen.bytes.Load())
			}
		})
	}
}

func lineWith(text, start string) string {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, start) {
			return line
		}
	}
	return ""
}

type sighting struct{ handshakes, bytes atomic.Int64 }

// impostor listens at addr with cert until the test ends, and counts who starts a
// handshake and how much it is told after one.
func impostor(t *testing.T, addr string, cert tls.Certificate) *sighting {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	seen, done := &sighting{}, make(chan struct{})
	conf := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert}
	conf.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		seen.handshakes.Add(1)
		own := conf.Clone()
		own.NextProtos = hello.SupportedProtos // whatever it wants
		return own, nil
	}
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(10 * time.Second)) // a TCP connection takes one
				n, _ := io.Copy(io.Discard, tls.Server(c, conf))    // how it ends does not matter, what came does
				seen.bytes.Add(n)
			}()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return seen
}

// TestCase_G9_G10_AtTheTerminal: what does not exist, what does not answer and what
// has no name are told apart by exit code and words.
func TestCase_G9_G10_AtTheTerminal(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := closed.Addr().String()
	closed.Close()
	w := newWorldWith(t, stack.Together, func(c *stack.Config) {
		c.Routes = append(
			c.Routes,
			stack.Route{From: "tcp://down.internal:1", To: "tcp://" + nobody, Policy: stack.Allow("all", stack.Anyone())},
			stack.Route{From: "tcp://nameless.internal:1", To: "tcp://nobody.invalid:1", Policy: stack.Allow("all", stack.Anyone())},
		)
	})
	bob := w.loggedIn(t, "bob")
	for _, c := range []struct {
		target string
		exit   int
		says   string
	}{
		{"reply.internal:7", 0, ""},
		{"REPLY.Internal.:7", 0, ""},
		{"down.internal:1", stack.ExitUpstream, "you are allowed"},
		{"nameless.internal:1", stack.ExitUpstream, "you are allowed"},
		{w.reply.Addr, stack.ExitUsage, ""},
		{"[::ffff:127.0.0.1]:7", stack.ExitUsage, ""},
		{"127.1:7", stack.ExitUsage, ""},
		{"reply.internal:8", stack.ExitUsage, ""},
		{"reply.internal..:7", stack.ExitUsage, ""},
	} {
		for _, transport := range []string{"quic", "tls"} {
			before := w.reply.Accepted()
			r := bob.Run("connect", "--stdio", c.target, "--transport", transport)
			if r.Exit != c.exit || !strings.Contains(r.Stderr, c.says) {
				t.Errorf("%s by %s: exit %d; want %d and %q\n%s", c.target, transport, r.Exit, c.exit, c.says, r.Stderr)
			}
			if got := w.reply.Accepted() - before; c.exit != 0 && got != 0 {
				t.Errorf("%s: %d connections reached a service", c.target, got)
			}
		}
	}
}

// TestCase_J7_NothingOfTheAdminListener: the public listeners know none of it.
func TestCase_J7_NothingOfTheAdminListener(t *testing.T) {
	w := newWorld(t, stack.Together)
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: w.Roots(t), MinVersion: tls.VersionTLS13, ServerName: "auth.localhost"},
	}}
	defer client.CloseIdleConnections()
	public, admin := "https://"+w.Ready("authd").Authd.Listen, "http://"+w.Ready("authd").Admin
	for _, path := range []string{"/metrics", "/debug/pprof/", "/debug/pprof/heap", "/debug/vars", "/healthz", "/readyz"} {
		resp, err := client.Get(public + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("authd's public listener answers %s with %s", path, resp.Status)
		}
	}
	resp, err := client.Get(admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("the admin listener answers /metrics with %s", resp.Status)
	}
	bare := &tls.Config{RootCAs: w.Roots(t), MinVersion: tls.VersionTLS13, ServerName: "gw.localhost", NextProtos: []string{"http/1.1", "h2"}}
	c, err := tls.Dial("tcp", w.Ready("gateway").Gateway.TCP, bare)
	if err == nil {
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		// TLS 1.3 tells a client that lacks a certificate after its handshake.
		_, _ = io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: gw.localhost\r\n\r\n") // it may be closed already
		var answer []byte
		answer, err = io.ReadAll(c)
		if len(answer) > 0 {
			t.Errorf("the tunnel host answers a client without a certificate: %q", answer)
		}
	}
	if err == nil || os.IsTimeout(err) {
		t.Errorf("a client without a certificate: %v; want a refused handshake", err)
	}
}

// site is a directory with a configuration, for starts that must fail.
type site struct {
	t    *testing.T
	dir  string
	file string
}

const siteConfig = `domain: corp.example
data_dir: data
gateway: {public_url: "https://gw.localhost:0", listen: "127.0.0.1:0"%s}
authd:
  public_url: "https://auth.localhost:0"
  listen: "127.0.0.1:0"
  idp: {issuer: "%s", client_id: x}
%s`

func newSite(t *testing.T) *site {
	dir := t.TempDir()
	return &site{t, dir, filepath.Join(dir, "sallyport.yaml")}
}

// configure writes siteConfig with more of the gateway, the issuer, and more sections.
func (s *site) configure(gateway, issuer, more string) {
	s.t.Helper()
	if err := os.WriteFile(s.file, fmt.Appendf(nil, siteConfig, gateway, issuer, more), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// refuses starts everything, which must end within two seconds, never be ready,
// and say so.
func (s *site) refuses(exit int, says string) {
	s.t.Helper()
	began := time.Now()
	p := stack.StartProcess(s.t, stack.Command{Program: "sallyport", Args: []string{"serve", "--config", s.file}})
	got := p.Wait(20 * time.Second)
	if took := time.Since(began); took > 5*time.Second {
		s.t.Errorf("it took %s", took)
	}
	if line := p.Line(time.Second); line != "" {
		s.t.Errorf("it said %q", line)
	}
	if got != exit || !strings.Contains(p.Stderr(), says) {
		s.t.Errorf("exit %d; want %d and %q\n%s", got, exit, says, p.Stderr())
	}
}

const issuer = "https://login.corp.example"

// TestCase_J1_J5_StartRefused: a configuration that cannot be right starts nothing:
// exit 2 and the line.
func TestCase_J1_J5_StartRefused(t *testing.T) {
	s := newSite(t)
	ca, err := tlsid.NewCA("corp", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for name, life := range map[string]time.Duration{"a": time.Hour, "b": time.Hour, "old": time.Nanosecond} {
		pair, err := ca.IssueServer([]string{"gw.localhost"}, life)
		if err != nil {
			t.Fatal(err)
		}
		if err := tlsid.SaveKeyPair(pair, filepath.Join(s.dir, name+".crt"), filepath.Join(s.dir, name+".key")); err != nil {
			t.Fatal(err)
		}
	}
	route := "routes: [{from: \"tcp://a.internal:1\", to: \"%s\", policy: {allow: {or: [{accept: true}]}}}]\n"
	for _, c := range []struct{ name, gateway, issuer, more, says string }{
		{"J1 unknown key", `, lisen: x`, issuer, "", `sallyport.yaml:3: gateway.lisen: unknown key`},
		{"J1 wrong type", `, name: [1]`, issuer, "", "sallyport.yaml:3: gateway.name"},
		{"J1 twice", `, name: a, name: b`, issuer, "", "sallyport.yaml:3: gateway.name: stands twice"},
		{"J1 no YAML", `, {`, issuer, "", "sallyport.yaml:3: not valid YAML"},
		{"J1 missing", "", "", "", "sallyport.yaml:7: authd.idp.issuer"},
		{"J5 mismatched", `, tls: {cert_file: a.crt, key_file: b.key}`, issuer, "", "sallyport.yaml:3: gateway.tls.cert_file"},
		{"J5 expired", `, tls: {cert_file: old.crt, key_file: old.key}`, issuer, "", "expired"},
		{"J5 CA that is none", "", issuer, "tls: {ca_file: a.crt, cert_file: a.crt, key_file: a.key}\n", "is no CA"},
		{"J7 public admin", "", issuer, "admin: {serve: \"0.0.0.0:0\"}\n", "sallyport.yaml:8: admin.serve"},
		{"J8 metadata", "", issuer, fmt.Sprintf(route, "tcp://169.254.169.254:80"), "sallyport.yaml:8: routes[0]"},
		{"A2 issuer over http", "", "http://login.corp.example", "", "sallyport.yaml:7: authd.idp.issuer"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.t = t
			s.configure(c.gateway, c.issuer, c.more)
			s.refuses(2, c.says)
			if _, err := os.Stat(filepath.Join(s.dir, "data", "cached.db")); err == nil {
				t.Error("there is a database")
			}
		})
	}
}

// TestCase_L10_R8_OwnDataOnly: what a running deployment writes is its owner's alone,
// whatever the umask, and a second one does not get at it.
func TestCase_L10_R8_OwnDataOnly(t *testing.T) {
	mask := syscall.Umask(0)
	defer syscall.Umask(mask)
	st := stack.Start(t, stack.Together, stack.Config{Users: []stack.User{{ID: "alice", Email: "alice@test.example"}}})
	files := 0
	err := filepath.WalkDir(filepath.Join(st.Dir, "data"), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		files++
		if bits := info.Mode().Perm() & 0o077; bits != 0 && !strings.HasSuffix(path, ".crt") && !strings.HasSuffix(path, ".pub") {
			t.Errorf("%s is %s", path, info.Mode())
		}
		if info.Mode().Perm()&0o022 != 0 {
			t.Errorf("%s is %s: others may write it", path, info.Mode())
		}
		return nil
	})
	if err != nil || files < 10 {
		t.Errorf("%d files: %v", files, err)
	}
	(&site{t, st.Dir, st.File}).refuses(1, "another process listens there")
}

// TestCase_J10_L5_DatabaseRefused: a database that a newer program wrote, or that is
// damaged, ends the start, and not a byte of it changes.
func TestCase_J10_L5_DatabaseRefused(t *testing.T) {
	st := stack.Start(t, stack.Together, stack.Config{Users: []stack.User{{ID: "alice", Email: "alice@test.example"}}})
	st.Stop()
	s := &site{t, st.Dir, st.File}
	path := filepath.Join(s.dir, "data", "cached.db")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	newer := append([]byte(nil), good...)
	binary.BigEndian.PutUint32(newer[60:], 99) // user_version, https://www.sqlite.org/fileformat.html#the_database_header
	for _, c := range []struct {
		name    string
		content []byte
		exit    int
		says    string
	}{
		{"newer schema", newer, 2, "schema.too_new"},
		{"cut", good[:len(good)/2], 1, "storage.corrupt"},
		{"header only", good[:100], 1, "storage.corrupt"},
		{"garbage", []byte(strings.Repeat("garbage!", 1000)), 1, "storage.corrupt"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.t = t
			if err := os.WriteFile(path, c.content, 0o600); err != nil {
				t.Fatal(err)
			}
			s.refuses(c.exit, c.says)
			after, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if sha256.Sum256(after) != sha256.Sum256(c.content) {
				t.Error("the file was changed")
			}
		})
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	st.StartDaemon(stack.Serve)
}

// TestCase_P2_VerifyAtTheTerminal: a changed audit log is told with the first bad
// sequence and exit code 1.
func TestCase_P2_VerifyAtTheTerminal(t *testing.T) {
	st := stack.Start(t, stack.Together, stack.Config{Users: []stack.User{{ID: "alice", Email: "alice@test.example"}}})
	st.Stop()
	verify := func() stack.Result {
		return stack.Run(t, stack.Command{Program: "sallyport", Args: []string{"audit", "verify", "--config", st.File}})
	}
	if r := verify(); r.Exit != 0 {
		t.Fatalf("untouched: exit %d\n%s%s", r.Exit, r.Stdout, r.Stderr)
	}
	path := filepath.Join(st.Dir, "data", "audit", "cached", "00000000000000000001.jsonl")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(good), "\n")
	if len(lines) < 4 {
		t.Fatalf("too few records:\n%s", good)
	}
	for name, c := range map[string]struct{ changed, says string }{
		"altered":   {strings.Replace(string(good), `"time":"20`, `"time":"21`, 1), "sequence 1"},
		"removed":   {strings.Join(append([]string{lines[0]}, lines[2:]...), ""), "sequence 2"},
		"reordered": {lines[0] + lines[2] + lines[1] + strings.Join(lines[3:], ""), "sequence 2"},
		"cut":       {lines[0], "sequence 2"},
		"emptied":   {"", "sequence 1"},
	} {
		if err := os.WriteFile(path, []byte(c.changed), 0o600); err != nil {
			t.Fatal(err)
		}
		r := verify()
		if r.Exit != 1 || !strings.Contains(r.Stderr, c.says+":") && !strings.Contains(r.Stderr, c.says+" ") {
			t.Errorf("%s: exit %d; want 1 and %q\n%s%s", name, r.Exit, c.says, r.Stdout, r.Stderr)
		}
	}
}

// TestCase_P6_NoSecretAtTrace: a login, a renewal of trust and a flow leave no
// password, code, token or key in a log, at any level.
func TestCase_P6_NoSecretAtTrace(t *testing.T) {
	w := newWorldWith(t, stack.Apart, func(c *stack.Config) { c.LogLevel = "trace" })
	alice := w.NewAgent(t, "alice")
	p, address := alice.StartLogin()
	page, err := alice.Browser().Follow(t.Context(), address, map[string]string{"username": "alice", "password": stack.Password, "answer": "allow"})
	if err != nil {
		t.Fatal(err)
	}
	if code := p.Wait(20 * time.Second); code != 0 {
		t.Fatal(p.Stderr())
	}
	tun := alice.Connect("db.internal:5432")
	const payload = "payload-of-a-flow"
	if err := stack.Echo(tun.Dial(t), payload); err != nil {
		t.Fatal(err)
	}
	secrets := []string{stack.Password, payload, page.URL.Query().Get("code"), page.URL.Query().Get("state"), "PRIVATE KEY", "eyJhbGciOi"}
	logs := map[string]string{"agent login": strings.ReplaceAll(p.Stderr(), address, ""), "agent connect": tun.Stderr()}
	for _, name := range []string{"cached", "policyd", "gateway", "authd"} {
		logs[name] = w.Daemon(name).Stderr()
	}
	for _, name := range []string{"gateway", "authd"} { // the others have nothing to say of a flow that works
		if !strings.Contains(logs[name], "[DEBUG]") {
			t.Errorf("%s logs nothing below info:\n%s", name, logs[name])
		}
	}
	trails, err := filepath.Glob(filepath.Join(w.Dir, "data", "audit", "*", "*.jsonl"))
	if err != nil || len(trails) == 0 {
		t.Fatalf("no audit logs: %v", err)
	}
	for _, path := range trails {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		logs[path] = string(text)
	}
	for name, text := range logs {
		for i, secret := range secrets {
			if secret == "" || strings.Contains(text, secret) {
				t.Errorf("%s holds secret %d (%.12q…)", name, i, secret)
			}
		}
	}
}

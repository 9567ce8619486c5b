package integration

import (
	"crypto/ed25519"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"sallyport/cached/postgres/postgrestest"
	"sallyport/integration/stack"
)

// TestClients: programs that know nothing of Sallyport reach real services, and
// are told why where they do not.
func TestClients(t *testing.T) {
	db := postgrestest.Start(t)
	host := startSSHD(t)
	wiki := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "the wiki of %s", r.Host)
	}))
	t.Cleanup(wiki.Close)
	payroll := stack.EchoServer(t)
	hash := stack.Listen(t, func(c *net.TCPConn) {
		h := sha256.New()
		if _, err := io.Copy(h, c); err == nil {
			fmt.Fprintf(c, "%x", h.Sum(nil))
		}
	})
	all := stack.Allow("all", stack.Anyone())
	finance := stack.Allow("finance", stack.Anyone(), stack.Fact("firewall", true))
	s := stack.Start(t, stack.Together, stack.Config{
		Users: []stack.User{{ID: "alice", Email: "alice@test.example"}},
		Routes: []stack.Route{
			{From: "tcp://db.internal:5432", To: "tcp://" + db.Addr(), Policy: all},
			{From: "tcp://host.internal:22", To: "tcp://" + host.Addr, Policy: stack.Allow("safe disks", stack.Fact("disk_encrypted", true))},
			{From: "tcp://wiki.internal:80", To: "tcp://" + wiki.Listener.Addr().String(), Policy: all},
			{From: "tcp://hash.internal:7", To: "tcp://" + hash.Addr, Policy: all},
			{From: "tcp://payroll.internal:22", To: "tcp://" + payroll.Addr, Policy: finance},
			{From: "tcp://payroll.internal:80", To: "tcp://" + payroll.Addr, Policy: finance},
		},
	})
	a := s.NewAgent(t, "alice")
	a.Login()
	for _, c := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"psql", func(t *testing.T) { testPsql(t, a.In(t), db) }},
		{"agent ssh", func(t *testing.T) { testAgentSSH(t, a.In(t), host) }},
		{"ssh with ProxyCommand", func(t *testing.T) { testProxyCommand(t, a.In(t), host) }},
		{"curl", func(t *testing.T) { testCurl(t, s) }},
		{"agent nc", func(t *testing.T) { testNc(t, a.In(t)) }},
		{"a port below 1024", func(t *testing.T) { testPrivilegedPort(t, a.In(t)) }},
	} {
		t.Run(c.name, c.run)
	}
	if n := payroll.Accepted(); n != 0 {
		t.Errorf("%d denied connections reached their service; want none", n)
	}
}

func testPsql(t *testing.T, a *stack.Agent, db *postgrestest.Cluster) {
	tun := a.Connect("db.internal:5432")
	host, port, err := net.SplitHostPort(tun.Local)
	if err != nil {
		t.Fatal(err)
	}
	psql := func(args ...string) stack.Command {
		return stack.Command{
			Program: need(t, "psql", "postgresql-client"),
			Args:    append([]string{"-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", host, "-p", port, "-U", postgrestest.User, "-d", "postgres"}, args...),
			Env:     []string{"PGPASSWORD=" + db.Password(), "PGSSLMODE=disable", "PGCONNECT_TIMEOUT=20"},
		}
	}
	if r := stack.Run(t, psql("-c", "SELECT 6*7")); r.Exit != 0 || r.Stdout != "42\n" {
		t.Fatalf("SELECT 6*7: %+v", r)
	}

	rows := make([]byte, 3840<<10) // 5 MiB and a little in base64
	rand.Read(rows)
	var lines strings.Builder
	for i := 0; i < len(rows); i += 48 {
		fmt.Fprintf(&lines, "%d\t%s\n", i, base64.RawStdEncoding.EncodeToString(rows[i:i+48]))
	}
	in := psql("-c", "CREATE TABLE rows (n int, line text)", "-c", `\copy rows FROM pstdin`)
	in.Stdin = lines.String()
	if r := stack.Run(t, in); r.Exit != 0 {
		t.Fatalf("COPY in: %+v", r)
	}
	// The server saw what was sent, and what it sends is that again.
	sum := fmt.Sprintf("%x\n", md5.Sum([]byte(lines.String())))
	if r := stack.Run(t, psql("-c", `SELECT md5(string_agg(n || E'\t' || line || E'\n', '' ORDER BY n)) FROM rows`)); r.Stdout != sum {
		t.Errorf("md5 of %d bytes at the server: %q, want %q\n%s", lines.Len(), r.Stdout, sum, r.Stderr)
	}
	if r := stack.Run(t, psql("-c", "COPY (SELECT * FROM rows ORDER BY n) TO STDOUT")); r.Stdout != lines.String() {
		t.Errorf("COPY out: %d bytes that differ from the %d sent, exit %d\n%s", len(r.Stdout), lines.Len(), r.Exit, r.Stderr)
	}

	c := a.Command("connect", "db.internal:5432", "--listen", "127.0.0.1:0", "--exec", need(t, "psql", "postgresql-client"), "--",
		"-X", "-A", "-t", "-h", "{host}", "-p", "{port}", "-U", postgrestest.User, "-d", "postgres", "-c", "SELECT 'through --exec'")
	c.Env = append(c.Env, "PGPASSWORD="+db.Password(), "PGSSLMODE=disable")
	if r := stack.Run(t, c); r.Exit != 0 || r.Stdout != "through --exec\n" {
		t.Errorf("agent connect --exec psql: %+v", r)
	}
}

// sshd is Debian's, one process for each connection, with keys of its own.
type sshd struct {
	*stack.Upstream
	user    string
	options []string // of ssh: which key to show and which to expect, nothing of the machine's
}

func startSSHD(t *testing.T) *sshd {
	t.Helper()
	program := needGlob(t, "/usr/sbin/sshd", "openssh-server")
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 { // its service makes this at boot
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	hostPrivate, hostPublic := sshKey(t)
	private, public := sshKey(t)
	config := file("sshd_config", strings.Join([]string{
		"HostKey " + file("host_key", hostPrivate), "AuthorizedKeysFile " + file("authorized_keys", public),
		"StrictModes no", "UsePAM no", "PasswordAuthentication no", "KbdInteractiveAuthentication no",
		"PermitRootLogin prohibit-password", "PidFile none", "LogLevel ERROR", "UseDNS no", "",
	}, "\n"))
	up := stack.Listen(t, func(c *net.TCPConn) {
		f, err := c.File()
		if err != nil {
			return
		}
		c.Close()
		defer f.Close()
		cmd := exec.CommandContext(t.Context(), program, "-i", "-e", "-f", config) // as inetd would
		cmd.Stdin, cmd.Stdout = f, f
		_ = cmd.Run() // 255 after most sessions
	})
	return &sshd{up, me.Username, []string{
		"-F", "none", "-i", file("id", private), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes",
		"-o", "UserKnownHostsFile=" + file("known_hosts", "host.internal "+hostPublic), "-o", "GlobalKnownHostsFile=none",
	}}
}

func sshKey(t *testing.T) (private, public string) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(block)), string(ssh.MarshalAuthorizedKey(signer.PublicKey()))
}

func testAgentSSH(t *testing.T, a *stack.Agent, host *sshd) {
	need(t, "ssh", "openssh-client")
	run := func(target, stdin string, words ...string) stack.Result {
		c := a.Command(append(append([]string{"ssh", host.user + "@" + target}, host.options...), words...)...)
		c.Stdin = stdin
		return stack.Run(t, c)
	}
	testSSH(t, func(stdin string, words ...string) stack.Result { return run("host.internal", stdin, words...) })
	if r := run("host", "", "echo", "by its short name"); r.Exit != 0 || r.Stdout != "by its short name\n" {
		t.Errorf("agent ssh host: %+v", r)
	}
	r := run("payroll.internal", "", "true")
	wantExit(t, r, stack.ExitDenied)
	wantWords(t, r.Stderr, `"finance"`, "device.firewall", "decision d-")
	testCutSSH(t, a, stack.ExitRevoked, a.Command(append(append([]string{"ssh", host.user + "@host.internal"}, host.options...), "echo in; sleep 60")...))
}

func testProxyCommand(t *testing.T, a *stack.Agent, host *sshd) {
	agent := "'" + a.Path() + "' connect --stdio %h:%p"
	run := func(target, stdin string, words ...string) stack.Result {
		args := append(append([]string{}, host.options...), "-o", "ProxyCommand="+agent, host.user+"@"+target)
		return stack.Run(t, stack.Command{Program: need(t, "ssh", "openssh-client"), Args: append(args, words...), Env: a.Env(), Stdin: stdin})
	}
	testSSH(t, func(stdin string, words ...string) stack.Result { return run("host.internal", stdin, words...) })
	r := run("payroll.internal", "", "true")
	wantExit(t, r, 255) // ssh's own
	wantWords(t, r.Stderr, `"finance"`, "device.firewall", "decision d-")
	args := append(append([]string{}, host.options...), "-o", "ProxyCommand="+agent, host.user+"@host.internal", "echo in; sleep 60")
	testCutSSH(t, a, 255, stack.Command{Program: need(t, "ssh", "openssh-client"), Args: args, Env: a.Env()})
}

// testCutSSH: a session that is open when the reason for it ends is cut, and says why.
func testCutSSH(t *testing.T, a *stack.Agent, exit int, c stack.Command) {
	t.Helper()
	c.Interactive = true // a person who has typed nothing yet
	p := stack.StartProcess(t, c)
	if line := p.Line(20 * time.Second); line != "in" {
		t.Fatalf("the session says %q\n%s", line, p.Stderr())
	}
	a.SetFacts("disk_encrypted: false\n")
	defer a.SetFacts("disk_encrypted: true\nfirewall: false\n")
	if code := p.Wait(10 * time.Second); code != exit {
		t.Errorf("exit code %d; want %d", code, exit)
	}
	wantWords(t, p.Stderr(), "disk_encrypted")
}

// testSSH runs commands at the host.
func testSSH(t *testing.T, run func(stdin string, words ...string) stack.Result) {
	t.Helper()
	if r := run("", "echo", "hello"); r.Exit != 0 || r.Stdout != "hello\n" {
		t.Fatalf("echo hello: %+v", r)
	}
	if r := run("", "exit 7"); r.Exit != 7 {
		t.Errorf("exit 7: exit code %d\n%s", r.Exit, r.Stderr)
	}
	data := make([]byte, 1<<20)
	rand.Read(data)
	if r := run(string(data), "sha256sum"); r.Exit != 0 || !strings.HasPrefix(r.Stdout, fmt.Sprintf("%x ", sha256.Sum256(data))) {
		t.Errorf("1 MiB to the host: %+v", r)
	}
	if r := run(string(data), "cat"); r.Exit != 0 || r.Stdout != string(data) {
		t.Errorf("1 MiB there and back: exit code %d, %d bytes that differ\n%s", r.Exit, len(r.Stdout), r.Stderr)
	}
}

// testCurl: curl, with a certificate got by the protocol on paper, is a client.
func testCurl(t *testing.T, s *stack.Stack) {
	who := logInByProtocol(t, s, "alice")
	run := func(args ...string) stack.Result {
		all := append([]string{"-q", "-sS", "-i", "--max-time", "30", "--noproxy", "", "--proxytunnel", "--proxy", s.GatewayURL()}, args...)
		return stack.Run(t, stack.Command{Program: need(t, "curl", "curl"), Args: all})
	}
	ours := []string{"--proxy-cacert", who.gatewayCA, "--proxy-cert", who.certificate, "--proxy-key", who.key}
	r := run(append(ours, "http://wiki.internal/")...)
	if r.Exit != 0 || !strings.Contains(r.Stdout, "the wiki of wiki.internal") {
		t.Errorf("allowed: %+v", r)
	}
	wantWords(t, strings.ToLower(r.Stdout), "sallyport-flow: f-", "sallyport-decision: d-")

	r = run(append(ours, "http://payroll.internal/")...)
	wantExit(t, r, 56)
	wantWords(t, r.Stdout, " 403 ", "Proxy-Status: sallyport; error=http_request_denied", `\"finance\"`, "device.firewall")

	r = run(append(ours, "http://absent.internal/")...)
	wantExit(t, r, 56)
	wantWords(t, r.Stdout, " 404 ")

	// Nobody without a certificate, and curl does not trust just any gateway.
	if r := run("--proxy-cacert", who.gatewayCA, "http://wiki.internal/"); r.Exit == 0 || strings.Contains(r.Stdout, "the wiki") {
		t.Errorf("without a certificate: %+v", r)
	}
	if r := run("--proxy-cert", who.certificate, "--proxy-key", who.key, "http://wiki.internal/"); r.Exit != 60 {
		t.Errorf("without the CA: %+v", r)
	}
}

func testNc(t *testing.T, a *stack.Agent) {
	data := make([]byte, 1<<20)
	rand.Read(data)
	c := a.Command("nc", "hash.internal", "7")
	c.Stdin = string(data)
	if r := stack.Run(t, c); r.Exit != 0 || r.Stdout != fmt.Sprintf("%x", sha256.Sum256(data)) {
		t.Errorf("agent nc: %+v", r)
	}
	r := a.Run("nc", "payroll.internal", "80")
	wantExit(t, r, stack.ExitDenied)
	wantWords(t, r.Stderr, `"finance"`, "device.firewall", "decision d-")
	if r.Stdout != "" {
		t.Errorf("agent nc writes %q where only the service's bytes belong", r.Stdout)
	}
}

// testPrivilegedPort is case Q2: a port that needs a right, without that right.
func testPrivilegedPort(t *testing.T, a *stack.Agent) {
	c := a.Command("connect", "wiki.internal:80", "--listen", "127.0.0.1:1", "--exec", "true")
	if os.Geteuid() == 0 {
		c.Args = append([]string{"--bounding-set=-net_bind_service", "--inh-caps=-net_bind_service", a.Path()}, c.Args...)
		c.Program = need(t, "setpriv", "util-linux")
	}
	first, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		t.Fatal(err)
	}
	r := stack.Run(t, c)
	if n := strings.TrimSpace(string(first)); n == "0" || n == "1" {
		wantExit(t, r, 0) // containers often let everybody have every port
		return
	}
	wantExit(t, r, stack.ExitConflict)
	wantWords(t, r.Stderr, "port 1 needs a right that you do not have", "fix:")
}

func wantWords(t *testing.T, said string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(said, w) {
			t.Errorf("no %q in\n%s", w, said)
		}
	}
}

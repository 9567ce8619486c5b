package stack

import (
	"cmp"
	"encoding/json"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Site is a deployment with two of each daemon over one PostgreSQL, laid out as
// on eight machines: each has a directory of its own with the files that `sallyport
// init` names for it and no others. One address stands for both authds, as a
// site's load balancer or DNS does.
type Site struct {
	T   testing.TB
	dir string
	cfg SiteConfig

	balancer *balancer

	mu      sync.Mutex // guards what follows
	ports   map[string]string
	members map[string]*Process
	ready   map[string]Ready
}

// SiteConfig is what a test wants of a site. All fields are required.
type SiteConfig struct {
	Store        string // postgres://…
	PasswordFile string
	IDP          func(redirectURI string) map[string]any // section idp of authd
	Routes       []Route
}

// Kinds are the daemons, in the order in which they find each other's ports.
var Kinds = []string{"cached", "policyd", "gateway", "authd"}

// Members are the names of a site's processes.
func Members() (names []string) {
	for _, kind := range Kinds {
		names = append(names, kind+"-1", kind+"-2")
	}
	return names
}

const operator = "operator"

// StartSite starts a site; it ends with the test.
func StartSite(t testing.TB, cfg SiteConfig) *Site {
	t.Helper()
	s := &Site{
		T: t, dir: t.TempDir(), cfg: cfg,
		ports: map[string]string{}, members: map[string]*Process{}, ready: map[string]Ready{},
	}
	s.balancer = listenBalancer(t)
	t.Cleanup(s.stop)
	s.write(operator)
	s.distribute(s.Operator("init").Stdout)
	for _, name := range Members() {
		s.Start(name)
	}
	for _, name := range Members() {
		s.write(name) // with everybody's ports
	}
	s.write(operator)
	s.Operator("apply")
	for _, name := range Members() {
		s.WaitReady(name)
	}
	return s
}

// distribute copies to each member's data directory what init names for its kind.
func (s *Site) distribute(told string) {
	s.T.Helper()
	for line := range strings.Lines(told) {
		kind, files, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok || !slices.Contains(Kinds, kind) {
			continue
		}
		for _, name := range []string{kind + "-1", kind + "-2"} {
			for _, file := range strings.Fields(strings.Trim(strings.TrimSpace(files), "[]")) {
				s.copy(file, name)
			}
		}
	}
}

func (s *Site) copy(file, name string) {
	s.T.Helper()
	text, err := os.ReadFile(filepath.Join(s.dir, operator, "data", file))
	if err != nil {
		s.T.Fatal(err)
	}
	to := filepath.Join(s.dir, name, "data", file)
	for dir := filepath.Dir(to); dir != s.dir; dir = filepath.Dir(dir) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			s.T.Fatal(err)
		}
	}
	if err := os.WriteFile(to, text, 0o600); err != nil {
		s.T.Fatal(err)
	}
}

func (s *Site) file(name string) string { return filepath.Join(s.dir, name, "sallyport.yaml") }

// Start starts a member, on the ports that it had before, and waits for its ready
// line.
func (s *Site) Start(name string) *Process {
	s.T.Helper()
	s.write(name)
	p := StartProcess(s.T, Command{Program: kindOf(name), Args: []string{"--config", s.file(name)}})
	line := p.Line(30 * time.Second)
	text, ok := strings.CutPrefix(line, "ready ")
	var r Ready
	if err := json.Unmarshal([]byte(text), &r); !ok || err != nil {
		s.T.Fatalf("%s: no ready line but %q\n%s", name, line, p.Stderr())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.members[name], s.ready[name] = p, r
	switch {
	case r.Gateway != nil:
		s.ports[name] = r.Gateway.TCP
	case r.Authd != nil:
		s.ports[name] = r.Authd.Listen
		s.balancer.add(r.Authd.Listen)
	case r.Cached != nil:
		s.ports[name] = r.Cached.Listen
	case r.Policyd != nil:
		s.ports[name] = r.Policyd.Listen
	}
	return p
}

func kindOf(name string) string {
	kind, _, _ := strings.Cut(name, "-")
	return kind
}

// Member returns the process of that name.
func (s *Site) Member(name string) *Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.members[name]
}

// WaitReady waits until the member's /readyz says 200.
func (s *Site) WaitReady(name string) {
	s.T.Helper()
	s.mu.Lock()
	admin := s.ready[name].Admin
	s.mu.Unlock()
	Eventually(s.T, 30*time.Second, func() error { return get("http://" + admin + "/readyz") })
}

// AuthdURL implements Deployment.
func (s *Site) AuthdURL() string { return "https://auth.localhost:" + s.balancer.port }

// CAFile implements Deployment.
func (s *Site) CAFile() string {
	return filepath.Join(s.dir, operator, "data", "keys", "public-ca.crt")
}

// NewAgent makes a machine for the user, with an encrypted disk and no firewall.
func (s *Site) NewAgent(t testing.TB, user string) *Agent {
	t.Helper()
	return newAgent(t, s, user)
}

// Operator runs the operator's tool on the machine that keeps the keys.
func (s *Site) Operator(args ...string) Result {
	s.T.Helper()
	r := Run(s.T, Command{Program: "sallyport", Args: append(args, "--config", s.file(operator))})
	if r.Exit != 0 {
		s.T.Fatalf("sallyport %s: exit code %d\n%s%s", strings.Join(args, " "), r.Exit, r.Stderr, r.Stdout)
	}
	return r
}

// write puts a member's configuration on disk.
func (s *Site) write(name string) {
	s.T.Helper()
	s.mu.Lock()
	doc := s.document(name)
	s.mu.Unlock()
	text, err := json.MarshalIndent(doc, "", "  ") // JSON is YAML
	if err == nil {
		err = os.MkdirAll(filepath.Dir(s.file(name)), 0o700)
	}
	if err == nil {
		err = os.WriteFile(s.file(name)+".new", text, 0o600)
	}
	if err == nil {
		err = os.Rename(s.file(name)+".new", s.file(name))
	}
	if err != nil {
		s.T.Fatal(err)
	}
}

// document is a member's configuration. The second of a kind asks the others in
// the other order.
func (s *Site) document(name string) map[string]any {
	listen := cmp.Or(s.ports[name], "127.0.0.1:0")
	doc := map[string]any{
		"domain": "test.example", "data_dir": "data",
		"log":     map[string]any{"level": "debug", "format": "text"},
		"connect": map[string]any{"cached": s.addresses(name, "cached"), "policyd": s.addresses(name, "policyd")},
	}
	sections := map[string]map[string]any{
		"cached":  {"listen": listen, "store": s.cfg.Store, "store_password_file": s.cfg.PasswordFile},
		"policyd": {"listen": listen, "posture_sources": []string{"os", "file"}},
		"gateway": {"listen": listen, "public_url": gatewayURL(s.ports[name])},
		"authd":   {"listen": listen, "public_url": s.AuthdURL(), "idp": s.cfg.IDP(s.AuthdURL() + "/callback")},
	}
	if name != operator {
		doc["name"], doc[kindOf(name)] = name, sections[kindOf(name)]
		return doc
	}
	doc["gateway"], doc["authd"], doc["policyd"] = sections["gateway"], sections["authd"], sections["policyd"]
	doc["routes"] = s.cfg.Routes
	if one, two := s.ports["gateway-1"], s.ports["gateway-2"]; one != "" && two != "" {
		doc["gateways"] = []any{
			map[string]any{"name": "gateway-1", "url": gatewayURL(one)}, map[string]any{"name": "gateway-2", "url": gatewayURL(two)},
		}
	}
	return doc
}

func gatewayURL(addr string) string {
	_, port, _ := strings.Cut(cmp.Or(addr, ":0"), ":")
	return "https://gw.localhost:" + port
}

func (s *Site) addresses(name, kind string) []string {
	all := []string{cmp.Or(s.ports[kind+"-1"], "127.0.0.1:1"), cmp.Or(s.ports[kind+"-2"], "127.0.0.1:1")}
	if strings.HasSuffix(name, "-2") {
		slices.Reverse(all)
	}
	return all
}

func (s *Site) stop() {
	s.mu.Lock()
	members := s.members
	s.mu.Unlock()
	for _, p := range members {
		p.Signal(syscall.SIGCONT)
		p.Signal(syscall.SIGTERM)
	}
	for name, p := range members {
		p.Wait(20 * time.Second)
		for _, bad := range []string{"panic:", "DATA RACE", "fatal error:", Password} {
			if strings.Contains(p.Stderr(), bad) {
				s.T.Errorf("%s: its log holds %q:\n%s", name, bad, p.Stderr())
			}
		}
		if s.T.Failed() {
			s.T.Logf("%s, last words:\n%s", name, tailOf(p.Stderr(), 20))
		}
	}
}

// balancer passes TCP connections on to one of several addresses, another if that
// one refuses. Each comes from an address of its own, as clients' do.
type balancer struct {
	port string

	mu sync.Mutex
	to []string
}

func listenBalancer(t testing.TB) *balancer {
	t.Helper()
	b := &balancer{}
	front := Listen(t, b.pass)
	_, b.port, _ = strings.Cut(front.Addr, ":")
	return b
}

func (b *balancer) add(addr string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !slices.Contains(b.to, addr) {
		b.to = append(b.to, addr)
	}
}

func (b *balancer) pass(c *net.TCPConn) {
	b.mu.Lock()
	to := slices.Clone(b.to)
	b.mu.Unlock()
	rand.Shuffle(len(to), func(i, j int) { to[i], to[j] = to[j], to[i] })
	from := &net.TCPAddr{IP: net.IPv4(127, byte(1+rand.IntN(200)), byte(rand.IntN(250)), byte(1+rand.IntN(250)))}
	for _, addr := range to {
		d := net.Dialer{Timeout: time.Second, LocalAddr: from}
		back, err := d.Dial("tcp", addr)
		if err != nil {
			continue
		}
		defer back.Close()
		var there sync.WaitGroup
		there.Go(func() {
			_, _ = io.Copy(back, c)
			_ = back.(*net.TCPConn).CloseWrite()
		})
		_, _ = io.Copy(c, back)
		c.Close()
		there.Wait()
		return
	}

}

// Package stack starts whole deployments from the built programs, as an operator
// would: all four daemons in one process, or apart with mTLS between them. It
// fills in ports, reads ready lines, and ends by process id what it started. Tests
// written against a Stack run over both modes and can tell no difference.
package stack

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Mode says how the daemons run.
type Mode string

// The modes.
const (
	Together Mode = "together" // sallyport serve
	Apart    Mode = "apart"    // cached, policyd, gateway, authd
)

// Modes are both of them, for tests over either.
var Modes = []Mode{Together, Apart}

// Serve is the name of the one process in mode Together.
const Serve = "serve"

// Config is what a test wants of a deployment. What is empty has a default.
type Config struct {
	Users  []User // of the embedded identity provider
	IDP    map[string]any
	Routes []Route
	// Policyd, Session, Gateway, Audit are merged into those sections.
	Policyd, Session, Gateway, Audit map[string]any
	// Cached is the section cached of a deployment Several, less listen.
	Cached        map[string]any
	ExplainGroups bool
	// Links puts a Link before cached, policyd and authd, where they run apart.
	Links    bool
	LogLevel string // of the daemons; empty: debug
}

// User is somebody who can log in.
type User struct {
	ID, Email string
	Groups    []string
}

// Password is everybody's.
const Password = "correct horse battery staple"

// Route is one entry of routes; Policy is any YAML value.
type Route struct {
	From   string `json:"from"`
	To     string `json:"to,omitempty"`
	Name   string `json:"name,omitempty"`
	Policy any    `json:"policy"`
	Hidden bool   `json:"hidden,omitempty"`
}

// Stack is a running deployment.
type Stack struct {
	T    testing.TB
	Mode Mode
	Dir  string // configuration and data
	File string // the configuration; in mode Several the operator's
	// Balancer stands before the authds of mode Several.
	Balancer *Balancer

	mu    sync.Mutex // guards what follows
	cfg   Config
	ports map[string]string // real addresses, filled in once they are known
	procs map[string]*Process
	ready map[string]Ready
	links map[string]*Link // by the daemon behind it
}

// Ready is a ready line.
type Ready struct {
	Gateway *struct{ URL, TCP, UDP string }
	Authd   *struct{ URL, Listen string }
	Cached  *struct{ Listen, Socket string }
	Policyd *struct{ Listen, Socket string }
	Admin   string
	CAFile  string `json:"ca_file"`
	PID     int
}

// startOrder is how daemons that run apart find each other's ports.
var startOrder = []string{"cached", "policyd", "gateway", "authd"}

// Start starts a deployment; it ends with the test.
func Start(t testing.TB, mode Mode, cfg Config) *Stack {
	t.Helper()
	dir := t.TempDir()
	s := &Stack{
		T: t, Mode: mode, Dir: dir, File: filepath.Join(dir, "sallyport.yaml"), cfg: cfg,
		ports: map[string]string{}, procs: map[string]*Process{}, ready: map[string]Ready{},
	}
	if cfg.Links {
		s.links = map[string]*Link{}
		for _, name := range []string{"cached", "policyd", "authd"} {
			s.links[name] = NewLink(t, func() string { return s.port(name) })
		}
	}
	t.Cleanup(s.Stop)
	s.write()
	if mode == Together {
		s.StartDaemon(Serve)
		return s
	}
	s.Operator("init", "--config", s.File)
	for _, name := range startOrder {
		s.StartDaemon(name)
		s.write() // the others learn its port
	}
	s.Operator("apply", "--config", s.File)
	for _, name := range startOrder {
		s.WaitReady(name)
	}
	return s
}

// StartDaemon starts one daemon (Serve for all) and waits for its ready line.
func (s *Stack) StartDaemon(name string) *Process {
	s.T.Helper()
	program, args := kindOf(name), []string{"--config", s.fileOf(name)}
	if name == Serve {
		program, args = "sallyport", append([]string{Serve}, args...)
	}
	p := StartProcess(s.T, Command{Program: program, Args: args})
	line := p.Line(20 * time.Second)
	text, ok := strings.CutPrefix(line, "ready ")
	var r Ready
	if err := json.Unmarshal([]byte(text), &r); !ok || err != nil {
		s.T.Fatalf("%s: no ready line but %q\n%s", name, line, p.Stderr())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.procs[name], s.ready[name] = p, r
	port := func(kind string) string { // the key of s.ports
		if s.Mode == Several {
			return name
		}
		return kind
	}
	if r.Gateway != nil {
		s.ports[port("gateway")] = r.Gateway.TCP
	}
	if r.Authd != nil {
		s.ports[port("authd")] = r.Authd.Listen
	}
	if r.Cached != nil {
		s.ports[port("cached")] = r.Cached.Listen
	}
	if r.Policyd != nil {
		s.ports[port("policyd")] = r.Policyd.Listen
	}
	return p
}

// Daemon returns the process that runs the daemon.
func (s *Stack) Daemon(name string) *Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.procs[name]; p != nil {
		return p
	}
	return s.procs[Serve]
}

// Restart ends the daemon with sig and starts it again on the same ports.
func (s *Stack) Restart(name string, sig syscall.Signal) {
	s.T.Helper()
	if s.Mode == Together {
		name = Serve
	}
	s.write() // with the ports that it had
	p := s.Daemon(name)
	p.Signal(sig)
	p.Wait(20 * time.Second)
	s.StartDaemon(name)
	s.WaitReady(name)
}

// Ready returns the part of the ready lines that says where the daemon is.
func (s *Stack) Ready(name string) Ready {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, ok := s.ready[name]; ok {
		return r
	}
	return s.ready[Serve]
}

// WaitReady waits until the daemon's /readyz says 200.
func (s *Stack) WaitReady(name string) {
	s.T.Helper()
	Eventually(s.T, 20*time.Second, func() error { return get("http://" + s.Ready(name).Admin + "/readyz") })
}

// AuthdURL is what agents log in at.
func (s *Stack) AuthdURL() string {
	if s.Balancer != nil {
		return s.Balancer.URL("auth.localhost")
	}
	return s.Ready("authd").Authd.URL
}

// GatewayURL is the tunnel host.
func (s *Stack) GatewayURL() string { return s.Ready("gateway").Gateway.URL }

// CAFile signs the public listeners.
func (s *Stack) CAFile() string { return filepath.Join(s.Dir, "data", "keys", "public-ca.crt") }

// Change edits the configuration and has it taken over: by the running daemons
// themselves, and with `sallyport apply` where they run apart. It returns when it
// was written and applied; that it has an effect is for the test to wait for.
func (s *Stack) Change(edit func(*Config)) {
	s.T.Helper()
	s.mu.Lock()
	edit(&s.cfg)
	s.mu.Unlock()
	s.write()
	if s.Mode != Together {
		s.Operator("apply", "--config", s.File)
	}
}

// SetGroups is Change for one user's groups.
func (s *Stack) SetGroups(user string, groups ...string) {
	s.T.Helper()
	s.Change(func(c *Config) {
		users := append([]User(nil), c.Users...)
		for i := range users {
			if users[i].ID == user {
				users[i].Groups = groups
			}
		}
		c.Users = users
	})
}

// Operator runs the operator's tool; it must succeed.
func (s *Stack) Operator(args ...string) Result {
	s.T.Helper()
	r := Run(s.T, Command{Program: "sallyport", Args: args})
	if r.Exit != 0 {
		s.T.Fatalf("sallyport %s: exit code %d\n%s%s", strings.Join(args, " "), r.Exit, r.Stderr, r.Stdout)
	}
	return r
}

// Stop ends all daemons, and fails the test if one had to be killed or a
// daemon's log holds a panic, a race or a secret.
func (s *Stack) Stop() {
	s.mu.Lock()
	procs := s.procs
	s.procs = map[string]*Process{}
	s.mu.Unlock()
	for _, p := range procs {
		p.Signal(syscall.SIGCONT)
		p.Signal(syscall.SIGTERM)
	}
	for name, p := range procs {
		p.Wait(15 * time.Second)
		for _, bad := range []string{"panic:", "DATA RACE", "fatal error:", Password} {
			if strings.Contains(p.Stderr(), bad) {
				s.T.Errorf("%s: its log holds %q:\n%s", name, bad, p.Stderr())
			}
		}
		if s.T.Failed() {
			s.T.Logf("%s, last words:\n%s", name, tailOf(p.Stderr(), 30))
		}
	}
}

// write puts the configuration on disk in one step.
func (s *Stack) write() {
	s.T.Helper()
	if s.Mode == Several {
		s.writeSeveral()
		return
	}
	s.mu.Lock()
	doc := s.document()
	s.mu.Unlock()
	text, err := json.MarshalIndent(doc, "", "  ") // JSON is YAML
	if err != nil {
		s.T.Fatal(err)
	}
	replaceFile(s.T, s.File, text)
}

func (s *Stack) document() map[string]any {
	authd := map[string]any{
		"public_url": s.public("auth.localhost", "authd"),
		"listen":     s.listen("authd"),
		"session":    s.cfg.Session,
	}
	if s.cfg.IDP != nil {
		authd["idp"] = s.cfg.IDP
	} else {
		var users []map[string]any
		for _, u := range s.cfg.Users {
			users = append(users, map[string]any{
				"id": u.ID, "email": u.Email, "name": u.ID, "groups": append([]string{}, u.Groups...), "password_hash": passwordHash(s.T),
			})
		}
		authd["users"] = users
	}
	if s.cfg.Session == nil {
		delete(authd, "session")
	}
	routes := s.cfg.Routes
	if routes == nil {
		routes = []Route{}
	}
	doc := map[string]any{
		"domain":   "test.example",
		"data_dir": "data",
		"log":      map[string]any{"level": cmp.Or(s.cfg.LogLevel, "debug"), "format": "text"},
		"gateway": merged(s.cfg.Gateway, map[string]any{
			"public_url": s.public("gw.localhost", "gateway"), "listen": s.listen("gateway"),
		}),
		"authd":          authd,
		"cached":         map[string]any{"listen": s.listen("cached")},
		"policyd":        merged(s.cfg.Policyd, map[string]any{"listen": s.listen("policyd"), "posture_sources": []string{"os", "file"}}),
		"routes":         routes,
		"explain_groups": s.cfg.ExplainGroups,
	}
	if s.cfg.Audit != nil {
		doc["audit"] = s.cfg.Audit
	}
	if s.Mode == Apart {
		doc["connect"] = map[string]any{"policyd": []string{s.known("policyd")}, "cached": []string{s.known("cached")}}
	}
	return doc
}

// listen is where the daemon is to listen: anywhere at first, then where it is.
func (s *Stack) listen(name string) string {
	if addr := s.ports[name]; addr != "" {
		return addr
	}
	return "127.0.0.1:0"
}

// known is where others find the daemon; a placeholder before it runs.
func (s *Stack) known(name string) string {
	if link := s.links[name]; link != nil {
		return link.Addr
	}
	return cmp.Or(s.ports[name], "127.0.0.1:1")
}

// Link is the network before the daemon, of a stack with Links.
func (s *Stack) Link(name string) *Link { return s.links[name] }

// port is the daemon's own address.
func (s *Stack) port(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ports[name]
}

func (s *Stack) public(host, name string) string {
	u := url.URL{Scheme: "https", Host: host + ":0"}
	if addr := s.known(name); s.ports[name] != "" || s.links[name] != nil {
		_, port, _ := strings.Cut(addr, ":")
		u.Host = host + ":" + port
	}
	return u.String()
}

func merged(extra, base map[string]any) map[string]any {
	all := map[string]any{}
	for _, m := range []map[string]any{base, extra} {
		for k, v := range m {
			all[k] = v
		}
	}
	return all
}

func tailOf(s string, lines int) string {
	all := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Allow is a policy with one rule: all of the criteria must hold.
func Allow(rule string, criteria ...map[string]any) any {
	return []any{map[string]any{"name": rule, "allow": map[string]any{"and": criteria}}}
}

// Group and Fact are criteria.
func Group(name string) map[string]any { return map[string]any{"groups": map[string]any{"has": name}} }

// Fact asks for a fact of the device.
func Fact(name string, want any) map[string]any {
	return map[string]any{"device": map[string]any{name: want}}
}

// Anyone is everybody who is logged in.
func Anyone() map[string]any { return map[string]any{"authenticated_user": true} }

var hash = sync.OnceValues(func() (string, error) {
	dir, err := Binaries()
	if err != nil {
		return "", err
	}
	out, err := pipe(filepath.Join(dir, "sallyport"), Password+"\n", "hash-password")
	if err != nil {
		return "", fmt.Errorf("hash-password: %w", err)
	}
	return strings.TrimSpace(out), nil
})

func passwordHash(t testing.TB) string {
	t.Helper()
	h, err := hash()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

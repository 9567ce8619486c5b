package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dexidp/dex/server"
	"github.com/dexidp/dex/server/connectors"
	"github.com/dexidp/dex/server/signer"
	"github.com/dexidp/dex/storage"
	"github.com/dexidp/dex/storage/memory"
	"github.com/dexidp/dex/web"
	"github.com/go-jose/go-jose/v4"
	"golang.org/x/crypto/bcrypt"

	"sallyport/integration/stack"
)

// foreignIDP is an identity provider that others wrote, with pages of its own.
type foreignIDP interface {
	// config is the section idp of authd, less the secret's file.
	config() map[string]any
	// register makes authd known to it.
	register(t *testing.T, redirectURI string)
	// setGroups says which groups it claims of a user.
	setGroups(t *testing.T, user string, groups ...string)
	// rotate makes it sign with a new key.
	rotate(t *testing.T)
	// keyFetches is how often its keys were asked for, -1 if it cannot tell.
	keyFetches() int
}

const (
	clientID     = "sallyport"
	clientSecret = "a secret of the company's, 32 bytes at least"
)

// TestForeignIDP: people log in at identity providers that we did not write, one
// in Node.js and certified by the OpenID Foundation, one in Go, through their
// pages; the groups that those claim decide.
func TestForeignIDP(t *testing.T) {
	for _, c := range []struct {
		name  string
		start func(*testing.T) foreignIDP
		mode  stack.Mode
	}{
		{"oidc-provider", startOIDCProvider, stack.Together},
		{"dex", startDex, stack.Apart},
	} {
		t.Run(c.name, func(t *testing.T) { testForeignIDP(t, c.start(t), c.mode) })
	}
}

func testForeignIDP(t *testing.T, idp foreignIDP, mode stack.Mode) {
	echo := stack.EchoServer(t)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(clientSecret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	config := idp.config()
	config["client_id"], config["client_secret_file"] = clientID, secret
	s := stack.Start(t, mode, stack.Config{
		IDP: config,
		Routes: []stack.Route{
			{From: "tcp://db.internal:5432", To: "tcp://" + echo.Addr, Policy: stack.Allow("dba", stack.Group("dba"))},
		},
	})
	idp.register(t, s.AuthdURL()+"/callback")
	idp.setGroups(t, "alice", "staff", "dba")
	idp.setGroups(t, "bob", "staff")

	login := func(a *stack.Agent) {
		t.Helper()
		a.LoginWith(map[string]string{"login": a.User + "@test.example", "password": stack.Password, "answer": "allow"})
	}
	alice, bob := s.NewAgent(t, "alice"), s.NewAgent(t, "bob")
	login(alice)
	if err := stack.Echo(alice.Connect("db.internal:5432").Dial(t), "hello"); err != nil {
		t.Error(err)
	}
	if r := alice.Run("whoami"); !strings.Contains(r.Stdout, "alice@test.example") || !strings.Contains(r.Stdout, "staff, dba") {
		t.Errorf("whoami: %+v", r)
	}

	idp.rotate(t) // A24
	before := idp.keyFetches()
	login(bob)
	if n := idp.keyFetches() - before; n > 1 {
		t.Errorf("the keys were fetched %d times for one rotation; want once", n)
	}
	upstream := echo.Accepted()
	r := bob.Run("connect", "--stdio", "db.internal:5432")
	wantExit(t, r, stack.ExitDenied)
	t.Log(r.Stderr)
	if !strings.Contains(r.Stderr, "group") {
		t.Errorf("the denial does not speak of groups:\n%s", r.Stderr)
	}
	if echo.Accepted() != upstream {
		t.Error("a denied connection reached the service")
	}

	// What the provider says at the next login counts, also for what is open.
	open := alice.Connect("db.internal:5432")
	conn := open.Dial(t)
	if err := stack.Echo(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	idp.setGroups(t, "alice", "staff")
	login(alice)
	stack.CutWithin(t, conn, 10*time.Second)
	if code := open.Wait(10 * time.Second); code != stack.ExitRevoked {
		t.Errorf("exit code %d; want %d\n%s", code, stack.ExitRevoked, open.Stderr())
	}
	wantExit(t, alice.Run("why", "db.internal:5432"), stack.ExitDenied)
}

// oidcProvider is npm oidc-provider, in a process of its own.
type oidcProvider struct {
	*stack.Process
	issuer string
	people map[string]any
}

func startOIDCProvider(t *testing.T) foreignIDP {
	t.Helper()
	dir := filepath.Join("testdata", "oidc-provider")
	if _, err := os.Stat(filepath.Join(dir, "node_modules", "oidc-provider")); err != nil {
		t.Fatalf("npm oidc-provider is missing: run tools/needs.sh, or npm ci in integration/%s", dir)
	}
	p := stack.StartProcess(t, stack.Command{Program: need(t, "node", "nodejs"), Args: []string{filepath.Join(dir, "provider.mjs")}, Interactive: true})
	text, ok := strings.CutPrefix(p.Line(30*time.Second), "ready ")
	var ready struct{ Issuer string }
	if err := json.Unmarshal([]byte(text), &ready); !ok || err != nil {
		t.Fatalf("oidc-provider did not start: %s", p.Stderr())
	}
	return &oidcProvider{p, ready.Issuer, map[string]any{}}
}

// config names a claim that nobody has by default.
func (o *oidcProvider) config() map[string]any {
	return map[string]any{"issuer": o.issuer, "groups_claim": "teams", "scopes": []string{"profile", "email", "teams"}}
}

func (o *oidcProvider) register(t *testing.T, redirectURI string) {
	o.order(t, map[string]any{"client": map[string]any{
		"client_id": clientID, "client_secret": clientSecret, "redirect_uris": []string{redirectURI},
	}})
}

func (o *oidcProvider) setGroups(t *testing.T, user string, groups ...string) {
	email := user + "@test.example"
	o.people[email] = map[string]any{"name": user, "email": email, "email_verified": true, "teams": groups}
	o.order(t, map[string]any{"people": o.people})
}

func (o *oidcProvider) rotate(t *testing.T) { o.order(t, map[string]any{"rotate": true}) }

func (o *oidcProvider) keyFetches() int { return -1 }

func (o *oidcProvider) order(t *testing.T, what any) {
	t.Helper()
	line, err := json.Marshal(what)
	if err != nil {
		t.Fatal(err)
	}
	o.Send(string(line))
	if answer := o.Line(20 * time.Second); answer != "done" {
		t.Fatalf("oidc-provider answered %q\n%s", answer, o.Stderr())
	}
}

// dex runs in this process, as dex embeds: records in memory, passwords of its
// own connector.
type dex struct {
	issuer string
	store  storage.Storage
	signer *turningSigner
	keys   atomic.Int64
}

func startDex(t *testing.T) foreignIDP {
	t.Helper()
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	d := &dex{store: memory.New(log), signer: &turningSigner{}}
	d.signer.turn(t)
	var handler atomic.Pointer[server.Server]
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/dex/keys" {
			d.keys.Add(1)
		}
		handler.Load().ServeHTTP(w, r)
	}))
	t.Cleanup(site.Close)
	d.issuer = site.URL + "/dex"
	if err := d.store.CreateConnector(t.Context(), storage.Connector{ID: "local", Type: connectors.LocalConnector, Name: "Email"}); err != nil {
		t.Fatal(err)
	}
	s, err := server.NewServer(t.Context(), server.Config{
		Issuer: d.issuer, Storage: d.store, Logger: log, Signer: d.signer,
		Web:               server.WebConfig{WebFS: web.FS()},
		AllowedGrantTypes: []string{"authorization_code"},
	})
	if err != nil {
		t.Fatal(err)
	}
	handler.Store(s)
	return d
}

func (d *dex) config() map[string]any {
	return map[string]any{"issuer": d.issuer, "scopes": []string{"profile", "email", "groups"}}
}

func (d *dex) register(t *testing.T, redirectURI string) {
	t.Helper()
	if err := d.store.CreateClient(t.Context(), storage.Client{ID: clientID, Secret: clientSecret, RedirectURIs: []string{redirectURI}, Name: "Sallyport"}); err != nil {
		t.Fatal(err)
	}
}

func (d *dex) setGroups(t *testing.T, user string, groups ...string) {
	t.Helper()
	email := user + "@test.example"
	err := d.store.UpdatePassword(t.Context(), email, func(p storage.Password) (storage.Password, error) {
		p.Groups = groups
		return p, nil
	})
	if err == nil {
		return
	}
	hash, err := bcrypt.GenerateFromPassword([]byte(stack.Password), 10) // dex takes no fewer rounds
	if err == nil {
		err = d.store.CreatePassword(t.Context(), storage.Password{Email: email, Hash: hash, Username: user, UserID: user, Groups: groups})
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (d *dex) rotate(t *testing.T) { d.signer.turnBeforeNext(t) }

func (d *dex) keyFetches() int { return int(d.keys.Load()) }

// turningSigner signs for dex, with a new key when told: from the very next
// signature on, as late as a rotation can come. Older keys stay published.
type turningSigner struct {
	mu   sync.Mutex // guards what follows
	keys []signer.Signer
	next signer.Signer // what to begin with at the next signature; nil: no change
}

func (s *turningSigner) turn(t *testing.T) {
	t.Helper()
	s.turnBeforeNext(t)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys, s.next = append(s.keys, s.next), nil
}

func (s *turningSigner) turnBeforeNext(t *testing.T) {
	t.Helper()
	key, err := signer.NewMockSigner(nil)
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next = key
}

// Sign, ValidationKeys, Algorithm and Start are dex's signer.Signer.
func (s *turningSigner) Sign(ctx context.Context, payload []byte) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next != nil {
		s.keys, s.next = append(s.keys, s.next), nil
	}
	return s.keys[len(s.keys)-1].Sign(ctx, payload)
}

func (s *turningSigner) ValidationKeys(ctx context.Context) ([]*jose.JSONWebKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*jose.JSONWebKey
	for _, k := range s.keys {
		keys, err := k.ValidationKeys(ctx)
		if err != nil {
			return nil, fmt.Errorf("keys: %w", err)
		}
		all = append(all, keys...)
	}
	return all, nil
}

func (s *turningSigner) Algorithm(context.Context) (jose.SignatureAlgorithm, error) {
	return jose.RS256, nil
}

func (s *turningSigner) Start(context.Context) {}

// Package idp is the embedded identity provider: a small OpenID Provider
// (zitadel's op) with its own issuer and the users of the configuration file, for
// sites that have no other. It knows one client, authd, which treats it like any
// other provider. It owns the login form, password hashes and what op leaves to
// its storage: PKCE S256 only, codes that burn at their first use, one exact
// redirect. Sessions, devices and consent are authd's.
//
// Its state is in memory: a login that is under way when authd restarts starts
// again.
package idp

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/zitadel/oidc/v3/pkg/op"

	"sallyport"
	"sallyport/authd/internal/page"
	"sallyport/internal/logging"
	"sallyport/internal/ratelimit"
)

// Paths under the issuer.
const (
	pathDiscovery = "/.well-known/openid-configuration"
	pathAuthorize = "/authorize"
	pathCallback  = "/authorize/callback"
	pathToken     = "/oauth/token"
	pathKeys      = "/keys"
	pathLogin     = "/login"
)

// Config says who the provider is and whom it serves.
type Config struct {
	Issuer      string // https://auth.corp.example/idp
	ClientID    string
	RedirectURI string
	Users       []User
	// FormAction lists where a login may lead in the end, beside this origin, as
	// CSP sources: browsers hold the login form's redirects to it.
	FormAction string
	Log        logging.Logger
	Now        func() time.Time
}

// Provider is the embedded identity provider. It serves the paths under its
// issuer.
type Provider struct {
	cfg    Config
	issuer *url.URL
	secret string
	users  atomic.Pointer[directory]
	store  *storage
	op     *op.Provider

	// Failed attempts only: whoever knows the password is never locked out by
	// an own typing error, but guessing is.
	byUser, byAddress ratelimit.Limiter
	// hashing bounds how many passwords are hashed at once.
	hashing chan struct{}
}

// Limits of attempts to log in.
const (
	userBurst, userEvery       = 10, 10 * time.Second
	addressBurst, addressEvery = 30, 2 * time.Second
	hashingAtOnce              = 4
)

// New makes a provider with a fresh signing key.
func New(cfg Config) (*Provider, error) {
	issuer, err := url.Parse(cfg.Issuer)
	if err != nil {
		return nil, fmt.Errorf("idp: issuer: %w", err)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = logging.Discard()
	}
	p := &Provider{
		cfg:       cfg,
		issuer:    issuer,
		secret:    sallyport.NewSecret(),
		byUser:    ratelimit.Limiter{Burst: userBurst, Every: userEvery, Now: cfg.Now},
		byAddress: ratelimit.Limiter{Burst: addressBurst, Every: addressEvery, Now: cfg.Now},
		hashing:   make(chan struct{}, hashingAtOnce),
	}
	if err := p.SetUsers(cfg.Users); err != nil {
		return nil, err
	}
	if p.store, err = newStorage(p); err != nil {
		return nil, err
	}
	conf := &op.Config{CodeMethodS256: true, SupportedScopes: []string{"openid", "profile", "email"}}
	rand.Read(conf.CryptoKey[:])
	p.op, err = op.NewProvider(conf, p.store, op.StaticIssuer(cfg.Issuer),
		op.WithCORSOptions(nil),
		op.WithCustomAuthEndpoint(op.NewEndpoint(pathAuthorize)),
		op.WithCustomTokenEndpoint(op.NewEndpoint(pathToken)),
		op.WithCustomKeysEndpoint(op.NewEndpoint(pathKeys)))
	if err != nil {
		return nil, fmt.Errorf("idp: %w", err)
	}
	return p, nil
}

// ClientSecret is what authd authenticates with. It is made anew with each
// provider and never leaves the process.
func (p *Provider) ClientSecret() string { return p.secret }

// SetUsers replaces the users. Logins under way of users who are gone fail.
func (p *Provider) SetUsers(users []User) error {
	d, err := newDirectory(users)
	if err != nil {
		return fmt.Errorf("idp: users: %w", err)
	}
	p.users.Store(d)
	return nil
}

// User returns the user with the id as the configuration has it now.
func (p *Provider) User(id string) (User, bool) {
	a, ok := p.users.Load().byID[id]
	if !ok {
		return User{}, false
	}
	return a.User, true
}

// Users returns all users as the configuration has them now.
func (p *Provider) Users() []User {
	byID := p.users.Load().byID
	users := make([]User, 0, len(byID))
	for _, id := range slices.Sorted(maps.Keys(byID)) {
		users = append(users, byID[id].User)
	}
	return users
}

// ServeHTTP serves what the one client needs, and no other endpoint of op's.
func (p *Provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	page.Secure(w.Header(), p.cfg.FormAction)
	path, ok := strings.CutPrefix(r.URL.Path, p.issuer.Path)
	if !ok {
		http.NotFound(w, r)
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, 16<<10)
	switch method := r.Method; {
	case path == pathDiscovery && method == http.MethodGet:
		p.discovery(w)
	case path == pathAuthorize && method == http.MethodGet:
		p.authorize(w, r)
	case path == pathLogin && method == http.MethodGet:
		p.showLogin(w, r)
	case path == pathLogin && method == http.MethodPost:
		p.submitLogin(w, r)
	case path == pathCallback && method == http.MethodGet && !p.store.completed(r.URL.Query().Get("id")):
		p.startAgain(w) // op would log it as an error, for anybody who asks
	case path == pathCallback && method == http.MethodGet,
		path == pathToken && method == http.MethodPost,
		path == pathKeys && method == http.MethodGet:
		http.StripPrefix(p.issuer.Path, p.op).ServeHTTP(w, r)
	default:
		http.NotFound(w, r)
	}
}

// discovery announces what this provider does; op's own document would announce
// every flow that op knows.
func (p *Provider) discovery(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	err := json.NewEncoder(w).Encode(map[string]any{
		"issuer":                                p.cfg.Issuer,
		"authorization_endpoint":                p.cfg.Issuer + pathAuthorize,
		"token_endpoint":                        p.cfg.Issuer + pathToken,
		"jwks_uri":                              p.cfg.Issuer + pathKeys,
		"scopes_supported":                      []string{"openid", "profile", "email"},
		"response_types_supported":              []string{"code"},
		"grant_types_supported":                 []string{"authorization_code"},
		"subject_types_supported":               []string{"public"},
		"id_token_signing_alg_values_supported": []string{string(signingAlg)},
		"token_endpoint_auth_methods_supported": []string{"client_secret_basic"},
		"code_challenge_methods_supported":      []string{"S256"},
		"claims_supported":                      []string{"sub", "email", "email_verified", "name", "groups", "amr"},
	})
	if err != nil {
		p.cfg.Log.Debug("discovery answer not written", "error", err)
	}
}

// authorize lets only the one request through that authd makes, and leaves the
// rest to op, which is more generous.
func (p *Provider) authorize(w http.ResponseWriter, r *http.Request) {
	if err := p.checkAuthorize(r.URL.Query()); err != nil {
		p.cfg.Log.Warn("authorization request refused", "error", err, "peer", r.RemoteAddr)
		p.failed(w, http.StatusBadRequest, "This login cannot start here", "Start again where you came from.")
		return
	}
	http.StripPrefix(p.issuer.Path, p.op).ServeHTTP(w, r)
}

func (p *Provider) checkAuthorize(q url.Values) error {
	known := []string{"client_id", "redirect_uri", "response_type", "scope", "state", "nonce", "code_challenge", "code_challenge_method"}
	for name, values := range q {
		if len(values) != 1 || !slices.Contains(known, name) || len(values[0]) > 1024 {
			return errors.New("unknown, repeated or long parameter")
		}
	}
	same := func(name, want string) bool {
		return subtle.ConstantTimeCompare([]byte(q.Get(name)), []byte(want)) == 1
	}
	switch {
	case !same("client_id", p.cfg.ClientID):
		return errors.New("unknown client_id")
	case !same("redirect_uri", p.cfg.RedirectURI):
		return errors.New("unknown redirect_uri")
	case !same("response_type", "code"):
		return errors.New("response_type is not code")
	case !same("code_challenge_method", "S256") || len(q.Get("code_challenge")) != 43:
		return errors.New("PKCE with S256 is required")
	case q.Get("state") == "" || q.Get("nonce") == "":
		return errors.New("state and nonce are required")
	}
	return nil
}

// failed shows why a login cannot go on, in our own words only.
func (p *Provider) failed(w http.ResponseWriter, status int, title, lead string) {
	if err := page.Write(w, status, page.Page{Title: title, Lead: lead, Tone: "bad"}); err != nil {
		p.cfg.Log.Debug("page not written", "error", err)
	}
}

// Health is op's question to its storage.
func (s *storage) Health(context.Context) error { return nil }

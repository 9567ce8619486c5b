// Package authd logs people in: it is the only relying party to the company's
// identity provider (internal/oidcrp, or the embedded one in authd/idp) and the
// only issuer of session certificates. It owns the way from an agent's
// authorization request through the browser to a certificate, renewals, logout,
// the consent for new device keys, and the records login, session, user,
// directory_user and device at the instant of a login. Whether a session is
// allowed to do anything is policyd's; that it ends when revoked is cached's and
// policyd's.
//
// One login:
//
//	agent ──▶ browser: GET /authorize        state record, flow cookie
//	          browser ──▶ identity provider ──▶ GET /callback
//	                                           state consumed, ID token checked
//	          new device key: page, POST /consent
//	          browser ──▶ agent's loopback listener, with a code
//	agent: POST /nonce, POST /token            code consumed, session written
//
// Everything that may be used once (state, consent, code, nonce) is consumed by
// the same write that acts on it, and is stored by its hash and sealed.
package authd

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport"
	"sallyport/authd/idp"
	"sallyport/internal/keyring"
	"sallyport/internal/logging"
	"sallyport/internal/oidcrp"
	"sallyport/internal/tlsid"
	"sallyport/proto/login"
)

// Deps is what authd works with. All fields but Log and Now are required.
type Deps struct {
	// Domain is the trust domain of session certificates.
	Domain  string
	Records sallyport.Records
	Audit   sallyport.Auditor
	Log     logging.Logger // nil: no log
	// SessionCAs sign session certificates and nothing else, the newest first: one,
	// or during a rotation the one before it too.
	SessionCAs []*tlsid.CA
	// MaxStale is how long gateways may go on without news of the records: so long a
	// CA is published before it signs. 0: 30 s.
	MaxStale time.Duration
	// KEK wraps the keys that seal what authd stores of other people's secrets. All
	// authds of a site have the same.
	KEK keyring.KEK
	Now func() time.Time // nil: time.Now
}

// Server is authd. It is safe for concurrent use.
type Server struct {
	deps   Deps
	log    logging.Logger
	now    func() time.Time
	public string // public URL
	issuer string // of the identity provider
	rp     *oidcrp.Client
	idp    *idp.Provider // nil beside another identity provider
	vault  *vault
	limits *limits

	session   atomic.Pointer[Session] // the part of the configuration that a reload changes
	published atomic.Bool             // the trust record stands

	cas     atomic.Pointer[[]*tlsid.CA] // our session CAs, the newest first
	rotated chan struct{}               // capacity 1: cas was replaced
	idle    atomic.Pointer[error]       // why nothing is signed at the moment; nil inside: it is
}

// New makes a server. It reads the files that cfg names and touches no network;
// Run does the rest.
func New(cfg Config, deps Deps) (*Server, error) {
	if err := cfg.Validate().Err(); err != nil {
		return nil, err
	}
	if deps.Log == nil {
		deps.Log = logging.Discard()
	}
	if deps.Now == nil {
		deps.Now = time.Now
	}
	if deps.Domain == "" || deps.Records == nil || deps.Audit == nil || len(deps.SessionCAs) == 0 {
		return nil, errors.New("authd: domain, records, audit and session CA are required")
	}
	v, err := newVault(deps.Records, deps.KEK, deps.Now)
	if err != nil {
		return nil, err
	}
	s := &Server{
		deps: deps, log: deps.Log, now: deps.Now,
		public: cfg.publicURL(), vault: v, limits: newLimits(deps.Now), rotated: make(chan struct{}, 1),
	}
	s.cas.Store(&deps.SessionCAs)
	s.session.Store(&cfg.Session)
	if err := s.connectIDP(cfg); err != nil {
		return nil, fmt.Errorf("authd: identity provider: %w", err)
	}
	return s, nil
}

// connectIDP makes the relying party, and before it the embedded provider if that
// is what it relies on.
func (s *Server) connectIDP(cfg Config) error {
	conf := oidcrp.Config{
		Issuer:       cfg.IDP.Issuer,
		ClientID:     cfg.IDP.ClientID,
		RedirectURL:  s.public + login.PathCallback,
		Scopes:       cfg.IDP.Scopes,
		GroupsClaim:  cfg.IDP.GroupsClaim,
		GroupsString: cfg.IDP.GroupsString,
		Now:          s.now,
	}
	if len(conf.Scopes) == 0 {
		conf.Scopes = []string{"profile", "email"}
	}
	var err error
	if cfg.embedded() {
		err = s.embedIDP(cfg, &conf)
	} else {
		err = readIDPFiles(cfg.IDP, &conf)
	}
	if err != nil {
		return err
	}
	s.issuer = conf.Issuer
	s.rp, err = oidcrp.New(conf)
	return err
}

func (s *Server) embedIDP(cfg Config, conf *oidcrp.Config) error {
	provider, err := idp.New(idp.Config{
		Issuer:      s.public + pathIDP,
		ClientID:    embeddedClient,
		RedirectURI: conf.RedirectURL,
		Users:       cfg.Users,
		FormAction:  "http://127.0.0.1:*", // agents' listeners, at the end of the redirects
		Log:         s.log.Named("idp"),
		Now:         s.now,
	})
	if err != nil {
		return err
	}
	s.idp = provider
	conf.Issuer, conf.ClientID, conf.ClientSecret = s.public+pathIDP, embeddedClient, provider.ClientSecret()
	conf.GroupsClaim, conf.GroupsString = "", false
	conf.Transport = provider.Transport()
	return nil
}

func readIDPFiles(cfg IDP, conf *oidcrp.Config) error {
	secret, err := readSecret(cfg.ClientSecretFile)
	if err != nil {
		return fmt.Errorf("client_secret_file: %w", err)
	}
	conf.ClientSecret = secret
	if cfg.CAFile == "" {
		return nil
	}
	if conf.RootCAs, err = tlsid.LoadPool(cfg.CAFile); err != nil {
		return fmt.Errorf("ca_file: %w", err)
	}
	return nil
}

// Handler serves everything on the public listener.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+login.PathMetadata, s.metadata)
	mux.HandleFunc("GET "+login.PathAuthorize, s.inBrowser(s.authorize))
	mux.HandleFunc("GET "+login.PathCallback, s.inBrowser(s.callback))
	mux.HandleFunc("POST "+login.PathConsent, s.inBrowser(s.consent))
	mux.HandleFunc("POST "+login.PathNonce, s.forAgent(s.nonce))
	mux.HandleFunc("POST "+login.PathToken, s.forAgent(s.token))
	mux.HandleFunc("POST "+login.PathRenew, s.forAgent(s.renew))
	mux.HandleFunc("POST "+login.PathLogout, s.forAgent(s.logout))
	mux.HandleFunc("GET /{$}", s.inBrowser(s.home))
	if s.idp != nil {
		mux.HandleFunc(pathIDP+"/", s.inBrowser(func(c *call) error {
			s.idp.ServeHTTP(c.w, c.r)
			return nil
		}))
	}
	return s.secured(mux)
}

// Ready returns nil once logins work, else why they do not.
func (s *Server) Ready() error {
	if !s.published.Load() {
		return errors.New("trust bundle is not published yet")
	}
	if idle := s.idle.Load(); idle != nil && *idle != nil {
		return *idle
	}
	if s.vault.current.Load() == nil {
		return errors.New("keys of stored secrets are not read yet")
	}
	if err := s.rp.Ready(); err != nil {
		return fmt.Errorf("identity provider: %w", err)
	}
	return nil
}

// Intervals of Run.
const (
	retryEvery     = time.Second
	rediscover     = time.Hour
	rediscoverSoon = 5 * time.Second // while the provider cannot be used
)

// Run publishes session CAs and retires them, brings the directory of the embedded
// provider into the records, keeps discovery fresh, and tends the keys of stored
// secrets, until ctx ends. It fails if the key-encryption key is the wrong one.
func (s *Server) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := s.publish(ctx); err != nil {
			return err
		}
		return s.keepTrust(ctx)
	})
	group.Go(func() error { return s.keepDiscovered(ctx) })
	group.Go(func() error { return s.keepKeys(ctx) })
	if err := group.Wait(); ctx.Err() == nil {
		return err
	}
	return nil
}

// publish writes what others need from authd, again and again until it stands.
func (s *Server) publish(ctx context.Context) error {
	for {
		_, err := s.publishTrust(ctx)
		if err == nil && s.idp != nil {
			err = s.syncDirectory(ctx)
		}
		if err == nil {
			s.published.Store(true)
			return nil
		}
		s.log.Warn("records not written yet", "error", err)
		if !wait(ctx, retryEvery) {
			return ctx.Err()
		}
	}
}

func (s *Server) keepDiscovered(ctx context.Context) error {
	for {
		every := rediscover
		if err := s.rp.Discover(ctx); err != nil {
			s.log.Warn("identity provider not usable", "issuer", s.issuer, "error", err)
			every = rediscoverSoon
		}
		if !wait(ctx, every) {
			return ctx.Err()
		}
	}
}

// wait reports whether d passed before ctx ended.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// reloadTimeout bounds the writes of Reload.
const reloadTimeout = 10 * time.Second

// Reload takes over the embedded users, the client secret in its file, and the
// session section of cfg. Users' groups are in the records when it returns. What
// else changed needs a restart, which the error says; nothing is taken over then.
func (s *Server) Reload(cfg Config) error {
	if err := cfg.Validate().Err(); err != nil {
		return err
	}
	if cfg.embedded() != (s.idp != nil) || cfg.publicURL() != s.public || !cfg.embedded() && cfg.IDP.Issuer != s.issuer {
		return errors.New("authd: public_url and the choice of identity provider need a restart")
	}
	if s.idp == nil {
		secret, err := readSecret(cfg.IDP.ClientSecretFile)
		if err != nil {
			return fmt.Errorf("client_secret_file: %w", err)
		}
		s.rp.SetClientSecret(secret)
		s.session.Store(&cfg.Session)
		return nil
	}
	s.session.Store(&cfg.Session)
	if err := s.idp.SetUsers(cfg.Users); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), reloadTimeout)
	defer cancel()
	return s.syncDirectory(ctx)
}

// SetKEK takes over another key-encryption key, which must open what is stored; the
// one before stays if it does not. If an older key of it wraps the ring, the ring is
// wrapped anew soon.
func (s *Server) SetKEK(kek keyring.KEK) error {
	ctx, cancel := context.WithTimeout(context.Background(), reloadTimeout)
	defer cancel()
	return s.vault.setKEK(ctx, kek)
}

// origin is the public URL as browsers name it in Origin.
func (s *Server) origin() string {
	u, err := url.Parse(s.public)
	if err != nil { // Validate has parsed it
		return s.public
	}
	return strings.ToLower(u.Scheme + "://" + u.Host)
}

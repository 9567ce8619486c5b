// Package oidcrp is a strict OpenID Connect relying party: authorization code
// with PKCE S256 and nonce against one provider. go-oidc and x/oauth2 do the
// protocol; this package owns everything they leave to their caller or accept
// too gladly: bounds on every answer, limits on keys and on fetching them, the
// checks of the ID token (OpenID Connect Core 1.0, section 3.1.3.7, and what
// implementations got wrong since), the merge with userinfo, the rules for
// groups. It refuses with an *Error whose Code is stable and never contains the
// other side's text.
//
// It does not keep state between Begin and Finish, speaks to no browser, and
// knows nothing of sessions: that is its caller's.
package oidcrp

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
	"golang.org/x/time/rate"
)

// Config names the provider and the client that we are to it.
type Config struct {
	// Issuer is the provider's issuer URL, compared exactly. It must be https,
	// or http on a loopback address.
	Issuer       string
	ClientID     string
	ClientSecret string // empty: a public client; see SetClientSecret
	RedirectURL  string
	// Scopes to ask for beside openid.
	Scopes []string
	// GroupsClaim is the claim that lists the user's groups; empty: groups.
	GroupsClaim string
	// GroupsString accepts a string in GroupsClaim as one group.
	GroupsString bool
	// RootCAs verify the provider's certificate; nil: the system's.
	RootCAs *x509.CertPool
	// Transport replaces the network, for a provider in the same process.
	Transport http.RoundTripper
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Validate returns what is wrong with the configuration, nil if nothing is.
func (c Config) Validate() error {
	if err := CheckIssuer(c.Issuer); err != nil {
		return err
	}
	if c.ClientID == "" {
		return errors.New("client id is missing")
	}
	if u, err := url.Parse(c.RedirectURL); err != nil || u.Host == "" {
		return fmt.Errorf("redirect URL %q is not absolute", c.RedirectURL)
	}
	return nil
}

// CheckIssuer returns why issuer cannot be one: it must be an https URL, or http
// on a loopback host, without query, fragment and user (OpenID Connect Discovery
// 1.0, section 2).
func CheckIssuer(issuer string) error {
	u, err := url.Parse(issuer)
	switch {
	case err != nil || u.Host == "":
		return errors.New("must be an absolute URL like https://login.corp.example")
	case u.Scheme != "https" && (u.Scheme != "http" || !isLoopback(u.Hostname())):
		return errors.New("must be https: over http anyone on the way could forge keys and logins")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || u.User != nil:
		return errors.New("must have no query, fragment or user")
	}
	return nil
}

// Client is the relying party. It is safe for concurrent use.
type Client struct {
	cfg  Config
	http *http.Client

	provider atomic.Pointer[provider] // nil until discovery succeeded
	secret   atomic.Pointer[string]   // the client secret in use

	discovery struct {
		sync.Mutex               // one discovery at a time
		limit      *rate.Limiter // of those that logins cause
		err        error         // why the last one failed
	}
}

// provider is what discovery found. It never changes.
type provider struct {
	oauth    oauth2.Config // without the client secret, which may change
	metadata metadata
	userinfo string
	algs     []string
	keys     *keySet
}

// New checks cfg. It does not touch the network.
func New(cfg Config) (*Client, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.GroupsClaim == "" {
		cfg.GroupsClaim = "groups"
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c := &Client{cfg: cfg, http: newHTTPClient(cfg.Transport, &tls.Config{RootCAs: cfg.RootCAs})}
	c.SetClientSecret(cfg.ClientSecret)
	c.discovery.limit = rate.NewLimiter(rate.Every(2*time.Second), 2)
	return c, nil
}

// SetClientSecret replaces the client secret. Codes that are redeemed from now on
// are redeemed with it, also those of logins that have begun.
func (c *Client) SetClientSecret(secret string) { c.secret.Store(&secret) }

// Flow is what one login must remember between Begin and Finish. State may be
// seen by the browser; Nonce and Verifier must not be.
type Flow struct {
	State    string `json:"state"`
	Nonce    string `json:"nonce"`
	Verifier string `json:"verifier"`
}

// Begin starts a login and returns the provider's URL to send the browser to.
// It runs discovery if that has not succeeded yet.
func (c *Client) Begin(ctx context.Context) (Flow, string, error) {
	p, err := c.discovered(ctx)
	if err != nil {
		return Flow{}, "", err
	}
	flow := Flow{State: oauth2.GenerateVerifier(), Nonce: oauth2.GenerateVerifier(), Verifier: oauth2.GenerateVerifier()}
	target := p.oauth.AuthCodeURL(flow.State, oauth2.S256ChallengeOption(flow.Verifier), oidc.Nonce(flow.Nonce))
	return flow, target, nil
}

// Callback holds the parameters with which the provider sent the browser back.
// The caller has compared state and refused duplicates.
type Callback struct {
	Code   string
	Issuer string // "iss", RFC 9207
}

// Identity is who logged in, by an ID token that passed every check.
type Identity struct {
	Issuer        string
	Subject       string
	Email         string
	EmailVerified bool
	Name          string
	// Groups has no duplicates; at most MaxGroups.
	Groups []string
	// AuthMethods is amr (RFC 8176), then acr as "acr:<value>".
	AuthMethods []string
	// Claims are all others, of ID token and userinfo, without the protocol's own,
	// the groups, and claims that stand elsewhere (aggregated, distributed).
	Claims map[string]any
	// RefreshToken is the provider's, empty if it gave none.
	RefreshToken string
	// Late is set if the token was expired, within the leeway.
	Late bool
}

// Finish redeems the code and returns who logged in.
func (c *Client) Finish(ctx context.Context, flow Flow, cb Callback) (Identity, error) {
	p, err := c.discovered(ctx)
	if err != nil {
		return Identity{}, err
	}
	if cb.Issuer != c.cfg.Issuer && (cb.Issuer != "" || p.metadata.IssParameter) {
		return Identity{}, refuse(CodeIssMismatch, "the callback's iss is not the issuer", nil)
	}
	token, raw, err := c.exchange(ctx, p, flow, cb.Code)
	if err != nil {
		return Identity{}, err
	}
	verified, err := c.verifyIDToken(ctx, p, raw, expected{nonce: flow.Nonce, accessToken: token.AccessToken, code: cb.Code})
	if err != nil {
		return Identity{}, err
	}
	claims := verified.claims
	if p.userinfo != "" {
		more, err := c.fetchUserinfo(ctx, p, token, claims.text("sub"))
		if err != nil {
			return Identity{}, err
		}
		claims.merge(more)
	}
	id, err := c.identity(claims)
	if err != nil {
		return Identity{}, err
	}
	id.RefreshToken = token.RefreshToken
	id.Late = verified.late
	return id, nil
}

// exchange redeems the code at the token endpoint and returns the tokens and the
// raw ID token.
func (c *Client) exchange(ctx context.Context, p *provider, flow Flow, code string) (*oauth2.Token, string, error) {
	conf := p.oauth
	conf.ClientSecret = *c.secret.Load()
	conf.Endpoint.AuthStyle = authStyle(conf.ClientSecret, p.metadata.AuthMethods)
	token, err := conf.Exchange(oidc.ClientContext(ctx, c.http), code, oauth2.VerifierOption(flow.Verifier))
	if err != nil {
		return nil, "", exchangeError(err)
	}
	if token.Type() != "Bearer" {
		return nil, "", refuse(CodeTokenRefused, "token type is not Bearer", nil)
	}
	raw, ok := token.Extra("id_token").(string)
	if !ok || raw == "" {
		return nil, "", refuse(CodeMalformed, "no id_token in the token response", nil)
	}
	return token, raw, nil
}

// exchangeError tells a code that the provider does not take from a client that
// it does not take, and both from a provider that is not there.
func exchangeError(err error) error {
	var answer *oauth2.RetrieveError
	switch {
	case !errors.As(err, &answer):
		return unreachable("token endpoint", err)
	case answer.Response != nil && answer.Response.StatusCode >= 500:
		return unreachable("token endpoint", errors.New(answer.Response.Status))
	case answer.ErrorCode == "invalid_grant":
		return refuse(CodeRejected, "invalid_grant", nil)
	}
	return refuse(CodeTokenRefused, "token endpoint answered "+answer.ErrorCode, nil)
}

// supportedAlgs are the signatures we take: asymmetric ones only.
var supportedAlgs = []string{
	oidc.RS256, oidc.RS384, oidc.RS512, oidc.PS256, oidc.PS384, oidc.PS512,
	oidc.ES256, oidc.ES384, oidc.ES512, oidc.EdDSA,
}

// allowedAlgs is what the provider announces and we support; RS256 if it
// announces nothing of use (OpenID Connect Core 1.0, section 15.1).
func allowedAlgs(announced []string) []string {
	var both []string
	for _, alg := range announced {
		if slices.Contains(supportedAlgs, alg) {
			both = append(both, alg)
		}
	}
	if len(both) == 0 {
		return []string{oidc.RS256}
	}
	return both
}

package oidcrp

import (
	"context"
	"errors"
	"net/url"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
)

// metadata is what go-oidc does not read from the discovery document.
type metadata struct {
	JWKSURI      string   `json:"jwks_uri"`
	Algorithms   []string `json:"id_token_signing_alg_values_supported"`
	AuthMethods  []string `json:"token_endpoint_auth_methods_supported"`
	IssParameter bool     `json:"authorization_response_iss_parameter_supported"` // RFC 9207, section 3
}

// Discover reads the provider's metadata. A provider that now names another
// issuer or unusable endpoints is no longer used; one that does not answer is,
// as it was found the last time.
func (c *Client) Discover(ctx context.Context) error {
	c.discovery.Lock()
	defer c.discovery.Unlock()
	return c.discover(ctx)
}

// Ready returns nil once logins can begin, else why they cannot.
func (c *Client) Ready() error {
	if c.provider.Load() != nil {
		return nil
	}
	c.discovery.Lock()
	defer c.discovery.Unlock()
	if c.discovery.err != nil {
		return c.discovery.err
	}
	return refuse(CodeUnavailable, "discovery has not run yet", nil)
}

// discovered returns the provider, after trying discovery if that is missing;
// many logins together cause a few attempts only.
func (c *Client) discovered(ctx context.Context) (*provider, error) {
	if p := c.provider.Load(); p != nil {
		return p, nil
	}
	c.discovery.Lock()
	defer c.discovery.Unlock()
	if p := c.provider.Load(); p != nil {
		return p, nil
	}
	if c.discovery.err != nil && !c.discovery.limit.Allow() {
		return nil, c.discovery.err
	}
	if err := c.discover(ctx); err != nil {
		return nil, err
	}
	return c.provider.Load(), nil
}

// discover needs discovery's lock.
func (c *Client) discover(ctx context.Context) error {
	p, err := c.fetchProvider(ctx)
	c.discovery.err = err
	if err != nil {
		if CodeOf(err) != CodeUnavailable {
			c.provider.Store(nil)
		}
		return err
	}
	if old := c.provider.Load(); old != nil && old.keys.url == p.keys.url {
		p.keys = old.keys // with what it knows, and its limiter
	}
	c.provider.Store(p)
	return nil
}

func (c *Client) fetchProvider(ctx context.Context) (*provider, error) {
	found, err := oidc.NewProvider(oidc.ClientContext(ctx, c.http), c.cfg.Issuer)
	var mismatch *oidc.IssuerMismatchError
	var network *url.Error
	switch {
	case errors.As(err, &mismatch):
		return nil, refuse(CodeIssuerMismatch, "discovery names "+Clip(mismatch.Discovered), nil)
	case errors.As(err, &network):
		return nil, unreachable("discovery", err)
	case err != nil:
		// An error status, or no such document; both may be a restart.
		return nil, unreachable("discovery", errors.New(Clip(err.Error())))
	}
	var m metadata
	if err := found.Claims(&m); err != nil {
		return nil, refuse(CodeBadDiscovery, "", err)
	}
	endpoint := found.Endpoint()
	if err := c.checkEndpoints(endpoint.AuthURL, endpoint.TokenURL, m.JWKSURI); err != nil {
		return nil, err
	}
	if u := found.UserInfoEndpoint(); u != "" {
		if err := c.checkEndpoints(u); err != nil {
			return nil, err
		}
	}
	return &provider{
		oauth: oauth2.Config{
			ClientID:    c.cfg.ClientID,
			RedirectURL: c.cfg.RedirectURL,
			Scopes:      append([]string{oidc.ScopeOpenID}, c.cfg.Scopes...),
			Endpoint:    oauth2.Endpoint{AuthURL: endpoint.AuthURL, TokenURL: endpoint.TokenURL},
		},
		metadata: m,
		userinfo: found.UserInfoEndpoint(),
		algs:     allowedAlgs(m.Algorithms),
		keys:     newKeySet(m.JWKSURI, c.http, c.cfg.Now),
	}, nil
}

// authStyle picks the one way to show the client secret. Left alone, x/oauth2
// tries both, and a provider burns the code at the first.
func authStyle(secret string, methods []string) oauth2.AuthStyle {
	if secret == "" {
		return oauth2.AuthStyleInParams
	}
	post := false
	for _, m := range methods {
		switch m {
		case "client_secret_basic":
			return oauth2.AuthStyleInHeader
		case "client_secret_post":
			post = true
		}
	}
	if post {
		return oauth2.AuthStyleInParams
	}
	return oauth2.AuthStyleInHeader // the default of OpenID Connect Discovery 1.0, section 3
}

// checkEndpoints wants https everywhere, and http only on loopback by an issuer
// that is there itself.
func (c *Client) checkEndpoints(endpoints ...string) error {
	issuer, err := url.Parse(c.cfg.Issuer)
	if err != nil {
		return refuse(CodeBadDiscovery, "", err)
	}
	for _, e := range endpoints {
		u, err := url.Parse(e)
		switch {
		case err != nil || u.Host == "" || u.User != nil || u.Fragment != "":
			return refuse(CodeBadDiscovery, "missing or bad endpoint", nil)
		case u.Scheme == "https":
		case u.Scheme == "http" && issuer.Scheme == "http" && isLoopback(u.Hostname()):
		default:
			return refuse(CodeBadDiscovery, "endpoint without https", nil)
		}
	}
	return nil
}

package login

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"runtime"
	"time"

	"github.com/pkg/browser"

	"sallyport"
	wire "sallyport/proto/login"
	"sallyport/proto/proof"
)

// DefaultTimeout is how long a login waits for the person, and the longest that
// the callback's listener is ever open.
const DefaultTimeout = 5 * time.Minute

// Options say how to ask the person.
type Options struct {
	// Show gets the URL to visit, always, before a browser is opened, and the
	// fingerprint of the device key, which the page of a new device asks the person
	// to compare. This field is required.
	Show func(url, fingerprint string)
	// Browser opens the URL; nil opens none.
	Browser func(url string) error
	// Extend prolongs this session: same ids, same user, later end.
	Extend sallyport.SessionID
	// Timeout of the wait for the person; 0 is DefaultTimeout, which is also the
	// longest.
	Timeout time.Duration
}

// OpenBrowser opens the system's browser. It blocks until the browser's command
// ends and keeps its chatter away from the terminal.
func OpenBrowser(url string) error {
	browser.Stdout, browser.Stderr = io.Discard, io.Discard
	return browser.OpenURL(url)
}

// Login runs one login (DESIGN section 4, steps 1 to 3).
func (c *Client) Login(ctx context.Context, o Options) (*Session, error) {
	if _, err := c.Metadata(ctx); err != nil {
		return nil, err
	}
	state, verifier := sallyport.NewSecret(), sallyport.NewSecret()
	cb, err := listen(state, c.base.String())
	if err != nil {
		return nil, err
	}
	code, err := c.ask(ctx, cb, state, verifier, o)
	if err != nil {
		return nil, err
	}
	return c.redeem(ctx, code, verifier, cb.URL())
}

// ask sends the person to authd and returns the code.
func (c *Client) ask(ctx context.Context, cb *callback, state, verifier string, o Options) (string, error) {
	timeout := o.Timeout
	if timeout <= 0 || timeout > DefaultTimeout {
		timeout = DefaultTimeout
	}
	late := &sallyport.Error{
		Outcome: sallyport.OutcomeLogin, Code: "login.timeout",
		Message: fmt.Sprintf("nobody finished the login within %s", timeout), Hint: "run: agent login",
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, late)
	defer cancel()
	visit := c.authorizeURL(cb.URL(), state, verifier, o.Extend)
	o.Show(visit, proof.Fingerprint(c.key.Thumbprint))
	if o.Browser != nil {
		go o.Browser(visit) // it may run as long as the browser does; the URL is on the screen anyway
	}
	query, err := cb.wait(ctx)
	if err != nil {
		return "", err
	}
	if query.Has("error") {
		return "", callbackError(query)
	}
	return query.Get("code"), nil
}

func (c *Client) authorizeURL(redirect, state, verifier string, extend sallyport.SessionID) string {
	sum := sha256.Sum256([]byte(verifier))
	q := url.Values{
		"response_type":         {"code"},
		"client_id":             {"agent"},
		"redirect_uri":          {redirect},
		"state":                 {state},
		"code_challenge":        {base64.RawURLEncoding.EncodeToString(sum[:])},
		"code_challenge_method": {"S256"},
		wire.ParamDPoPJKT:       {c.key.Thumbprint},
		wire.ParamDevice:        {string(c.key.ID)},
		wire.ParamDeviceOS:      {runtime.GOOS},
	}
	if name, err := os.Hostname(); err == nil {
		q.Set(wire.ParamDeviceName, name)
	}
	if extend != "" {
		q.Set(wire.ParamExtend, string(extend))
	}
	u := c.base.JoinPath(wire.PathAuthorize) // built from what the person configured, never from an answer (R9)
	u.RawQuery = q.Encode()
	return u.String()
}

// stableCode is the form of the codes that authd sends as error_description.
var stableCode = regexp.MustCompile(`^[a-z][a-z0-9_]*(\.[a-z0-9_]+)+$`)

// callbackError maps the error that authd put into the redirect (RFC 6749,
// section 4.1.2.1). Only the stable code is taken from it, never a text.
func callbackError(query url.Values) error {
	e := &sallyport.Error{
		Outcome: sallyport.OutcomeLogin, Code: "login.refused",
		Message: "the login was refused", Hint: "run: agent login",
	}
	switch query.Get("error") {
	case "access_denied":
		e.Code, e.Message = "login.access_denied", "the login was not allowed"
		e.Hint = "if you did not refuse it yourself, ask your administrator"
	case "temporarily_unavailable", "server_error":
		e.Code, e.Message = "login.unavailable", "the login service or the identity provider failed"
		e.Hint = "try again in a minute"
	}
	if code := query.Get("error_description"); len(code) <= 64 && stableCode.MatchString(code) {
		e.Code = code
		e.Message += " (" + code + ")"
	}
	return e
}

// redeem turns the code into a session.
func (c *Client) redeem(ctx context.Context, code, verifier, redirect string) (*Session, error) {
	fresh, err := newSessionKey()
	if err != nil {
		return nil, err
	}
	jws, err := c.proof(ctx, "token", "", fresh.csr)
	if err != nil {
		return nil, err
	}
	req := wire.TokenRequest{
		Code: code, CodeVerifier: verifier, RedirectURI: redirect,
		CSR: fresh.csr, Proof: jws, KeyProtection: c.key.Protection,
	}
	var g wire.Grant
	if err := c.call(ctx, http.MethodPost, wire.PathToken, req, &g); err != nil {
		return nil, err
	}
	return fresh.session(g)
}

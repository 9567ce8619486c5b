// Package login is the agent's side of proto/login: it sends the person's
// browser to authd, waits for the code on a loopback listener, and redeems it,
// with a proof by the device key, for the certificate of a fresh session key.
// It also renews and ends sessions. It keeps nothing on disk and decides nothing
// about who may log in; authd does.
package login

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"sallyport"
	"sallyport/agent/keys"
	"sallyport/internal/localhost"
	"sallyport/proto/connect"
	wire "sallyport/proto/login"
	"sallyport/proto/proof"
)

const (
	maxAnswer      = 1 << 20 // bytes of a JSON answer
	requestTimeout = 20 * time.Second
)

// Client speaks to one authd.
type Client struct {
	base *url.URL
	http *http.Client
	key  *keys.Key
}

// ParseURL reads authd's address as people type it: a host name gets https://,
// anything but https is refused (OutcomeUsage), a path, query or user is too.
func ParseURL(s string) (*url.URL, error) {
	if !strings.Contains(s, "://") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	wrong := ""
	switch {
	case err != nil || u.Hostname() == "":
		wrong = "is no URL"
	case u.Scheme != "https":
		wrong = "must start with https://"
	case u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "":
		wrong = "must be only a host and a port"
	}
	if wrong != "" {
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeUsage, Code: "usage.authd_url",
			Message: fmt.Sprintf("the login address %.200q %s", s, wrong), Hint: "for example: agent login https://auth.corp.example",
		}
	}
	return &url.URL{Scheme: "https", Host: strings.ToLower(u.Host)}, nil
}

// NewClient returns a client of the authd at base. ca is a PEM bundle that signs
// its certificate; empty means the system's roots. key signs the proofs.
func NewClient(base *url.URL, ca string, key *keys.Key) (*Client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM([]byte(ca)) {
			return nil, &sallyport.Error{
				Outcome: sallyport.OutcomeUsage, Code: "usage.ca_file",
				Message: "the CA file holds no PEM certificate",
			}
		}
	}
	transport := &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: localhost.Dial(&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}), TLSClientConfig: conf, ForceAttemptHTTP2: true,
		TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: requestTimeout,
		MaxIdleConns: 2, IdleConnTimeout: 30 * time.Second, MaxResponseHeaderBytes: 64 << 10,
	}
	return &Client{base: base, key: key, http: &http.Client{
		Transport: transport, Timeout: requestTimeout,
		// authd answers itself or not at all; a redirect elsewhere would carry
		// the code and the proof with it.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Metadata asks authd who it is, and refuses one that says it is another.
func (c *Client) Metadata(ctx context.Context) (wire.Metadata, error) {
	var m wire.Metadata
	if err := c.call(ctx, http.MethodGet, wire.PathMetadata, nil, &m); err != nil {
		return m, err
	}
	if strings.TrimSuffix(m.Issuer, "/") != c.base.String() {
		return m, &sallyport.Error{
			Outcome: sallyport.OutcomeLogin, Code: "login.issuer_mismatch",
			Message: fmt.Sprintf("%s says that it is %.200q", c.base, m.Issuer),
			Hint:    "ask your administrator for the login address, authd's public_url",
		}
	}
	return m, nil
}

// Renew gets the next certificate of a live session. An ended session is an
// *sallyport.Error of OutcomeLogin. Where authd names no gateways, because the
// configuration is gone for the moment, those that are known stay.
func (c *Client) Renew(ctx context.Context, session sallyport.SessionID, known []sallyport.GatewayInfo) (*Session, error) {
	fresh, err := newSessionKey()
	if err != nil {
		return nil, err
	}
	jws, err := c.proof(ctx, "renew", session, fresh.csr)
	if err != nil {
		return nil, err
	}
	var g wire.Grant
	if err := c.call(ctx, http.MethodPost, wire.PathRenew, wire.RenewRequest{Session: session, CSR: fresh.csr, Proof: jws}, &g); err != nil {
		return nil, err
	}
	if g.Session != session {
		return nil, badAnswer("another session than the one to renew", nil)
	}
	if len(g.Gateways) == 0 {
		g.Gateways = known
	}
	return fresh.session(g)
}

// Logout ends the session at authd. One that is over already is no error.
func (c *Client) Logout(ctx context.Context, session sallyport.SessionID) error {
	jws, err := c.proof(ctx, "logout", session, nil)
	if err == nil {
		err = c.call(ctx, http.MethodPost, wire.PathLogout, wire.LogoutRequest{Session: session, Proof: jws}, nil)
	}
	if sallyport.OutcomeOf(err) == sallyport.OutcomeLogin {
		return nil
	}
	return err
}

// proof signs what the next request wants, over a nonce fetched for it.
func (c *Client) proof(ctx context.Context, action string, session sallyport.SessionID, csr []byte) (string, error) {
	var n wire.Nonce
	if err := c.call(ctx, http.MethodPost, wire.PathNonce, struct{}{}, &n); err != nil {
		return "", err
	}
	p := proof.Login{Nonce: n.Nonce, Audience: c.base.String(), Action: action, Session: session, CSRHash: hashOf(csr)}
	jws, err := proof.Sign(c.key, proof.TypeLogin, p)
	if err != nil {
		return "", fmt.Errorf("sign %s proof: %w", action, err)
	}
	return jws, nil
}

// call sends in as JSON and decodes the answer into out; either may be nil.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode %s: %w", path, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base.JoinPath(path).String(), body)
	if err != nil {
		return fmt.Errorf("request %s: %w", path, err)
	}
	req.Header.Set("Accept", "application/json, "+connect.ContentProblem)
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.unreachable(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return refusal(resp)
	}
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out); err != nil {
		return badAnswer("no JSON that this version reads", err)
	}
	return nil
}

// refusal turns authd's problem document into an error. What authd refuses with
// 400 or 401 is a login that did not happen (SECURITY-CASES, LR).
func refusal(resp *http.Response) error {
	e := connect.ReadRefusal(resp)
	switch resp.StatusCode {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusGone:
		e.Outcome = sallyport.OutcomeLogin
	case http.StatusTooManyRequests:
		e.Outcome = sallyport.OutcomeUnavailable
	}
	return e
}

// unreachable sorts what can be wrong with the way to authd: a certificate that
// is not to be trusted (E2), or nobody there.
func (c *Client) unreachable(err error) error {
	if ctxErr := contextError(err); ctxErr != nil {
		return ctxErr
	}
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	var verify *tls.CertificateVerificationError
	if errors.As(err, &verify) || errors.As(err, &unknown) || errors.As(err, &host) || errors.As(err, &invalid) {
		return &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable, Code: "tls.server_untrusted",
			Message: "the certificate of " + c.base.Host + " is not to be trusted",
			Hint:    "if your company signs it itself: agent login " + c.base.String() + " --ca FILE", Err: err,
		}
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable, Code: CodeUnreachable,
		Message: "cannot reach the login service at " + c.base.Host + ": " + inWords(err), Hint: "check the network, then try again", Err: err,
	}
}

// CodeUnreachable is the code of the error for an authd that nobody has reached.
const CodeUnreachable = "authd.unreachable"

func inWords(err error) string {
	var dns *net.DNSError
	var timeout interface{ Timeout() bool }
	switch {
	case errors.As(err, &dns):
		return "its name does not resolve"
	case errors.As(err, &timeout) && timeout.Timeout():
		return "no answer"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "nobody listens there"
	}
	return "the connection failed"
}

func contextError(err error) error {
	if errors.Is(err, context.Canceled) {
		return context.Canceled
	}
	return nil
}

func badAnswer(what string, err error) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable, Code: "authd.bad_answer",
		Message: "the login service answered with " + what, Err: err,
	}
}

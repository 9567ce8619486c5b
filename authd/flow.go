package authd

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"

	"sallyport"
	"sallyport/authd/internal/page"
	"sallyport/internal/oidcrp"
	"sallyport/proto/login"
	"sallyport/proto/proof"
)

// agentRequest is what an agent asked for in /authorize. It travels through
// state, consent and code, so that all three are bound to the same device key,
// verifier and listener.
type agentRequest struct {
	RedirectURI string              `json:"redirect_uri"`
	State       string              `json:"state"`
	Challenge   string              `json:"challenge"`
	Thumbprint  string              `json:"thumbprint"` // dpop_jkt
	Device      sallyport.DeviceID  `json:"device,omitempty"`
	DeviceName  string              `json:"device_name,omitempty"`
	DeviceOS    string              `json:"device_os,omitempty"`
	Extend      sallyport.SessionID `json:"extend,omitempty"`
}

// browserBinding ties a login to the browser it began in.
type browserBinding struct {
	Cookie string `json:"cookie"` // its name
	Hash   []byte `json:"hash"`   // SHA-256 of its value
}

// pendingState waits for the identity provider's redirect.
type pendingState struct {
	Agent   agentRequest   `json:"agent"`
	OIDC    oidcrp.Flow    `json:"oidc"`
	Browser browserBinding `json:"browser"`
}

// pendingConsent waits for the person's answer about a new device key.
type pendingConsent struct {
	Agent   agentRequest    `json:"agent"`
	Person  oidcrp.Identity `json:"person"`
	Browser browserBinding  `json:"browser"`
}

// pendingCode waits for the agent.
type pendingCode struct {
	Agent  agentRequest    `json:"agent"`
	Person oidcrp.Identity `json:"person"`
	// Address is the browser's, for the operator's list of sessions.
	Address string `json:"address"`
}

// Bounds of parameters.
const (
	maxRedirect   = 256
	maxStateLen   = 512
	maxDeviceName = 64
	hashLen       = 43 // of a SHA-256 in base64url
)

// authorize begins a login: the agent's request is kept, the browser goes on to
// the identity provider.
func (s *Server) authorize(c *call) error {
	q, err := single(c.r)
	if err != nil {
		return err
	}
	req, err := parseAgentRequest(q)
	if err != nil {
		return refusal("login.bad_request", "the agent's request is not understood", err)
	}
	flow, target, err := s.rp.Begin(c.ctx())
	if err != nil {
		return err
	}
	secret := sallyport.NewSecret()
	browser := bind(flow.State, secret)
	if err := s.vault.keepAs(c.ctx(), forState, flow.State, stateLife, pendingState{req, flow, browser}); err != nil {
		return err
	}
	setCookie(c.w, browser.Cookie, secret, stateLife+consentLife)
	redirect(c.w, http.StatusFound, target)
	return nil
}

func parseAgentRequest(q url.Values) (agentRequest, error) {
	req := agentRequest{
		RedirectURI: q.Get("redirect_uri"),
		State:       q.Get("state"),
		Challenge:   q.Get("code_challenge"),
		Thumbprint:  q.Get(login.ParamDPoPJKT),
		Device:      sallyport.DeviceID(q.Get(login.ParamDevice)),
		DeviceName:  claimed(q.Get(login.ParamDeviceName)),
		DeviceOS:    claimed(q.Get(login.ParamDeviceOS)),
		Extend:      sallyport.SessionID(q.Get(login.ParamExtend)),
	}
	switch {
	case q.Get("response_type") != "code":
		return req, errors.New("response_type is not code")
	case q.Get("client_id") != "agent":
		return req, errors.New("unknown client_id")
	case !loopbackRedirect(req.RedirectURI):
		return req, errors.New("redirect_uri is not http://127.0.0.1:port/… or http://[::1]:port/…")
	case req.State == "" || len(req.State) > maxStateLen:
		return req, errors.New("bad state")
	case q.Get("code_challenge_method") != "S256" || !isHash(req.Challenge):
		return req, errors.New("PKCE with S256 is required")
	case !isHash(req.Thumbprint):
		return req, errors.New("dpop_jkt is no thumbprint")
	case len(req.Device) > 64 || len(req.Extend) > 64:
		return req, errors.New("bad id")
	}
	return req, nil
}

// loopbackRedirect accepts the agent's listener only: a literal loopback address
// (RFC 8252, section 8.3: never "localhost"), a port, a path, in one spelling.
func loopbackRedirect(raw string) bool {
	u, err := url.Parse(raw)
	if err != nil || len(raw) > maxRedirect || u.Scheme != "http" || !strings.HasPrefix(u.Path, "/") {
		return false
	}
	port, err := strconv.ParseUint(u.Port(), 10, 16)
	if err != nil || port == 0 {
		return false
	}
	host := u.Hostname()
	if host == "::1" {
		host = "[::1]"
	} else if host != "127.0.0.1" {
		return false
	}
	return raw == "http://"+host+":"+strconv.FormatUint(port, 10)+u.Path
}

func isHash(s string) bool {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	return err == nil && len(b) == sha256.Size && len(s) == hashLen
}

// claimed makes what an agent says of its machine fit to be shown.
func claimed(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, s)
	if r := []rune(s); len(r) > maxDeviceName {
		s = string(r[:maxDeviceName])
	}
	return strings.TrimSpace(s)
}

// bind names a flow's cookie after its state, so that several logins of one
// browser do not disturb each other.
func bind(state, secret string) browserBinding {
	sum := sha256.Sum256([]byte(secret))
	id := recordID(forState, state)
	return browserBinding{Cookie: "__Host-sallyport-" + id[len(id)-16:], Hash: sum[:]}
}

// holds reports whether the request comes from the browser that began the flow.
func (b browserBinding) holds(r *http.Request) bool {
	cookie, err := r.Cookie(b.Cookie)
	if err != nil {
		return false
	}
	sum := sha256.Sum256([]byte(cookie.Value))
	return subtle.ConstantTimeCompare(sum[:], b.Hash) == 1
}

// setCookie sets a cookie that only this origin sees. Lax, not Strict: the
// identity provider's redirect must bring it along.
func setCookie(w http.ResponseWriter, name, value string, life time.Duration) {
	http.SetCookie(w, &http.Cookie{
		Name: name, Value: value, Path: "/", MaxAge: int(life / time.Second),
		Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode,
	})
}

// redirect has no body: http.Redirect's would repeat the target.
func redirect(w http.ResponseWriter, status int, target string) {
	w.Header().Set("Location", target)
	w.WriteHeader(status)
}

// callback takes the browser back from the identity provider.
func (s *Server) callback(c *call) error {
	q, err := single(c.r)
	if err != nil {
		return err
	}
	var pending pendingState
	consume, err := s.vault.look(c.ctx(), forState, q.Get("state"), &pending)
	if errors.Is(err, sallyport.ErrNotFound) {
		return errStateGone(err)
	}
	if err != nil {
		return err
	}
	if !pending.Browser.holds(c.r) {
		return refusal("login.state_mismatch", "this login did not begin in this browser, or took too long", nil)
	}
	if _, err := s.deps.Records.Apply(c.ctx(), []sallyport.Op{consume}); errors.Is(err, sallyport.ErrConflict) {
		return errStateGone(err)
	} else if err != nil {
		return err
	}
	c.back = &pending.Agent
	if q.Has("error") {
		said := errors.New(oidcrp.Clip(q.Get("error") + ": " + q.Get("error_description")))
		return refusal("login.idp_error", "the identity provider did not log you in", said)
	}
	if q.Get("code") == "" {
		return refusal("login.idp_error", "the identity provider sent no code", nil)
	}
	person, err := s.rp.Finish(c.ctx(), pending.OIDC, oidcrp.Callback{Code: q.Get("code"), Issuer: q.Get("iss")})
	if err != nil {
		return err
	}
	if person.Late {
		s.log.Warn("id token had expired, within the leeway", "request_id", c.id)
	}
	c.user = sallyport.UserID(person.Subject)
	return s.welcome(c, pending, person)
}

func errStateGone(err error) error {
	return refusal(codeStateGone, "this login is over: it was finished, or took longer than ten minutes", err)
}

// welcome decides whether the person must be asked about the device key first.
func (s *Server) welcome(c *call, pending pendingState, person oidcrp.Identity) error {
	if _, _, err := s.admit(c.ctx(), person); err != nil {
		return err
	}
	known, err := s.confirmed(c.ctx(), pending.Agent, sallyport.UserID(person.Subject))
	if err != nil {
		return err
	}
	if known {
		return s.sendCode(c, http.StatusFound, pending.Agent, person, pending.Browser)
	}
	id, err := s.vault.keep(c.ctx(), forConsent, consentLife, pendingConsent{pending.Agent, person, pending.Browser})
	if err != nil {
		return err
	}
	s.askConsent(c, id, pending.Agent, person)
	return nil
}

// confirmed reports whether the user has confirmed this device key before. The
// agent names the device; the key counts.
func (s *Server) confirmed(ctx ctx, agent agentRequest, user sallyport.UserID) (bool, error) {
	if agent.Device == "" {
		return false, nil
	}
	device, _, err := get[sallyport.Device](ctx, s.deps.Records, sallyport.KindDevice, string(agent.Device))
	if errors.Is(err, sallyport.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	key, err := parseDeviceKey(device.PublicKey)
	if err != nil {
		return false, err
	}
	if key.Thumbprint != agent.Thumbprint {
		return false, nil
	}
	if device.Revoked {
		return false, errDeviceRevoked()
	}
	_, ok := device.Users[user]
	return ok, nil
}

// askConsent shows what is about to log in. Everything on the page that the
// agent claimed is marked as claimed.
func (s *Server) askConsent(c *call, id string, agent agentRequest, person oidcrp.Identity) {
	name := agent.DeviceName
	if name == "" {
		name = "(no name)"
	}
	if agent.DeviceOS != "" {
		name += " · " + agent.DeviceOS
	}
	address := hostOf(c.r.RemoteAddr)
	page.Secure(c.w.Header(), formTarget(agent.RedirectURI))
	s.show(c, http.StatusOK, page.Page{
		Title: "Is this your computer?",
		Lead:  "A device that you have not used before wants to log in as you. Allow it only if you just ran agent login there and the fingerprints match.",
		Facts: []page.Fact{
			{Name: "You", Value: nameOf(person)},
			{Name: "Device, as it calls itself", Value: name},
			{Name: "Fingerprint of its key", Value: proof.Fingerprint(agent.Thumbprint), Code: true},
			{Name: "Your address", Value: address, Code: true},
		},
		Form: &page.Form{
			Action: login.PathConsent,
			Hidden: []page.Field{{Name: "consent", Value: id}},
			Buttons: []page.Button{
				{Label: "Allow", Name: "answer", Value: "allow", Primary: true},
				{Label: "Cancel", Name: "answer", Value: "deny"},
			},
		},
		Note: "agent login prints the same fingerprint.",
	})
}

// formTarget is the CSP source of the agent's listener, to which the form's
// answer redirects. CSP has no source for [::1].
func formTarget(redirectURI string) string {
	u, err := url.Parse(redirectURI)
	if err != nil || u.Hostname() != "127.0.0.1" {
		return "http:"
	}
	return page.OriginOf(u)
}

func nameOf(p oidcrp.Identity) string {
	switch {
	case p.Email != "" && p.Name != "":
		return p.Name + " (" + p.Email + ")"
	case p.Email != "":
		return p.Email
	case p.Name != "":
		return p.Name + " (" + p.Subject + ")"
	}
	return p.Subject
}

// consent takes the person's answer. It counts only from authd's own page, in the
// browser of the flow, once.
func (s *Server) consent(c *call) error {
	if !page.SameOrigin(c.r, s.origin()) {
		return refusal(codeCrossSite, "this form was sent by another site; nothing was done", nil)
	}
	if err := c.r.ParseForm(); err != nil || len(c.r.PostForm["consent"]) != 1 || len(c.r.PostForm["answer"]) != 1 {
		return badRequest(err)
	}
	id := c.r.PostForm.Get("consent")
	var pending pendingConsent
	_, err := s.vault.look(c.ctx(), forConsent, id, &pending)
	if errors.Is(err, sallyport.ErrNotFound) {
		return errStateGone(err)
	}
	if err != nil {
		return err
	}
	if !pending.Browser.holds(c.r) {
		return refusal("login.state_mismatch", "this login did not begin in this browser, or took too long", nil)
	}
	if err := s.vault.take(c.ctx(), forConsent, id, &pending); errors.Is(err, sallyport.ErrNotFound) {
		return errStateGone(err)
	} else if err != nil {
		return err
	}
	c.user = sallyport.UserID(pending.Person.Subject)
	if c.r.PostForm.Get("answer") != "allow" {
		e := refusal("login.denied", "the device was not allowed", nil)
		s.recordFailure(c, e)
		redirect(c.w, http.StatusSeeOther, pending.Agent.failed(s.public, e))
		return nil
	}
	c.back = &pending.Agent
	return s.sendCode(c, http.StatusSeeOther, pending.Agent, pending.Person, pending.Browser)
}

// sendCode ends the browser's way: on to the agent's listener, with a code.
func (s *Server) sendCode(c *call, status int, agent agentRequest, person oidcrp.Identity, browser browserBinding) error {
	code, err := s.vault.keep(c.ctx(), forCode, codeLife, pendingCode{agent, person, hostOf(c.r.RemoteAddr)})
	if err != nil {
		return err
	}
	setCookie(c.w, browser.Cookie, "", -time.Second)
	redirect(c.w, status, agent.succeeded(s.public, code))
	return nil
}

// succeeded is where the browser goes with a code (RFC 6749, section 4.1.2; iss:
// RFC 9207).
func (a agentRequest) succeeded(issuer, code string) string {
	return a.RedirectURI + "?" + url.Values{"code": {code}, "state": {a.State}, "iss": {issuer}}.Encode()
}

// failed is where the browser goes without one (section 4.1.2.1).
func (a agentRequest) failed(issuer string, e *sallyport.Error) string {
	kind := "access_denied"
	switch e.Outcome {
	case sallyport.OutcomeUnavailable:
		kind = "temporarily_unavailable"
	case sallyport.OutcomeInternal:
		kind = "server_error"
	}
	return a.RedirectURI + "?" + url.Values{"error": {kind}, "error_description": {e.Code}, "state": {a.State}, "iss": {issuer}}.Encode()
}

func parseDeviceKey(der []byte) (proof.Key, error) {
	pub, err := parsePKIX(der)
	if err != nil {
		return proof.Key{}, err
	}
	return proof.KeyOf(pub)
}

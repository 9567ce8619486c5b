package authd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"time"

	"sallyport"
	"sallyport/authd/internal/page"
	"sallyport/internal/oidcrp"
	"sallyport/internal/ratelimit"
	"sallyport/proto/connect"
	"sallyport/proto/login"
)

// Bounds on requests.
const (
	maxBody        = 64 << 10
	requestTimeout = 30 * time.Second // longer than the identity provider's three answers may take
)

// Limits per address. People log in seldom; a company's agents share an address
// and renew together after an outage.
const (
	browserBurst, browserEvery = 60, 200 * time.Millisecond
	agentBurst, agentEvery     = 600, 20 * time.Millisecond
	totalBurst, totalEvery     = 2000, 5 * time.Millisecond
)

type limits struct{ browser, agent, total ratelimit.Limiter }

func newLimits(now func() time.Time) *limits {
	return &limits{
		browser: ratelimit.Limiter{Burst: browserBurst, Every: browserEvery, Now: now},
		agent:   ratelimit.Limiter{Burst: agentBurst, Every: agentEvery, Now: now},
		total:   ratelimit.Limiter{Burst: totalBurst, Every: totalEvery, Now: now},
	}
}

// call is one request being served.
type call struct {
	w  http.ResponseWriter
	r  *http.Request
	id string // request id, for people and audit
	// what is known of the person and the flow by now, for the audit record and
	// the page of a failure
	user    sallyport.UserID
	session sallyport.SessionID
	device  sallyport.DeviceID
	back    *agentRequest // set once the flow is proved to be this browser's
}

func (c *call) ctx() context.Context { return c.r.Context() }

// refusal is a failure with everything that is done about it. Outcome decides
// the status: OutcomeLogin is 400, what LR(code) of the security cases says.
func refusal(code, message string, err error) *sallyport.Error {
	return &sallyport.Error{Outcome: sallyport.OutcomeLogin, Code: code, Message: message, Err: err}
}

// Codes with a status of their own.
const (
	codeUnavailable = "login.unavailable"
	codeInternal    = "internal"
	codeCrossSite   = "login.cross_site"
	codeStateGone   = "login.state_unknown"
)

func statusOf(e *sallyport.Error) int {
	switch e.Code {
	case connect.ProblemLogin:
		return http.StatusUnauthorized
	case connect.ProblemRateLimited:
		return http.StatusTooManyRequests
	case codeCrossSite:
		return http.StatusForbidden
	}
	if e.Outcome == sallyport.OutcomeLogin {
		return http.StatusBadRequest
	}
	return e.Outcome.HTTPStatus()
}

// asRefusal turns any error into one that can be shown. Errors of the store and
// of an unreachable identity provider are "try later", not "refused".
func asRefusal(err error) *sallyport.Error {
	var e *sallyport.Error
	if errors.As(err, &e) {
		return e
	}
	message := "login is not possible right now"
	var oe *oidcrp.Error
	switch {
	case !errors.As(err, &oe):
	case oe.Code == oidcrp.CodeUnavailable:
		message = "login is not possible right now: the identity provider does not answer"
	default:
		return refusal(oe.Code, "the identity provider's answer was refused", err)
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable, Code: codeUnavailable,
		Message: message, Hint: "try again in a moment", Err: err,
	}
}

// secured sets the headers of every answer, and bounds what a request may bring
// and how long it may take.
func (s *Server) secured(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		page.Secure(w.Header(), "")
		w.Header().Set("Strict-Transport-Security", "max-age=31536000")
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// inBrowser serves a page: failures become pages.
func (s *Server) inBrowser(serve func(*call) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c := &call{w: w, r: r, id: sallyport.NewID("r")}
		if !s.limits.browser.Allow(ratelimit.Key(r.RemoteAddr)) || !s.limits.total.Allow("") {
			s.showFailure(c, errTooMany())
			return
		}
		if err := serve(c); err != nil {
			e := asRefusal(err)
			s.recordFailure(c, e)
			s.showFailure(c, e)
		}
	}
}

// forAgent serves JSON: failures become problem documents.
func (s *Server) forAgent(serve func(*call) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c := &call{w: w, r: r, id: sallyport.NewID("r")}
		if !s.limits.agent.Allow(ratelimit.Key(r.RemoteAddr)) || !s.limits.total.Allow("") {
			s.writeProblem(c, errTooMany())
			return
		}
		if err := serve(c); err != nil {
			e := asRefusal(err)
			s.recordFailure(c, e)
			s.writeProblem(c, e)
		}
	}
}

func errTooMany() *sallyport.Error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable, Code: connect.ProblemRateLimited,
		Message: "too many requests from this address", Hint: "wait a few seconds, then try again",
	}
}

// recordFailure writes what people are not shown. The detail may hold words of the
// identity provider: they go into the audit record, which is not a log to grep
// through with a terminal.
func (s *Server) recordFailure(c *call, e *sallyport.Error) {
	detail := ""
	if e.Err != nil {
		detail = oidcrp.Clip(e.Err.Error())
	}
	s.log.Info("login refused", "code", e.Code, "request_id", c.id, "peer", c.r.RemoteAddr)
	// The context of a request that its client gave up is over; its record is not.
	err := s.deps.Audit.Append(context.WithoutCancel(c.ctx()), sallyport.AuditRecord{
		Type: sallyport.AuditLoginFailed, Time: s.now(), Peer: c.r.RemoteAddr, RequestID: c.id,
		Code: e.Code, Detail: detail, User: c.user, Session: c.session, Device: c.device,
	})
	if err != nil {
		s.log.Error("audit record lost", "type", sallyport.AuditLoginFailed, "request_id", c.id, "error", err)
	}
}

func (s *Server) writeProblem(c *call, e *sallyport.Error) {
	p := connect.Problem{Status: statusOf(e), Code: e.Code, Detail: e.Message, Hint: e.Hint, RequestID: c.id}
	if p.Status == http.StatusServiceUnavailable || p.Status == http.StatusTooManyRequests {
		p.RetryAfter = time.Second
	}
	connect.WriteProblem(c.w, p)
}

// showFailure says on a page what the code is, and nothing that came from
// outside. If the flow is this browser's, the browser goes on to the agent a
// little later, so that the person reads both.
func (s *Server) showFailure(c *call, e *sallyport.Error) {
	status := statusOf(e)
	if status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests {
		c.w.Header().Set("Retry-After", "1")
	}
	if c.back != nil {
		c.w.Header().Set("Refresh", "4; url="+c.back.failed(s.public, e))
	}
	hint := e.Hint
	if hint == "" {
		hint = "Start again with agent login. If it keeps failing, give your administrator the request id."
	}
	s.show(c, status, page.Page{
		Title: "You are not logged in", Tone: "bad", Lead: sentence(e.Message),
		Facts: []page.Fact{{Name: "Code", Value: e.Code, Code: true}, {Name: "Request id", Value: c.id, Code: true}},
		Note:  sentence(hint),
		Link:  &page.Link{Label: "How to log in", Path: "/"},
	})
}

func (s *Server) show(c *call, status int, p page.Page) {
	if err := page.Write(c.w, status, p); err != nil {
		s.log.Debug("page not written", "error", err)
	}
}

// readJSON reads the body into v. Another content type is refused, since forms of
// other sites can send only those.
func readJSON(c *call, v any) error {
	media, _, err := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	if err != nil || media != "application/json" {
		return badRequest(errors.New("content type is not application/json"))
	}
	d := json.NewDecoder(c.r.Body) // bounded by secured
	if err := d.Decode(v); err != nil {
		return badRequest(err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return badRequest(errors.New("more than one JSON value"))
	}
	return nil
}

func badRequest(err error) error {
	return refusal(connect.ProblemBadRequest, "the request is not understood", err)
}

func (s *Server) writeJSON(c *call, v any) {
	c.w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(c.w).Encode(v); err != nil {
		s.log.Debug("answer not written", "error", err)
	}
}

// single returns query parameters, each given once (RFC 6749, section 3.1).
func single(r *http.Request) (url.Values, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badRequest(err)
	}
	for name, values := range q {
		if len(values) > 1 {
			return nil, refusal("login.duplicate_parameter", "a parameter was given twice", fmt.Errorf("parameter %.40q", name))
		}
	}
	return q, nil
}

func (s *Server) metadata(w http.ResponseWriter, r *http.Request) {
	s.writeJSON(&call{w: w, r: r}, login.Metadata{Issuer: s.public, Domain: s.deps.Domain})
}

func (s *Server) home(c *call) error {
	s.show(c, http.StatusOK, page.Page{
		Title: "This is the way in", Lead: "Logins to " + s.deps.Domain + " begin on your own computer:",
		Facts: []page.Fact{{Name: "In a terminal", Value: "agent login " + s.public, Code: true}},
	})
	return nil
}

// sentence makes a message or hint one.
func sentence(s string) string {
	if s == "" {
		return ""
	}
	if last := s[len(s)-1]; last != '.' && last != '?' {
		s += "."
	}
	if s[0] >= 'a' && s[0] <= 'z' {
		s = string(s[0]-'a'+'A') + s[1:]
	}
	return s
}

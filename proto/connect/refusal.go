package connect

import (
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"sallyport"
)

// Codes of refusals (sallyport.Error's and Problem's Code). Others exist; these
// decide more than their outcome does.
const (
	ProblemBadRequest     = "bad_request"            // 400
	ProblemBadTarget      = "target.invalid"         // 400: no canonical form
	ProblemLogin          = "login_required"         // 401
	ProblemSessionRevoked = "session_revoked"        // 401
	ProblemDenied         = "denied"                 // 403
	ProblemPending        = "approval_pending"       // 403
	ProblemWithdrawn      = "flow_withdrawn"         // 403: allowed once, not any more
	ProblemProhibited     = "upstream.prohibited"    // 403: an address that is never dialled
	ProblemNotFound       = "target.unknown"         // 404
	ProblemMisdirected    = "misdirected"            // 421: another host's request
	ProblemRateLimited    = "rate_limited"           // 429
	ProblemTooMany        = "too_many"               // 429: carriers or flows of one session
	ProblemUnsupported    = "unsupported"            // 501
	ProblemRefused        = "upstream.refused"       // 502
	ProblemUnreachable    = "upstream.unreachable"   // 502
	ProblemDNS            = "upstream.dns"           // 502
	ProblemReset          = "upstream.reset"         // 502
	ProblemTLS            = "upstream.tls"           // 502
	ProblemTimeout        = "upstream.timeout"       // 504
	ProblemUnavailable    = "policy.unavailable"     // 503
	ProblemUntrusted      = "tls.server_untrusted"   // the agent's own: never on the wire
	ProblemGatewayDown    = "gateway.unreachable"    // the agent's own: never on the wire
	ProblemUnintelligible = "gateway.unintelligible" // the agent's own: an answer that is none of ours
)

// codeTable is what a code says beyond its outcome: status and proxy error type.
var codeTable = map[string]struct {
	status int
	proxy  string
}{
	ProblemBadRequest:  {http.StatusBadRequest, ProxyRequestError},
	ProblemBadTarget:   {http.StatusBadRequest, ProxyRequestError},
	ProblemProhibited:  {http.StatusForbidden, ProxyIPProhibited},
	ProblemMisdirected: {http.StatusMisdirectedRequest, ProxyRequestError},
	ProblemRateLimited: {http.StatusTooManyRequests, ProxyLimitReached},
	ProblemTooMany:     {http.StatusTooManyRequests, ProxyLimitReached},
	ProblemUnsupported: {http.StatusNotImplemented, ProxyRequestDenied},
	ProblemRefused:     {http.StatusBadGateway, ProxyRefused},
	ProblemUnreachable: {http.StatusBadGateway, ProxyUnavailable},
	ProblemDNS:         {http.StatusBadGateway, ProxyDNSError},
	ProblemReset:       {http.StatusBadGateway, ProxyTerminated},
	ProblemTLS:         {http.StatusBadGateway, ProxyCertificateError},
	ProblemTimeout:     {http.StatusGatewayTimeout, ProxyTimeout},
}

// maxProblem bounds the body that ReadProblem takes.
const maxProblem = 64 << 10

const typePrefix = "urn:sallyport:problem:"

// ProblemOf returns the document for e. Causes (e.Err) stay behind, and so does
// what Visible strips from the decision.
func ProblemOf(e *sallyport.Error) Problem {
	p := Problem{
		Type:   typePrefix + e.Code,
		Status: e.Outcome.HTTPStatus(),
		Detail: e.Message,
		Code:   e.Code,
		Hint:   e.Hint,
	}
	if c, ok := codeTable[e.Code]; ok {
		p.Status = c.status
	}
	p.Title = http.StatusText(p.Status)
	if e.Decision != nil {
		d := Visible(*e.Decision)
		p.DecisionID, p.Decision = d.ID, &d
	}
	if p.Status == http.StatusServiceUnavailable || p.Status == http.StatusTooManyRequests {
		p.RetryAfter = time.Second
	}
	return p
}

// ProxyError is the RFC 9209 type for p.
func (p Problem) ProxyError() string {
	if c, ok := codeTable[p.Code]; ok {
		return c.proxy
	}
	switch p.Status {
	case http.StatusUnauthorized, http.StatusForbidden:
		return ProxyRequestDenied
	case http.StatusNotFound:
		return ProxyNotFound
	case http.StatusServiceUnavailable:
		return ProxyInternalResponse
	case http.StatusBadGateway:
		return ProxyUnavailable
	case http.StatusGatewayTimeout:
		return ProxyTimeout
	}
	if p.Status >= 400 && p.Status < 500 {
		return ProxyRequestError
	}
	return ProxyInternalError
}

// Err returns p as the error it was made from, as far as the wire tells it.
func (p Problem) Err() *sallyport.Error {
	e := &sallyport.Error{Outcome: p.outcome(), Code: p.Code, Message: p.Detail, Hint: p.Hint, Decision: p.Decision}
	if e.Decision == nil && p.DecisionID != "" {
		e.Decision = &sallyport.Decision{ID: p.DecisionID}
	}
	return e
}

func (p Problem) outcome() sallyport.Outcome {
	switch p.Status {
	case http.StatusUnauthorized:
		return sallyport.OutcomeLogin
	case http.StatusForbidden:
		switch p.Code {
		case ProblemPending:
			return sallyport.OutcomePending
		case ProblemWithdrawn:
			return sallyport.OutcomeRevoked
		}
		return sallyport.OutcomeDenied
	case http.StatusBadRequest, http.StatusNotFound:
		return sallyport.OutcomeUsage
	case http.StatusBadGateway, http.StatusGatewayTimeout:
		return sallyport.OutcomeUpstream
	case http.StatusServiceUnavailable, http.StatusTooManyRequests, http.StatusMisdirectedRequest:
		return sallyport.OutcomeUnavailable
	}
	return sallyport.OutcomeInternal
}

// WriteRefusal answers with e: its status, Proxy-Status with details (curl shows
// no body of a refused CONNECT), Sallyport-Decision, Retry-After where waiting
// helps, and the problem document.
func WriteRefusal(w http.ResponseWriter, e *sallyport.Error) {
	p := ProblemOf(e)
	details := p.Detail
	if p.Hint != "" {
		details += "; hint: " + p.Hint
	}
	if p.DecisionID != "" {
		details += "; decision " + string(p.DecisionID)
	}
	w.Header().Set(HeaderProxyStatus, ProxyStatus{Error: p.ProxyError(), Details: details}.String())
	WriteProblem(w, p)
}

// WriteProblem answers with p's status and document, without a Proxy-Status: for
// servers that are no proxy (authd). Title and Type are filled in if empty.
func WriteProblem(w http.ResponseWriter, p Problem) {
	if p.Title == "" {
		p.Title = http.StatusText(p.Status)
	}
	if p.Type == "" {
		p.Type = typePrefix + p.Code
	}
	body, err := json.Marshal(p)
	if err != nil { // a decision with a value JSON cannot hold: the words still go out
		p.Decision = nil
		body, _ = json.Marshal(p)
	}
	h := w.Header()
	if p.DecisionID != "" {
		h.Set(HeaderDecision, string(p.DecisionID))
	}
	if p.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int((p.RetryAfter+time.Second-1)/time.Second)))
	}
	h.Set("Content-Type", ContentProblem)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(p.Status)
	w.Write(body) // the client is gone if this fails
}

// ReadRefusal reads the refusal in an answer that is no success, and leaves
// closing the body to the caller. It never fails: from an answer without a
// problem document it makes what status and Proxy-Status tell. Text is stripped of
// control characters, for it is printed on terminals.
func ReadRefusal(resp *http.Response) *sallyport.Error { return ReadProblem(resp).Err() }

// ReadProblem is ReadRefusal for callers that want the request id or Retry-After.
func ReadProblem(resp *http.Response) Problem {
	p, err := decodeProblem(resp)
	if err != nil {
		p = Problem{}
	}
	p.Status = resp.StatusCode
	p.Title = http.StatusText(p.Status)
	if p.DecisionID == "" {
		p.DecisionID = sallyport.DecisionID(resp.Header.Get(HeaderDecision))
	}
	if ps, ok := ParseProxyStatus(strings.Join(resp.Header.Values(HeaderProxyStatus), ", ")); ok && p.Detail == "" {
		p.Detail = ps.Details
	}
	if p.Code == "" {
		p.Code = codeForStatus(p.Status)
	}
	if p.Detail == "" {
		p.Detail = "the gateway answered " + strconv.Itoa(p.Status) + " " + p.Title
	}
	if n, err := strconv.ParseUint(resp.Header.Get("Retry-After"), 10, 16); err == nil {
		p.RetryAfter = time.Duration(n) * time.Second
	}
	return clean(p)
}

func decodeProblem(resp *http.Response) (p Problem, err error) {
	if mt, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || mt != ContentProblem || resp.Body == nil {
		return p, errors.New("no problem document")
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	if err != nil {
		return p, err
	}
	return p, json.Unmarshal(body, &p)
}

func codeForStatus(status int) string {
	switch status {
	case http.StatusBadRequest:
		return ProblemBadRequest
	case http.StatusUnauthorized:
		return ProblemLogin
	case http.StatusForbidden:
		return ProblemDenied
	case http.StatusNotFound:
		return ProblemNotFound
	case http.StatusMisdirectedRequest:
		return ProblemMisdirected
	case http.StatusTooManyRequests:
		return ProblemRateLimited
	case http.StatusNotImplemented:
		return ProblemUnsupported
	case http.StatusBadGateway:
		return ProblemUnreachable
	case http.StatusServiceUnavailable:
		return ProblemUnavailable
	case http.StatusGatewayTimeout:
		return ProblemTimeout
	}
	return "http." + strconv.Itoa(status)
}

func clean(p Problem) Problem {
	p.Detail, p.Hint = Printable(p.Detail, 1000), Printable(p.Hint, 1000)
	p.Code = Printable(p.Code, 100)
	p.RequestID = Printable(p.RequestID, 100)
	p.DecisionID = sallyport.DecisionID(Printable(string(p.DecisionID), 100))
	if p.Decision == nil {
		return p
	}
	d := p.Decision
	d.Rule, d.Route = Printable(d.Rule, 300), Printable(d.Route, 600)
	for i := range d.Reasons {
		r := &d.Reasons[i]
		r.Rule, r.Condition = Printable(r.Rule, 300), Printable(r.Condition, 300)
		r.Wanted, r.Found = Printable(r.Wanted, 1000), Printable(r.Found, 1000)
	}
	for _, set := range d.WouldAllowIf {
		for i := range set {
			r := &set[i]
			r.Condition, r.Want, r.Hint = Printable(r.Condition, 300), Printable(r.Want, 1000), Printable(r.Hint, 1000)
		}
	}
	return p
}

// Printable drops what could steer a terminal, and everything after max bytes.
func Printable(s string, max int) string {
	s = strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		if r < 0x20 || r >= 0x7f && r < 0xa0 || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 {
			return -1
		}
		return r
	}, s)
	if len(s) > max {
		s = strings.ToValidUTF8(s[:max], "")
	}
	return s
}

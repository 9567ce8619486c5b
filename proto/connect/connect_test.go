package connect

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport"
)

func TestProxyStatusString(t *testing.T) {
	tests := []struct {
		in   ProxyStatus
		want string
	}{
		{ProxyStatus{}, `sallyport`},
		{ProxyStatus{Error: ProxyDNSError}, `sallyport; error=dns_error`},
		{ProxyStatus{Error: ProxyRequestDenied, Details: `rule "dba" \ é` + "\r\n\x00"}, `sallyport; error=http_request_denied; details="rule \"dba\" \\ ?   "`},
	}
	for _, tt := range tests {
		if got := tt.in.String(); got != tt.want {
			t.Errorf("got %s; want %s", got, tt.want)
		}
	}
	long := ProxyStatus{Error: "x", Details: strings.Repeat("ä", 10_000)}
	if got, _ := ParseProxyStatus(long.String()); len(got.Details) != MaxDetails {
		t.Errorf("%d bytes of details; want %d", len(got.Details), MaxDetails)
	}
}

func TestParseProxyStatus(t *testing.T) {
	tests := []struct {
		in   string
		want ProxyStatus
		ok   bool
	}{
		{`sallyport; error=dns_error; details="no \"db\""`, ProxyStatus{"dns_error", `no "db"`}, true},
		{`other.example; error=connection_refused, sallyport;error=dns_error`, ProxyStatus{Error: "dns_error"}, true},
		{`"a, \"b\"; error=x", sallyport`, ProxyStatus{}, true},
		{`"sallyport"; received-status=403; next-hop=:YWJj:; x; error=http_request_denied`, ProxyStatus{Error: "http_request_denied"}, true},
		{``, ProxyStatus{}, false},
		{`other`, ProxyStatus{}, false},
		{`sallyport; details="no end`, ProxyStatus{}, false},
		{`sallyport; details="bad \escape"`, ProxyStatus{}, false},
		{`sallyport; Error=x`, ProxyStatus{}, false},
		{`sallyport,`, ProxyStatus{}, false},
		{`sallyport other`, ProxyStatus{}, false},
		{`(sallyport)`, ProxyStatus{}, false},
	}
	for _, tt := range tests {
		got, ok := ParseProxyStatus(tt.in)
		if got != tt.want || ok != tt.ok {
			t.Errorf("%s: got %+v, %v; want %+v, %v", tt.in, got, ok, tt.want, tt.ok)
		}
	}
}

func FuzzParseProxyStatus(f *testing.F) {
	f.Add(`sallyport; error=dns_error; details="no \"db\""`, "details \" \\ é")
	f.Add(`a;b=:x:,?1;*c="`, "")
	f.Fuzz(func(t *testing.T, field, details string) {
		ParseProxyStatus(field)
		want := ProxyStatus{Error: "x", Details: details}.String()
		got, ok := ParseProxyStatus(want)
		if !ok {
			t.Fatalf("our own field does not parse: %s", want)
		}
		if again := got.String(); again != want {
			t.Fatalf("%s reads back as %s", want, again)
		}
		if strings.ContainsAny(want, "\r\n\x00") {
			t.Fatalf("%q would break the header it stands in", want)
		}
	})
}

var payroll = sallyport.Decision{
	ID:      "d-01JD7F3A",
	Verdict: sallyport.VerdictDeny,
	Rule:    "finance",
	Route:   "tcp://payroll.internal:443",
	Reasons: []sallyport.Reason{{
		Rule: "finance", Condition: "device.disk_encrypted", Wanted: "is true", Found: "false", Age: 9 * time.Second, Result: "false",
	}},
	WouldAllowIf: [][]sallyport.Remedy{
		{{Condition: "device.disk_encrypted", Want: "true", Hint: "turn on disk encryption"}},
	},
	DependsOn:      []sallyport.Subject{{Kind: sallyport.SubjectDevice, ID: "secret-subject"}},
	Upstream:       sallyport.Upstream{Network: sallyport.TCP, Host: "10.0.3.7", Port: 5432},
	Who:            sallyport.Identity{User: "alice"},
	PolicyRevision: 214,
}

func TestDenial(t *testing.T) {
	tests := []struct {
		name    string
		d       sallyport.Decision
		outcome sallyport.Outcome
		code    string
		message string
		hint    string
	}{
		{
			"a condition failed", payroll, sallyport.OutcomeDenied, ProblemDenied,
			`denied by rule "finance": device.disk_encrypted is false`,
			"turn on disk encryption; then this is allowed, no new login needed",
		},
		{"no rule", sallyport.Decision{}, sallyport.OutcomeDenied, ProblemDenied, "denied: no rule allows it", ""},
		{"a deny rule", sallyport.Decision{Rule: "night"}, sallyport.OutcomeDenied, ProblemDenied, `denied by rule "night"`, ""},
		{"no session", sallyport.Decision{Verdict: sallyport.VerdictLogin}, sallyport.OutcomeLogin, ProblemLogin, "there is no live session", "run: agent login"},
		{"no route", sallyport.Decision{Verdict: sallyport.VerdictNoRoute}, sallyport.OutcomeUsage, ProblemNotFound, "no such target", "run: agent ls"},
		{"pending", sallyport.Decision{Verdict: sallyport.VerdictPending}, sallyport.OutcomePending, ProblemPending, "approval has been asked for and is not given yet", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := Denial(tt.d)
			if e.Outcome != tt.outcome || e.Code != tt.code || e.Message != tt.message || e.Hint != tt.hint {
				t.Errorf("got %d %s %q hint %q; want %d %s %q hint %q", e.Outcome, e.Code, e.Message, e.Hint, tt.outcome, tt.code, tt.message, tt.hint)
			}
		})
	}
	if e := Denial(sallyport.Decision{Verdict: sallyport.VerdictAllow}); e != nil {
		t.Errorf("an allow is %v; want nil", e)
	}
}

func TestFixSaysWhetherToLogIn(t *testing.T) {
	for hint, want := range map[string]string{
		"turn on the firewall":       "turn on the firewall; then this is allowed, no new login needed",
		"run: agent login":           "run: agent login; then this is allowed",
		"log in again: agent extend": "log in again: agent extend; then this is allowed",
	} {
		d := sallyport.Decision{WouldAllowIf: [][]sallyport.Remedy{{{Condition: "x", Hint: hint}}}}
		if got := Fix(d); got != want {
			t.Errorf("got %q; want %q", got, want)
		}
	}
}

func TestExplain(t *testing.T) {
	want := []string{
		`why:  rule "finance" matched you, but 1 condition failed:`,
		`        device.disk_encrypted    is false   (checked 9 s ago on this machine)`,
		`fix:  turn on disk encryption; then this is allowed, no new login needed`,
		`decision d-01JD7F3A, policy revision 214`,
	}
	if diff := cmp.Diff(want, Explain(payroll)); diff != "" {
		t.Error(diff)
	}
}

// What was found is told with what was wanted, where that says more.
func TestExplainTellsWhatWasWanted(t *testing.T) {
	d := sallyport.Decision{ID: "d-1", Verdict: sallyport.VerdictDeny, PolicyRevision: 3, Reasons: []sallyport.Reason{
		{Rule: "day", Condition: "device.os_version", Wanted: "at least 15.4", Found: "15.3", Result: "false"},
		{Rule: "day", Condition: "groups", Wanted: "the membership that this rule asks for", Found: "missing the membership that this rule asks for", Result: "false"},
	}, Observed: []sallyport.Observation{{Rule: "all", Would: sallyport.VerdictAllow}}}
	want := []string{
		`why:  rule "day" matched you, but 2 conditions failed:`,
		`        device.os_version        is 15.3, wanted: at least 15.4`,
		`        groups                   is missing the membership that this rule asks for`,
		`note: rule "all" is only observed; in force it would have made this: allow`,
		`decision d-1, policy revision 3`,
	}
	if diff := cmp.Diff(want, Explain(d)); diff != "" {
		t.Error(diff)
	}
}

func refuse(e *sallyport.Error) *http.Response {
	w := httptest.NewRecorder()
	WriteRefusal(w, e)
	return w.Result()
}

func TestRefusalRoundTrip(t *testing.T) {
	tests := []struct {
		e      *sallyport.Error
		status int
		proxy  string
		retry  string
	}{
		{Denial(payroll), 403, ProxyRequestDenied, ""},
		{Denial(sallyport.Decision{ID: "d-1", Verdict: sallyport.VerdictLogin}), 401, ProxyRequestDenied, ""},
		{Denial(sallyport.Decision{ID: "d-2", Verdict: sallyport.VerdictNoRoute}), 404, ProxyNotFound, ""},
		{Denial(sallyport.Decision{ID: "d-3", Verdict: sallyport.VerdictPending}), 403, ProxyRequestDenied, ""},
		{&sallyport.Error{Outcome: sallyport.OutcomeRevoked, Code: ProblemWithdrawn, Message: "no longer"}, 403, ProxyRequestDenied, ""},
		{&sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: ProblemBadTarget, Message: "bad"}, 400, ProxyRequestError, ""},
		{&sallyport.Error{Outcome: sallyport.OutcomeUpstream, Code: ProblemRefused, Message: "refused"}, 502, ProxyRefused, ""},
		{&sallyport.Error{Outcome: sallyport.OutcomeUpstream, Code: ProblemTimeout, Message: "timeout"}, 504, ProxyTimeout, ""},
		{&sallyport.Error{Outcome: sallyport.OutcomeUpstream, Code: ProblemDNS, Message: "no name"}, 502, ProxyDNSError, ""},
		{&sallyport.Error{Outcome: sallyport.OutcomeUpstream, Code: ProblemUnreachable, Message: "away"}, 502, ProxyUnavailable, ""},
		{&sallyport.Error{Outcome: sallyport.OutcomeDenied, Code: ProblemProhibited, Message: "loopback"}, 403, ProxyIPProhibited, ""},
		{&sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: ProblemUnavailable, Message: "no policy"}, 503, ProxyInternalResponse, "1"},
		{&sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: ProblemTooMany, Message: "many"}, 429, ProxyLimitReached, "1"},
		{&sallyport.Error{Outcome: sallyport.OutcomeInternal, Code: ProblemUnsupported, Message: "udp"}, 501, ProxyRequestDenied, ""},
		{&sallyport.Error{Outcome: sallyport.OutcomeInternal, Code: "x", Message: "broken", Err: io.ErrUnexpectedEOF}, 500, ProxyInternalError, ""},
	}
	for _, tt := range tests {
		t.Run(tt.e.Code, func(t *testing.T) {
			resp := refuse(tt.e)
			if resp.StatusCode != tt.status {
				t.Errorf("status %d; want %d", resp.StatusCode, tt.status)
			}
			ps, ok := ParseProxyStatus(resp.Header.Get(HeaderProxyStatus))
			if !ok || ps.Error != tt.proxy || !strings.Contains(ps.Details, strings.ReplaceAll(tt.e.Message, "é", "?")) {
				t.Errorf("Proxy-Status %q; want error %s and the message", resp.Header.Get(HeaderProxyStatus), tt.proxy)
			}
			if got := resp.Header.Get("Retry-After"); got != tt.retry {
				t.Errorf("Retry-After %q; want %q", got, tt.retry)
			}
			got := ReadRefusal(resp)
			if got.Outcome != tt.e.Outcome || got.Code != tt.e.Code || got.Message != tt.e.Message || got.Hint != tt.e.Hint {
				t.Errorf("read back %+v; want %+v", got, tt.e)
			}
			if got.Err != nil {
				t.Errorf("the cause crossed the wire: %v", got.Err)
			}
		})
	}
}

func TestRefusalTellsNobodyWhatIsInside(t *testing.T) {
	resp := refuse(Denial(payroll))
	if resp.Header.Get(HeaderDecision) != "d-01JD7F3A" {
		t.Errorf("decision header %q", resp.Header.Get(HeaderDecision))
	}
	body, _ := io.ReadAll(resp.Body)
	for _, secret := range []string{"10.0.3.7", "secret-subject", "alice"} {
		if strings.Contains(string(body), secret) {
			t.Errorf("the body tells %s: %s", secret, body)
		}
	}
	hidden := payroll
	hidden.Verdict = sallyport.VerdictNoRoute
	unknown := sallyport.Decision{ID: payroll.ID, Verdict: sallyport.VerdictNoRoute, PolicyRevision: 214}
	a, _ := io.ReadAll(refuse(Denial(hidden)).Body)
	b, _ := io.ReadAll(refuse(Denial(unknown)).Body)
	if diff := cmp.Diff(string(a), string(b)); diff != "" {
		t.Errorf("a hidden target looks different from none:\n%s", diff)
	}
}

func TestReadRefusalIsTolerantAndBounded(t *testing.T) {
	answer := func(status int, contentType, body string, header ...string) *http.Response {
		h := http.Header{"Content-Type": {contentType}}
		for i := 0; i < len(header); i += 2 {
			h.Add(header[i], header[i+1])
		}
		return &http.Response{StatusCode: status, Header: h, Body: io.NopCloser(strings.NewReader(body))}
	}
	endless := struct{ io.Reader }{neverEnding('x')}
	tests := []struct {
		name    string
		resp    *http.Response
		outcome sallyport.Outcome
		code    string
		message string
	}{
		{"no body", answer(403, "", ""), sallyport.OutcomeDenied, ProblemDenied, "the gateway answered 403 Forbidden"},
		{"HTML", answer(502, "text/html", "<h1>no</h1>"), sallyport.OutcomeUpstream, ProblemUnreachable, "the gateway answered 502 Bad Gateway"},
		{"Proxy-Status only", answer(403, "", "", "Proxy-Status", `sallyport; error=http_request_denied; details="no rule"`), sallyport.OutcomeDenied, ProblemDenied, "no rule"},
		{"cut JSON", answer(503, ContentProblem, `{"code":"x`), sallyport.OutcomeUnavailable, ProblemUnavailable, "the gateway answered 503 Service Unavailable"},
		{"the status line rules", answer(403, ContentProblem, `{"status":200,"code":"denied","detail":"no"}`), sallyport.OutcomeDenied, ProblemDenied, "no"},
		{"terminal escapes", answer(403, ContentProblem, `{"code":"denied","detail":"\u001b]0;owned\u0007 no\u202e"}`), sallyport.OutcomeDenied, ProblemDenied, "]0;owned no"},
		{"endless", &http.Response{StatusCode: 403, Header: http.Header{"Content-Type": {ContentProblem}}, Body: io.NopCloser(endless)}, sallyport.OutcomeDenied, ProblemDenied, "the gateway answered 403 Forbidden"},
		{"a status of the future", answer(418, "", ""), sallyport.OutcomeInternal, "http.418", "the gateway answered 418 I'm a teapot"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := ReadRefusal(tt.resp)
			if e.Outcome != tt.outcome || e.Code != tt.code || e.Message != tt.message {
				t.Errorf("got %d %s %q; want %d %s %q", e.Outcome, e.Code, e.Message, tt.outcome, tt.code, tt.message)
			}
		})
	}
}

type neverEnding byte

func (c neverEnding) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(c)
	}
	return len(b), nil
}

func FuzzReadRefusal(f *testing.F) {
	good, _ := json.Marshal(ProblemOf(Denial(payroll)))
	f.Add(403, string(good), `sallyport; error=x`)
	f.Add(200, `{"decision":{"verdict":"allow"}}`, "")
	f.Fuzz(func(t *testing.T, status int, body, proxyStatus string) {
		e := ReadRefusal(&http.Response{
			StatusCode: status,
			Header:     http.Header{"Content-Type": {ContentProblem}, HeaderProxyStatus: {proxyStatus}},
			Body:       io.NopCloser(strings.NewReader(body)),
		})
		if e.Outcome == sallyport.OutcomeOK || e.Message == "" || e.Code == "" {
			t.Fatalf("a refusal without outcome, code or message: %+v", e)
		}
		if strings.ContainsAny(e.Message+e.Hint+e.Code, "\x1b\x00\n\x07") {
			t.Fatalf("control characters in %+v", e)
		}
	})
}

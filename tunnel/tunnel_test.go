package tunnel

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport"
	"sallyport/proto/connect"
)

// stub is a carrier that only says whether it was closed.
type stub struct {
	name   string
	closed bool
}

func (s *stub) Open(context.Context, sallyport.Target, []byte) (*Flow, error) { return nil, nil }
func (s *stub) RoundTrip(*http.Request) (*http.Response, error)               { return nil, nil }
func (s *stub) Name() string                                                  { return s.name }
func (s *stub) Done() <-chan struct{}                                         { return nil }
func (s *stub) Err() error                                                    { return nil }
func (s *stub) Close() error                                                  { s.closed = true; return nil }

// entrant is one dial in a race: it stands or fails after a while.
type entrant struct {
	after    time.Duration
	err      error
	stubborn bool // makes it although it was cancelled

	carrier stub
	started time.Duration // since the race began; -1: never
}

func (e *entrant) dial(begin time.Time) DialFunc[Carrier] {
	e.started = -1
	return func(ctx context.Context) (Carrier, error) {
		e.started = time.Since(begin)
		t := time.NewTimer(e.after)
		defer t.Stop()
		done := ctx.Done()
		if e.stubborn {
			done = nil
		}
		select {
		case <-done:
			return nil, context.Cause(ctx)
		case <-t.C:
		}
		if e.err != nil {
			return nil, e.err
		}
		return &e.carrier, nil
	}
}

func TestRace(t *testing.T) {
	failed := errors.New("failed")
	const ms = time.Millisecond
	tests := []struct {
		name          string
		first, second entrant
		winner        string // "" if the race fails
		took          time.Duration
		secondStarted time.Duration
	}{
		{"the first is quick", entrant{after: 20 * ms}, entrant{after: ms}, "first", 20 * ms, -1},
		{"the first is late but first", entrant{after: 260 * ms}, entrant{after: 50 * ms}, "first", 260 * ms, 250 * ms},
		{"the second overtakes", entrant{after: time.Hour}, entrant{after: 50 * ms}, "second", 300 * ms, 250 * ms},
		{"the first fails at once", entrant{err: failed, after: ms}, entrant{after: 50 * ms}, "second", 51 * ms, ms},
		{"the first fails late", entrant{err: failed, after: 270 * ms}, entrant{after: 50 * ms}, "second", 300 * ms, 250 * ms},
		{"both fail", entrant{err: failed, after: ms}, entrant{err: failed, after: 2 * ms}, "", 3 * ms, ms},
		{"a loser that makes it is closed", entrant{after: 400 * ms, stubborn: true}, entrant{after: 50 * ms}, "second", 400 * ms, 250 * ms},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begin := time.Now()
				tt.first.carrier.name, tt.second.carrier.name = "first", "second"
				c, err := Race(t.Context(), HeadStart, tt.first.dial(begin), tt.second.dial(begin))
				name := ""
				if c != nil {
					name = c.Name()
				}
				if name != tt.winner || (err == nil) != (tt.winner != "") {
					t.Errorf("winner %q, %v; want %q", name, err, tt.winner)
				}
				if tt.winner == "" && !errors.Is(err, failed) {
					t.Errorf("error %v; want the dials' own", err)
				}
				if took := time.Since(begin); took != tt.took {
					t.Errorf("took %v; want %v", took, tt.took)
				}
				if tt.second.started != tt.secondStarted {
					t.Errorf("the second started after %v; want %v", tt.second.started, tt.secondStarted)
				}
				if c != nil && c.(*stub).closed {
					t.Error("the winner was closed")
				}
				if tt.first.stubborn && !tt.first.carrier.closed {
					t.Error("the loser that made it was left open")
				}
			})
		})
	}
	if _, err := Race[Carrier](t.Context(), 0); err == nil {
		t.Error("a race without dials must fail")
	}
}

// TestRaceTellsWhoWasMet: silence on one carrier does not hide what the other met,
// nor make the person wait for all of it.
func TestRaceTellsWhoWasMet(t *testing.T) {
	untrusted := DialFailure("gw", x509.UnknownAuthorityError{})
	silence := DialFailure("gw", context.DeadlineExceeded)
	const ms = time.Millisecond
	for name, tt := range map[string]struct {
		first, second entrant
		want          error
		took          time.Duration
	}{
		"silence beside it":  {entrant{err: silence, after: 10 * time.Second}, entrant{err: untrusted, after: 50 * ms}, untrusted, 2300 * ms},
		"silence before it":  {entrant{err: silence, after: 5 * ms}, entrant{err: untrusted, after: 50 * ms}, untrusted, 55 * ms},
		"another gets by":    {entrant{after: 1900 * ms}, entrant{err: untrusted, after: 50 * ms}, nil, 1900 * ms},
		"silence everywhere": {entrant{err: silence, after: 10 * time.Second}, entrant{err: silence, after: 10 * time.Second}, silence, 10250 * ms},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begin := time.Now()
				_, err := Race(t.Context(), HeadStart, tt.first.dial(begin), tt.second.dial(begin))
				if !errors.Is(err, tt.want) || sallyport.CodeOf(err) != sallyport.CodeOf(tt.want) {
					t.Errorf("got %v; want %v", err, tt.want)
				}
				if took := time.Since(begin); took != tt.took {
					t.Errorf("took %v; want %v", took, tt.took)
				}
			})
		})
	}
}

func TestRaceEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		a, b := entrant{after: time.Hour}, entrant{after: time.Hour}
		if _, err := Race(ctx, HeadStart, a.dial(time.Now()), b.dial(time.Now())); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v; want the deadline", err)
		}
	})
}

func TestDialFailure(t *testing.T) {
	remote := func(a tls.AlertError) error {
		return &net.OpError{Op: "remote error", Err: errors.New(a.Error())}
	}
	tests := []struct {
		name    string
		err     error
		outcome sallyport.Outcome
		code    string
	}{
		{"our certificate has expired", remote(45), sallyport.OutcomeLogin, connect.ProblemLogin},
		{"a certificate is required", remote(116), sallyport.OutcomeLogin, connect.ProblemLogin},
		{"unknown authority, says the gateway", fmt.Errorf("read: %w", remote(48)), sallyport.OutcomeLogin, connect.ProblemLogin},
		{"over QUIC", tls.AlertError(42), sallyport.OutcomeLogin, connect.ProblemLogin},
		{"another alert", remote(120), sallyport.OutcomeUnavailable, connect.ProblemGatewayDown},
		{"the same words from here", &net.OpError{Op: "local error", Err: errors.New(tls.AlertError(45).Error())}, sallyport.OutcomeUnavailable, connect.ProblemGatewayDown},
		{"their authority", x509.UnknownAuthorityError{}, sallyport.OutcomeUnavailable, connect.ProblemUntrusted},
		{"their authority, with the alert we sent", errors.Join(tls.AlertError(42), x509.UnknownAuthorityError{}), sallyport.OutcomeUnavailable, connect.ProblemUntrusted},
		{"their name", x509.HostnameError{Certificate: &x509.Certificate{}}, sallyport.OutcomeUnavailable, connect.ProblemUntrusted},
		{"their date", x509.CertificateInvalidError{Reason: x509.Expired}, sallyport.OutcomeUnavailable, connect.ProblemUntrusted},
		{"something about it", &tls.CertificateVerificationError{Err: errors.New("x")}, sallyport.OutcomeUnavailable, connect.ProblemUntrusted},
		{"DNS", &net.DNSError{Err: "no such host"}, sallyport.OutcomeUnavailable, connect.ProblemGatewayDown},
		{"time", context.DeadlineExceeded, sallyport.OutcomeUnavailable, connect.ProblemGatewayDown},
		{"known already", &sallyport.Error{Outcome: sallyport.OutcomePortal, Code: "portal"}, sallyport.OutcomePortal, "portal"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := DialFailure("gw", tt.err)
			if sallyport.OutcomeOf(got) != tt.outcome || sallyport.CodeOf(got) != tt.code || !errors.Is(got, tt.err) {
				t.Errorf("outcome %d, code %q (%v); want %d, %q", sallyport.OutcomeOf(got), sallyport.CodeOf(got), got, tt.outcome, tt.code)
			}
		})
	}
	if DialFailure("gw", nil) != nil {
		t.Error("no error must stay none")
	}
}

func TestAdmitRefusal(t *testing.T) {
	for _, tt := range []struct {
		err    error
		status int
		code   string
	}{
		{errors.New("no"), 401, connect.ProblemSessionRevoked},
		{&AdmitError{Code: connect.CodeSessionRevoked}, 401, connect.ProblemSessionRevoked},
		{&AdmitError{Code: connect.CodeTooMany}, 429, connect.ProblemTooMany},
		{&AdmitError{Code: connect.CodePolicyStale}, 503, connect.ProblemUnavailable},
		{&AdmitError{Code: connect.CodeDraining}, 503, connect.ProblemGatewayDown},
	} {
		p := connect.ProblemOf(AdmitRefusal(tt.err))
		if p.Status != tt.status || p.Code != tt.code {
			t.Errorf("%v: %d %s; want %d %s", tt.err, p.Status, p.Code, tt.status, tt.code)
		}
	}
}

func TestEndpointOf(t *testing.T) {
	tests := []struct {
		in   sallyport.GatewayInfo
		want Endpoint
	}{
		{sallyport.GatewayInfo{URL: "https://GW.corp.example"}, Endpoint{"gw.corp.example", "GW.corp.example", []string{"gw.corp.example:443"}}},
		{sallyport.GatewayInfo{URL: "https://gw.corp.example:8443"}, Endpoint{"gw.corp.example", "gw.corp.example:8443", []string{"gw.corp.example:8443"}}},
		{sallyport.GatewayInfo{URL: "https://gw.corp.example", Addresses: []string{"10.0.0.1:1"}}, Endpoint{"gw.corp.example", "gw.corp.example", []string{"10.0.0.1:1"}}},
		{sallyport.GatewayInfo{URL: "https://gw.localhost:8443"}, Endpoint{"gw.localhost", "gw.localhost:8443", []string{"127.0.0.1:8443", "[::1]:8443"}}},
		{sallyport.GatewayInfo{URL: "https://[2001:db8::1]"}, Endpoint{"2001:db8::1", "[2001:db8::1]", []string{"[2001:db8::1]:443"}}},
	}
	for _, tt := range tests {
		got, err := EndpointOf(tt.in)
		if diff := cmp.Diff(tt.want, got); err != nil || diff != "" {
			t.Errorf("%s: %v\n%s", tt.in.URL, err, diff)
		}
	}
	for _, u := range []string{"", "gw.corp.example", "http://gw.corp.example", "https://", "https://u:p@gw", "https://%zz"} {
		if got, err := EndpointOf(sallyport.GatewayInfo{URL: u}); sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
			t.Errorf("%q: %+v, %v; want a usage error", u, got, err)
		}
	}
}

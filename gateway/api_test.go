package gateway

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport"
	"sallyport/proto/connect"
)

// request sends a /v1 request on the agent's connection.
func (a *agent) request(method, path, body string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	a.b.ServeAPI(w, httptest.NewRequestWithContext(a.conn.ctx, method, "https://gw.test"+path, strings.NewReader(body)), a.conn)
	return w
}

func TestAPIAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		b.policy.set(func() {
			b.policy.upstreams[web.String()] = sallyport.Upstream{Host: "10.0.3.9"}
			b.policy.denied[web.String()] = true
		})
		a := b.connect("s1")
		tests := []struct {
			name, method, path, body string
			status                   int
			want                     string
		}{
			{"me", "GET", "/v1/me", "", 200, `"user":"u-s1"`},
			{"me has no targets", "GET", "/v1/me", "", 200, `"targets":[]`},
			{"targets", "GET", "/v1/targets", "", 200, `"from":"tcp://db.internal:5432"`},
			{"targets with those denied", "GET", "/v1/targets?all=1", "", 200, `"from":"tcp://web.internal:80"`},
			{"why allowed", "GET", "/v1/why?target=db.internal:5432", "", 200, `"verdict":"allow"`},
			{"why denied", "GET", "/v1/why?target=web.internal:80", "", 200, `"condition":"device.disk_encrypted"`},
			{"why not a target", "GET", "/v1/why?target=2130706433:80", "", 400, `"code":"target.invalid"`},
			{"why nothing", "GET", "/v1/why", "", 400, `"code":"target.invalid"`},
			{"posture", "POST", "/v1/posture", "good", 204, ``},
			{"bad posture", "POST", "/v1/posture", "bad", 400, `"code":"posture.malformed"`},
			{"posture that nobody can store", "POST", "/v1/posture", "unstored", 503, `"code":"posture.unavailable"`},
			{"huge posture", "POST", "/v1/posture", strings.Repeat("x", maxPosture+1), 400, `"code":"bad_request"`},
			{"wrong method", "POST", "/v1/me", "", 405, `"code":"method.wrong"`},
			{"unknown path", "GET", "/v1/other", "", 404, `"code":"path.unknown"`},
			{"no debug", "GET", "/debug/pprof/", "", 404, ``},
			{"no metrics", "GET", "/metrics", "", 404, ``},
			{"no health", "GET", "/healthz", "", 404, ``},
		}
		for _, tt := range tests {
			w := a.request(tt.method, tt.path, tt.body)
			if w.Code != tt.status || !strings.Contains(w.Body.String(), tt.want) {
				t.Errorf("%s: got %d %s; want %d with %s", tt.name, w.Code, w.Body, tt.status, tt.want)
			}
			if w.Header().Get("Cache-Control") != "no-store" {
				t.Errorf("%s: may be stored", tt.name)
			}
		}
	})
}

// TestAPIHidesWhatIsNotTheOwners: neither the upstream nor the subjects of a
// decision leave the gateway.
func TestAPIHidesWhatIsNotTheOwners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		body := b.connect("s1").request("GET", "/v1/why?target=db.internal:5432", "").Body.String()
		for _, secret := range []string{"10.0.3.7", "depends_on"} {
			if strings.Contains(body, secret) {
				t.Errorf("answer holds %q: %s", secret, body)
			}
		}
	})
}

func TestAPIWithoutPolicyd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		b.policy.set(func() { b.policy.err = http.ErrServerClosed })
		w := a.request("GET", "/v1/targets", "")
		if w.Code != 503 || w.Header().Get("Retry-After") != "1" || !strings.Contains(w.Header().Get("Proxy-Status"), "proxy_internal_response") {
			t.Errorf("got %d, %v; want 503 with Retry-After and Proxy-Status", w.Code, w.Header())
		}
	})
}

// TestAPIOfRevokedSession: between the revocation and the close of the carrier
// nothing is answered any more.
func TestAPIOfRevokedSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		b.policy.change(sessionSubject("s1"), "", func() { b.policy.dead["s1"] = true })
		<-a.conn.closed
		if w := a.request("GET", "/v1/me", ""); w.Code != http.StatusUnauthorized {
			t.Errorf("got %d; want 401", w.Code)
		}
	})
}

func TestEventsSayHelloAndPing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		began := time.Now()
		events := a.events()
		for i := range 3 {
			if e := <-events; e.Type != connect.EventPing {
				t.Errorf("got %+v; want ping", e)
			}
			if took := time.Since(began); took != time.Duration(i+1)*pingEvery {
				t.Errorf("ping %d after %s", i+1, took)
			}
		}
	})
}

func TestEventsAreOnesOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a, stranger := b.connect("s1"), b.connect("s2")
		mine, theirs := a.events(), stranger.events()
		_, c := a.open(db)
		b.denyDB()
		c.cutWith(t)
		next(t, mine)
		if e := <-theirs; e.Type != connect.EventPing {
			t.Errorf("another session reads %+v", e)
		}
	})
}

func TestEventStreamsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, Limits{})
		a := b.connect("s1")
		for range maxSubscribers {
			a.events()
		}
		if w := a.request("GET", "/v1/events", ""); w.Code != http.StatusTooManyRequests {
			t.Errorf("got %d; want 429", w.Code)
		}
	})
}

// TestEventsAreLines: each event is one line of JSON.
func TestEventsAreLines(t *testing.T) {
	w := httptest.NewRecorder()
	sub := &subscriber{wake: make(chan struct{}, 1)}
	err := sub.write(w, http.NewResponseController(w), []queued{
		{event: connect.Event{Type: connect.EventWithdrawn, Reason: "two\nlines"}}, {event: connect.Event{Type: connect.EventPing}},
	})
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(w.Body.String(), "\n"), "\n")
	if len(lines) != 2 || !w.Flushed {
		t.Fatalf("got %q, flushed %v; want two lines", lines, w.Flushed)
	}
	for _, l := range lines {
		var e connect.Event
		if err := json.Unmarshal([]byte(l), &e); err != nil {
			t.Errorf("%s: %v", l, err)
		}
	}
}

package oidcrp

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"sallyport/internal/oidcrp/oidcrptest"
)

func newClient(t *testing.T, issuer string) *Client {
	t.Helper()
	c, err := New(Config{Issuer: issuer, ClientID: oidcrptest.ClientID, ClientSecret: oidcrptest.Secret, RedirectURL: "https://rp.example/callback"})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	var elsewhere atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	t.Cleanup(other.Close)
	here := httptest.NewServer(http.RedirectHandler(other.URL, http.StatusFound))
	t.Cleanup(here.Close)
	if err := newClient(t, here.URL).Discover(t.Context()); err == nil {
		t.Error("a redirect was taken for metadata")
	}
	if n := elsewhere.Load(); n != 0 {
		t.Errorf("%d requests elsewhere", n)
	}
}

func TestAnswersAreBounded(t *testing.T) {
	p := oidcrptest.New(t)
	p.Discovery = func(m map[string]any) { m["pad"] = strings.Repeat("x", maxBody) }
	if err := newClient(t, p.Issuer()).Discover(t.Context()); !errors.Is(err, errTooLarge) && !strings.Contains(err.Error(), errTooLarge.Error()) {
		t.Errorf("got %v; want %v", err, errTooLarge)
	}
	p.Discovery = func(m map[string]any) { m["pad"] = strings.Repeat("x", maxBody/2) }
	if err := newClient(t, p.Issuer()).Discover(t.Context()); err != nil {
		t.Errorf("half a MiB: %v", err)
	}
}

func TestBodyOfExactlyTheLimit(t *testing.T) {
	for size, ok := range map[int]bool{maxBody: true, maxBody + 1: false} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, size)) }))
		body, _, err := get(t.Context(), newHTTPClient(http.DefaultTransport, nil), s.URL, "")
		if (err == nil) != ok || ok && len(body) != size {
			t.Errorf("%d bytes: got %d, %v", size, len(body), err)
		}
		s.Close()
	}
}

func TestProviderThatComesBack(t *testing.T) {
	p := oidcrptest.New(t)
	c := newClient(t, p.Issuer())
	p.Discovery = func(m map[string]any) { m["issuer"] = "https://evil.example" }
	if err := c.Discover(t.Context()); CodeOf(err) != CodeIssuerMismatch {
		t.Fatalf("got %v", err)
	}
	if _, _, err := c.Begin(t.Context()); CodeOf(err) != CodeIssuerMismatch {
		t.Errorf("Begin: got %v", err)
	}
	p.Discovery = nil
	if err := c.Discover(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Ready(); err != nil {
		t.Errorf("Ready: %v", err)
	}
	// It stays usable while it is out of reach, and not once it is another.
	p.Server.Config.Handler = http.NotFoundHandler()
	if err := c.Discover(t.Context()); CodeOf(err) != CodeUnavailable {
		t.Errorf("got %v; want %s", err, CodeUnavailable)
	}
	if err := c.Ready(); err != nil {
		t.Errorf("Ready while out of reach: %v", err)
	}
	p.Server.Config.Handler = p
	p.Discovery = func(m map[string]any) { m["issuer"] = "https://evil.example" }
	if err := c.Discover(t.Context()); CodeOf(err) != CodeIssuerMismatch {
		t.Errorf("got %v", err)
	}
	if err := c.Ready(); CodeOf(err) != CodeIssuerMismatch {
		t.Errorf("Ready with another issuer: got %v", err)
	}
}

// Many logins while the provider is down ask it a few times, not each.
func TestNoDiscoveryStorm(t *testing.T) {
	var asked atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	t.Cleanup(s.Close)
	c := newClient(t, s.URL)
	for range 200 {
		if _, _, err := c.Begin(t.Context()); CodeOf(err) != CodeUnavailable {
			t.Fatalf("got %v", err)
		}
	}
	if n := asked.Load(); n > 5 {
		t.Errorf("200 logins asked %d times", n)
	}
}

func TestAuthStyle(t *testing.T) {
	for _, tc := range []struct {
		methods []string
		post    bool
	}{{nil, false}, {[]string{"client_secret_post"}, true}, {[]string{"client_secret_post", "client_secret_basic"}, false}, {[]string{"private_key_jwt"}, false}} {
		var posted, basic atomic.Int32
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, _, ok := r.BasicAuth(); ok {
				basic.Add(1)
			}
			if r.FormValue("client_secret") != "" {
				posted.Add(1)
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusUnauthorized)
			w.Write([]byte(`{"error":"invalid_client"}`))
		}))
		p := oidcrptest.New(t)
		p.Discovery = func(m map[string]any) {
			m["token_endpoint"] = s.URL
			if tc.methods != nil {
				m["token_endpoint_auth_methods_supported"] = tc.methods
			}
		}
		c := newClient(t, p.Issuer())
		if _, err := c.Finish(t.Context(), Flow{}, Callback{Code: "x"}); CodeOf(err) != CodeTokenRefused {
			t.Errorf("got %v; want %s", err, CodeTokenRefused)
		}
		if wantPost := map[bool]int32{true: 1}[tc.post]; posted.Load() != wantPost || basic.Load() != 1-wantPost {
			t.Errorf("%v: %d times in the form, %d times in the header; the code would be burned by a second try", tc.methods, posted.Load(), basic.Load())
		}
		s.Close()
	}
}

func TestCheckIssuerLoopback(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "auth.localhost": true, "LOCALHOST": true, "localhost.": true, "127.0.0.1": true, "127.8.9.1": true, "::1": true,
		"localhost.example": false, "notlocalhost": false, "128.0.0.1": false, "": false, "::ffff:10.0.0.1": false,
	} {
		if got := isLoopback(host); got != want {
			t.Errorf("isLoopback(%q) = %v; want %v", host, got, want)
		}
	}
}

func TestDialLocalhost(t *testing.T) {
	s := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(s.Close)
	_, port, _ := strings.Cut(s.Listener.Addr().String(), ":")
	_, _, err := get(context.Background(), newHTTPClient(nil, &tls.Config{}), "http://anything.localhost:"+port, "")
	if err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("got %v; want an answer of 404", err)
	}
}

func FuzzParseKeys(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(oidcrptest.KeySet(f, jose.JSONWebKey{Key: key.Public(), KeyID: "k", Use: "sig"}))
	f.Add([]byte(`{"keys":[{"kty":"EC","crv":"P-224"},{"kty":"OKP","crv":"Ed448"},{"kty":"RSA","n":"AQ","e":"AQ"}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		keys, err := parseKeys(body)
		if err != nil {
			return
		}
		if len(keys) > maxKeys {
			t.Fatalf("%d keys", len(keys))
		}
		seen := make(map[string]bool)
		for _, k := range keys {
			if k.public == nil && !k.weak {
				t.Fatal("a key without a key")
			}
			if k.kid != "" && seen[k.kid] {
				t.Fatalf("kid %q twice", k.kid)
			}
			seen[k.kid] = true
		}
	})
}

func FuzzParseHeader(f *testing.F) {
	f.Add("eyJhbGciOiJFUzI1NiJ9.e30.AA")
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add(`{"payload":"e30","signatures":[]}`)
	f.Fuzz(func(t *testing.T, raw string) {
		if _, err := parseHeader(raw); err == nil && strings.Count(raw, ".") != 2 {
			t.Fatalf("accepted %q", raw)
		}
	})
}

func FuzzIdentity(f *testing.F) {
	f.Add([]byte(`{"iss":"i","sub":"s","groups":["a","a"],"amr":["pwd"],"acr":"x","email_verified":"true","n":1.5}`))
	f.Add([]byte(`{"_claim_names":{"groups":"a"},"hasgroups":true}`))
	c := &Client{cfg: Config{GroupsClaim: "groups"}}
	f.Fuzz(func(t *testing.T, payload []byte) {
		claims, err := parseClaims(payload)
		if err != nil {
			return
		}
		id, err := c.identity(claims)
		if err != nil {
			if CodeOf(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		if len(id.Groups) > MaxGroups {
			t.Fatalf("%d groups", len(id.Groups))
		}
		for _, name := range append(protocolClaims, "groups") {
			if _, ok := id.Claims[name]; ok {
				t.Fatalf("claim %s is kept", name)
			}
		}
		if _, err := json.Marshal(id); err != nil {
			t.Fatalf("identity does not marshal: %v", err)
		}
	})
}

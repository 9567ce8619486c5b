package idp

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/zitadel/oidc/v3/pkg/oidc"
	"golang.org/x/crypto/argon2"
)

const (
	issuer   = "https://auth.corp.example/idp"
	redirect = "https://auth.corp.example/callback"
)

// cheap is a hash with the least costs that are allowed.
func cheap(password string) string { return newHash(password, minCosts).String() }

func newProvider(t testing.TB, now func() time.Time) *Provider {
	t.Helper()
	p, err := New(Config{
		Issuer: issuer, ClientID: "client", RedirectURI: redirect, Now: now,
		Users: []User{{ID: "alice", Name: "Alice", Email: "Alice@corp.example", PasswordHash: cheap("right"), Groups: []string{"dba"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const verifier = "a verifier of at least forty-three characters, as RFC 7636 wants"

func authorizeQuery() url.Values {
	sum := sha256.Sum256([]byte(verifier))
	return url.Values{
		"client_id": {"client"}, "redirect_uri": {redirect}, "response_type": {"code"}, "scope": {"openid profile email"},
		"state": {"s"}, "nonce": {"n"}, "code_challenge": {base64.RawURLEncoding.EncodeToString(sum[:])}, "code_challenge_method": {"S256"},
	}
}

func do(t testing.TB, p *Provider, req *http.Request) (*http.Response, string) {
	t.Helper()
	resp, err := p.Transport().RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

func get(t testing.TB, p *Provider, target string, cookies ...*http.Cookie) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, target, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cookies {
		req.AddCookie(c)
	}
	return do(t, p, req)
}

func post(t testing.TB, p *Provider, target string, form url.Values, cookies ...*http.Cookie) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodPost, target, strings.NewReader(form.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	for _, c := range cookies {
		req.AddCookie(c)
	}
	return do(t, p, req)
}

// code logs alice in.
func code(t testing.TB, p *Provider) string {
	t.Helper()
	resp, _ := get(t, p, issuer+pathAuthorize+"?"+authorizeQuery().Encode())
	form := resp.Header.Get("Location")
	resp, _ = get(t, p, form)
	u, err := url.Parse(form)
	if err != nil {
		t.Fatal(err)
	}
	cookies := resp.Cookies()
	resp, body := post(t, p, issuer+pathLogin, url.Values{"id": {u.Query().Get("id")}, "username": {"ALICE@corp.example"}, "password": {"right"}}, cookies...)
	resp2, _ := get(t, p, resp.Header.Get("Location"))
	back, err := url.Parse(resp2.Header.Get("Location"))
	if err != nil || back.Query().Get("code") == "" || back.Query().Get("state") != "s" {
		t.Fatalf("got %d %s, then %d to %q", resp.StatusCode, body, resp2.StatusCode, back)
	}
	return back.Query().Get("code")
}

func exchange(t testing.TB, p *Provider, change func(url.Values), secret string) (*http.Response, string) {
	t.Helper()
	form := url.Values{"grant_type": {"authorization_code"}, "redirect_uri": {redirect}, "code_verifier": {verifier}}
	change(form)
	req, err := http.NewRequest(http.MethodPost, issuer+pathToken, strings.NewReader(form.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.SetBasicAuth("client", secret)
	return do(t, p, req)
}

func TestIDToken(t *testing.T) {
	p := newProvider(t, nil)
	c := code(t, p)
	resp, body := exchange(t, p, func(v url.Values) { v.Set("code", c) }, p.ClientSecret())
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("got %d %s", resp.StatusCode, body)
	}
	var answer struct {
		IDToken      string `json:"id_token"`
		RefreshToken string `json:"refresh_token"`
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		t.Fatal(err)
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(answer.IDToken, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	var claims map[string]any
	if err := json.Unmarshal(payload, &claims); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]any{"sub": "alice", "email": "Alice@corp.example", "email_verified": true, "name": "Alice", "nonce": "n", "iss": issuer} {
		if claims[name] != want {
			t.Errorf("%s is %v; want %v", name, claims[name], want)
		}
	}
	if groups, _ := claims["groups"].([]any); len(groups) != 1 || groups[0] != "dba" {
		t.Errorf("groups are %v", claims["groups"])
	}
	if amr, _ := claims["amr"].([]any); len(amr) != 1 || amr[0] != "pwd" {
		t.Errorf("amr is %v", claims["amr"])
	}
	if answer.RefreshToken != "" {
		t.Error("there is a refresh token")
	}
	if life := claims["exp"].(float64) - claims["iat"].(float64); life > 61 {
		t.Errorf("the token lives %v s; want 60", life)
	}
}

func TestCodeBurns(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(url.Values)
		secret bool
	}{
		"wrong verifier": {func(v url.Values) { v.Set("code_verifier", "wrong") }, true},
		"no verifier":    {func(v url.Values) { v.Del("code_verifier") }, true},
		"wrong redirect": {func(v url.Values) { v.Set("redirect_uri", redirect+"/") }, true},
		"wrong secret":   {func(url.Values) {}, false},
	} {
		p := newProvider(t, nil)
		c := code(t, p)
		secret := "wrong"
		if tc.secret {
			secret = p.ClientSecret()
		}
		if resp, _ := exchange(t, p, func(v url.Values) { v.Set("code", c); tc.change(v) }, secret); resp.StatusCode == http.StatusOK {
			t.Errorf("%s: accepted", name)
		}
		if resp, _ := exchange(t, p, func(v url.Values) { v.Set("code", c) }, p.ClientSecret()); resp.StatusCode == http.StatusOK {
			t.Errorf("%s: a second try with the same code was accepted", name)
		}
	}
}

func TestCodeIsRedeemedOnceByMany(t *testing.T) {
	p := newProvider(t, nil)
	c := code(t, p)
	var wg sync.WaitGroup
	var mu sync.Mutex
	ok := 0
	for range 30 {
		wg.Go(func() {
			if resp, _ := exchange(t, p, func(v url.Values) { v.Set("code", c) }, p.ClientSecret()); resp.StatusCode == http.StatusOK {
				mu.Lock()
				ok++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if ok != 1 {
		t.Errorf("got %d tokens for one code", ok)
	}
}

func TestAuthorizeRefuses(t *testing.T) {
	p := newProvider(t, nil)
	for name, change := range map[string]func(url.Values){
		"plain":             func(q url.Values) { q.Set("code_challenge_method", "plain") },
		"no method":         func(q url.Values) { q.Del("code_challenge_method") },
		"no challenge":      func(q url.Values) { q.Del("code_challenge") },
		"other redirect":    func(q url.Values) { q.Set("redirect_uri", redirect+"/x") },
		"loopback redirect": func(q url.Values) { q.Set("redirect_uri", "http://127.0.0.1/callback") },
		"implicit":          func(q url.Values) { q.Set("response_type", "id_token") },
		"other client":      func(q url.Values) { q.Set("client_id", "x") },
		"request object":    func(q url.Values) { q.Set("request", "e30.e30.") },
		"form_post":         func(q url.Values) { q.Set("response_mode", "form_post") },
		"two states":        func(q url.Values) { q.Add("state", "b") },
		"no nonce":          func(q url.Values) { q.Del("nonce") },
	} {
		q := authorizeQuery()
		change(q)
		if resp, body := get(t, p, issuer+pathAuthorize+"?"+q.Encode()); resp.StatusCode != http.StatusBadRequest || resp.Header.Get("Location") != "" || !strings.Contains(body, "cannot start here") {
			t.Errorf("%s: got %d to %q", name, resp.StatusCode, resp.Header.Get("Location"))
		}
	}
	// The storage checks PKCE by itself, should op ever be reached another way.
	if _, err := p.store.CreateAuthRequest(context.Background(), &oidc.AuthRequest{RedirectURI: redirect, CodeChallenge: "x", CodeChallengeMethod: oidc.CodeChallengeMethodPlain}, ""); err == nil {
		t.Error("the storage took plain PKCE")
	}
}

func TestOnlyItsOwnPaths(t *testing.T) {
	p := newProvider(t, nil)
	for _, path := range []string{"/userinfo", "/oauth/introspect", "/revoke", "/end_session", "/device_authorization", "/healthz", "/ready", "/", ""} {
		if resp, _ := get(t, p, issuer+path); resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: got %d; want 404", path, resp.StatusCode)
		}
	}
	for grant, want := range map[string]int{"refresh_token": 400, "client_credentials": 400, "password": 400, "urn:ietf:params:oauth:grant-type:jwt-bearer": 400, "": 400} {
		if resp, body := exchange(t, p, func(v url.Values) { v.Set("grant_type", grant) }, p.ClientSecret()); resp.StatusCode != want {
			t.Errorf("grant %q: got %d %s", grant, resp.StatusCode, body)
		}
	}
	if resp, _ := get(t, p, issuer+pathKeys); resp.Header.Get("Access-Control-Allow-Origin") != "" {
		t.Error("other origins may read")
	}
}

func TestLoginEnds(t *testing.T) {
	var mu sync.Mutex
	add := time.Duration(0)
	p := newProvider(t, func() time.Time { mu.Lock(); defer mu.Unlock(); return time.Now().Add(add) })
	resp, _ := get(t, p, issuer+pathAuthorize+"?"+authorizeQuery().Encode())
	form := resp.Header.Get("Location")
	mu.Lock()
	add = requestLife + time.Second
	mu.Unlock()
	if resp, body := get(t, p, form); resp.StatusCode != http.StatusBadRequest || !strings.Contains(body, "This login is over") {
		t.Errorf("got %d", resp.StatusCode)
	}
	get(t, p, issuer+pathAuthorize+"?"+authorizeQuery().Encode()) // sweeps
	if n := len(p.store.requests); n != 1 {
		t.Errorf("%d logins are kept; want the new one", n)
	}
}

func TestRequestsAreBounded(t *testing.T) {
	p := newProvider(t, nil)
	q := authorizeQuery()
	for range maxRequests + 50 {
		if _, err := p.store.CreateAuthRequest(context.Background(), &oidc.AuthRequest{
			RedirectURI: redirect, CodeChallenge: q.Get("code_challenge"), CodeChallengeMethod: oidc.CodeChallengeMethodS256,
		}, ""); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(p.store.requests); n > maxRequests {
		t.Errorf("%d logins are kept; want at most %d", n, maxRequests)
	}
}

func TestRemovedUserGetsNoToken(t *testing.T) {
	p := newProvider(t, nil)
	c := code(t, p)
	if err := p.SetUsers([]User{{ID: "bob", PasswordHash: cheap("x")}}); err != nil {
		t.Fatal(err)
	}
	if resp, _ := exchange(t, p, func(v url.Values) { v.Set("code", c) }, p.ClientSecret()); resp.StatusCode == http.StatusOK {
		t.Error("a removed user got a token")
	}
}

func TestPasswordHash(t *testing.T) {
	s, err := HashPassword("pässword")
	if err != nil {
		t.Fatal(err)
	}
	h, err := parseHash(s)
	if err != nil {
		t.Fatal(err)
	}
	if !h.matches("pässword") || h.matches("password") || h.matches("") {
		t.Error("matches the wrong passwords")
	}
	if h.costs != defaultCosts {
		t.Errorf("got costs %+v", h.costs)
	}
	again, err := HashPassword("pässword")
	if err != nil || again == s {
		t.Error("two hashes of one password are the same")
	}
	for _, bad := range []string{"", strings.Repeat("x", maxPassword+1)} {
		if _, err := HashPassword(bad); err == nil {
			t.Errorf("a password of %d bytes was hashed", len(bad))
		}
	}
}

// What other tools write must be read: a hash made by argon2 itself.
func TestForeignPasswordHash(t *testing.T) {
	salt := []byte("somesaltsomesalt")
	key := argon2.IDKey([]byte("password"), salt, 3, 64<<10, 4, 32)
	s := "$argon2id$v=19$m=65536,t=3,p=4$" + base64.RawStdEncoding.EncodeToString(salt) + "$" + base64.RawStdEncoding.EncodeToString(key)
	h, err := parseHash(s)
	if err != nil {
		t.Fatal(err)
	}
	if !h.matches("password") {
		t.Error("does not match")
	}
}

func TestBadPasswordHashes(t *testing.T) {
	good := cheap("x")
	for name, s := range map[string]string{
		"empty": "", "plain": "secret", "bcrypt": "$2y$10$abcdefghijklmnopqrstuv", "argon2i": strings.Replace(good, "argon2id", "argon2i", 1),
		"version": strings.Replace(good, "v=19", "v=16", 1), "cheap": strings.Replace(good, "m=8192", "m=1024", 1),
		"costly": strings.Replace(good, "m=8192", "m=4194304", 1), "many passes": strings.Replace(good, "t=1", "t=1000", 1),
		"zero": strings.Replace(good, "t=1", "t=0", 1), "more": good + "$x", "blank": good + " ", "cut": good[:len(good)-30],
	} {
		if _, err := parseHash(s); err == nil {
			t.Errorf("%s: accepted %q", name, s)
		}
	}
}

func FuzzParseHash(f *testing.F) {
	f.Add(cheap("x"))
	f.Add("$argon2id$v=19$m=8192,t=1,p=1$$")
	f.Fuzz(func(t *testing.T, s string) {
		h, err := parseHash(s)
		if err == nil && (h.memory > maxCosts.memory || h.time > maxCosts.time || h.String() != s) {
			t.Fatalf("accepted %q", s)
		}
	})
}

func TestValidateUsers(t *testing.T) {
	hash := cheap("x")
	faults := Validate([]User{
		{ID: "alice", Email: "alice@corp.example", PasswordHash: hash},
		{ID: "", PasswordHash: hash},
		{ID: "b\nb", PasswordHash: hash},
		{ID: "carol", Email: "not an address", PasswordHash: "secret"},
		{ID: "ALICE", PasswordHash: hash},
		{ID: "dora", Email: "alice@CORP.example", PasswordHash: hash, Groups: []string{"ok", ""}},
	})
	want := []string{"[1].id", "[2].id", "[3].email", "[3].password_hash", "[4].id", "[5].groups[1]", "[5].id"}
	var got []string
	for _, f := range faults {
		got = append(got, f.Key)
		if strings.Contains(f.Message, "secret") {
			t.Errorf("%s repeats the password hash: %s", f.Key, f.Message)
		}
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("got %v; want %v", got, want)
	}
}

// An unknown name must cost as much as a wrong password.
func TestUnknownNamesAreHashedToo(t *testing.T) {
	d, err := newDirectory([]User{{ID: "alice", PasswordHash: cheap("right")}})
	if err != nil {
		t.Fatal(err)
	}
	if d.nobody.costs != d.byID["alice"].hash.costs {
		t.Errorf("nobody costs %+v, alice %+v", d.nobody.costs, d.byID["alice"].hash.costs)
	}
	if d.authenticate("nobody", "") != nil || d.authenticate("alice", "wrong") != nil || d.authenticate(" Alice ", "right") == nil {
		t.Error("the wrong people are let in")
	}
}

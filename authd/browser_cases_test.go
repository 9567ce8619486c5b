package authd_test

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"sallyport"
	"sallyport/authd"
	"sallyport/authd/idp"
	"sallyport/internal/oidcrp/oidcrptest"
	"sallyport/proto/login"
)

// The cases of SECURITY-CASES.md, B: redirects and callbacks.

// atCallback runs a login up to the provider's redirect to authd, which it
// returns without following it.
func atCallback(w *world, browser *http.Client, start string) *url.URL {
	w.t.Helper()
	a := w.get(browser, start)
	for range 5 {
		next, err := a.url.Parse(a.header.Get("Location"))
		if err != nil {
			w.t.Fatal(err)
		}
		if next.Path == login.PathCallback {
			return next
		}
		a = w.get(browser, next.String())
	}
	w.t.Fatal("no callback")
	return nil
}

func with(u *url.URL, change func(url.Values)) string {
	q := u.Query()
	change(q)
	c := *u
	c.RawQuery = q.Encode()
	return c.String()
}

func TestCase_B1_State(t *testing.T) {
	w := withProvider(t)
	browser, a := w.browser(), w.agent()
	back := atCallback(w, browser, a.authorizeURL())
	w.pageRefused(w.get(browser, with(back, func(q url.Values) { q.Del("state") })), "login.state_unknown")
	w.pageRefused(w.get(browser, with(back, func(q url.Values) { q.Set("state", "unknown") })), "login.state_unknown")
	w.pageRefused(w.get(browser, with(back, func(q url.Values) { q.Set("state", strings.Repeat("x", 5000)) })), "login.state_unknown")
	w.clock.advance(10*time.Minute + time.Second)
	w.pageRefused(w.get(browser, back.String()), "login.state_unknown")
}

func TestCase_B2_StateOfAnotherBrowser(t *testing.T) {
	w := withProvider(t)
	attacker, victim := w.browser(), w.browser()
	back := atCallback(w, attacker, w.agent().authorizeURL())
	w.pageRefused(w.get(victim, back.String()), "login.state_mismatch")

	atCallback(w, victim, w.agent().authorizeURL()) // the victim has a login of its own under way
	w.pageRefused(w.get(victim, back.String()), "login.state_mismatch")
	w.accepted(w.get(attacker, back.String()))
}

func TestCase_B4_IdPError(t *testing.T) {
	w := withProvider(t)
	browser, a := w.browser(), w.agent()
	back := atCallback(w, browser, a.authorizeURL())
	evil := "<script>alert(1)</script>" + strings.Repeat("x", 1000)
	end := w.get(browser, with(back, func(q url.Values) {
		q.Del("code")
		q.Set("error", "access_denied")
		q.Set("error_description", evil)
	}))
	w.pageRefused(end, "login.idp_error")
	if strings.Contains(end.body, "script") || strings.Contains(end.body, "xxxx") {
		t.Error("the page repeats what the provider said")
	}
	r, _ := w.audit.last(sallyport.AuditLoginFailed)
	if !strings.Contains(r.Detail, "access_denied") || len([]rune(r.Detail)) > 200 {
		t.Errorf("audit detail: got %d characters: %s", len(r.Detail), r.Detail)
	}
	refresh := end.header.Get("Refresh")
	if !strings.HasPrefix(refresh, "4; url="+callback+"?") || !strings.Contains(refresh, "error_description=login.idp_error") || !strings.Contains(refresh, "state="+a.state) {
		t.Errorf("the agent does not hear of it: Refresh is %q", refresh)
	}
}

func TestCase_B5_InjectedCode(t *testing.T) {
	w := withProvider(t)
	attacker, victim := w.browser(), w.browser()
	stolen := atCallback(w, victim, w.agent().authorizeURL()).Query().Get("code")
	back := atCallback(w, attacker, w.agent().authorizeURL())
	w.pageRefused(w.get(attacker, with(back, func(q url.Values) { q.Set("code", stolen) })), "login.code_rejected")
}

func TestCase_B6_AlwaysS256(t *testing.T) {
	for name, methods := range map[string]any{"none announced": nil, "plain": []string{"plain"}, "S256": []string{"S256"}} {
		w := withProvider(t)
		w.idp.Discovery = func(m map[string]any) {
			delete(m, "code_challenge_methods_supported")
			if methods != nil {
				m["code_challenge_methods_supported"] = methods
			}
		}
		w.accepted(loginEnds(w))
		q := w.idp.LastQuery()
		if q.Get("code_challenge_method") != "S256" || len(q.Get("code_challenge")) != 43 || q.Get("nonce") == "" || q.Get("scope") != "openid profile email" {
			t.Errorf("%s: the provider got %v", name, q)
		}
	}
}

func TestCase_B9_CrossSite(t *testing.T) {
	cases := map[string][]string{
		"cross-site":       {"Sec-Fetch-Site", "cross-site"},
		"same-site":        {"Sec-Fetch-Site", "same-site"},
		"none":             {"Sec-Fetch-Site", "none"},
		"foreign Origin":   {"Origin", "https://evil.example"},
		"null Origin":      {"Origin", "null"},
		"Origin with path": {"Origin", "https://127.0.0.1.evil.example"},
	}
	for name, header := range cases {
		t.Run(name, func(t *testing.T) {
			w := withProvider(t)
			browser, a := w.browser(), w.agent()
			form := hidden(w.follow(browser, w.get(browser, a.authorizeURL())).body)
			form.Set("answer", "allow")
			end := w.post(browser, w.url+login.PathConsent, form, header...)
			if end.status != http.StatusForbidden || end.header.Get("Location") != "" {
				t.Errorf("got %d to %q; want 403", end.status, end.header.Get("Location"))
			}
			w.audited("login.cross_site")
			// Nothing changed: the person's own answer still counts.
			if end := w.post(browser, w.url+login.PathConsent, form, "Origin", w.url); end.header.Get("Location") == "" {
				t.Errorf("afterwards the real answer got %d %s", end.status, text(end.body))
			}
		})
	}
	t.Run("login form of the embedded provider", func(t *testing.T) {
		w := withEmbedded(t)
		browser := w.browser()
		page := w.follow(browser, w.get(browser, w.agent().authorizeURL()))
		form := hidden(page.body)
		form.Set("username", "alice")
		form.Set("password", "correct horse")
		for _, header := range cases {
			if end := w.post(browser, w.url+"/idp/login", form, header...); end.status != http.StatusForbidden {
				t.Errorf("%v: got %d; want 403", header, end.status)
			}
		}
		if end := w.post(w.browser(), w.url+"/idp/login", form); end.status != http.StatusBadRequest {
			t.Errorf("from another browser: got %d; want 400", end.status)
		}
	})
	t.Run("consent needs POST and the flow's cookie", func(t *testing.T) {
		w := withProvider(t)
		browser := w.browser()
		form := hidden(w.follow(browser, w.get(browser, w.agent().authorizeURL())).body)
		form.Set("answer", "allow")
		if end := w.get(browser, w.url+login.PathConsent+"?"+form.Encode()); end.status != http.StatusMethodNotAllowed {
			t.Errorf("GET: got %d; want 405", end.status)
		}
		w.pageRefused(w.post(w.browser(), w.url+login.PathConsent, form), "login.state_mismatch")
	})
}

func TestCase_B13_DuplicateParameters(t *testing.T) {
	w := withProvider(t)
	browser, a := w.browser(), w.agent()
	back := atCallback(w, browser, a.authorizeURL())
	for _, name := range []string{"state", "code", "iss", "anything"} {
		w.pageRefused(w.get(browser, with(back, func(q url.Values) { q.Add(name, "a"); q.Add(name, "b") })), "login.duplicate_parameter")
	}
	w.pageRefused(w.get(browser, a.authorizeURL(func(q url.Values) { q.Add("state", "b") })), "login.duplicate_parameter")
	w.pageRefused(w.get(browser, back.String()+"&x=%zz"), "bad_request")
	w.pageRefused(w.get(browser, back.String()+";y=1"), "bad_request")
	w.accepted(w.get(browser, back.String()))
}

func TestCase_B15_StartAgain(t *testing.T) {
	w := withProvider(t)
	browser, a := w.browser(), w.agent()
	back := atCallback(w, browser, a.authorizeURL())
	consent := w.get(browser, back.String())
	w.accepted(consent)
	w.pageRefused(w.get(browser, back.String()), "login.state_unknown") // the back button

	form := hidden(consent.body)
	form.Set("answer", "allow")
	a.code(w.post(browser, w.url+login.PathConsent, form))
	w.pageRefused(w.post(browser, w.url+login.PathConsent, form), "login.state_unknown") // twice

	late := w.follow(browser, w.get(browser, a.authorizeURL(func(q url.Values) { q.Del(login.ParamDevice) })))
	w.accepted(late)
	form = hidden(late.body)
	form.Set("answer", "allow")
	w.clock.advance(5*time.Minute + time.Second)
	w.pageRefused(w.post(browser, w.url+login.PathConsent, form), "login.state_unknown")
}

func TestAuthorizeRefuses(t *testing.T) {
	w := withProvider(t)
	browser, a := w.browser(), w.agent()
	redirect := func(v string) func(url.Values) { return func(q url.Values) { q.Set("redirect_uri", v) } }
	cases := map[string]func(url.Values){
		"https":            redirect("https://127.0.0.1:1/x"),
		"localhost":        redirect("http://localhost:1/x"),
		"other loopback":   redirect("http://127.0.0.2:1/x"),
		"decimal":          redirect("http://2130706433:1/x"),
		"short":            redirect("http://127.1:1/x"),
		"mapped":           redirect("http://[::ffff:127.0.0.1]:1/x"),
		"zone":             redirect("http://[::1%25lo]:1/x"),
		"no port":          redirect("http://127.0.0.1/x"),
		"port 0":           redirect("http://127.0.0.1:0/x"),
		"port 65536":       redirect("http://127.0.0.1:65536/x"),
		"port +1":          redirect("http://127.0.0.1:+1/x"),
		"port 01":          redirect("http://127.0.0.1:01/x"),
		"no path":          redirect("http://127.0.0.1:1"),
		"query":            redirect("http://127.0.0.1:1/x?a"),
		"empty query":      redirect("http://127.0.0.1:1/x?"),
		"fragment":         redirect("http://127.0.0.1:1/x#a"),
		"user":             redirect("http://127.0.0.1@evil.example:1/x"),
		"user of loopback": redirect("http://evil.example@127.0.0.1:1/x"),
		"evil suffix":      redirect("http://127.0.0.1.evil.example:1/x"),
		"backslash":        redirect(`http://evil.example\@127.0.0.1:1/x`),
		"newline":          redirect("http://127.0.0.1:1/x\nSet-Cookie: a=b"),
		"escaped newline":  redirect("http://127.0.0.1:1/x%0d%0aSet-Cookie:a=b"),
		"javascript":       redirect("javascript:alert(1)//127.0.0.1:1/x"),
		"long":             redirect("http://127.0.0.1:1/" + strings.Repeat("x", 300)),
		"no state":         func(q url.Values) { q.Del("state") },
		"long state":       func(q url.Values) { q.Set("state", strings.Repeat("x", 513)) },
		"plain PKCE":       func(q url.Values) { q.Set("code_challenge_method", "plain") },
		"no PKCE":          func(q url.Values) { q.Del("code_challenge") },
		"short challenge":  func(q url.Values) { q.Set("code_challenge", "x") },
		"no key":           func(q url.Values) { q.Del(login.ParamDPoPJKT) },
		"token flow":       func(q url.Values) { q.Set("response_type", "token") },
		"other client":     func(q url.Values) { q.Set("client_id", "other") },
	}
	for name, change := range cases {
		t.Run(name, func(t *testing.T) {
			w.t = t
			end := w.get(browser, a.authorizeURL(change))
			if end.header.Get("Location") != "" || end.header.Get("Refresh") != "" {
				t.Errorf("the browser is sent to %s%s", end.header.Get("Location"), end.header.Get("Refresh"))
			}
			w.pageRefused(end, "login.bad_request")
		})
	}
	w.t = t
	if end := w.get(browser, a.authorizeURL(redirect("http://[::1]:4711/x"))); end.status != http.StatusFound {
		t.Errorf("[::1]: got %d; want a redirect to the provider", end.status)
	}
}

// R5, for our own pages: nothing is reflected, nothing loads, nothing is kept.
func TestCase_R5_PagesReflectNothing(t *testing.T) {
	w := withEmbedded(t)
	browser, a := w.browser(), w.agent()
	const canary = "canary7%3Cscript%3E"
	for _, target := range []string{
		w.url + "/?x=" + canary, w.url + login.PathCallback + "?state=" + canary + "&code=" + canary,
		w.url + login.PathAuthorize + "?state=" + canary, w.url + "/idp/login?id=" + canary, w.url + "/idp/authorize?client_id=" + canary,
		w.url + "/idp/authorize/callback?id=" + canary, w.url + "/" + canary,
		a.authorizeURL(),
	} {
		end := w.follow(browser, w.get(browser, target))
		if strings.Contains(end.body, "canary7") {
			t.Errorf("%s: reflected in %s", target, text(end.body))
		}
		csp := end.header.Get("Content-Security-Policy")
		if !strings.HasPrefix(csp, "default-src 'none'; style-src 'sha256-") || !strings.Contains(csp, "frame-ancestors 'none'") {
			t.Errorf("%s: CSP %q", target, csp)
		}
		for name, want := range map[string]string{
			"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "same-origin",
		} {
			if got := end.header.Get(name); got != want {
				t.Errorf("%s: %s is %q; want %q", target, name, got, want)
			}
		}
	}
}

func TestFlowCookie(t *testing.T) {
	w := withProvider(t)
	end := w.get(w.browser(), w.agent().authorizeURL())
	cookie := end.header.Get("Set-Cookie")
	for _, want := range []string{"__Host-", "; Path=/", "; HttpOnly", "; Secure", "; SameSite=Lax", "; Max-Age=900"} {
		if !strings.Contains(cookie, want) {
			t.Errorf("got cookie %q; want %s", cookie, want)
		}
	}
}

func TestTwoLoginsOfOneBrowserAtOnce(t *testing.T) {
	w := withProvider(t)
	browser := w.browser()
	first := atCallback(w, browser, w.agent().authorizeURL())
	second := atCallback(w, browser, w.agent().authorizeURL())
	w.accepted(w.get(browser, second.String()))
	w.accepted(w.get(browser, first.String()))
}

// The provider fails, and then is gone: logins are refused with words that say so,
// sessions go on, and authd stays ready.
func TestCase_M7_IdPOutOfReach(t *testing.T) {
	w := withProvider(t)
	w.run()
	a := w.agent()
	session := a.login(w.browser()).Session
	goesOn := func() {
		t.Helper()
		if _, p, status := a.renew(session); status != http.StatusOK {
			t.Errorf("a renewal: %d %+v", status, p)
		}
		if err := w.server.Ready(); err != nil {
			t.Errorf("not ready: %v", err)
		}
	}
	w.idp.Status = http.StatusInternalServerError
	end := loginEnds(w)
	if end.status != http.StatusServiceUnavailable || end.header.Get("Retry-After") == "" || !strings.Contains(end.body, "identity provider") {
		t.Errorf("got %d %s; want 503 with Retry-After and the reason", end.status, text(end.body))
	}
	goesOn()
	w.idp.Server.Close()
	if end := loginBroken(w); end.status != http.StatusServiceUnavailable {
		t.Errorf("got %d; want 503", end.status)
	}
	goesOn()
}

// loginBroken is a callback while the provider is gone.
func loginBroken(w *world) answer {
	fresh := withProvider(w.t)
	fresh.idp.Server.Close()
	return fresh.get(fresh.browser(), fresh.agent().authorizeURL())
}

func TestUserOfAnotherIssuer(t *testing.T) {
	w := withProvider(t)
	put(w, sallyport.Put(sallyport.KindUser, "alice", sallyport.User{ID: "alice", Issuer: "https://old.example"}))
	w.pageRefused(loginEnds(w), "login.issuer_changed")
}

func TestDisabledUserAndRevokedDevice(t *testing.T) {
	w := withProvider(t)
	a, browser := w.agent(), w.browser()
	a.login(browser)
	d := record[sallyport.Device](w, sallyport.KindDevice, string(a.device.ID))
	d.Revoked = true
	put(w, sallyport.Put(sallyport.KindDevice, string(d.ID), d))
	end := w.follow(browser, w.get(browser, a.authorizeURL()))
	if end.status != http.StatusBadRequest || !strings.Contains(end.body, "login.device_revoked") {
		t.Errorf("got %d %s; want login.device_revoked", end.status, text(end.body))
	}
	// A revoked device that does not say which one it is gets as far as the code.
	code := a.code(w.browse(browser, a.authorizeURL(func(q url.Values) { q.Del(login.ParamDevice) })))
	w.refused(login.PathToken, a.tokenRequest(code), http.StatusBadRequest, "login.device_revoked")

	u := record[sallyport.User](w, sallyport.KindUser, "alice")
	u.Disabled = true
	put(w, sallyport.Put(sallyport.KindUser, "alice", u))
	end = loginEnds(w)
	if end.status != http.StatusBadRequest || !strings.Contains(end.body, "login.user_disabled") {
		t.Errorf("got %d %s; want login.user_disabled", end.status, text(end.body))
	}
}

func put(w *world, ops ...sallyport.Op) {
	w.t.Helper()
	if _, err := w.records.Apply(context.Background(), ops); err != nil {
		w.t.Fatal(err)
	}
}

func TestCase_S7_LoginStorm(t *testing.T) {
	w := withProvider(t)
	browser, a := w.browser(), w.agent()
	limited := 0
	for range 100 {
		if end := w.get(browser, a.authorizeURL()); end.status == http.StatusTooManyRequests {
			limited++
			if end.header.Get("Retry-After") == "" {
				t.Fatal("429 without Retry-After")
			}
		}
	}
	if limited < 20 {
		t.Errorf("%d of 100 logins at once were limited; want at least 20", limited)
	}
	w.clock.advance(time.Minute)
	w.accepted(loginEnds(w))
}

func TestWrongPasswordsAreLimited(t *testing.T) {
	w := withEmbedded(t, func(c *authd.Config) {})
	try := func(name, password string) answer {
		browser := w.browser()
		page := w.follow(browser, w.get(browser, w.agent().authorizeURL()))
		form := hidden(page.body)
		form.Set("username", name)
		form.Set("password", password)
		return w.post(browser, page.url.String(), form)
	}
	for i := range 10 {
		if end := try("ALICE", "wrong"); end.status != http.StatusUnauthorized || strings.Contains(end.body, "unknown") {
			t.Fatalf("attempt %d: got %d; want 401", i, end.status)
		}
	}
	if end := try("alice", "correct horse"); end.status != http.StatusTooManyRequests {
		t.Errorf("after 10 wrong passwords the right one got %d; want 429", end.status)
	}
	if end := try("nobody", "wrong"); end.status != http.StatusUnauthorized || !strings.Contains(end.body, "User name or password is wrong.") {
		t.Errorf("unknown user: got %d %s", end.status, text(end.body))
	}
	w.clock.advance(10 * time.Second)
	if end := try("Alice@corp.example", "correct horse"); end.status != http.StatusSeeOther {
		t.Errorf("later: got %d; want to be let in", end.status)
	}
}

func TestEmbeddedBesideAnotherIsRefused(t *testing.T) {
	hash, err := idp.HashPassword("x")
	if err != nil {
		t.Fatal(err)
	}
	cfg := authd.Config{
		PublicURL: "https://auth.corp.example", Listen: ":443",
		IDP:   authd.IDP{Issuer: "https://login.corp.example", ClientID: "c"},
		Users: []idp.User{{ID: "alice", PasswordHash: hash}},
	}
	if faults := cfg.Validate(); len(faults) != 1 || faults[0].Key != "users" {
		t.Errorf("got %v; want one fault at users", faults)
	}
}

func TestCase_P6_NoSecretInTheLog(t *testing.T) {
	for name, w := range map[string]*world{"embedded": withEmbedded(t), "provider": withProvider(t)} {
		a, browser := w.agent(), w.browser()
		code := a.code(w.browse(browser, a.authorizeURL()))
		req := a.tokenRequest(code)
		w.call(login.PathToken, req, nil)
		w.refused(login.PathToken, req, http.StatusBadRequest, "login.code_unknown")
		secrets := map[string]string{"code": code, "verifier": a.verifier, "proof": req.Proof, "password": "correct horse", "client secret": oidcrptest.Secret}
		home, err := url.Parse(w.url)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range browser.Jar.Cookies(home) {
			secrets["cookie"] = c.Value
		}
		back := w.url + login.PathCallback + "?state=" + a.state + "&error=x&error_description=canary-of-the-provider"
		w.get(browser, back)
		secrets["error_description"] = "canary-of-the-provider"
		secrets["state"] = a.state
		log := w.log.String()
		if !strings.Contains(log, "login refused") {
			t.Errorf("%s: nothing was logged: %s", name, log)
		}
		for what, secret := range secrets {
			if secret != "" && strings.Contains(log, secret) {
				t.Errorf("%s: the log holds the %s", name, what)
			}
		}
	}
}

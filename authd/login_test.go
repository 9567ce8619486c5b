package authd_test

import (
	"context"
	"crypto/x509"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport"
	"sallyport/authd"
	"sallyport/internal/oidcrp/oidcrptest"
	"sallyport/proto/connect"
	"sallyport/proto/login"
)

func TestLoginWithEmbeddedProvider(t *testing.T) {
	w := withEmbedded(t)
	w.run()
	a := w.agent()
	g := a.login(w.browser())

	if g.User != "alice" || g.Email != "alice@corp.example" || g.Name != "Alice" || g.Domain != domain {
		t.Errorf("got grant for %q %q %q %q", g.User, g.Email, g.Name, g.Domain)
	}
	cert := leaf(t, g.Certificate)
	if id, err := connect.SessionOf(cert, domain); err != nil || id != g.Session {
		t.Errorf("certificate is of session %q, %v; want %q", id, err, g.Session)
	}
	pool := x509.NewCertPool()
	pool.AddCert(w.ca.Certificate())
	if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Errorf("certificate: %v", err)
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err == nil {
		t.Error("certificate would do for a server")
	}
	if life := cert.NotAfter.Sub(cert.NotBefore); life != time.Hour+2*time.Minute {
		t.Errorf("certificate lives %v; want 1h and 2m back-dated", life)
	}
	if g.RenewIn != 30*time.Minute || g.ExpiresIn < 12*time.Hour-time.Minute || g.ExpiresIn > 12*time.Hour {
		t.Errorf("got renew in %v, expires in %v", g.RenewIn, g.ExpiresIn)
	}
	if cert.IsCA || cert.Subject.String() != "" || len(cert.EmailAddresses) != 0 {
		t.Errorf("certificate says more than its session: %v", cert.Subject)
	}

	session := record[sallyport.Session](w, sallyport.KindSession, string(g.Session))
	if session.Device != a.device.ID || session.User != "alice" || session.Kind != sallyport.AgentSession || session.Address != "127.0.0.1" {
		t.Errorf("got session %+v", session)
	}
	if diff := cmp.Diff([]string{"pwd"}, session.AuthMethods); diff != "" {
		t.Errorf("auth methods (-want +got):\n%s", diff)
	}
	groups := record[sallyport.DirectoryUser](w, sallyport.KindDirectoryUser, "alice").Groups
	if diff := cmp.Diff([]sallyport.Group{{ID: "dba"}, {ID: "staff"}}, groups); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
	device := record[sallyport.Device](w, sallyport.KindDevice, string(a.device.ID))
	if device.Type != "file" || device.Name != "laptop <b>" || device.Users["alice"].IsZero() {
		t.Errorf("got device %+v", device)
	}
	if r, ok := w.audit.last(sallyport.AuditLogin); !ok || r.User != "alice" || r.Session != g.Session || r.Device != a.device.ID {
		t.Errorf("audit: got %+v", r)
	}
	trust := record[sallyport.Trust](w, sallyport.KindTrust, "current")
	if trust.SessionCAs != string(w.ca.PEM()) {
		t.Errorf("got trust %q", trust.SessionCAs)
	}
}

func TestSecondLoginAsksNoConsent(t *testing.T) {
	w := withProvider(t)
	a := w.agent()
	browser := w.browser()

	first := w.follow(browser, w.get(browser, a.authorizeURL()))
	if first.status != http.StatusOK || !strings.Contains(first.body, "Is this your computer?") {
		t.Fatalf("a new key was not asked about: %d %s", first.status, text(first.body))
	}
	for _, want := range []string{"laptop &lt;b&gt;", "linux", "SHA256:" + a.device.Thumbprint, "127.0.0.1", "alice@corp.example"} {
		if !strings.Contains(first.body, want) {
			t.Errorf("the consent page does not show %q", want)
		}
	}
	if csp := first.header.Get("Content-Security-Policy"); !strings.Contains(csp, "form-action 'self' http://127.0.0.1:4711") {
		t.Errorf("got CSP %q; the answer would not reach the agent", csp)
	}
	a.login(browser)

	again := w.follow(browser, w.get(browser, a.authorizeURL()))
	if again.header.Get("Location") == "" {
		t.Errorf("a confirmed key was asked about again: %s", text(again.body))
	}

	other := w.agent() // another key that calls itself the confirmed device
	lied := w.follow(browser, w.get(browser, other.authorizeURL(func(q url.Values) { q.Set(login.ParamDevice, string(a.device.ID)) })))
	if !strings.Contains(lied.body, "Is this your computer?") {
		t.Error("another key passed for the confirmed device")
	}
}

func TestConsentDenied(t *testing.T) {
	w := withProvider(t)
	a, browser := w.agent(), w.browser()
	page := w.follow(browser, w.get(browser, a.authorizeURL()))
	form := hidden(page.body)
	form.Set("answer", "deny")
	end := w.post(browser, w.url+login.PathConsent, form, "Sec-Fetch-Site", "same-origin")
	u, err := url.Parse(end.header.Get("Location"))
	if err != nil {
		t.Fatal(err)
	}
	if q := u.Query(); q.Get("error") != "access_denied" || q.Get("error_description") != "login.denied" || q.Get("state") != a.state {
		t.Errorf("the agent hears %v", q)
	}
	w.audited("login.denied")
	form.Set("answer", "allow")
	w.pageRefused(w.post(browser, w.url+login.PathConsent, form, "Sec-Fetch-Site", "same-origin"), "login.state_unknown")
}

func TestRenewal(t *testing.T) {
	w := withEmbedded(t)
	a := w.agent()
	g := a.login(w.browser())

	again, p, status := a.renew(g.Session)
	if status != http.StatusOK {
		t.Fatalf("got %d %s", status, p.Code)
	}
	if again.Session != g.Session || leaf(t, again.Certificate).PublicKey == nil || again.Certificate == g.Certificate {
		t.Errorf("got session %s", again.Session)
	}

	w.clock.advance(3 * time.Hour) // the laptop slept: the certificate is over, the session is not
	if _, p, status = a.renew(g.Session); status != http.StatusOK {
		t.Errorf("after sleep: got %d %s; want a certificate", status, p.Code)
	}

	w.clock.advance(9*time.Hour - 20*time.Minute)
	last, p, status := a.renew(g.Session)
	if status != http.StatusOK {
		t.Fatalf("got %d %s", status, p.Code)
	}
	session := record[sallyport.Session](w, sallyport.KindSession, string(g.Session))
	if cert := leaf(t, last.Certificate); cert.NotAfter.After(session.Expires.Add(time.Second)) {
		t.Errorf("certificate until %v outlives its session until %v", cert.NotAfter, session.Expires)
	}

	w.clock.advance(time.Hour)
	if _, p, status = a.renew(g.Session); status != http.StatusUnauthorized || p.Code != connect.ProblemLogin {
		t.Errorf("after the session's end: got %d %s; want 401 login_required", status, p.Code)
	}
}

func TestRenewalEndsWithItsReasons(t *testing.T) {
	cases := map[string]func(w *world, s sallyport.Session) sallyport.Op{
		"session revoked": func(_ *world, s sallyport.Session) sallyport.Op {
			return sallyport.Op{Kind: sallyport.KindSession, ID: string(s.ID), Delete: true}
		},
		"login revoked": func(_ *world, s sallyport.Session) sallyport.Op {
			return sallyport.Op{Kind: sallyport.KindLogin, ID: string(s.Login), Delete: true}
		},
		"user disabled": func(w *world, s sallyport.Session) sallyport.Op {
			u := record[sallyport.User](w, sallyport.KindUser, string(s.User))
			u.Disabled = true
			return sallyport.Put(sallyport.KindUser, string(u.ID), u)
		},
		"device revoked": func(w *world, s sallyport.Session) sallyport.Op {
			d := record[sallyport.Device](w, sallyport.KindDevice, string(s.Device))
			d.Revoked = true
			return sallyport.Put(sallyport.KindDevice, string(d.ID), d)
		},
	}
	for name, change := range cases {
		t.Run(name, func(t *testing.T) {
			w := withProvider(t)
			a := w.agent()
			g := a.login(w.browser())
			op := change(w, record[sallyport.Session](w, sallyport.KindSession, string(g.Session)))
			if _, err := w.records.Apply(context.Background(), []sallyport.Op{op}); err != nil {
				t.Fatal(err)
			}
			if _, p, status := a.renew(g.Session); status != http.StatusUnauthorized || p.Code != connect.ProblemLogin {
				t.Errorf("got %d %s; want 401 login_required", status, p.Code)
			}
		})
	}
}

func TestExtend(t *testing.T) {
	w := withProvider(t)
	a, browser := w.agent(), w.browser()
	g := a.login(browser)
	before := record[sallyport.Session](w, sallyport.KindSession, string(g.Session))

	w.clock.advance(8 * time.Hour)
	shift(w, 8*time.Hour)
	extend := func(q url.Values) { q.Set(login.ParamExtend, string(g.Session)) }
	again := a.login(browser, extend)
	if again.Session != g.Session {
		t.Errorf("got session %s; want the same, %s", again.Session, g.Session)
	}
	after := record[sallyport.Session](w, sallyport.KindSession, string(g.Session))
	if after.Login != before.Login || !after.Expires.After(before.Expires.Add(7*time.Hour)) || !after.Created.Equal(before.Created) {
		t.Errorf("got %+v; want the same login and a later end than %v", after, before.Expires)
	}

	w.idp.Claims = func(c map[string]any) { shiftClaims(c, 8*time.Hour); c["sub"] = "mallory" }
	code := a.code(w.browse(browser, a.authorizeURL(extend)))
	w.refused(login.PathToken, a.tokenRequest(code), http.StatusBadRequest, "login.extend_mismatch")
	shift(w, 8*time.Hour)

	other := w.agent()
	code = other.code(w.browse(browser, other.authorizeURL(extend)))
	w.refused(login.PathToken, other.tokenRequest(code), http.StatusBadRequest, "login.extend_mismatch")
}

// shift makes the provider's tokens of a time that a test moved to.
func shift(w *world, d time.Duration) {
	w.idp.Claims = func(c map[string]any) { shiftClaims(c, d) }
}

func shiftClaims(c map[string]any, d time.Duration) {
	c["iat"] = time.Now().Add(d).Unix()
	c["exp"] = time.Now().Add(d + 5*time.Minute).Unix()
}

func TestLogout(t *testing.T) {
	for _, single := range []bool{false, true} {
		w := withProvider(t)
		cfg := w.cfg
		cfg.Session.SingleLogout = single
		if err := w.server.Reload(cfg); err != nil {
			t.Fatal(err)
		}
		a := w.agent()
		g := a.login(w.browser())
		session := record[sallyport.Session](w, sallyport.KindSession, string(g.Session))

		thief := w.agent()
		w.refused(login.PathLogout, login.LogoutRequest{Session: g.Session, Proof: thief.proof("logout", g.Session, nil)}, http.StatusBadRequest, "proof.wrong_key")

		if status := w.call(login.PathLogout, login.LogoutRequest{Session: g.Session, Proof: a.proof("logout", g.Session, nil)}, nil); status != http.StatusNoContent {
			t.Fatalf("got %d; want 204", status)
		}
		if n := w.sessions(); n != 0 {
			t.Errorf("single_logout %v: %d sessions left", single, n)
		}
		_, err := w.records.Get(context.Background(), sallyport.KindLogin, string(session.Login))
		if gone := err != nil; gone != single {
			t.Errorf("single_logout %v: login gone: %v", single, gone)
		}
		if _, p, status := a.renew(g.Session); status != http.StatusUnauthorized {
			t.Errorf("renewal after logout: got %d %s; want 401", status, p.Code)
		}
	}
}

func TestReloadOfUsersTakesEffectAtOnce(t *testing.T) {
	w := withEmbedded(t)
	w.run()
	a := w.agent()
	g := a.login(w.browser())
	cfg := w.cfg

	cfg.Users = append(cfg.Users[:0:0], cfg.Users...)
	cfg.Users[0].Groups = []string{"staff"}
	if err := w.server.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	groups := record[sallyport.DirectoryUser](w, sallyport.KindDirectoryUser, "alice").Groups
	if diff := cmp.Diff([]sallyport.Group{{ID: "staff"}}, groups); diff != "" {
		t.Errorf("groups after reload (-want +got):\n%s", diff)
	}

	without := cfg
	without.Users = cfg.Users[1:]
	if err := w.server.Reload(without); err != nil {
		t.Fatal(err)
	}
	if u := record[sallyport.User](w, sallyport.KindUser, "alice"); !u.Disabled {
		t.Error("a removed user is not disabled")
	}
	if _, p, status := a.renew(g.Session); status != http.StatusUnauthorized {
		t.Errorf("renewal of a removed user: got %d %s; want 401", status, p.Code)
	}
	if err := w.server.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	if u := record[sallyport.User](w, sallyport.KindUser, "alice"); u.Disabled {
		t.Error("a user who came back is still disabled")
	}
}

// A login that is written just after its user was removed must not outlive that.
func TestRemovedDuringTheLogin(t *testing.T) {
	w := withEmbedded(t)
	w.run()
	without := w.cfg
	without.Users = w.cfg.Users[1:]
	w.records.beforeSession(func() {
		if err := w.server.Reload(without); err != nil {
			t.Error(err)
		}
	})
	a := w.agent()
	code := a.code(w.browse(w.browser(), a.authorizeURL())) // alice's first: nothing is known of her until it is written
	w.refused(login.PathToken, a.tokenRequest(code), http.StatusBadRequest, "login.user_unknown")
	if u := record[sallyport.User](w, sallyport.KindUser, "alice"); !u.Disabled {
		t.Error("a user who was removed during the login is not disabled")
	}
	if logins, err := w.records.List(t.Context(), sallyport.KindLogin); err != nil || len(logins) != 0 {
		t.Errorf("%d logins of a removed user, %v; want none", len(logins), err)
	}
}

// Groups that change while a login is written are those of afterwards.
func TestGroupsChangedDuringTheLogin(t *testing.T) {
	w := withEmbedded(t)
	w.run()
	w.records.beforeSession(func() {
		fewer := w.cfg
		fewer.Users = slices.Clone(fewer.Users)
		fewer.Users[0].Groups = []string{"staff"}
		if err := w.server.Reload(fewer); err != nil {
			t.Error(err)
		}
	})
	w.agent().login(w.browser())
	groups := record[sallyport.DirectoryUser](w, sallyport.KindDirectoryUser, "alice").Groups
	if diff := cmp.Diff([]sallyport.Group{{ID: "staff"}}, groups); diff != "" {
		t.Errorf("groups after the login (-want +got):\n%s", diff)
	}
}

// Who comes back logs in again: what stood open before the removal stays shut.
func TestSessionsOfARemovedUserAreNotRevived(t *testing.T) {
	w := withEmbedded(t)
	w.run()
	a := w.agent()
	g := a.login(w.browser())
	without := w.cfg
	without.Users = w.cfg.Users[1:]
	for _, cfg := range []authd.Config{without, w.cfg} {
		if err := w.server.Reload(cfg); err != nil {
			t.Fatal(err)
		}
	}
	if _, p, status := a.renew(g.Session); status != http.StatusUnauthorized {
		t.Errorf("renewal of a session from before the removal: got %d %s; want 401", status, p.Code)
	}
	if g := a.login(w.browser()); g.User != "alice" {
		t.Errorf("a new login is of %q", g.User)
	}
}

func TestFailedAuditRefuses(t *testing.T) {
	w := withProvider(t)
	a := w.agent()
	code := a.code(w.browse(w.browser(), a.authorizeURL()))
	w.audit.mu.Lock()
	w.audit.broken = context.DeadlineExceeded
	w.audit.mu.Unlock()
	if status := w.call(login.PathToken, a.tokenRequest(code), nil); status != http.StatusServiceUnavailable {
		t.Errorf("got %d; want 503", status)
	}
	if n := w.sessions(); n != 0 {
		t.Errorf("got %d sessions without an audit record", n)
	}
}

// The client secret changes at the provider and in its file: logins that have
// begun are finished with the new one, and a file that holds none changes nothing.
func TestCase_O4_ClientSecretRotatedLive(t *testing.T) {
	w := withProvider(t)
	w.run()
	w.agent().login(w.browser())
	underWay, person := w.agent(), w.browser()
	sent := w.get(person, underWay.authorizeURL()) // the person is about to log in at the provider

	const next = "another-secret-of-32-characters-or-more"
	w.idp.RotateSecret(next)
	write := func(secret string) error {
		t.Helper()
		if err := os.WriteFile(w.cfg.IDP.ClientSecretFile, []byte(secret), 0o600); err != nil {
			t.Fatal(err)
		}
		return w.server.Reload(w.cfg)
	}
	if err := write(""); err == nil {
		t.Error("an empty secret was taken")
	}
	if err := write(next + "\n"); err != nil {
		t.Fatal(err)
	}
	code := underWay.code(w.goOn(person, sent))
	if status := w.call(login.PathToken, underWay.tokenRequest(code), nil); status != http.StatusOK {
		t.Errorf("a login under way: status %d", status)
	}
	w.agent().login(w.browser())

	if err := write(oidcrptest.Secret); err != nil { // the provider takes it no more
		t.Fatal(err)
	}
	end := w.browse(w.browser(), w.agent().authorizeURL())
	if end.status != http.StatusBadRequest || !strings.Contains(end.body, "oidc.token_refused") {
		t.Errorf("with the earlier secret: %d %s", end.status, text(end.body))
	}
}

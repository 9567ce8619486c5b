package idp

import (
	"net/http"
	"time"

	"sallyport"
	"sallyport/authd/internal/page"
	"sallyport/internal/ratelimit"
)

// The login form's cookie binds a login to the browser that saw its form first,
// so that nobody can finish in one browser what began in another.
const browserCookie = "__Host-sallyport-idp"

func (p *Provider) showLogin(w http.ResponseWriter, r *http.Request) {
	id := r.URL.Query().Get("id")
	browser := sallyport.NewSecret()
	if c, err := r.Cookie(browserCookie); err == nil && len(c.Value) == len(browser) {
		browser = c.Value // other logins of this browser stay bound
	}
	if !p.store.bind(id, browser) {
		p.startAgain(w)
		return
	}
	http.SetCookie(w, &http.Cookie{
		Name: browserCookie, Value: browser, Path: "/", MaxAge: int(requestLife / time.Second),
		Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode,
	})
	p.form(w, http.StatusOK, id, "", "")
}

func (p *Provider) submitLogin(w http.ResponseWriter, r *http.Request) {
	if !page.SameOrigin(r, page.OriginOf(p.issuer)) {
		p.failed(w, http.StatusForbidden, "Not from here", "This form was sent by another site. Nothing was done.")
		return
	}
	if err := r.ParseForm(); err != nil {
		p.failed(w, http.StatusBadRequest, "Unreadable form", "Go back and try again.")
		return
	}
	id, name, password := r.PostForm.Get("id"), r.PostForm.Get("username"), r.PostForm.Get("password")
	c, err := r.Cookie(browserCookie)
	if err != nil || !p.store.boundTo(id, c.Value) {
		p.startAgain(w)
		return
	}
	user, allowed := p.attempt(r, name, password)
	switch {
	case !allowed:
		w.Header().Set("Retry-After", "10")
		p.form(w, http.StatusTooManyRequests, id, name, "Too many attempts. Wait a little, then try again.")
	case user == nil:
		p.cfg.Log.Info("wrong user name or password", "peer", r.RemoteAddr)
		p.form(w, http.StatusUnauthorized, id, name, "User name or password is wrong.")
	case !p.store.complete(id, user.ID):
		p.startAgain(w)
	default:
		http.Redirect(w, r, p.cfg.Issuer+pathCallback+"?id="+id, http.StatusSeeOther)
	}
}

// attempt checks a password within the limits; allowed is false if it did not.
func (p *Provider) attempt(r *http.Request, name, password string) (user *account, allowed bool) {
	if len(name) > 255 || len(password) > maxPassword {
		return nil, true
	}
	who, where := fold(name), ratelimit.Key(r.RemoteAddr)
	if !p.byAddress.Allow(where) {
		return nil, false
	}
	if !p.byUser.Allow(who) {
		return nil, false
	}
	select {
	case p.hashing <- struct{}{}:
		defer func() { <-p.hashing }()
	case <-r.Context().Done():
		return nil, false
	}
	user = p.users.Load().authenticate(name, password)
	if user != nil {
		p.byAddress.Refund(where)
		p.byUser.Refund(who)
	}
	return user, true
}

func (p *Provider) form(w http.ResponseWriter, status int, id, name, alert string) {
	err := page.Write(w, status, page.Page{
		Title: "Log in",
		Alert: alert,
		Form: &page.Form{
			Action: p.issuer.Path + pathLogin,
			Hidden: []page.Field{{Name: "id", Value: id}},
			Fields: []page.Field{
				{Name: "username", Label: "User name or e-mail", Type: "text", Autocomplete: "username", Value: name, Focus: name == ""},
				{Name: "password", Label: "Password", Type: "password", Autocomplete: "current-password", Focus: name != ""},
			},
			Buttons: []page.Button{{Label: "Log in", Primary: true}},
		},
	})
	if err != nil {
		p.cfg.Log.Debug("page not written", "error", err)
	}
}

func (p *Provider) startAgain(w http.ResponseWriter) {
	p.failed(w, http.StatusBadRequest, "This login is over", "It was finished, took too long, or began in another browser. Start again where you came from.")
}

package browse

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// site is a login like many: a redirect, a form with a token, a cookie, a
// question with two buttons.
func site(t *testing.T) *httptest.Server {
	mux := http.NewServeMux()
	page := func(w http.ResponseWriter, body string) { fmt.Fprint(w, "<!doctype html><title>t</title>"+body) }
	mux.HandleFunc("GET /start", func(w http.ResponseWriter, r *http.Request) {
		http.SetCookie(w, &http.Cookie{Name: "__Host-s", Value: "1", Path: "/", Secure: true, HttpOnly: true})
		http.Redirect(w, r, "/login?x=1", http.StatusSeeOther)
	})
	mux.HandleFunc("GET /login", func(w http.ResponseWriter, r *http.Request) {
		page(w, `<form method="post" action="login"><input type=hidden name=token value="a&amp;b"><input name=user><input type=password name=password><button>go</button></form>`)
	})
	mux.HandleFunc("POST /login", func(w http.ResponseWriter, r *http.Request) {
		_, err := r.Cookie("__Host-s")
		if err != nil || r.FormValue("token") != "a&b" || r.Header.Get("Origin") == "" {
			http.Error(w, "no browser", http.StatusForbidden)
			return
		}
		if r.FormValue("password") != "right" {
			page(w, `<p>wrong password</p><form method="post" action="login"><input type=hidden name=token value="a&amp;b"><input name=user><input type=password name=password></form>`)
			return
		}
		page(w, `<form method=post action="/consent"><button name=answer value=no>no</button><button name=answer value=yes>yes</button></form>`)
	})
	mux.HandleFunc("POST /consent", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/done?answer="+r.FormValue("answer"), http.StatusSeeOther)
	})
	mux.HandleFunc("GET /done", func(w http.ResponseWriter, r *http.Request) {
		page(w, "<p>done: <b>"+r.FormValue("answer")+"</b></p>")
	})
	s := httptest.NewTLSServer(mux)
	t.Cleanup(s.Close)
	return s
}

func browser(s *httptest.Server) *Browser {
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	return New(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13})
}

func TestFollow(t *testing.T) {
	s := site(t)
	page, err := browser(s).Follow(t.Context(), s.URL+"/start", map[string]string{"user": "alice", "password": "right", "answer": "yes"})
	if err != nil {
		t.Fatal(err)
	}
	if page.Text != "done: yes" || page.Status != http.StatusOK {
		t.Errorf("got %d %q; want 200 %q", page.Status, page.Text, "done: yes")
	}
}

func TestFollowStopsWhenRefused(t *testing.T) {
	s := site(t)
	_, err := browser(s).Follow(t.Context(), s.URL+"/start", map[string]string{"user": "alice", "password": "wrong"})
	if err == nil || !strings.Contains(err.Error(), "wrong password") {
		t.Errorf("got %v; want the page's words", err)
	}
}

func TestFollowNeedsEveryField(t *testing.T) {
	s := site(t)
	_, err := browser(s).Follow(t.Context(), s.URL+"/start", map[string]string{"user": "alice"})
	if err == nil || !strings.Contains(err.Error(), `"password"`) {
		t.Errorf("got %v; want the missing field's name", err)
	}
}

package page

import (
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func render(t *testing.T, p Page) (http.Header, string) {
	t.Helper()
	w := httptest.NewRecorder()
	Secure(w.Header(), "http://127.0.0.1:1")
	if err := Write(w, http.StatusOK, p); err != nil {
		t.Fatal(err)
	}
	return w.Header(), w.Body.String()
}

// The style sheet on the page must be the one that the policy allows.
func TestPolicyAllowsTheStyle(t *testing.T) {
	header, body := render(t, Page{Title: "t"})
	_, rest, _ := strings.Cut(body, "<style>")
	css, _, ok := strings.Cut(rest, "</style>")
	if !ok {
		t.Fatal("no style")
	}
	sum := sha256.Sum256([]byte(css))
	csp := header.Get("Content-Security-Policy")
	if want := "style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"; !strings.Contains(csp, want) {
		t.Errorf("policy %q does not allow the page's style, %s", csp, want)
	}
	if !strings.HasSuffix(csp, "form-action 'self' http://127.0.0.1:1") {
		t.Errorf("got policy %q", csp)
	}
}

func TestEverythingIsEscaped(t *testing.T) {
	const evil = `"><script>x</script>`
	_, body := render(t, Page{
		Title: evil, Lead: evil, Alert: evil, Note: evil, Tone: evil, Facts: []Fact{{evil, evil, true}, {evil, evil, false}},
		Link: &Link{evil, evil},
		Form: &Form{
			Action: evil, Hidden: []Field{{Name: evil, Value: evil}}, Fields: []Field{{Name: evil, Label: evil, Value: evil, Type: "text"}},
			Buttons: []Button{{Label: evil, Name: evil, Value: evil}},
		},
	})
	if strings.Contains(body, "<script") || strings.Contains(body, `"><`+"s") {
		t.Errorf("not escaped:\n%s", body)
	}
}

func TestPagesLoadNothing(t *testing.T) {
	_, body := render(t, Page{Title: "t", Form: &Form{Action: "/x", Buttons: []Button{{Label: "b"}}}})
	for _, bad := range []string{"<script", " src=", "http://", "https://", " on", "url("} {
		if strings.Contains(body, bad) {
			t.Errorf("the page contains %q", bad)
		}
	}
}

func TestSameOrigin(t *testing.T) {
	const own = "https://auth.corp.example"
	cases := []struct {
		site, origin string
		want         bool
	}{
		{"same-origin", own, true},
		{"same-origin", "null", true}, // the browser itself says where it comes from
		{"", own, true},
		{"", "https://AUTH.corp.example", true},
		{"", "", true}, // no browser
		{"same-site", own, false},
		{"cross-site", "", false},
		{"none", "", false},
		{"", "null", false},
		{"", "https://evil.example", false},
		{"", "https://auth.corp.example.evil.example", false},
		{"", "http://auth.corp.example", false},
		{"SAME-ORIGIN", own, false},
	}
	for _, c := range cases {
		r := httptest.NewRequest(http.MethodPost, "/", nil)
		if c.site != "" {
			r.Header.Set("Sec-Fetch-Site", c.site)
		}
		if c.origin != "" {
			r.Header.Set("Origin", c.origin)
		}
		if got := SameOrigin(r, own); got != c.want {
			t.Errorf("Sec-Fetch-Site %q, Origin %q: got %v; want %v", c.site, c.origin, got, c.want)
		}
	}
}

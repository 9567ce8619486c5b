// Package page is how authd and the embedded IdP show themselves in a browser:
// one layout, one style sheet, and the headers that keep a page from being
// framed, cached, scripted or made to load anything. Pages hold no script.
package page

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"html/template"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

//go:embed style.css
var style string

//go:embed page.html
var layout string

// styleSource allows the style sheet by its hash (CSP Level 3, section 2.3.1).
var styleSource = func() string {
	sum := sha256.Sum256([]byte(style))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}()

// Page is what a page says. Every text is escaped.
type Page struct {
	Title string
	// Lead is the first paragraph.
	Lead string
	// Facts are rows of a table; a row whose Code is set prints in monospace.
	Facts []Fact
	// Alert is said aloud, above the form.
	Alert string
	// Note is small print under everything.
	Note string
	Form *Form
	Link *Link
	// Tone is "", "good" or "bad".
	Tone string
}

// Fact is one row.
type Fact struct {
	Name, Value string
	Code        bool
}

// Link leads to another page of the same origin.
type Link struct{ Label, Path string }

// Form posts to Action on the same origin.
type Form struct {
	Action  string
	Hidden  []Field
	Fields  []Field
	Buttons []Button
}

// Field is an input of a form.
type Field struct {
	Name, Label, Value string
	// Type is text or password; Autocomplete as in HTML.
	Type, Autocomplete string
	Focus              bool
}

// Button submits the form; with a Name it tells which one was pressed.
type Button struct {
	Label, Name, Value string
	Primary            bool
}

var templates = template.Must(template.New("page").Funcs(template.FuncMap{
	"css": func() template.CSS { return template.CSS(style) }, // our own file, no input
}).Parse(layout))

// Secure sets the headers of every answer, page or not. formAction lists where
// forms of the page may lead besides the same origin: browsers apply it to the
// redirects that follow, too (CSP Level 3, section 6.4.1).
func Secure(h http.Header, formAction string) {
	h.Set("Content-Security-Policy", strings.Join([]string{
		"default-src 'none'", "style-src " + styleSource, "base-uri 'none'", "frame-ancestors 'none'",
		strings.TrimSpace("form-action 'self' " + formAction),
	}, "; "))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	// Not no-referrer: browsers would send Origin: null with our own forms
	// (Fetch, "serialize a request origin").
	h.Set("Referrer-Policy", "same-origin")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=()")
}

// Write answers with p. The caller has set Secure's headers.
func Write(w http.ResponseWriter, status int, p Page) error {
	var b strings.Builder
	if err := templates.Execute(&b, p); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(b.Len()))
	w.WriteHeader(status)
	_, err := w.Write([]byte(b.String()))
	return err
}

// SameOrigin reports whether a form came from a page of origin itself. Browsers
// say so in Sec-Fetch-Site, older ones in Origin; a client that is no browser
// sends neither and has no cookies of anybody else.
func SameOrigin(r *http.Request, origin string) bool {
	switch r.Header.Get("Sec-Fetch-Site") {
	case "same-origin":
		return true
	case "":
	default:
		return false
	}
	got := r.Header.Get("Origin")
	return got == "" || strings.EqualFold(got, origin)
}

// OriginOf returns scheme://host[:port] of u.
func OriginOf(u *url.URL) string { return u.Scheme + "://" + u.Host }

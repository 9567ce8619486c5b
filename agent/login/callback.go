package login

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	_ "embed"
	"encoding/base64"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"sallyport"
)

// callback is the loopback listener that the browser is sent back to (RFC 8252,
// section 7.3). It is open only while one login runs. Any process and any web
// page on this machine can reach it, so it answers only the one request that a
// redirect from authd makes, and everything else leaves it open for that one.
type callback struct {
	listener net.Listener
	server   *http.Server
	path     string
	state    string
	from     string // authd's origin
	result   chan url.Values
}

// listen opens the callback. state is the login's, from is authd's origin.
func listen(state, from string) (*callback, error) {
	// The literal address, never "localhost", which may resolve elsewhere.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeConflict, Code: "login.no_listener",
			Message: "cannot listen on 127.0.0.1 for the browser's answer", Err: err,
		}
	}
	c := &callback{listener: l, path: "/" + sallyport.NewSecret(), state: state, from: from, result: make(chan url.Values, 1)}
	c.server = &http.Server{
		Handler: c, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second,
		IdleTimeout: time.Second, MaxHeaderBytes: 16 << 10, ErrorLog: log.New(io.Discard, "", 0),
	}
	return c, nil
}

// URL is the redirect_uri.
func (c *callback) URL() string { return "http://" + c.listener.Addr().String() + c.path }

// wait serves until the genuine answer came or ctx ends, and closes the listener.
func (c *callback) wait(ctx context.Context) (url.Values, error) {
	served := make(chan error, 1)
	go func() { served <- c.server.Serve(c.listener) }()
	defer func() {
		// The page that says "you may close this window" is still being written.
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if c.server.Shutdown(end) != nil {
			c.server.Close()
		}
		<-served
	}()
	select {
	case v := <-c.result:
		return v, nil
	case err := <-served:
		served <- err
		return nil, err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// ServeHTTP answers the genuine callback once and refuses everything else with a
// bare status.
func (c *callback) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Content-Security-Policy", "default-src 'none'; style-src "+styleSource+"; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("Cache-Control", "no-store")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Type", "text/html; charset=utf-8")
	query, status := c.check(r)
	if status != http.StatusOK {
		w.WriteHeader(status)
		return
	}
	page := pageDone
	if query.Has("error") {
		page = pageFailed
	}
	select {
	case c.result <- query:
	default: // a second genuine answer: the first one counts
		w.WriteHeader(http.StatusForbidden)
		return
	}
	io.WriteString(w, page)
}

// check returns 200 only for the redirect that this login waits for.
func (c *callback) check(r *http.Request) (url.Values, int) {
	switch {
	case subtle.ConstantTimeCompare([]byte(r.URL.Path), []byte(c.path)) != 1:
		return nil, http.StatusNotFound
	case r.Host != c.listener.Addr().String(): // a rebound name
		return nil, http.StatusForbidden
	case r.Method != http.MethodGet, !c.navigation(r.Header):
		return nil, http.StatusForbidden
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil || !single(query) || subtle.ConstantTimeCompare([]byte(query.Get("state")), []byte(c.state)) != 1 {
		return nil, http.StatusForbidden
	}
	if query.Has("iss") && strings.TrimSuffix(query.Get("iss"), "/") != c.from { // RFC 9207: another server's answer
		return nil, http.StatusForbidden
	}
	if !query.Has("error") && query.Get("code") == "" {
		return nil, http.StatusForbidden
	}
	return query, http.StatusOK
}

// navigation reports whether the headers are those of a browser that goes to the
// page: no Origin, no Referer but authd's, and if it sends Fetch Metadata, a
// top-level navigation (which a redirect from authd is, though cross-site).
func (c *callback) navigation(h http.Header) bool {
	if len(h["Origin"]) > 0 {
		return false
	}
	if ref := h.Get("Referer"); ref != "" {
		u, err := url.Parse(ref)
		if err != nil || u.Scheme+"://"+u.Host != c.from {
			return false
		}
	}
	site, mode, dest := h.Get("Sec-Fetch-Site"), h.Get("Sec-Fetch-Mode"), h.Get("Sec-Fetch-Dest")
	if site == "" && mode == "" && dest == "" {
		return true
	}
	return mode == "navigate" && dest == "document"
}

func single(query url.Values) bool {
	for _, v := range query {
		if len(v) != 1 {
			return false
		}
	}
	return true
}

//go:embed callback.css
var style string

// styleSource allows the style sheet by its hash (CSP Level 3, section 2.3.1).
var styleSource = func() string {
	sum := sha256.Sum256([]byte(style))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}()

// The pages at the end hold nothing but these words.
var (
	pageDone   = pageOf("good", "You are back at the agent", "The terminal says how it went on. You may close this window.")
	pageFailed = pageOf("bad", "You are not logged in", "The terminal says why. You may close this window.")
)

func pageOf(tone, title, text string) string {
	return `<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">` +
		"<title>" + title + " · Sallyport</title><style>" + style + `</style></head><body><main class="` + tone + `"><h1>` + title +
		"</h1><p>" + text + "</p></main></body></html>\n"
}

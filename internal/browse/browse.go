// Package browse is a web browser without scripts and without eyes: it keeps
// cookies, follows redirects and fills in HTML forms. The demonstration and the
// tests log in with it through the same pages that people see. It knows no page
// in particular.
package browse

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"strings"
	"time"

	"golang.org/x/net/html"
)

const (
	maxPages = 20
	maxPage  = 1 << 20 // bytes
)

// Browser is one person's browser. Its zero value is of no use: call New.
type Browser struct {
	client *http.Client
}

// New returns a browser that trusts what conf says and has no cookies yet. Names
// under localhost are loopback (RFC 6761, section 6.3).
func New(conf *tls.Config) *Browser {
	jar, err := cookiejar.New(nil)
	if err != nil {
		panic(err) // cannot fail without options
	}
	return &Browser{&http.Client{
		Jar:           jar,
		Timeout:       30 * time.Second,
		CheckRedirect: redirected,
		Transport: &http.Transport{
			TLSClientConfig:   conf,
			ForceAttemptHTTP2: true,
			DialContext:       dialLocal,
		},
	}}
}

// redirected makes a redirect's request what a browser makes of it: a navigation,
// a GET without an Origin (Fetch, section 3.2), cross-site once it has left the
// site where it began (Fetch Metadata, section 2.3).
func redirected(req *http.Request, via []*http.Request) error {
	if len(via) >= 10 {
		return errors.New("10 redirects, and still another")
	}
	if req.Method == http.MethodGet {
		req.Header.Del("Origin")
	}
	site := "same-origin"
	if req.URL.Host != via[0].URL.Host || via[len(via)-1].Header.Get("Sec-Fetch-Site") == "cross-site" {
		site = "cross-site"
	}
	req.Header.Set("Sec-Fetch-Site", site)
	req.Header.Set("Sec-Fetch-Mode", "navigate")
	req.Header.Set("Sec-Fetch-Dest", "document")
	return nil
}

func dialLocal(ctx context.Context, network, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		addr = net.JoinHostPort("127.0.0.1", port)
	}
	var d net.Dialer
	return d.DialContext(ctx, network, addr)
}

// Page is what the browser shows in the end.
type Page struct {
	URL    *url.URL
	Status int
	// Text is what a person would read, in one line.
	Text string
	// Body is the document as it was sent.
	Body string

	form *form
}

// Get shows one page, after its redirects, without filling in a form.
func (b *Browser) Get(ctx context.Context, address string) (*Page, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	return b.do(req)
}

// Follow opens address and submits every form it meets, with the values of fill
// for the fields of that name, until a page has no form. A form with a field
// for a person to fill in that fill does not name is an error; so is one that
// comes again with the same values, because they were refused.
func (b *Browser) Follow(ctx context.Context, address string, fill map[string]string) (*Page, error) {
	page, err := b.Get(ctx, address)
	seen := map[string]bool{}
	for range maxPages {
		if err != nil || page.form == nil {
			return page, err
		}
		f := page.form
		values, err := f.fill(fill)
		if err != nil {
			return page, fmt.Errorf("%s: %w", page.URL.Redacted(), err)
		}
		state := f.action + " " + f.names()
		if seen[state] {
			return page, fmt.Errorf("%s: the form came back: %s", page.URL.Redacted(), page.Text)
		}
		seen[state] = true
		if page, err = b.submit(ctx, page, f, values); err != nil {
			return page, err
		}
	}
	return page, errors.New("more than 20 pages, and still a form")
}

func (b *Browser) submit(ctx context.Context, page *Page, f *form, values url.Values) (*Page, error) {
	action, err := page.URL.Parse(f.action)
	if err != nil {
		return nil, fmt.Errorf("form of %s: %w", page.URL.Redacted(), err)
	}
	if f.method == http.MethodGet {
		action.RawQuery = values.Encode()
		return b.Get(ctx, action.String())
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, action.String(), strings.NewReader(values.Encode()))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	// What a browser says of a form on the site itself (Fetch, sections 3.2, 3.12).
	req.Header.Set("Origin", page.URL.Scheme+"://"+page.URL.Host)
	if action.Host == page.URL.Host {
		req.Header.Set("Sec-Fetch-Site", "same-origin")
	} else {
		req.Header.Set("Sec-Fetch-Site", "cross-site")
	}
	return b.do(req)
}

func (b *Browser) do(req *http.Request) (*Page, error) {
	resp, err := b.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxPage))
	if err != nil {
		return nil, err
	}
	page := &Page{URL: resp.Request.URL, Status: resp.StatusCode, Body: string(body)}
	if doc, err := html.Parse(strings.NewReader(page.Body)); err == nil {
		page.Text = strings.Join(strings.Fields(text(doc)), " ")
		page.form = firstForm(doc)
	}
	return page, nil
}

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

	"sallyport/internal/localhost"

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
		CheckRedirect: redirect,
		Transport: &http.Transport{
			TLSClientConfig:   conf,
			ForceAttemptHTTP2: true,
			DialContext:       localhost.Dial(&net.Dialer{}),
		},
	}}
}

// What a browser says of a navigation (Fetch Metadata, section 2).
const (
	fetchSite = "Sec-Fetch-Site"
	fetchMode = "Sec-Fetch-Mode"
	fetchDest = "Sec-Fetch-Dest"
)

// redirect says of a request that follows an answer what a browser would: it
// names no origin, and a form's answer that leads elsewhere is cross-site. What a
// person typed stays theirs (site "none").
func redirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxPages {
		return errors.New("more than 20 redirects")
	}
	req.Header.Del("Origin")
	last := via[len(via)-1]
	site := last.Header.Get(fetchSite)
	if site == "same-origin" && (req.URL.Scheme != last.URL.Scheme || req.URL.Host != last.URL.Host) {
		site = "cross-site"
	}
	navigate(req, site)
	return nil
}

func navigate(req *http.Request, site string) {
	req.Header.Set(fetchSite, site)
	req.Header.Set(fetchMode, "navigate")
	req.Header.Set(fetchDest, "document")
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
	return b.get(ctx, address, "none")
}

func (b *Browser) get(ctx context.Context, address, site string) (*Page, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	navigate(req, site)
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
	site := "cross-site"
	if action.Scheme == page.URL.Scheme && action.Host == page.URL.Host {
		site = "same-origin"
	}
	if f.method == http.MethodGet {
		action.RawQuery = values.Encode()
		return b.get(ctx, action.String(), site)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, action.String(), strings.NewReader(values.Encode()))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Origin", page.URL.Scheme+"://"+page.URL.Host)
	navigate(req, site)
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

package oidcrp

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	"sallyport/internal/localhost"
)

// Bounds on everything the provider answers. The libraries read whole bodies.
const (
	maxBody     = 1 << 20 // bytes
	maxHeaders  = 64 << 10
	httpTimeout = 10 * time.Second // for a whole exchange, body included
)

var errTooLarge = errors.New("answer is too large")

// newHTTPClient follows no redirect (none of our requests has a reason to be
// sent elsewhere) and cuts answers at maxBody. transport nil means the network.
func newHTTPClient(transport http.RoundTripper, conf *tls.Config) *http.Client {
	if transport == nil {
		conf.MinVersion = tls.VersionTLS12
		transport = &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            localhost.Dial(&net.Dialer{Timeout: httpTimeout}),
			TLSClientConfig:        conf,
			TLSHandshakeTimeout:    httpTimeout,
			MaxResponseHeaderBytes: maxHeaders,
			ForceAttemptHTTP2:      true,
			IdleConnTimeout:        90 * time.Second,
			MaxConnsPerHost:        16,
		}
	}
	return &http.Client{
		Transport:     bounded{transport},
		Timeout:       httpTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return localhost.Is(host) || err == nil && addr.IsLoopback()
}

// bounded fails a body that is longer than maxBody instead of cutting it
// silently, so that half an answer is never taken for a whole one.
type bounded struct{ base http.RoundTripper }

func (t bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.base.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	resp.Body = &boundedBody{resp.Body, maxBody}
	return resp, nil
}

type boundedBody struct {
	io.ReadCloser
	left int64
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		// Only a body with another byte is too long.
		var one [1]byte
		n, err := b.ReadCloser.Read(one[:])
		if n > 0 {
			return 0, errTooLarge
		}
		return 0, err
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.ReadCloser.Read(p)
	b.left -= int64(n)
	return n, err
}

// get fetches a JSON document.
func get(ctx context.Context, client *http.Client, url, bearer string) (body []byte, contentType string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, "", err
	}
	req.Header.Set("Accept", "application/json")
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, "", errors.New("answered " + resp.Status)
	}
	body, err = io.ReadAll(resp.Body) // bounded by newHTTPClient
	return body, resp.Header.Get("Content-Type"), err
}

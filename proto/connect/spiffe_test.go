package connect

import (
	"crypto/x509"
	"net"
	"net/url"
	"testing"

	"sallyport"
)

func TestSessionOf(t *testing.T) {
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	good := uri("spiffe://corp.example/session/s-01JD")
	tests := []struct {
		name string
		cert *x509.Certificate
		want sallyport.SessionID
	}{
		{"a session", &x509.Certificate{URIs: []*url.URL{good}}, "s-01JD"},
		{"none", nil, ""},
		{"no name", &x509.Certificate{}, ""},
		{"two names", &x509.Certificate{URIs: []*url.URL{good, good}}, ""},
		{"a DNS name beside it", &x509.Certificate{URIs: []*url.URL{good}, DNSNames: []string{"a"}}, ""},
		{"an address beside it", &x509.Certificate{URIs: []*url.URL{good}, IPAddresses: []net.IP{net.IPv6loopback}}, ""},
		{"a service", &x509.Certificate{URIs: []*url.URL{uri("spiffe://corp.example/svc/gateway/eu1")}}, ""},
		{"another domain", &x509.Certificate{URIs: []*url.URL{uri("spiffe://evil.example/session/s-01JD")}}, ""},
		{"an upper-case domain", &x509.Certificate{URIs: []*url.URL{uri("spiffe://CORP.example/session/s-01JD")}}, ""},
		{"a longer domain", &x509.Certificate{URIs: []*url.URL{uri("spiffe://corp.example.evil/session/s-01JD")}}, ""},
		{"https", &x509.Certificate{URIs: []*url.URL{uri("https://corp.example/session/s-01JD")}}, ""},
		{"a port", &x509.Certificate{URIs: []*url.URL{uri("spiffe://corp.example:1/session/s-01JD")}}, ""},
		{"user info", &x509.Certificate{URIs: []*url.URL{uri("spiffe://u@corp.example/session/s-01JD")}}, ""},
		{"a query", &x509.Certificate{URIs: []*url.URL{uri("spiffe://corp.example/session/s-01JD?x=1")}}, ""},
		{"an empty query", &x509.Certificate{URIs: []*url.URL{uri("spiffe://corp.example/session/s-01JD?")}}, ""},
		{"a fragment", &x509.Certificate{URIs: []*url.URL{uri("spiffe://corp.example/session/s-01JD#x")}}, ""},
		{"a deeper path", &x509.Certificate{URIs: []*url.URL{uri("spiffe://corp.example/session/s/x")}}, ""},
		{"an escape", &x509.Certificate{URIs: []*url.URL{uri("spiffe://corp.example/session/s%2d01JD")}}, ""},
		{"an escaped slash", &x509.Certificate{URIs: []*url.URL{uri("spiffe://corp.example/session/s%2fx")}}, ""},
		{"an empty id", &x509.Certificate{URIs: []*url.URL{uri("spiffe://corp.example/session/")}}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := SessionOf(tt.cert, "corp.example")
			if got != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("got %q, %v; want %q", got, err, tt.want)
			}
		})
	}
	if _, err := SessionOf(&x509.Certificate{URIs: []*url.URL{uri("spiffe:///session/x")}}, ""); err == nil {
		t.Error("an empty domain must match nothing")
	}
	if got := SessionURI("corp.example", "s-01JD").String(); got != good.String() {
		t.Errorf("SessionURI %q; want %q", got, good)
	}
}

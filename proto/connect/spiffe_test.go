package connect

import (
	"crypto/x509"
	"net/url"
	"testing"
)

func TestSessionOf(t *testing.T) {
	const domain = "corp.example"
	cases := []struct {
		uri  string
		want string // empty: refused
	}{
		{SessionURI(domain, "s-0123").String(), "s-0123"},
		{"spiffe://corp.example/session/s-0123", "s-0123"},
		{"spiffe://other.example/session/s-0123", ""},
		{"spiffe://CORP.example/session/s-0123", ""},
		{"spiffe://corp.example:443/session/s-0123", ""},
		{"spiffe://user@corp.example/session/s-0123", ""},
		{"https://corp.example/session/s-0123", ""},
		{"spiffe://corp.example/session/", ""},
		{"spiffe://corp.example/session/a/b", ""},
		{"spiffe://corp.example/session/a%2Fb", ""},
		{"spiffe://corp.example/session/%73-0123", ""},
		{"spiffe://corp.example/session/s-0123?x", ""},
		{"spiffe://corp.example/session/s-0123#x", ""},
		{"spiffe://corp.example/svc/gateway/eu1", ""},
	}
	for _, c := range cases {
		u, err := url.Parse(c.uri)
		if err != nil {
			t.Fatal(err)
		}
		got, err := SessionOf(&x509.Certificate{URIs: []*url.URL{u}}, domain)
		if string(got) != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: got %q, %v; want %q", c.uri, got, err, c.want)
		}
	}
	for _, n := range []int{0, 2} {
		uris := make([]*url.URL, n)
		for i := range uris {
			uris[i] = SessionURI(domain, "s-1")
		}
		if id, err := SessionOf(&x509.Certificate{URIs: uris}, domain); err == nil {
			t.Errorf("%d names: got %q; want an error", n, id)
		}
	}
}

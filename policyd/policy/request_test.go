package policy

import (
	"net/url"
	pathpkg "path"
	"strings"
	"testing"

	"sallyport"

	"pgregory.net/rapid"
)

// What testdata shows too: a browser's certificate for alice@corp.example, her
// SSH key, and a certificate for that, valid on 2026-06-01 until 18:00.
const (
	aliceCertificate = "MIIBJjCB2aADAgECAgECMAUGAytlcDANMQswCQYDVQQDEwJDQTAeFw0yNjAxMDEwMDAwMDBaFw0zMDAzMDEwMDAwMDBaMAAwKjAFBgMrZXADIQBDpy5xRAF2LfZraMJt+98mgqrsnyR07KRhPkJKD7r9PKNrMGkwZwYDVR0RAQH/BF0wW4IUbGFwdG9wMS5jb3JwLmV4YW1wbGWBEmFsaWNlQGNvcnAuZXhhbXBsZYESYnVpbGRAY29ycC5leGFtcGxlhhtzcGlmZmU6Ly9jb3JwLmV4YW1wbGUvYWxpY2UwBQYDK2VwA0EAo++XMiXnuolB8Q9wi1XX9KtjWEJUMxDPX9nw97ZyPynkpVUApGjYxcvKADwgsqQxzcNeYfWnGKCfNt6ahY6RCw=="
	aliceFingerprint = "a18151eb27988a96758e92a5eb6df49c3ead4f4895e38bf556e821422e5e56be"
	aliceKey         = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICCCi/XFvcrLaEhjM2wgL7VZnaSL5VlmFXQhcHBb7Kn3"
	aliceKeyWire     = "AAAAC3NzaC1lZDI1NTE5AAAAICCCi/XFvcrLaEhjM2wgL7VZnaSL5VlmFXQhcHBb7Kn3"
	aliceLogin       = "AAAAIHNzaC1lZDI1NTE5LWNlcnQtdjAxQG9wZW5zc2guY29tAAAAIAcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHAAAAICCCi/XFvcrLaEhjM2wgL7VZnaSL5VlmFXQhcHBb7Kn3AAAAAAAAAAAAAAABAAAAAAAAABMAAAAFYWxpY2UAAAAGZGVwbG95AAAAAGocy4AAAAAAah3IoAAAAAAAAAAAAAAAAAAAADMAAAALc3NoLWVkMjU1MTkAAAAgURw0oaLLUh3xa7JGuN6OeZfOI1x+drIqPXUDokgZ3YoAAABTAAAAC3NzaC1lZDI1NTE5AAAAQP24D+mc2QtnSkghCirIpOQaxFM07xGOsYqYvgl95sq31UnlnjSKPCn/jhv5dLqyxeempiaEUZrTWnmluILE2g4="
	sshAuthorityKey  = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFEcNKGiy1Id8WuyRrjejnmXziNcfnayKj11A6JIGd2K"
)

// requestLeaves are criteria about the request.
var requestLeaves = []string{
	"http_method: GET", "http_method: {not_in: [GET, OPTIONS]}", "http_path: {prefix: /api}",
	"http_path: {not: /api/x, starts_with: /a}", "cors_preflight: true",
	"source_ip: 10.0.0.0/8", "source_ip: [\"2001:db8::/32\", 192.0.2.7]",
	"mcp_tool: query", "mcp_tool: {not_in: [query]}",
	"client_certificate: {fingerprint: " + aliceFingerprint + "}", "client_certificate: {san_email: {ends_with: \"@corp.example\"}, san_dns: {not: x}}",
	"client_certificate: {san_uri: x}", "invalid_client_certificate: true",
	"ssh_publickey: " + aliceKey, "ssh_ca: " + sshAuthorityKey, "ssh_username: {starts_with: a}",
	"ssh_username_matches_email: true", "ssh_username_matches_claim: x", "ssh_username_matches_claim/o.p: true",
	"device: {type: any}", "device: {type: {not: enclave_only}}",
}

// requestWords fill in a request of which each criterion has something to look at.
const requestWords = " peer=10.1.2.3 method=OPTIONS path=/api/x header.origin=a header.Access-Control-Request-Method=PUT" +
	" mcp=tools/call:query ssh=a ssh-key=" + aliceKeyWire + " cert=" + aliceCertificate + " cert-valid"

// drawRequest fills in parts of a request.
func drawRequest(t *rapid.T, q *sallyport.Request) {
	var parts []string
	for _, words := range [][]string{
		{"", "peer=10.1.2.3", "peer=::ffff:10.1.2.3", "peer=192.0.2.7", "peer=2001:db8::1"},
		{"", "method=GET path=/api/x", "method=POST path=/api?x=/apis", "method=GET path=/api/../x", "method=OPTIONS path=/a header.Origin=a header.access-control-request-method=PUT"},
		{"", "mcp=tools/list", "mcp=tools/call:query", "mcp=tools/call:drop"},
		{"", "no-cert", "cert=" + aliceCertificate, "cert=" + aliceCertificate + " cert-valid", "cert=AAAA cert-valid"},
		{"", "ssh=a", "ssh=alice ssh-key=" + aliceLogin, "ssh=root ssh-key=" + aliceLogin, "ssh=1 ssh-key=" + aliceKeyWire},
	} {
		parts = append(parts, rapid.SampledFrom(words).Draw(t, "request"))
	}
	a := goldenAsker{in: &Input{Request: q}, person: &Person{}}
	for word := range strings.FieldsSeq(strings.Join(parts, " ")) {
		key, value, _ := strings.Cut(word, "=")
		kind, name, _ := strings.Cut(key, ".")
		a.ofRequest(nil, kind, name, value)
	}
}

// An Input that is used again does not remember another browser's certificate.
func TestCertificateIsThatOfTheRequest(t *testing.T) {
	set := compileOne(t, "allow: {or: [{client_certificate: {san_email: alice@corp.example}}]}")
	in := asker(t, "cert="+aliceCertificate+" cert-valid")
	leaf := in.Request.Certificate.Leaf
	if v := set.Decide(in).Verdict; v != sallyport.VerdictAllow {
		t.Fatalf("got %v; want allow", v)
	}
	leaf[len(leaf)-1]++ // the same bytes in memory, another signature: parsed anew
	before := in.shown
	set.Decide(in)
	if in.shown == before {
		t.Error("another certificate was answered from the memory of the last")
	}
	clear(leaf)
	if v := set.Decide(in).Verdict; v != sallyport.VerdictDeny {
		t.Errorf("a certificate that cannot be read: got %v; want deny", v)
	}
}

// Only who looks at the address depends on it.
func TestDependsOnPeer(t *testing.T) {
	for text, want := range map[string]bool{
		"allow: {or: [{source_ip: 10.0.0.0/8}]}":                                true,
		"allow: {and: [{http_method: GET}, {source_ip: 10.0.0.0/8}]}":           true,
		"allow: {and: [{http_method: GET}, {ssh_ca: " + sshAuthorityKey + "}]}": false,
	} {
		in := asker(t, "peer=10.1.2.3 ssh=alice ssh-key="+aliceLogin)
		if got := compileOne(t, text).Decide(in).DependsOnPeer; got != want {
			t.Errorf("%s: got %v; want %v", text, got, want)
		}
	}
}

// What a prefix holds of lies under it, however the path is spelt.
func FuzzPaths(f *testing.F) {
	for _, path := range []string{"/api", "/api/../x", "/api/%2e%2e/x", "/apis", "//api", "/api/..;/x", "/api?x", "/api/\\..\\x", "/%61pi"} {
		f.Add(path)
	}
	f.Fuzz(func(t *testing.T, path string) {
		s, absent, why := pathOf(&sallyport.Request{Path: path})
		if why != "" {
			if absent != Unknown {
				t.Fatalf("%q: got %v; want unknown", path, absent)
			}
			return
		}
		u, err := url.ParseRequestURI(s) // the query is nobody's business
		if err != nil {
			t.Fatalf("%q has one reading only, but not to net/url: %v", path, err)
		}
		if clean := pathpkg.Clean(u.Path); clean != u.Path && clean+"/" != u.Path {
			t.Fatalf("%q: net/url reads %q, which is %q", path, u.Path, clean)
		}
		if strings.HasPrefix(u.Path, "/api/") != strings.HasPrefix(s, "/api/") {
			t.Fatalf("%q: net/url reads %q, we %q", path, u.Path, s)
		}
	})
}

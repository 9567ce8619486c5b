package authd_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/proto/login"
	"sallyport/proto/proof"
)

// The cases of SECURITY-CASES.md, E, that are authd's: requests of agents.

// badCSRs are what E9 lists, and relatives.
func badCSRs(t testing.TB, session sallyport.SessionID, device *ecdsa.PrivateKey) map[string][]byte {
	t.Helper()
	key := newP256(t)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	names := make([]string, 2000)
	for i := range names {
		names[i] = fmt.Sprintf("h%d.example", i)
	}
	caTrue, err := asn1.Marshal(struct{ CA bool }{true})
	if err != nil {
		t.Fatal(err)
	}
	good := newCSR(t, key, &x509.CertificateRequest{})
	tampered := append([]byte(nil), good...)
	tampered[len(tampered)-1] ^= 1
	other := connect.SessionURI(domain, session+"0")
	return map[string][]byte{
		"another session in the SAN": newCSR(t, key, &x509.CertificateRequest{URIs: []*url.URL{other}}),
		"two URIs":                   newCSR(t, key, &x509.CertificateRequest{URIs: []*url.URL{connect.SessionURI(domain, session), other}}),
		"a service's name":           newCSR(t, key, &x509.CertificateRequest{URIs: []*url.URL{{Scheme: "spiffe", Host: domain, Path: "/svc/gateway/x"}}}),
		"RSA key":                    newCSR(t, rsaKeys(), &x509.CertificateRequest{}),
		"P-384 key":                  newCSR(t, p384, &x509.CertificateRequest{}),
		"the device key":             newCSR(t, device, &x509.CertificateRequest{}),
		"2,000 SANs":                 newCSR(t, key, &x509.CertificateRequest{DNSNames: names}),
		"DNS name":                   newCSR(t, key, &x509.CertificateRequest{DNSNames: []string{"gw.corp.example"}}),
		"IP address":                 newCSR(t, key, &x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}),
		"e-mail":                     newCSR(t, key, &x509.CertificateRequest{EmailAddresses: []string{"a@b.example"}}),
		"CA:TRUE":                    newCSR(t, key, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Value: caTrue}}}),
		"bad signature":              tampered,
		"trailing bytes":             append(append([]byte(nil), good...), 0),
		"empty":                      {},
		"garbage":                    []byte("garbage"),
	}
}

func TestCase_E9_CSRRejected(t *testing.T) {
	w := withProvider(t)
	a := w.agent()
	g := a.login(w.browser())
	for name, csr := range badCSRs(t, g.Session, a.key) {
		t.Run("renew: "+name, func(t *testing.T) {
			w.t = t
			w.refused(login.PathRenew, login.RenewRequest{Session: g.Session, CSR: csr, Proof: a.proof("renew", g.Session, csr)}, http.StatusBadRequest, "csr.rejected")
		})
	}
	w.t = t
	own := newCSR(t, newP256(t), &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "admin", Organization: []string{"root"}}, URIs: []*url.URL{connect.SessionURI(domain, g.Session)},
	})
	again, p, status := w.renew(login.RenewRequest{Session: g.Session, CSR: own, Proof: a.proof("renew", g.Session, own)})
	if status != http.StatusOK {
		t.Fatalf("own session in the SAN: got %d %s", status, p.Code)
	}
	if cert := leaf(t, again.Certificate); cert.Subject.String() != "" {
		t.Errorf("the request's subject got into the certificate: %s", cert.Subject)
	}
	if n := w.sessions(); n != 1 {
		t.Errorf("got %d sessions; want the one", n)
	}
}

func TestCase_E9_CSRRejectedAtLogin(t *testing.T) {
	w := withProvider(t)
	a, browser := w.agent(), w.browser()
	for name, csr := range badCSRs(t, "s-0", a.key) {
		t.Run(name, func(t *testing.T) {
			w.t = t
			w.clock.advance(time.Minute) // the limits of the browser
			shift(w, w.clock.add)
			code := a.code(w.browse(browser, a.authorizeURL()))
			req := a.tokenRequest(code)
			req.CSR, req.Proof = csr, a.proof("token", "", csr)
			w.refused(login.PathToken, req, http.StatusBadRequest, "csr.rejected")
			if n := w.sessions(); n != 0 {
				t.Errorf("got %d sessions; want none", n)
			}
		})
	}
}

func TestCase_E9_WrongProof(t *testing.T) {
	w := withProvider(t)
	a := w.agent()
	g := a.login(w.browser())
	thief := w.agent()
	sign := func(key *ecdsa.PrivateKey, typ string, l proof.Login) string {
		jws, err := proof.Sign(key, typ, l)
		if err != nil {
			t.Fatal(err)
		}
		return jws
	}
	sum := sha256.Sum256(a.csr)
	claims := func(change func(*proof.Login)) proof.Login {
		l := proof.Login{Nonce: w.nonce(), Audience: w.url, Action: "renew", Session: g.Session, CSRHash: sum[:]}
		change(&l)
		return l
	}
	same := func(*proof.Login) {}
	cases := map[string]struct{ jws, code string }{
		"another key":       {sign(thief.key, proof.TypeLogin, claims(same)), "proof.wrong_key"},
		"posture as login":  {sign(a.key, proof.TypePosture, claims(same)), "proof.invalid"},
		"another authd":     {sign(a.key, proof.TypeLogin, claims(func(l *proof.Login) { l.Audience = "https://evil.example" })), "proof.invalid"},
		"another action":    {sign(a.key, proof.TypeLogin, claims(func(l *proof.Login) { l.Action = "logout" })), "proof.invalid"},
		"another session":   {sign(a.key, proof.TypeLogin, claims(func(l *proof.Login) { l.Session = "s-other" })), "proof.invalid"},
		"another CSR":       {sign(a.key, proof.TypeLogin, claims(func(l *proof.Login) { l.CSRHash = make([]byte, 32) })), "proof.invalid"},
		"no CSR":            {sign(a.key, proof.TypeLogin, claims(func(l *proof.Login) { l.CSRHash = nil })), "proof.invalid"},
		"invented nonce":    {sign(a.key, proof.TypeLogin, claims(func(l *proof.Login) { l.Nonce = sallyport.NewSecret() })), "proof.replayed"},
		"changed nonce":     {sign(a.key, proof.TypeLogin, claims(func(l *proof.Login) { l.Nonce = "b" + l.Nonce[1:] })), "proof.replayed"},
		"no nonce":          {sign(a.key, proof.TypeLogin, claims(func(l *proof.Login) { l.Nonce = "" })), "proof.replayed"},
		"no proof":          {"", "proof.invalid"},
		"proof of 200 KiB":  {strings.Repeat("a", 40<<10), "proof.invalid"},
		"unsigned":          {"eyJhbGciOiJub25lIn0.e30.", "proof.invalid"},
		"certificate's key": {sign(a.csrKey, proof.TypeLogin, claims(same)), "proof.wrong_key"},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			w.t = t
			w.refused(login.PathRenew, login.RenewRequest{Session: g.Session, CSR: a.csr, Proof: tc.jws}, http.StatusBadRequest, tc.code)
		})
	}
	w.t = t
	old := sign(a.key, proof.TypeLogin, claims(same))
	w.clock.advance(2*time.Minute + time.Second)
	w.refused(login.PathRenew, login.RenewRequest{Session: g.Session, CSR: a.csr, Proof: old}, http.StatusBadRequest, "proof.replayed")
}

func TestCase_E11_Replay(t *testing.T) {
	w := withProvider(t)
	a := w.agent()
	code := a.code(w.browse(w.browser(), a.authorizeURL()))
	req := a.tokenRequest(code)
	var g login.Grant
	if status := w.call(login.PathToken, req, &g); status != http.StatusOK {
		t.Fatalf("got %d", status)
	}
	w.refused(login.PathToken, req, http.StatusBadRequest, "login.code_unknown")

	renewal := login.RenewRequest{Session: g.Session, CSR: a.csr, Proof: a.proof("renew", g.Session, a.csr)}
	if _, p, status := w.renew(renewal); status != http.StatusOK {
		t.Fatalf("got %d %s", status, p.Code)
	}
	w.refused(login.PathRenew, renewal, http.StatusBadRequest, "proof.replayed")

	again := a.code(w.browse(w.browser(), a.authorizeURL()))
	mixed := a.tokenRequest(again)
	mixed.Proof = req.Proof // a recorded proof with a new code
	w.refused(login.PathToken, mixed, http.StatusBadRequest, "proof.replayed")
}

// One code in twenty hands at once: one session.
func TestCase_E11_ConcurrentRedemption(t *testing.T) {
	w := withProvider(t)
	a := w.agent()
	code := a.code(w.browse(w.browser(), a.authorizeURL()))
	requests := make([]login.TokenRequest, 20)
	for i := range requests {
		requests[i] = a.tokenRequest(code)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	granted := 0
	for _, req := range requests {
		wg.Go(func() {
			if w.call(login.PathToken, req, nil) == http.StatusOK {
				mu.Lock()
				granted++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if n := w.sessions(); n > 1 || granted > 1 || n != granted {
		t.Errorf("one code gave %d grants and %d sessions", granted, n)
	}
}

func TestWrongRedemptionBurnsTheCode(t *testing.T) {
	cases := []struct {
		name, code string
		change     func(a, thief *agent, r *login.TokenRequest)
	}{
		{"wrong verifier", "login.verifier_mismatch", func(_, _ *agent, r *login.TokenRequest) { r.CodeVerifier = "guess" }},
		{"no verifier", "login.verifier_mismatch", func(_, _ *agent, r *login.TokenRequest) { r.CodeVerifier = "" }},
		{"wrong redirect", "login.redirect_mismatch", func(_, _ *agent, r *login.TokenRequest) { r.RedirectURI += "x" }},
		{"wrong key", "login.key_mismatch", func(_, thief *agent, r *login.TokenRequest) { r.Proof = thief.proof("token", "", r.CSR) }},
		{"no proof", "proof.invalid", func(_, _ *agent, r *login.TokenRequest) { r.Proof = "" }},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			w := withProvider(t)
			a := w.agent()
			code := a.code(w.browse(w.browser(), a.authorizeURL()))
			bad := a.tokenRequest(code)
			tc.change(a, w.agent(), &bad)
			w.refused(login.PathToken, bad, http.StatusBadRequest, tc.code)
			w.refused(login.PathToken, a.tokenRequest(code), http.StatusBadRequest, "login.code_unknown")
			if n := w.sessions(); n != 0 {
				t.Errorf("got %d sessions", n)
			}
		})
	}
}

func TestCodeExpires(t *testing.T) {
	w := withProvider(t)
	a := w.agent()
	code := a.code(w.browse(w.browser(), a.authorizeURL()))
	w.clock.advance(time.Minute + time.Second)
	w.refused(login.PathToken, a.tokenRequest(code), http.StatusBadRequest, "login.code_unknown")
}

func TestAgentRequestsThatAreNone(t *testing.T) {
	w := withProvider(t)
	for _, path := range []string{login.PathToken, login.PathRenew, login.PathLogout} {
		for name, body := range map[string]string{
			"empty": "", "not JSON": "code=x", "array": "[]", "two values": "{}{}", "1 MiB": `{"proof":"` + strings.Repeat("x", 1<<20) + `"}`,
		} {
			if end := w.post(w.root, w.url+path, nil); end.status != http.StatusBadRequest {
				t.Errorf("%s as a form: got %d; want 400", path, end.status)
			}
			req, err := http.NewRequest(http.MethodPost, w.url+path, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/json")
			if end := w.do(w.root, req); end.status != http.StatusBadRequest || !strings.Contains(end.header.Get("Content-Type"), "problem+json") {
				t.Errorf("%s with %s: got %d %s; want 400", path, name, end.status, end.header.Get("Content-Type"))
			}
		}
		if end := w.get(w.root, w.url+path); end.status != http.StatusMethodNotAllowed {
			t.Errorf("GET %s: got %d; want 405", path, end.status)
		}
	}
}

func TestGrantNamesGateways(t *testing.T) {
	w := withProvider(t)
	put(w, sallyport.Put(sallyport.KindConfig, "current", sallyport.Config{
		Domain: domain, Gateways: []sallyport.GatewayInfo{{Name: "eu1", URL: "https://gw.corp.example", CA: "pem"}},
	}))
	g := w.agent().login(w.browser())
	if len(g.Gateways) != 1 || g.Gateways[0].Name != "eu1" || g.Gateways[0].CA != "pem" {
		t.Errorf("got gateways %+v", g.Gateways)
	}
}

// L14: what authd keeps for itself is sealed, and by hash.
func TestCase_L14_NoSecretInTheRecords(t *testing.T) {
	w := withProvider(t)
	w.idp.Token = func(answer map[string]any) { answer["refresh_token"] = "refresh-canary" }
	a := w.agent()
	code := a.code(w.browse(w.browser(), a.authorizeURL()))
	var g login.Grant
	if status := w.call(login.PathToken, a.tokenRequest(code), &g); status != http.StatusOK {
		t.Fatalf("got %d", status)
	}
	seen := make(map[sallyport.Kind]int)
	for _, op := range w.records.ops {
		if op.Kind != sallyport.KindCode && op.Kind != sallyport.KindIDPToken || op.Delete {
			continue
		}
		seen[op.Kind]++
		for _, secret := range []string{code, "refresh-canary", "alice", a.state, a.device.Thumbprint} {
			if strings.Contains(op.ID+string(op.Payload), secret) {
				t.Errorf("%s %s holds %q in the clear", op.Kind, op.ID, secret)
			}
		}
	}
	if seen[sallyport.KindCode] < 3 || seen[sallyport.KindIDPToken] != 1 {
		t.Errorf("looked at %v; want state, consent, code, nonce and a token", seen)
	}
}

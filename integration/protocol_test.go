package integration

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/integration/stack"
	"sallyport/internal/browse"
	"sallyport/proto/login"
	"sallyport/proto/proof"
)

// protocolLogin is what a login leaves a client that keeps its key in files.
type protocolLogin struct {
	certificate, key, gatewayCA string // files
}

// logInByProtocol logs the user in as docs/protocol.md says, with nothing of the
// agent's: another client could be written from that paper. The browser is the
// test's.
func logInByProtocol(t *testing.T, s *stack.Stack, user string) protocolLogin {
	t.Helper()
	deviceKey, sessionKey := newKey(t), newKey(t)
	device, err := proof.KeyOf(deviceKey.Public())
	if err != nil {
		t.Fatal(err)
	}
	code, redirect, verifier := authorize(t, s, user, device)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, sessionKey)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: s.Roots(t), ServerName: "auth.localhost"},
	}}
	defer client.CloseIdleConnections()
	post := func(path string, in, out any) {
		t.Helper()
		body, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		// The name would resolve everywhere but in Go (RFC 6761, section 6.3).
		u := "https://" + s.Ready("authd").Authd.Listen + path
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, u, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Host = strings.TrimPrefix(s.AuthdURL(), "https://")
		req.Header.Set("Content-Type", "application/json")
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("POST %s: %s, %v\n%s", path, resp.Status, err, answer)
		}
		if err := json.Unmarshal(answer, out); err != nil {
			t.Fatalf("POST %s: %v\n%s", path, err, answer)
		}
	}
	var nonce login.Nonce
	post(login.PathNonce, struct{}{}, &nonce)
	sum := sha256.Sum256(csr)
	jws, err := proof.Sign(deviceKey, proof.TypeLogin, proof.Login{Nonce: nonce.Nonce, Audience: s.AuthdURL(), Action: "token", CSRHash: sum[:]})
	if err != nil {
		t.Fatal(err)
	}
	var grant login.Grant
	post(login.PathToken, login.TokenRequest{
		Code: code, CodeVerifier: verifier, RedirectURI: redirect, CSR: csr, Proof: jws, KeyProtection: "file",
	}, &grant)
	return saveLogin(t, grant, sessionKey)
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// authorize sends the browser through a login and returns the code that it brings
// back to a loopback listener, with what redeems it.
func authorize(t *testing.T, s *stack.Stack, user string, device proof.Key) (code, redirect, verifier string) {
	t.Helper()
	answers := make(chan url.Values, 1)
	listener := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answers <- r.URL.Query()
		fmt.Fprintln(w, "<!doctype html><p>thank you")
	}))
	defer listener.Close()
	redirect, verifier = listener.URL+"/back", rand.Text()+rand.Text()
	state, challenge := rand.Text(), sha256.Sum256([]byte(verifier))
	ask := url.Values{
		"response_type": {"code"}, "client_id": {"agent"}, "redirect_uri": {redirect}, "state": {state},
		"code_challenge": {base64.RawURLEncoding.EncodeToString(challenge[:])}, "code_challenge_method": {"S256"},
		login.ParamDPoPJKT: {device.Thumbprint}, login.ParamDevice: {string(device.ID)}, login.ParamDeviceName: {"a shell script"},
	}
	browser := browse.New(&tls.Config{RootCAs: s.Roots(t)})
	page, err := browser.Follow(t.Context(), s.AuthdURL()+login.PathAuthorize+"?"+ask.Encode(),
		map[string]string{"username": user, "password": stack.Password, "answer": "allow"})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-answers:
		if got.Get("state") != state || got.Get("iss") != s.AuthdURL() || got.Get("code") == "" {
			t.Fatalf("the browser came back with %s", got.Encode())
		}
		return got.Get("code"), redirect, verifier
	default:
		t.Fatalf("the browser ended at %s: %s", page.URL.Redacted(), page.Text)
		return "", "", ""
	}
}

func saveLogin(t *testing.T, grant login.Grant, key *ecdsa.PrivateKey) protocolLogin {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if len(grant.Gateways) == 0 {
		t.Fatal("the grant names no gateway")
	}
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return protocolLogin{
		certificate: file("session.crt", grant.Certificate),
		key:         file("session.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))),
		gatewayCA:   file("gateway-ca.crt", grant.Gateways[0].CA),
	}
}

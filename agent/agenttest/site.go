// Package agenttest is a site for an agent to talk to: an authd that logs
// everybody in, and a gateway on lanes with a table of decisions. Both speak the
// real wire (proto/login, proto/connect, tunnel/lane) and verify what the agent
// signs; there is no policy, no store and no person behind them.
package agenttest

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"sallyport"
	"sallyport/internal/tlsid"
	"sallyport/proto/connect"
	"sallyport/proto/login"
	"sallyport/proto/proof"
	"sallyport/tunnel"
	"sallyport/tunnel/lane"
)

// Domain is the site's trust domain.
const Domain = "corp.example"

// Site is an authd and a gateway on loopback. Its fields may be set before
// Start; afterwards use the methods.
type Site struct {
	// CertificateLife of sessions; 0: an hour.
	CertificateLife time.Duration
	// NamesNoGateways is how an authd renews whose configuration is gone.
	NamesNoGateways bool
	// Gateways are what logins list before the site's own.
	Gateways []sallyport.GatewayInfo

	// AuthdURL and GatewayURL are known after Start.
	AuthdURL   string
	GatewayURL string

	public, sessions *tlsid.CA
	authd            *http.Server
	listener         net.Listener
	cancel           context.CancelFunc
	tasks            sync.WaitGroup

	mu        sync.Mutex
	down      bool // authd answers 503
	refuse    string
	codes     map[string]url.Values // by code: the authorize request
	nonces    map[string]bool
	live      map[sallyport.SessionID]proof.Key
	logins    int
	renewals  int
	decisions map[string]sallyport.Decision // by target
	facts     map[string]sallyport.Fact
	history   []string // "posture", "connect db.internal:5432", …
	flows     map[sallyport.FlowID]*flow
	streams   map[chan connect.Event]bool
	conns     map[tunnel.ServerConn]bool
}

type flow struct {
	target sallyport.Target
	conn   tunnel.Conn
}

// Start makes keys and listens.
func (s *Site) Start() error {
	var err error
	if s.public, err = tlsid.NewCA("agenttest public", time.Hour); err != nil {
		return err
	}
	if s.sessions, err = tlsid.NewCA("agenttest sessions", time.Hour); err != nil {
		return err
	}
	s.codes, s.nonces, s.live = map[string]url.Values{}, map[string]bool{}, map[sallyport.SessionID]proof.Key{}
	s.flows, s.streams, s.conns = map[sallyport.FlowID]*flow{}, map[chan connect.Event]bool{}, map[tunnel.ServerConn]bool{}
	s.decisions = map[string]sallyport.Decision{
		"tcp://db.internal:5432": Allow("dba"), "tcp://web.internal:22": Allow("staff"), "tcp://web.internal:8080": Allow("staff"),
		"tcp://payroll.internal:443": Denied,
	}
	if err := s.startAuthd(); err != nil {
		return err
	}
	return s.startGateway()
}

// New returns a started site that ends with the test.
func New(t testing.TB) *Site {
	t.Helper()
	s := &Site{}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// Close ends everything and waits for it.
func (s *Site) Close() {
	s.authd.Close()
	s.cancel()
	s.listener.Close()
	s.tasks.Wait()
}

// CA is the PEM bundle that signs authd's and the gateway's certificates.
func (s *Site) CA() []byte { return s.public.PEM() }

// ClientTLS trusts the site, for a test's browser.
func (s *Site) ClientTLS() *tls.Config { return &tls.Config{RootCAs: s.public.Pool()} }

// Allow is a decision that allows by that rule.
func Allow(rule string) sallyport.Decision {
	return sallyport.Decision{ID: "d-ALLOWED", Verdict: sallyport.VerdictAllow, Rule: rule, PolicyRevision: 7}
}

// Denied is a decision as policyd makes them.
var Denied = sallyport.Decision{
	ID: "d-01JD7F3A", Verdict: sallyport.VerdictDeny, Rule: "finance", PolicyRevision: 214,
	Reasons: []sallyport.Reason{{
		Rule: "finance", Condition: "device.disk_encrypted", Wanted: "is true", Found: "false",
		Age: 9 * time.Second, Result: "false",
	}},
	WouldAllowIf: [][]sallyport.Remedy{{{Condition: "device.disk_encrypted", Want: "true", Hint: "turn on disk encryption"}}},
}

func (s *Site) startAuthd() error {
	cert, err := s.public.IssueServer([]string{"auth.localhost"}, time.Hour)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.AuthdURL = fmt.Sprintf("https://auth.localhost:%d", l.Addr().(*net.TCPAddr).Port)
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+login.PathMetadata, s.metadata)
	mux.HandleFunc("GET "+login.PathAuthorize, s.authorize)
	mux.HandleFunc("POST "+login.PathNonce, s.nonce)
	mux.HandleFunc("POST "+login.PathToken, s.token)
	mux.HandleFunc("POST "+login.PathRenew, s.renew)
	mux.HandleFunc("POST "+login.PathLogout, s.logout)
	s.authd = &http.Server{Handler: s.maybeDown(mux), TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}}, ErrorLog: log.New(io.Discard, "", 0)}
	s.tasks.Go(func() { s.authd.ServeTLS(l, "", "") })
	return nil
}

func (s *Site) maybeDown(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		down := s.down
		s.mu.Unlock()
		if down {
			connect.WriteProblem(w, connect.Problem{Status: http.StatusServiceUnavailable, Code: "authd.unavailable", Detail: "the login service has a problem"})
			return
		}
		h.ServeHTTP(w, r)
	})
}

// AuthdDown makes authd answer 503, or answer again.
func (s *Site) AuthdDown(down bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = down
}

// RefuseLogins sends browsers back with that stable code; empty: none.
func (s *Site) RefuseLogins(code string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refuse = code
}

func (s *Site) metadata(w http.ResponseWriter, _ *http.Request) {
	json.NewEncoder(w).Encode(login.Metadata{Issuer: s.AuthdURL, Domain: Domain})
}

func (s *Site) authorize(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	back, err := url.Parse(q.Get("redirect_uri"))
	if err != nil || q.Get("code_challenge_method") != "S256" || q.Get("response_type") != "code" || q.Get(login.ParamDPoPJKT) == "" {
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	answer := url.Values{"state": {q.Get("state")}, "iss": {s.AuthdURL}}
	if s.refuse != "" {
		answer.Set("error", "access_denied")
		answer.Set("error_description", s.refuse)
	} else {
		code := sallyport.NewSecret()
		s.codes[code] = q
		answer.Set("code", code)
	}
	s.mu.Unlock()
	back.RawQuery = answer.Encode()
	http.Redirect(w, r, back.String(), http.StatusSeeOther)
}

func (s *Site) nonce(w http.ResponseWriter, _ *http.Request) {
	n := sallyport.NewSecret()
	s.mu.Lock()
	s.nonces[n] = true
	s.mu.Unlock()
	json.NewEncoder(w).Encode(login.Nonce{Nonce: n})
}

// proven verifies a proof and uses up its nonce.
func (s *Site) proven(jws, action string, csr []byte) (proof.Key, proof.Login, error) {
	var p proof.Login
	key, err := proof.Verify(jws, proof.TypeLogin, &p)
	if err != nil {
		return key, p, err
	}
	s.mu.Lock()
	fresh := s.nonces[p.Nonce]
	delete(s.nonces, p.Nonce)
	s.mu.Unlock()
	sum := sha256.Sum256(csr)
	if !fresh || p.Action != action || p.Audience != s.AuthdURL || csr != nil && string(p.CSRHash) != string(sum[:]) {
		return key, p, fmt.Errorf("proof does not fit: %+v", p)
	}
	return key, p, nil
}

func (s *Site) token(w http.ResponseWriter, r *http.Request) {
	var req login.TokenRequest
	json.NewDecoder(r.Body).Decode(&req)
	s.mu.Lock()
	asked, ok := s.codes[req.Code]
	delete(s.codes, req.Code)
	s.mu.Unlock()
	key, _, err := s.proven(req.Proof, "token", req.CSR)
	sum := sha256.Sum256([]byte(req.CodeVerifier))
	if !ok || err != nil || asked.Get("code_challenge") != base64.RawURLEncoding.EncodeToString(sum[:]) ||
		asked.Get("redirect_uri") != req.RedirectURI || asked.Get(login.ParamDPoPJKT) != key.Thumbprint {
		refuse(w, "login.code_rejected")
		return
	}
	id := sallyport.SessionID(asked.Get(login.ParamExtend))
	s.mu.Lock()
	s.logins++
	if id == "" {
		id = sallyport.SessionID(sallyport.NewID("s"))
	}
	s.live[id] = key
	s.mu.Unlock()
	s.grant(w, id, req.CSR, s.gateways())
}

func (s *Site) renew(w http.ResponseWriter, r *http.Request) {
	var req login.RenewRequest
	json.NewDecoder(r.Body).Decode(&req)
	key, p, err := s.proven(req.Proof, "renew", req.CSR)
	s.mu.Lock()
	owner, live := s.live[req.Session]
	if err == nil && live {
		s.renewals++
	}
	s.mu.Unlock()
	if err != nil || p.Session != req.Session || !live || owner.ID != key.ID {
		connect.WriteProblem(w, connect.Problem{Status: http.StatusUnauthorized, Code: connect.ProblemLogin, Detail: "the session is over"})
		return
	}
	gateways := s.gateways()
	if s.NamesNoGateways {
		gateways = nil
	}
	s.grant(w, req.Session, req.CSR, gateways)
}

func (s *Site) logout(w http.ResponseWriter, r *http.Request) {
	var req login.LogoutRequest
	json.NewDecoder(r.Body).Decode(&req)
	if _, p, err := s.proven(req.Proof, "logout", nil); err != nil || p.Session != req.Session {
		refuse(w, "proof.invalid")
		return
	}
	s.EndSession(req.Session, "session_revoked", "logged out")
	w.WriteHeader(http.StatusNoContent)
}

func refuse(w http.ResponseWriter, code string) {
	connect.WriteProblem(w, connect.Problem{Status: http.StatusBadRequest, Code: code, Detail: "the login was refused"})
}

func (s *Site) grant(w http.ResponseWriter, id sallyport.SessionID, csr []byte, gateways []sallyport.GatewayInfo) {
	life := s.CertificateLife
	if life == 0 {
		life = time.Hour
	}
	chain, err := s.certificate(id, csr, life)
	if err != nil {
		refuse(w, "csr.rejected")
		return
	}
	json.NewEncoder(w).Encode(login.Grant{
		Session: id, User: "u-alice", Email: "alice@corp.example", Name: "Alice", Domain: Domain,
		Certificate: chain, RenewIn: life / 2, ExpiresIn: 12 * time.Hour,
		Gateways: gateways,
	})
}

func (s *Site) gateways() []sallyport.GatewayInfo {
	list := append(slices.Clone(s.Gateways), sallyport.GatewayInfo{Name: "test", URL: s.GatewayURL})
	for i := range list {
		list[i].CA = string(s.CA())
	}
	return list
}

func (s *Site) certificate(id sallyport.SessionID, csr []byte, life time.Duration) (string, error) {
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return "", err
	}
	pub, ok := req.PublicKey.(*ecdsa.PublicKey)
	if !ok || req.CheckSignature() != nil {
		return "", errors.New("not P-256")
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-2 * time.Minute), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs: []*url.URL{connect.SessionURI(Domain, id)},
	}
	der, err := x509.CreateCertificate(nil, template, s.sessions.Certificate(), pub, s.sessions.Signer())
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), nil
}

// Counts returns how many logins and renewals there were.
func (s *Site) Counts() (logins, renewals int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.logins, s.renewals
}

// Visit is a person's browser that follows the login page back to the agent.
func Visit(conf *tls.Config, page string) error {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		TLSClientConfig: conf,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			_, port, _ := net.SplitHostPort(addr)
			return (&net.Dialer{}).DialContext(ctx, network, "127.0.0.1:"+port)
		},
	}}
	defer client.CloseIdleConnections()
	resp, err := client.Get(page)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("visit: %s", resp.Status)
	}
	return nil
}

func (s *Site) startGateway() error {
	cert, err := s.public.IssueServer([]string{"gw.localhost"}, time.Hour)
	if err != nil {
		return err
	}
	if s.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return err
	}
	s.GatewayURL = fmt.Sprintf("https://gw.localhost:%d", s.listener.Addr().(*net.TCPAddr).Port)
	conf := tunnel.ServerTLS(func() *tls.Certificate { return &cert }, s.sessions.Pool(), lane.NextProto)
	server := lane.NewServer(lane.ServerConfig{Domain: Domain, Host: "gw.localhost", Handler: (*handler)(s)})
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.tasks.Go(func() {
		for {
			c, err := s.listener.Accept()
			if err != nil {
				return
			}
			s.tasks.Go(func() { server.ServeConn(ctx, tls.Server(c, conf)) })
		}
	})
	return nil
}

package authd_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport"
	"sallyport/authd"
	"sallyport/authd/idp"
	"sallyport/cached"
	"sallyport/cached/memory"
	"sallyport/internal/keyring"
	"sallyport/internal/logging"
	"sallyport/internal/oidcrp/oidcrptest"
	"sallyport/internal/tlsid"
	"sallyport/proto/connect"
	"sallyport/proto/login"
	"sallyport/proto/proof"
)

const (
	domain   = "corp.example"
	callback = "http://127.0.0.1:4711/random-path" // the agent's listener; nothing needs to listen there
)

// world is one authd with everything around it.
type world struct {
	t       *testing.T
	server  *authd.Server
	cfg     authd.Config
	url     string
	records *recording
	audit   *auditLog
	log     *logBuffer // at trace level
	ca      *tlsid.CA
	idp     *oidcrptest.Provider // nil with the embedded one
	root    *http.Client         // trusts authd, follows nothing
	clock   *clock
}

// clock is the time plus what a test adds.
type clock struct {
	mu  sync.Mutex
	add time.Duration
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.add)
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.add += d
}

// recording is cached with a memory of everything that was written.
type recording struct {
	*cached.Server
	mu     sync.Mutex
	ops    []sallyport.Op
	before func(batch []sallyport.Op) // runs before a batch is written
}

func (r *recording) Apply(ctx context.Context, batch []sallyport.Op) (sallyport.Revision, error) {
	r.mu.Lock()
	r.ops = append(r.ops, batch...)
	before := r.before
	r.mu.Unlock()
	if before != nil {
		before(batch)
	}
	return r.Server.Apply(ctx, batch)
}

// beforeSession runs f once, right before a batch with a session is written.
func (r *recording) beforeSession(f func()) {
	var once sync.Once
	r.mu.Lock()
	defer r.mu.Unlock()
	r.before = func(batch []sallyport.Op) {
		if slices.ContainsFunc(batch, func(op sallyport.Op) bool { return op.Kind == sallyport.KindSession }) {
			once.Do(f)
		}
	}
}

// logBuffer keeps what daemons log.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// auditLog is an Auditor in memory that can be told to fail.
type auditLog struct {
	mu      sync.Mutex
	records []sallyport.AuditRecord
	broken  error
}

func (a *auditLog) Append(_ context.Context, r sallyport.AuditRecord) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.broken != nil {
		return a.broken
	}
	a.records = append(a.records, r)
	return nil
}

func (a *auditLog) last(kind string) (sallyport.AuditRecord, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := len(a.records) - 1; i >= 0; i-- {
		if a.records[i].Type == kind {
			return a.records[i], true
		}
	}
	return sallyport.AuditRecord{}, false
}

// withProvider is an authd beside a provider of its own.
func withProvider(t *testing.T, change ...func(*authd.Config)) *world {
	t.Helper()
	p := oidcrptest.New(t)
	secret := filepath.Join(t.TempDir(), "idp.secret")
	if err := os.WriteFile(secret, []byte(oidcrptest.Secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(c *authd.Config) {
		c.IDP = authd.IDP{Issuer: p.Issuer(), ClientID: oidcrptest.ClientID, ClientSecretFile: secret}
		for _, f := range change {
			f(c)
		}
	})
	w.idp = p
	return w
}

// embeddedUsers are hashed once: argon2id takes its time.
var embeddedUsers = sync.OnceValue(func() []idp.User {
	hash, err := idp.HashPassword("correct horse")
	if err != nil {
		panic(err)
	}
	return []idp.User{
		{ID: "alice", Name: "Alice", Email: "alice@corp.example", PasswordHash: hash, Groups: []string{"dba", "staff"}},
		{ID: "bob", Name: "Bob", Email: "bob@corp.example", PasswordHash: hash},
	}
})

// withEmbedded is an authd with the embedded provider.
func withEmbedded(t *testing.T, change ...func(*authd.Config)) *world {
	t.Helper()
	return newWorld(t, func(c *authd.Config) {
		c.Users = embeddedUsers()
		for _, f := range change {
			f(c)
		}
	})
}

func newWorld(t *testing.T, change func(*authd.Config)) *world {
	t.Helper()
	w := &world{t: t, audit: &auditLog{}, log: &logBuffer{}, clock: &clock{}}
	logger, err := logging.New(w.log, "trace", logging.FormatJSON)
	if err != nil {
		t.Fatal(err)
	}
	store, err := cached.New(cached.Config{}, cached.Deps{Store: memory.New(), KEK: keyring.NewKEK(), Now: w.clock.now})
	if err != nil {
		t.Fatal(err)
	}
	w.records = &recording{Server: store}
	if w.ca, err = tlsid.NewCA("session-ca", 0); err != nil {
		t.Fatal(err)
	}
	listener := httptest.NewUnstartedServer(nil)
	w.url = "https://" + listener.Listener.Addr().String()
	w.cfg = authd.Config{PublicURL: w.url, Listen: "127.0.0.1:0"}
	change(&w.cfg)
	w.server, err = authd.New(w.cfg, authd.Deps{
		Domain: domain, Records: w.records, Audit: w.audit, Log: logger, SessionCAs: []*tlsid.CA{w.ca},
		KEK: keyring.NewKEK(), Now: w.clock.now,
	})
	if err != nil {
		t.Fatal(err)
	}
	listener.Config.Handler = w.server.Handler()
	listener.StartTLS()
	t.Cleanup(listener.Close)
	w.root = listener.Client()
	w.root.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return w
}

// run runs the server until the test ends, and waits until it is ready.
func (w *world) run() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.server.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("Run: %v", err)
		}
	})
	w.eventually("ready", func() error { return w.server.Ready() })
}

func (w *world) eventually(what string, check func() error) {
	w.t.Helper()
	deadline := time.NewTimer(10 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			w.t.Fatalf("%s: %v", what, err)
		}
	}
}

// browser is a person's browser: cookies, and no redirects followed by itself.
func (w *world) browser() *http.Client {
	jar, err := cookiejar.New(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return &http.Client{Transport: w.root.Transport, Jar: jar, CheckRedirect: w.root.CheckRedirect}
}

// agent is one device with one login under way.
type agent struct {
	w        *world
	key      *ecdsa.PrivateKey
	device   proof.Key
	verifier string
	state    string
	csrKey   *ecdsa.PrivateKey
	csr      []byte
}

func newP256(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (w *world) agent() *agent {
	w.t.Helper()
	a := &agent{w: w, key: newP256(w.t)}
	var err error
	if a.device, err = proof.KeyOf(a.key.Public()); err != nil {
		w.t.Fatal(err)
	}
	a.renewCSR()
	return a
}

func (a *agent) renewCSR() {
	a.w.t.Helper()
	a.csrKey = newP256(a.w.t)
	a.csr = newCSR(a.w.t, a.csrKey, &x509.CertificateRequest{})
}

func newCSR(t testing.TB, key any, template *x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// authorizeURL begins a login.
func (a *agent) authorizeURL(change ...func(url.Values)) string {
	a.verifier, a.state = rand.Text()+rand.Text(), rand.Text()
	sum := sha256.Sum256([]byte(a.verifier))
	q := url.Values{
		"response_type": {"code"}, "client_id": {"agent"}, "redirect_uri": {callback}, "state": {a.state},
		"code_challenge": {base64.RawURLEncoding.EncodeToString(sum[:])}, "code_challenge_method": {"S256"},
		login.ParamDPoPJKT: {a.device.Thumbprint}, login.ParamDevice: {string(a.device.ID)},
		login.ParamDeviceName: {"laptop <b>"}, login.ParamDeviceOS: {"linux"},
	}
	for _, f := range change {
		f(q)
	}
	return a.w.url + login.PathAuthorize + "?" + q.Encode()
}

// answer is a response whose body is read.
type answer struct {
	status int
	header http.Header
	body   string
	url    *url.URL
}

func (w *world) do(client *http.Client, req *http.Request) answer {
	w.t.Helper()
	resp, err := client.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, string(body), resp.Request.URL}
}

func (w *world) get(client *http.Client, target string) answer {
	w.t.Helper()
	req, err := http.NewRequest(http.MethodGet, target, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.do(client, req)
}

func (w *world) post(client *http.Client, target string, form url.Values, header ...string) answer {
	w.t.Helper()
	req, err := http.NewRequest(http.MethodPost, target, strings.NewReader(form.Encode()))
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	return w.do(client, req)
}

// follow goes along redirects until a page, or the agent's listener.
func (w *world) follow(client *http.Client, a answer) answer {
	w.t.Helper()
	for range 10 {
		location := a.header.Get("Location")
		if location == "" || strings.HasPrefix(location, callback) {
			return a
		}
		next, err := a.url.Parse(location)
		if err != nil {
			w.t.Fatal(err)
		}
		a = w.get(client, next.String())
	}
	w.t.Fatal("more than ten redirects")
	return a
}

var hiddenField = regexp.MustCompile(`<input type="hidden" name="([a-z]+)" value="([^"]+)">`)

// hidden returns the hidden fields of a page's form.
func hidden(body string) url.Values {
	v := url.Values{}
	for _, m := range hiddenField.FindAllStringSubmatch(body, -1) {
		v.Set(m[1], m[2])
	}
	return v
}

// browse takes a login through the browser to the agent's listener: logs in at
// the embedded provider's form, allows the device where it is asked.
func (w *world) browse(client *http.Client, start string) answer {
	w.t.Helper()
	return w.goOn(client, w.get(client, start))
}

// goOn is browse from the first answer on.
func (w *world) goOn(client *http.Client, a answer) answer {
	w.t.Helper()
	a = w.follow(client, a)
	if strings.Contains(a.body, `name="password"`) {
		form := hidden(a.body)
		form.Set("username", "alice")
		form.Set("password", "correct horse")
		a = w.follow(client, w.post(client, a.url.String(), form, "Sec-Fetch-Site", "same-origin"))
	}
	if strings.Contains(a.body, "Is this your computer?") {
		form := hidden(a.body)
		form.Set("answer", "allow")
		a = w.follow(client, w.post(client, w.url+login.PathConsent, form, "Sec-Fetch-Site", "same-origin"))
	}
	return a
}

// code is what reached the agent's listener.
func (a *agent) code(end answer) string {
	a.w.t.Helper()
	u, err := url.Parse(end.header.Get("Location"))
	if err != nil {
		a.w.t.Fatal(err)
	}
	q := u.Query()
	if q.Get("state") != a.state || q.Get("iss") != a.w.url || q.Get("code") == "" {
		a.w.t.Fatalf("the browser ended at %s with status %d; want state %s and a code\n%s", u, end.status, a.state, end.body)
	}
	return q.Get("code")
}

func (w *world) nonce() string {
	w.t.Helper()
	var n login.Nonce
	if status := w.call(login.PathNonce, struct{}{}, &n); status != http.StatusOK {
		w.t.Fatalf("nonce: status %d", status)
	}
	return n.Nonce
}

// call posts JSON and reads the answer into out, or a problem into a *connect.Problem.
func (w *world) call(path string, in, out any) int {
	w.t.Helper()
	body, err := json.Marshal(in)
	if err != nil {
		w.t.Fatal(err)
	}
	req, err := http.NewRequest(http.MethodPost, w.url+path, bytes.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := w.root.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	if out != nil {
		if err := json.NewDecoder(resp.Body).Decode(out); err != nil && !errors.Is(err, io.EOF) {
			w.t.Fatal(err)
		}
	}
	return resp.StatusCode
}

func (a *agent) proof(action string, session sallyport.SessionID, csr []byte) string {
	a.w.t.Helper()
	claims := proof.Login{Nonce: a.w.nonce(), Audience: a.w.url, Action: action, Session: session}
	if csr != nil {
		sum := sha256.Sum256(csr)
		claims.CSRHash = sum[:]
	}
	jws, err := proof.Sign(a.key, proof.TypeLogin, claims)
	if err != nil {
		a.w.t.Fatal(err)
	}
	return jws
}

func (a *agent) tokenRequest(code string) login.TokenRequest {
	a.w.t.Helper()
	return login.TokenRequest{
		Code: code, CodeVerifier: a.verifier, RedirectURI: callback, CSR: a.csr,
		Proof: a.proof("token", "", a.csr), KeyProtection: "file",
	}
}

// login goes the whole way.
func (a *agent) login(browser *http.Client, change ...func(url.Values)) login.Grant {
	a.w.t.Helper()
	code := a.code(a.w.browse(browser, a.authorizeURL(change...)))
	var g login.Grant
	if status := a.w.call(login.PathToken, a.tokenRequest(code), &g); status != http.StatusOK {
		a.w.t.Fatalf("token: status %d", status)
	}
	return g
}

func (a *agent) renew(session sallyport.SessionID) (login.Grant, connect.Problem, int) {
	a.w.t.Helper()
	a.renewCSR()
	return a.w.renew(login.RenewRequest{Session: session, CSR: a.csr, Proof: a.proof("renew", session, a.csr)})
}

func (w *world) renew(req login.RenewRequest) (g login.Grant, p connect.Problem, status int) {
	w.t.Helper()
	var raw json.RawMessage
	status = w.call(login.PathRenew, req, &raw)
	var err error
	if status == http.StatusOK {
		err = json.Unmarshal(raw, &g)
	} else {
		err = json.Unmarshal(raw, &p)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return g, p, status
}

// refused posts and wants a problem with that status and code.
func (w *world) refused(path string, in any, status int, code string) {
	w.t.Helper()
	var p connect.Problem
	if got := w.call(path, in, &p); got != status || p.Code != code {
		w.t.Errorf("%s: got %d %q; want %d %q", path, got, p.Code, status, code)
	}
	w.audited(code)
}

// audited wants the last failed login to be of that code.
func (w *world) audited(code string) {
	w.t.Helper()
	r, ok := w.audit.last(sallyport.AuditLoginFailed)
	if !ok || r.Code != code || r.RequestID == "" {
		w.t.Errorf("audit: got %+v; want login.failed with code %s", r, code)
	}
}

// pageRefused wants LR(code): a page with status 400, the code and a request id,
// and no session.
func (w *world) pageRefused(a answer, code string) {
	w.t.Helper()
	if a.status != http.StatusBadRequest || !strings.Contains(a.body, "<code>"+code+"</code>") || !strings.Contains(a.body, "<code>r-") {
		w.t.Errorf("got status %d, page %s; want 400 with code %s and a request id", a.status, text(a.body), code)
	}
	w.audited(code)
	if n := w.sessions(); n != 0 {
		w.t.Errorf("got %d sessions; want none", n)
	}
}

var tags = regexp.MustCompile(`(?s)<style>.*</style>|<[^>]*>|\s+`)

func text(body string) string { return strings.TrimSpace(tags.ReplaceAllString(body, " ")) }

func (w *world) sessions() int {
	w.t.Helper()
	list, err := w.records.List(context.Background(), sallyport.KindSession)
	if err != nil {
		w.t.Fatal(err)
	}
	return len(list)
}

func leaf(t testing.TB, chain string) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode([]byte(chain))
	if block == nil {
		t.Fatalf("no PEM in %q", chain)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func record[T any](w *world, kind sallyport.Kind, id string) T {
	w.t.Helper()
	rec, err := w.records.Get(context.Background(), kind, id)
	if err != nil {
		w.t.Fatalf("%s %s: %v", kind, id, err)
	}
	v, err := sallyport.Decode[T](rec)
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

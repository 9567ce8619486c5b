package login_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyport"
	"sallyport/agent/agenttest"
	"sallyport/agent/keys"
	"sallyport/agent/login"
	"sallyport/agent/state"
	"sallyport/internal/tlsid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newKey(t *testing.T) *keys.Key {
	t.Helper()
	d, err := state.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	k, err := keys.LoadOrCreate(t.Context(), d, keys.Options{Where: keys.File})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newClient(t *testing.T, authd string, ca []byte) *login.Client {
	t.Helper()
	base, err := login.ParseURL(authd)
	if err != nil {
		t.Fatal(err)
	}
	c, err := login.NewClient(base, string(ca), newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// attempt is a login that waits for its person.
type attempt struct {
	t      *testing.T
	site   *agenttest.Site
	page   string // the login page
	target *url.URL
	state  string
	result chan error
}

func begin(t *testing.T, timeout time.Duration) *attempt {
	t.Helper()
	a := &attempt{t: t, site: agenttest.New(t), result: make(chan error, 1)}
	c := newClient(t, a.site.AuthdURL, a.site.CA())
	shown := make(chan string, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := c.Login(t.Context(), login.Options{Show: func(u, _ string) { shown <- u }, Timeout: timeout})
		a.result <- err
	})
	t.Cleanup(wg.Wait)
	select {
	case a.page = <-shown:
	case <-time.After(10 * time.Second):
		t.Fatal("no login page")
	}
	u, err := url.Parse(a.page)
	if err != nil {
		t.Fatal(err)
	}
	if a.target, err = url.Parse(u.Query().Get("redirect_uri")); err != nil {
		t.Fatal(err)
	}
	a.state = u.Query().Get("state")
	return a
}

// send makes one request to the callback; edit changes it.
func (a *attempt) send(edit func(*http.Request)) *http.Response {
	a.t.Helper()
	u := *a.target
	u.RawQuery = url.Values{"code": {"stolen"}, "state": {a.state}}.Encode()
	req, err := http.NewRequest(http.MethodGet, u.String(), nil)
	if err != nil {
		a.t.Fatal(err)
	}
	edit(req)
	transport := &http.Transport{DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: transport, Timeout: 5 * time.Second}).Do(req)
	if err != nil {
		a.t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil {
		a.t.Fatal(err)
	}
	resp.Body = io.NopCloser(strings.NewReader(string(body)))
	return resp
}

// finish lets the person log in, and expects success.
func (a *attempt) finish() {
	a.t.Helper()
	if err := agenttest.Visit(a.site.ClientTLS(), a.page); err != nil {
		a.t.Fatal(err)
	}
	if err := <-a.result; err != nil {
		a.t.Fatalf("the genuine callback: %v", err)
	}
}

// Case R2: what a web page or another process can send is refused, and the
// listener stays for the real callback.
func TestCase_R2_BogusCallbacks(t *testing.T) {
	a := begin(t, time.Minute)
	port := a.target.Port()
	query := func(edit func(url.Values)) func(*http.Request) {
		return func(r *http.Request) {
			q := r.URL.Query()
			edit(q)
			r.URL.RawQuery = q.Encode()
		}
	}
	header := func(pairs ...string) func(*http.Request) {
		return func(r *http.Request) {
			for i := 0; i < len(pairs); i += 2 {
				r.Header.Set(pairs[i], pairs[i+1])
			}
		}
	}
	for name, edit := range map[string]func(*http.Request){
		"root":             func(r *http.Request) { r.URL.Path = "/" },
		"other path":       func(r *http.Request) { r.URL.Path += "x" },
		"path prefix":      func(r *http.Request) { r.URL.Path = r.URL.Path[:len(r.URL.Path)-1] },
		"favicon":          func(r *http.Request) { r.URL.Path = "/favicon.ico" },
		"post":             func(r *http.Request) { r.Method = http.MethodPost },
		"head":             func(r *http.Request) { r.Method = http.MethodHead },
		"options":          func(r *http.Request) { r.Method = http.MethodOptions },
		"rebound host":     func(r *http.Request) { r.Host = "evil.com:" + port },
		"localhost":        func(r *http.Request) { r.Host = "localhost:" + port },
		"host, no port":    func(r *http.Request) { r.Host = "127.0.0.1" },
		"no state":         query(func(q url.Values) { q.Del("state") }),
		"wrong state":      query(func(q url.Values) { q.Set("state", "x"+q.Get("state")[1:]+"y") }),
		"state twice":      query(func(q url.Values) { q.Add("state", q.Get("state")) }),
		"code twice":       query(func(q url.Values) { q.Add("code", "other") }),
		"no code":          query(func(q url.Values) { q.Del("code") }),
		"other issuer":     query(func(q url.Values) { q.Set("iss", "https://evil.example") }),
		"origin":           header("Origin", "https://evil.example"),
		"origin null":      header("Origin", "null"),
		"referer":          header("Referer", "https://evil.example/page"),
		"referer look":     header("Referer", a.site.AuthdURL+".evil.example/"),
		"cross-site":       header("Sec-Fetch-Site", "cross-site"),
		"cross-site fetch": header("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "image"),
		"iframe":           header("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate", "Sec-Fetch-Dest", "iframe"),
	} {
		resp := a.send(edit)
		if resp.StatusCode != http.StatusForbidden && resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: got %s; want 403 or 404", name, resp.Status)
		}
		checkPage(t, name, resp)
	}
	select {
	case err := <-a.result:
		t.Fatalf("the login ended: %v", err)
	default:
	}
	a.finish()
}

// Case R5: nothing reflected, nothing loaded, nothing stored.
func checkPage(t *testing.T, name string, resp *http.Response) {
	t.Helper()
	for h, want := range map[string]string{"Content-Security-Policy": "default-src 'none'", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"} {
		if got := resp.Header.Get(h); !strings.Contains(got, want) {
			t.Errorf("%s: %s is %q; want %s", name, h, got, want)
		}
	}
	body, _ := io.ReadAll(resp.Body)
	for _, echo := range []string{"stolen", "evil", "<script>"} {
		if strings.Contains(string(body), echo) {
			t.Errorf("%s: the page reflects %q", name, echo)
		}
	}
}

func TestCase_R5_PageReflectsNothing(t *testing.T) {
	a := begin(t, time.Minute)
	resp := a.send(func(r *http.Request) {
		q := r.URL.Query()
		q.Del("code")
		q.Set("error", "<script>alert(1)</script>")
		q.Set("error_description", "<script>evil</script>")
		r.URL.RawQuery = q.Encode()
	})
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("got %s; want the page that says so", resp.Status)
	}
	checkPage(t, "error", resp)
	err := <-a.result
	if sallyport.OutcomeOf(err) != sallyport.OutcomeLogin || strings.Contains(err.Error(), "script") {
		t.Errorf("got %v; want a refused login without foreign text", err)
	}
}

// A browser that says where it comes from is let in.
func TestNavigationFromAuthd(t *testing.T) {
	a := begin(t, time.Minute)
	resp := a.send(func(r *http.Request) {
		r.Header.Set("Referer", a.site.AuthdURL+"/")
		r.Header.Set("Sec-Fetch-Site", "cross-site")
		r.Header.Set("Sec-Fetch-Mode", "navigate")
		r.Header.Set("Sec-Fetch-Dest", "document")
	})
	if resp.StatusCode != http.StatusOK {
		t.Errorf("got %s", resp.Status)
	}
	// The code was made up, so authd refuses it.
	if err := <-a.result; sallyport.CodeOf(err) != "login.code_rejected" || sallyport.OutcomeOf(err) != sallyport.OutcomeLogin {
		t.Errorf("got %v; want login.code_rejected", err)
	}
}

// Case R3: a literal loopback address, and closed after the first valid hit.
func TestCase_R3_OpenOnlyDuringLogin(t *testing.T) {
	a := begin(t, time.Minute)
	if a.target.Hostname() != "127.0.0.1" || len(a.target.Path) < 40 {
		t.Errorf("callback %s; want 127.0.0.1 and a random path", a.target)
	}
	a.finish()
	if c, err := net.DialTimeout("tcp", a.target.Host, time.Second); err == nil {
		c.Close()
		t.Error("the callback's port is still open")
	}

	late := begin(t, 200*time.Millisecond)
	err := <-late.result
	if sallyport.CodeOf(err) != "login.timeout" || sallyport.OutcomeOf(err) != sallyport.OutcomeLogin {
		t.Errorf("got %v; want login.timeout", err)
	}
	if c, err := net.DialTimeout("tcp", late.target.Host, time.Second); err == nil {
		c.Close()
		t.Error("the port is open after the timeout")
	}
}

// Case R4: a flood of bogus callbacks does not keep the real one out.
func TestCase_R4_Flood(t *testing.T) {
	a := begin(t, time.Minute)
	stop := make(chan struct{})
	var sent atomic.Int64
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			client := &http.Client{Timeout: time.Second}
			defer client.CloseIdleConnections()
			for {
				select {
				case <-stop:
					return
				default:
				}
				if resp, err := client.Get(a.target.String() + "?code=x&state=y"); err == nil {
					resp.Body.Close()
					sent.Add(1)
				}
			}
		})
	}
	for sent.Load() < 500 {
		<-time.After(time.Millisecond)
	}
	a.finish()
	close(stop)
	wg.Wait()
}

// Case E2: a login service that is not who it should be gets nothing, and there
// is no way to go on.
func TestCase_E2_Untrusted(t *testing.T) {
	ca, err := tlsid.NewCA("right", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	other, err := tlsid.NewCA("other", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		ca   *tlsid.CA
		host string
		life time.Duration
	}{
		"another authority": {other, "auth.localhost", time.Hour},
		"another name":      {ca, "elsewhere.localhost", time.Hour},
		"expired":           {ca, "auth.localhost", time.Nanosecond},
	} {
		t.Run(name, func(t *testing.T) {
			cert, err := tt.ca.IssueServer([]string{tt.host}, tt.life)
			if err != nil {
				t.Fatal(err)
			}
			hits := 0
			s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hits++ }))
			s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
			s.Config.ErrorLog = nil
			s.StartTLS()
			defer s.Close()
			_, port, _ := net.SplitHostPort(s.Listener.Addr().String())
			c := newClient(t, "https://auth.localhost:"+port, ca.PEM())
			_, err = c.Metadata(t.Context())
			var e *sallyport.Error
			if !errors.As(err, &e) || e.Code != "tls.server_untrusted" || e.Outcome != sallyport.OutcomeUnavailable || hits != 0 {
				t.Errorf("got %v with %d requests; want tls.server_untrusted and none", err, hits)
			}
		})
	}
}

// Case R9: the page that is opened is the configured authd's, whatever authd
// itself says.
func TestCase_R9_OnlyTheConfiguredHost(t *testing.T) {
	ca, err := tlsid.NewCA("right", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.IssueServer([]string{"auth.localhost"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for name, answer := range map[string]string{
		"another issuer": `{"issuer":"https://evil.example","domain":"d"}`,
		"a file":         `{"issuer":"file:///etc/passwd","domain":"d"}`,
		"nothing":        `{}`,
		"no JSON":        `hello`,
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, answer) }))
			s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
			s.StartTLS()
			defer s.Close()
			_, port, _ := net.SplitHostPort(s.Listener.Addr().String())
			c := newClient(t, "https://auth.localhost:"+port, ca.PEM())
			opened := false
			_, err := c.Login(t.Context(), login.Options{Show: func(string, string) { opened = true }, Browser: func(string) error { opened = true; return nil }})
			if err == nil || opened {
				t.Errorf("got %v, opened %v; want an error and no page", err, opened)
			}
		})
	}
}

func TestAuthdRedirectIsNotFollowed(t *testing.T) {
	ca, err := tlsid.NewCA("right", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.IssueServer([]string{"auth.localhost"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/elsewhere" {
			t.Error("the redirect was followed")
		}
		http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
	}))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	s.StartTLS()
	defer s.Close()
	_, port, _ := net.SplitHostPort(s.Listener.Addr().String())
	if _, err := newClient(t, "https://auth.localhost:"+port, ca.PEM()).Metadata(t.Context()); err == nil {
		t.Error("a redirect passed for an answer")
	}
}

func TestParseURL(t *testing.T) {
	for in, want := range map[string]string{
		"https://auth.corp.example": "https://auth.corp.example", "auth.corp.example": "https://auth.corp.example",
		"https://Auth.Corp.Example:8443/": "https://auth.corp.example:8443",
	} {
		if u, err := login.ParseURL(in); err != nil || u.String() != want {
			t.Errorf("%s: got %v, %v; want %s", in, u, err, want)
		}
	}
	for _, in := range []string{
		"", "http://auth.corp.example", "file:///etc/passwd", "javascript:alert(1)", "https://user:pw@auth.corp.example",
		"https://auth.corp.example/path", "https://auth.corp.example?x=y", "https://", "https://a b",
	} {
		if _, err := login.ParseURL(in); sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
			t.Errorf("%q: got %v; want usage", in, err)
		}
	}
}

func TestCancelledLogin(t *testing.T) {
	site := agenttest.New(t)
	c := newClient(t, site.AuthdURL, site.CA())
	ctx, cancel := context.WithCancel(t.Context())
	_, err := c.Login(ctx, login.Options{Show: func(string, string) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v; want canceled", err)
	}
}

func TestBadCAFile(t *testing.T) {
	base, err := login.ParseURL("auth.corp.example")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := login.NewClient(base, "no PEM", newKey(t)); sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
		t.Errorf("got %v; want usage", err)
	}
}

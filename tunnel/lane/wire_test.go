package lane_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/tunnel"
	"sallyport/tunnel/lane"
	"sallyport/tunnel/tunneltest"
)

// wire is a TLS connection to a lane server, for requests that no client sends.
type wire struct {
	site    *tunneltest.Site
	gateway *tunneltest.Gateway
	addr    string
}

func newWire(t testing.TB) *wire {
	w := &wire{site: tunneltest.NewSite(t), gateway: tunneltest.NewGateway()}
	w.addr = listen(t, w.site.ServerTLS(lane.NextProto), tunneltest.Domain, tunneltest.Host, w.gateway)
	return w
}

func (w *wire) dial(t testing.TB) *tls.Conn {
	t.Helper()
	c, err := tls.Dial("tcp", w.addr, &tls.Config{
		RootCAs: w.site.Public.Pool(), ServerName: tunneltest.Host, NextProtos: []string{lane.NextProto},
		Certificates: []tls.Certificate{*w.site.Session(t, "s-1", nil)},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

// send returns everything the server answers to text, until it closes.
func (w *wire) send(t testing.TB, text string) string {
	t.Helper()
	c := w.dial(t)
	go io.WriteString(c, text)
	got, err := io.ReadAll(c)
	if err != nil {
		t.Errorf("%.60q: %v; want an orderly end", text, err)
	}
	return string(got)
}

func TestStrictRequests(t *testing.T) {
	w := newWire(t)
	target := "CONNECT echo.test:1 HTTP/1.1\r\nHost: echo.test:1\r\n"
	tests := []struct {
		name, request string
		status        int
	}{
		{"bare LF", "CONNECT echo.test:1 HTTP/1.1\nHost: echo.test:1\n\n\r\n\r\n", 400},
		{"bare LF inside", "CONNECT echo.test:1 HTTP/1.1\r\nHost: echo.test:1\nX: y\r\n\r\n", 400},
		{"bare CR", "CONNECT echo.test:1 HTTP/1.1\r\nHost: echo.test:1\rX: y\r\n\r\n", 400},
		{"NUL", target + "X: \x00\r\n\r\n", 400},
		{"folded line", target + "X: a\r\n b\r\n\r\n", 400},
		{"blank before colon", target + "X : a\r\n\r\n", 400},
		{"no colon", target + "X\r\n\r\n", 400},
		{"empty name", target + ": a\r\n\r\n", 400},
		{"HTTP/1.0", "CONNECT echo.test:1 HTTP/1.0\r\nHost: echo.test:1\r\n\r\n", 400},
		{"HTTP/1.2", "CONNECT echo.test:1 HTTP/1.2\r\nHost: echo.test:1\r\n\r\n", 400},
		{"HTTP/0.9", "GET /v1/me\r\n\r\n", 400},
		{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400},
		{"two blanks", "CONNECT  echo.test:1 HTTP/1.1\r\nHost: echo.test:1\r\n\r\n", 400},
		{"no Host", "CONNECT echo.test:1 HTTP/1.1\r\n\r\n", 400},
		{"two Hosts", target + "Host: echo.test:1\r\n\r\n", 400},
		{"another Host", "CONNECT echo.test:1 HTTP/1.1\r\nHost: deny.test:1\r\n\r\n", 400},
		{"content", target + "Content-Length: 3\r\n\r\nabc", 400},
		{"no content, said aloud", target + "Content-Length: 0\r\n\r\n", 400},
		{"chunked", target + "Transfer-Encoding: chunked\r\n\r\n", 400},
		{"too many fields", target + strings.Repeat("X: y\r\n", 70) + "\r\n", 400},
		{"too large a head", target + "X: " + strings.Repeat("y", 20<<10) + "\r\n\r\n", 400},
		{"user info", "CONNECT u@echo.test:1 HTTP/1.1\r\nHost: u@echo.test:1\r\n\r\n", 400},
		{"origin form", "CONNECT /echo.test:1 HTTP/1.1\r\nHost: echo.test:1\r\n\r\n", 400},
		{"absolute form", "GET https://gw.localhost/v1/me HTTP/1.1\r\nHost: gw.localhost\r\n\r\n", 400},
		{"another host's request", "GET /v1/me HTTP/1.1\r\nHost: wiki.corp.example\r\n\r\n", 421},
		{"a path that is not served", "GET / HTTP/1.1\r\nHost: gw.localhost\r\n\r\n", 404},
		{"pprof", "GET /debug/pprof/ HTTP/1.1\r\nHost: gw.localhost\r\n\r\n", 404},
		{"an upgrade", "GET /v1/me HTTP/1.1\r\nHost: gw.localhost\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n", 501},
		{"two lengths", "POST /v1/posture HTTP/1.1\r\nHost: gw.localhost\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400},
		{"a signed length", "POST /v1/posture HTTP/1.1\r\nHost: gw.localhost\r\nContent-Length: +1\r\n\r\nx", 400},
		{"too long a body", "POST /v1/posture HTTP/1.1\r\nHost: gw.localhost\r\nContent-Length: 99999999\r\n\r\nx", 400},
		{"length and coding", "POST /v1/posture HTTP/1.1\r\nHost: gw.localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nx", 400},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := w.send(t, tt.request)
			resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(got)), nil)
			if err != nil {
				t.Fatalf("answer %.60q: %v", got, err)
			}
			if resp.StatusCode != tt.status || !resp.Close || resp.Header.Get(connect.HeaderProxyStatus) == "" {
				t.Errorf("%d, close %v, Proxy-Status %q; want %d, close and a reason", resp.StatusCode, resp.Close, resp.Header.Get(connect.HeaderProxyStatus), tt.status)
			}
		})
	}
	if _, _, asked := w.gateway.Counts(); asked != 0 {
		t.Errorf("%d of them reached the handler as a CONNECT", asked)
	}
}

func TestCase_G2_G8_BadTargets(t *testing.T) {
	w := newWire(t)
	for _, target := range []string{
		"db.internal", "db.internal:0", "db.internal:65536", "db.internal:+22", "db.internal:0x16", "db.internal:22:22",
		"[fe80::1%25eth0]:22", "2130706433:22", "127.1:22", "0x7f.1:22",
	} {
		got := w.send(t, "CONNECT "+target+" HTTP/1.1\r\nHost: "+target+"\r\n\r\n")
		if !strings.HasPrefix(got, "HTTP/1.1 400 ") || !strings.Contains(got, "Connection: close") {
			t.Errorf("%s: %.60q; want 400 and a close", target, got)
		}
	}
	if got := w.send(t, "CONNECT DENY.test.:1 HTTP/1.1\r\nHost: deny.test:1\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 403 ") {
		t.Errorf("case and a trailing dot: %.60q; want what deny.test gets", got)
	}
	if _, _, asked := w.gateway.Counts(); asked != 1 {
		t.Errorf("%d CONNECTs reached the handler; want the last one", asked)
	}
}

// What follows a refused CONNECT is never parsed, however much it looks like a
// request.
func TestNothingBehindARefusalIsParsed(t *testing.T) {
	w := newWire(t)
	second := "CONNECT echo.test:1 HTTP/1.1\r\nHost: echo.test:1\r\n\r\n"
	got := w.send(t, "CONNECT deny.test:1 HTTP/1.1\r\nHost: deny.test:1\r\n\r\n"+strings.Repeat(second, 100))
	if strings.Count(got, "HTTP/1.1") != 1 {
		t.Errorf("more than one answer: %q", got)
	}
	w.send(t, "GET /v1/me HTTP/1.1\r\nHost: gw.localhost\r\n\r\n"+second)
	if _, _, asked := w.gateway.Counts(); asked != 1 {
		t.Errorf("%d CONNECTs; want the refused one only", asked)
	}
}

// A head that arrives byte by byte is the same head.
func TestFragmentedHead(t *testing.T) {
	w := newWire(t)
	c := w.dial(t)
	for _, b := range []byte("CONNECT echo.test:1 HTTP/1.1\r\nHost: echo.test:1\r\n\r\nearly") {
		if _, err := c.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	c.CloseWrite()
	got, err := io.ReadAll(c)
	if err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 200 OK\r\n") || !strings.HasSuffix(string(got), "\r\n\r\nearly") {
		t.Errorf("%q, %v; want 200 and the echo", got, err)
	}
}

// A TCP stream that ends without TLS's own end is a cut, on both sides.
func TestTruncationIsNoEnd(t *testing.T) {
	w := newWire(t)
	c := w.dial(t)
	io.WriteString(c, "CONNECT echo.test:1 HTTP/1.1\r\nHost: echo.test:1\r\n\r\nx")
	if _, err := io.ReadFull(c, make([]byte, 20)); err != nil {
		t.Fatal(err)
	}
	c.NetConn().(*net.TCPConn).CloseWrite()
	tunneltest.Eventually(t, "the gateway sees a cut", func() bool { return len(w.gateway.Resets()) == 1 })
	var reset *tunnel.ResetError
	if err := w.gateway.Resets()[0]; !errors.As(err, &reset) {
		t.Errorf("the gateway read %v; want a *tunnel.ResetError", err)
	}
}

// Case M1: a connection that was made while policyd was down must not wait in a
// client's pool to refuse a request that comes after its return.
func TestCase_M1_RefusedConnectionsDoNotWait(t *testing.T) {
	w := newWire(t)
	w.gateway.Refuse(func(tunnel.Peer) error {
		return &tunnel.AdmitError{Code: connect.CodePolicyStale, Reason: "policyd does not answer"}
	})
	began := time.Now()
	if got, err := io.ReadAll(w.dial(t)); err != nil || len(got) > 0 {
		t.Errorf("an unused connection: %q, %v; want its end and no answer", got, err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it ended after %s; want about one second", took)
	}
	got := w.send(t, "CONNECT echo.test:1 HTTP/1.1\r\nHost: echo.test:1\r\n\r\n")
	if !strings.HasPrefix(got, "HTTP/1.1 503 ") {
		t.Errorf("a request at once: %.60q; want 503", got)
	}
}

// A connection that was refused while policyd was down is asked about again if its
// request comes after policyd's return; what has been decided stays decided.
func TestCase_M1_ARefusalIsNoOlderThanItsRequest(t *testing.T) {
	const request = "CONNECT echo.test:1 HTTP/1.1\r\nHost: echo.test:1\r\n\r\n"
	for code, want := range map[uint64]string{connect.CodePolicyStale: "HTTP/1.1 200 ", connect.CodeSessionRevoked: "HTTP/1.1 401 "} {
		w := newWire(t)
		refused := make(chan struct{}, 1)
		w.gateway.Refuse(func(tunnel.Peer) error {
			refused <- struct{}{}
			return &tunnel.AdmitError{Code: code, Reason: "not now"}
		})
		c := w.dial(t)
		<-refused
		w.gateway.Refuse(nil)
		<-time.After(50 * time.Millisecond)
		io.WriteString(c, request)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
			t.Errorf("after %#x: %q, %v; want %q", code, got, err, want)
		}
	}
}

// stalled answers /v1 requests with more than a client that does not read takes.
type stalled struct {
	*tunneltest.Gateway
	wrote atomic.Int64
}

func (s *stalled) ServeAPI(w http.ResponseWriter, _ *http.Request, _ tunnel.ServerConn) {
	for {
		n, err := w.Write(make([]byte, 64<<10))
		if err != nil {
			return
		}
		s.wrote.Add(int64(n))
	}
}

// wait returns once nothing more goes into the connection.
func (s *stalled) wait() {
	for last, still := int64(0), 0; still < 40; <-time.After(5 * time.Millisecond) {
		if now := s.wrote.Load(); now == 0 || now != last {
			last, still = now, 0
		} else {
			still++
		}
	}
}

// Whoever closes a connection has others to close: a client that does not read
// must not hold that up.
func TestCloseDoesNotWaitForTheClient(t *testing.T) {
	w := &wire{site: tunneltest.NewSite(t), gateway: tunneltest.NewGateway()}
	h := &stalled{Gateway: w.gateway}
	w.addr = listen(t, w.site.ServerTLS(lane.NextProto), tunneltest.Domain, tunneltest.Host, h)
	io.WriteString(w.dial(t), "GET /v1/targets HTTP/1.1\r\nHost: "+tunneltest.Host+"\r\n\r\n")
	h.wait()
	began := time.Now()
	for _, c := range w.gateway.Conns() {
		c.Close(connect.CodeSessionRevoked, "revoked")
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("the close took %s", took)
	}
	for _, released, _ := w.gateway.Counts(); released == 0; _, released, _ = w.gateway.Counts() {
		if time.Since(began) > 10*time.Second {
			t.Fatal("the connection is still served")
		}
		<-time.After(5 * time.Millisecond)
	}
}

func TestWarmConnections(t *testing.T) {
	w := newWire(t)
	var dials atomic.Int32
	cfg := w.site.DialConfig(w.addr, w.site.Session(t, "s-1", nil))
	cfg.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		dials.Add(1)
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	c, err := lane.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if n := dials.Load(); n != 1 {
		t.Errorf("%d connections for Dial; want 1", n)
	}
	open := func() {
		t.Helper()
		f, err := c.Open(t.Context(), target("echo.test"), nil)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	open()
	// The one in use and four to follow.
	tunneltest.Eventually(t, "the pool is full", func() bool { return dials.Load() == 5 && len(w.gateway.Conns()) >= 4 })
	// The gateway drops them all: the next flow must not notice.
	for _, conn := range w.gateway.Conns() {
		conn.Close(connect.CodeDraining, "")
	}
	open()
}

// A proxy of the environment is used, and only knows the gateway's address.
func TestHTTPSProxy(t *testing.T) {
	w := newWire(t)
	var asked atomic.Value
	proxy := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if user, password, _ := parseProxyAuth(r); user != "alice" || password != "secret" {
			rw.WriteHeader(http.StatusProxyAuthRequired)
			return
		}
		asked.Store(r.Host)
		up, err := net.Dial("tcp", w.addr)
		if err != nil {
			t.Error(err)
			return
		}
		defer up.Close()
		down, buf, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer down.Close()
		io.WriteString(down, "HTTP/1.1 200 OK\r\n\r\n")
		done := make(chan struct{})
		go func() { io.Copy(up, buf); up.(*net.TCPConn).CloseWrite(); close(done) }()
		io.Copy(down, up)
		down.Close()
		<-done
	}))
	defer proxy.Close()
	// The site's certificate is for gw.localhost, which no proxy is used for; the
	// name below is the same server's.
	site := *w.site
	var err error
	if site.Server, err = site.Public.IssueServer([]string{"gw.corp.example"}, time.Hour); err != nil {
		t.Fatal(err)
	}
	w.addr = listen(t, site.ServerTLS(lane.NextProto), tunneltest.Domain, "gw.corp.example", w.gateway)
	cfg := site.DialConfig("", site.Session(t, "s-1", nil))
	cfg.Gateway.URL, cfg.Gateway.Addresses = "https://gw.corp.example", nil

	t.Setenv("HTTPS_PROXY", strings.Replace(proxy.URL, "http://", "http://alice:secret@", 1))
	t.Setenv("NO_PROXY", "")
	c, err := lane.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	f, err := c.Open(t.Context(), target("echo.test"), []byte("through"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(f, make([]byte, 7)); err != nil {
		t.Error(err)
	}
	c.Close()
	if asked.Load() != "gw.corp.example:443" {
		t.Errorf("the proxy was asked for %v", asked.Load())
	}

	t.Setenv("HTTPS_PROXY", proxy.URL)
	if _, err := lane.Dial(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "407") {
		t.Errorf("without a password: %v; want the proxy's 407 named", err)
	}
	t.Setenv("HTTPS_PROXY", "socks5://127.0.0.1:1")
	if _, err := lane.Dial(t.Context(), cfg); err == nil {
		t.Error("a SOCKS proxy was taken")
	}
}

func parseProxyAuth(r *http.Request) (user, password string, ok bool) {
	r = &http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}
	return r.BasicAuth()
}

// A slow client does not hold a connection open for longer than a head may take.
func TestHeadTimeoutIsSet(t *testing.T) {
	w := newWire(t)
	c := w.dial(t)
	start := time.Now()
	io.WriteString(c, "CONNECT echo")
	_, err := io.ReadAll(c)
	if took := time.Since(start); took < 9*time.Second || took > 15*time.Second {
		t.Errorf("closed after %v (%v); want 10 s", took, err)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, syscall.ETIMEDOUT) {
		t.Error(err)
	}
}

func target(host string) sallyport.Target {
	return sallyport.Target{Network: sallyport.TCP, Host: host, Port: 1}
}

func BenchmarkDownload(b *testing.B) { tunneltest.BenchmarkDownload(b, carrier) }
func BenchmarkUpload(b *testing.B)   { tunneltest.BenchmarkUpload(b, carrier) }
func BenchmarkOpen(b *testing.B)     { tunneltest.BenchmarkOpen(b, carrier) }
func BenchmarkIdle(b *testing.B)     { tunneltest.BenchmarkIdle(b, carrier) }
func BenchmarkPingPong(b *testing.B) { tunneltest.BenchmarkPingPong(b, carrier) }

func FuzzRequest(f *testing.F) {
	w := newWire(f)
	f.Add("CONNECT deny.test:1 HTTP/1.1\r\nHost: deny.test:1\r\n\r\n")
	f.Add("GET /v1/me HTTP/1.1\r\nHost: gw.localhost\r\n\r\n")
	f.Add("\r\n\r\n")
	f.Fuzz(func(t *testing.T, text string) {
		c := w.dial(t)
		fmt.Fprint(c, text)
		c.CloseWrite()
		io.Copy(io.Discard, c) // that it ends, and that nothing panics, is the test
		c.Close()
	})
}

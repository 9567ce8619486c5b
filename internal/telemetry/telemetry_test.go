package telemetry_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport/internal/telemetry"
)

func get(t *testing.T, h http.Handler, method, host, path string) (int, string) {
	t.Helper()
	r := httptest.NewRequest(method, "http://127.0.0.1"+path, nil)
	r.Host = host
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

func TestHandler(t *testing.T) {
	var notReady error
	h := telemetry.Handler(telemetry.NewRegistry(), func() error { return notReady })
	tests := []struct {
		method, host, path string
		code               int
		body               string
	}{
		{"GET", "127.0.0.1:9", "/healthz", 200, "ok"},
		{"GET", "[::1]:9", "/readyz", 200, "ready"},
		{"GET", "localhost", "/metrics", 200, "go_goroutines"},
		{"GET", "127.0.0.1", "/debug/pprof/", 200, "goroutine"},
		{"GET", "127.0.0.1", "/debug/pprof/cmdline", 200, "telemetry"},
		{"GET", "127.0.0.1", "/", 404, ""},
		{"GET", "127.0.0.1", "/debug/vars", 404, ""},
		{"POST", "127.0.0.1", "/healthz", 405, ""},
		{"GET", "evil.example:9", "/metrics", 421, ""},
		{"GET", "127.0.0.1.evil.example", "/debug/pprof/heap", 421, ""},
		{"GET", "10.0.0.1", "/healthz", 421, ""},
	}
	for _, tt := range tests {
		if code, body := get(t, h, tt.method, tt.host, tt.path); code != tt.code || !strings.Contains(body, tt.body) {
			t.Errorf("%s %s at %s: got %d %.60q; want %d %q", tt.method, tt.path, tt.host, code, body, tt.code, tt.body)
		}
	}
	notReady = errors.New("no snapshot yet")
	if code, body := get(t, h, "GET", "127.0.0.1", "/readyz"); code != 503 || !strings.Contains(body, "no snapshot yet") {
		t.Errorf("not ready: got %d %q", code, body)
	}
}

func TestMetrics(t *testing.T) {
	reg := telemetry.NewRegistry()
	refused := reg.Counter("sallyport_test_refused_total", "Refused.", "outcome")
	refused.Inc("denied")
	refused.Add(2, "denied")
	reg.Counter("sallyport_test_untouched_total", "Never counted.")
	flows := reg.Gauge("sallyport_test_flows", "Flows.")
	flows.Set(5)
	flows.Add(-1)
	reg.GaugeFunc("sallyport_test_age_seconds", "Age.", func() float64 { return 1.5 })
	reg.Histogram("sallyport_test_seconds", "Took.", telemetry.Seconds).Observe(.002)

	_, body := get(t, telemetry.Handler(reg, nil), "GET", "localhost", "/metrics")
	for _, want := range []string{
		`sallyport_test_refused_total{outcome="denied"} 3`,
		`sallyport_test_untouched_total 0`,
		`sallyport_test_flows 4`,
		`sallyport_test_age_seconds 1.5`,
		`sallyport_test_seconds_bucket{le="0.001"} 0`,
		`sallyport_test_seconds_bucket{le="0.0025"} 1`,
	} {
		if !strings.Contains(body, want+"\n") {
			t.Errorf("/metrics lacks %s", want)
		}
	}
}

func TestNilRegistryCountsNothing(t *testing.T) {
	var reg *telemetry.Registry
	reg.Counter("a", "").Inc()
	reg.Gauge("b", "").Set(1)
	reg.Gauge("c", "").Add(1)
	reg.GaugeFunc("d", "", nil)
	reg.Histogram("e", "", nil).Observe(1)
	if code, _ := get(t, telemetry.Handler(reg, nil), "GET", "localhost", "/metrics"); code != 404 {
		t.Errorf("/metrics without a registry: got %d; want 404", code)
	}
}

func TestCase_J7_AdminListenerIsNotPublic(t *testing.T) {
	for addr, ok := range map[string]bool{
		"127.0.0.1:0": true, "127.9.9.9:1": true, "[::1]:0": true, "localhost:0": true, "unix:/run/x": true,
		":0": false, "0.0.0.0:0": false, "[::]:0": false, "10.0.0.1:80": false, "192.168.1.1:9090": false,
		"[fe80::1]:1": false, "admin.corp.example:1": false, "localhost.evil.example:1": false, "": false, "127.0.0.1": false, "unix:": false,
	} {
		if err := telemetry.CheckListen(addr); (err == nil) != ok {
			t.Errorf("%q: got %v; want ok %t", addr, err, ok)
		}
		if ln, err := telemetry.Listen(addr); !ok && err == nil {
			ln.Close()
			t.Errorf("%q: listens", addr)
		}
	}
}

func TestServeOnUnixSocket(t *testing.T) {
	dir, err := os.MkdirTemp("", "t")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "admin.sock")
	// One that a killed process left behind.
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()

	ln, err := telemetry.Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: got %v, %v; want 0600", info.Mode(), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- telemetry.Serve(ctx, ln, telemetry.Handler(nil, func() error { return nil })) }()

	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}}
	resp, err := client.Get("http://localhost/readyz")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != 200 || string(body) != "ready\n" {
		t.Errorf("got %d %q", resp.StatusCode, body)
	}
	if _, err := telemetry.Listen("unix:" + path); err == nil || !strings.Contains(err.Error(), "somebody listens") {
		t.Errorf("second listener: got %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := telemetry.Listen("unix:" + file); err == nil {
		t.Error("a file was taken for a stale socket")
	}
	if b, _ := os.ReadFile(file); string(b) != "mine" {
		t.Error("the file was removed")
	}
}

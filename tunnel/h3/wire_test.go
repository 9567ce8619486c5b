package h3_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/quic-go/qpack"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"

	"sallyport/proto/connect"
	"sallyport/tunnel/h3"
	"sallyport/tunnel/tunneltest"
)

// wire is a QUIC connection to a server, for requests that no client sends.
type wire struct {
	gateway *tunneltest.Gateway
	conn    *quic.Conn
	client  *http3.ClientConn
}

func newWire(t testing.TB) *wire {
	site, gateway := tunneltest.NewSite(t), tunneltest.NewGateway()
	addr := listen(t, site.ServerTLS(h3.NextProto), tunneltest.Domain, tunneltest.Host, gateway)
	conn, err := quic.DialAddr(t.Context(), addr, &tls.Config{
		RootCAs: site.Public.Pool(), ServerName: tunneltest.Host, NextProtos: []string{h3.NextProto},
		Certificates: []tls.Certificate{*site.Session(t, "s-1", nil)},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.CloseWithError(0, "") })
	return &wire{gateway: gateway, conn: conn, client: new(http3.Transport).NewClientConn(conn)}
}

type field = qpack.HeaderField

// send writes a HEADERS frame with fields on a stream of its own.
func (w *wire) send(t testing.TB, fields ...field) *quic.Stream {
	t.Helper()
	var block bytes.Buffer
	enc := qpack.NewEncoder(&block)
	for _, f := range fields {
		if err := enc.WriteField(f); err != nil {
			t.Fatal(err)
		}
	}
	str, err := w.conn.OpenStreamSync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	str.SetDeadline(time.Now().Add(10 * time.Second))
	frame := quicvarint.Append(nil, 0x1) // RFC 9114, section 7.2.2
	frame = quicvarint.Append(frame, uint64(block.Len()))
	if _, err := str.Write(append(frame, block.Bytes()...)); err != nil {
		t.Fatal(err)
	}
	return str
}

// answer reads the fields of the answer on str.
func answer(t testing.TB, str *quic.Stream) map[string]string {
	t.Helper()
	r := quicvarint.NewReader(str)
	if kind, err := quicvarint.Read(r); err != nil || kind != 0x1 {
		t.Fatalf("frame %d, %v; want HEADERS", kind, err)
	}
	n, err := quicvarint.Read(r)
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, n)
	if _, err := io.ReadFull(r, block); err != nil {
		t.Fatal(err)
	}
	out := make(map[string]string)
	next := qpack.NewDecoder().Decode(block)
	for {
		f, err := next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out[f.Name] = f.Value
	}
}

func TestCase_G1_MalformedConnect(t *testing.T) {
	w := newWire(t)
	method, authority := field{Name: ":method", Value: "CONNECT"}, field{Name: ":authority", Value: "echo.test:1"}
	tests := map[string][]field{
		":scheme":                  {method, authority, {Name: ":scheme", Value: "https"}},
		":path":                    {method, authority, {Name: ":path", Value: "/"}},
		":scheme and :path":        {method, authority, {Name: ":scheme", Value: "https"}, {Name: ":path", Value: "/"}},
		"empty :authority":         {method, {Name: ":authority", Value: ""}},
		"no :authority":            {method},
		"Host instead":             {method, {Name: "host", Value: "echo.test:1"}},
		"user info":                {method, {Name: ":authority", Value: "u@echo.test:1"}},
		"two :authority":           {method, authority, authority},
		"upper-case field":         {method, authority, {Name: "X-Upper", Value: "1"}},
		"unknown pseudo header":    {method, authority, {Name: ":target", Value: "1"}},
		"pseudo header after":      {method, {Name: "x", Value: "1"}, authority},
		"Host is another":          {method, authority, {Name: "host", Value: "deny.test:1"}},
		"connection field":         {method, authority, {Name: "connection", Value: "x"}},
		"transfer-encoding":        {method, authority, {Name: "transfer-encoding", Value: "chunked"}},
		"content-length":           {method, authority, {Name: "content-length", Value: "1"}},
		"CR in a value":            {method, authority, {Name: "x", Value: "a\rb"}},
		"empty :protocol":          {method, authority, {Name: ":protocol", Value: ""}},
		"extended without a :path": {method, authority, {Name: ":protocol", Value: "connect-udp"}},
	}
	for name, fields := range tests {
		t.Run(name, func(t *testing.T) {
			str := w.send(t, fields...)
			_, err := io.ReadAll(str)
			var reset *quic.StreamError
			if !errors.As(err, &reset) || !reset.Remote || reset.ErrorCode != quic.StreamErrorCode(http3.ErrCodeMessageError) {
				t.Errorf("read: %v; want a reset with H3_MESSAGE_ERROR", err)
			}
		})
	}
	if _, _, asked := w.gateway.Counts(); asked != 0 {
		t.Errorf("%d of them reached the handler", asked)
	}
	if got := answer(t, w.send(t, method, authority)); got[":status"] != "200" {
		t.Errorf("the connection did not live on: %v", got)
	}
}

func TestCase_G2_G8_BadTargets(t *testing.T) {
	w := newWire(t)
	for _, target := range []string{
		"db.internal", "db.internal:0", "db.internal:65536", "db.internal:+22", "db.internal: 22", "db.internal:0x16",
		"db.internal:22:22", "[fe80::1%25eth0]:22", "b\u00fccher.example:22", "2130706433:22", "127.1:22", "0x7f.1:22",
	} {
		got := answer(t, w.send(t, field{Name: ":method", Value: "CONNECT"}, field{Name: ":authority", Value: target}))
		ps, ok := connect.ParseProxyStatus(got["proxy-status"])
		if got[":status"] != "400" || !ok || ps.Error != connect.ProxyRequestError {
			t.Errorf("%s: %v; want 400 with a Proxy-Status", target, got)
		}
	}
	got := answer(t, w.send(t, field{Name: ":method", Value: "CONNECT"}, field{Name: ":authority", Value: "DENY.test.:1"}))
	if got[":status"] != "403" {
		t.Errorf("case and a trailing dot: %v; want what deny.test gets", got)
	}
	if _, _, asked := w.gateway.Counts(); asked != 1 {
		t.Errorf("%d CONNECTs reached the handler; want the last one", asked)
	}
}

func TestCase_G3_ExtendedConnect(t *testing.T) {
	w := newWire(t)
	for _, tt := range []struct{ protocol, path, status, proxy string }{
		{"websocket", "/chat", "501", connect.ProxyRequestDenied},
		{"webtransport", "/", "501", connect.ProxyRequestDenied},
		{"connect-udp", "/.well-known/masque/udp/dns.internal/53/", "403", connect.ProxyRequestDenied},
		{"connect-udp", "/.well-known/masque/udp/127.0.0.1/53/", "403", connect.ProxyIPProhibited},
		{"connect-udp", "/.well-known/masque/udp/%3A%3A1/53/", "403", connect.ProxyIPProhibited},
		{"connect-udp", "/.well-known/masque/udp/169.254.169.254/80/", "403", connect.ProxyIPProhibited},
	} {
		got := answer(t, w.send(t,
			field{Name: ":method", Value: "CONNECT"}, field{Name: ":protocol", Value: tt.protocol}, field{Name: ":scheme", Value: "https"},
			field{Name: ":authority", Value: tunneltest.Host}, field{Name: ":path", Value: tt.path}))
		ps, ok := connect.ParseProxyStatus(got["proxy-status"])
		if got[":status"] != tt.status || !ok || ps.Error != tt.proxy {
			t.Errorf("%s %s: %v; want %s, %s", tt.protocol, tt.path, got, tt.status, tt.proxy)
		}
	}
	if _, _, asked := w.gateway.Counts(); asked != 0 {
		t.Errorf("%d of them reached the handler", asked)
	}
}

func TestOnlyTheTunnelHostsAPI(t *testing.T) {
	w := newWire(t)
	for _, tt := range []struct{ authority, path, status string }{
		{tunneltest.Host, "/v1/me", "200"},
		{tunneltest.Host + ":8443", "/v1/me", "200"},
		{"wiki.corp.example", "/v1/me", "421"},
		{tunneltest.Host, "/", "404"},
		{tunneltest.Host, "/debug/pprof/", "404"},
	} {
		str := w.send(t, field{Name: ":method", Value: "GET"}, field{Name: ":scheme", Value: "https"},
			field{Name: ":authority", Value: tt.authority}, field{Name: ":path", Value: tt.path})
		if got := answer(t, str); got[":status"] != tt.status {
			t.Errorf("%s%s: %v; want %s", tt.authority, tt.path, got, tt.status)
		}
	}
}

// Two uploads that nobody reads must not stop a third flow.
func TestStalledUploadsDoNotStopOthers(t *testing.T) {
	site, gateway := tunneltest.NewSite(t), tunneltest.NewGateway()
	addr := listen(t, site.ServerTLS(h3.NextProto), tunneltest.Domain, tunneltest.Host, gateway)
	c, err := h3.Dial(t.Context(), site.DialConfig(addr, site.Session(t, "s-1", nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 2 * 4 { // on each connection that flows may be spread over
		f, err := c.Open(t.Context(), target("download.test"), nil) // writes and never reads
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		f.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		if _, err := f.Write(make([]byte, 4<<20)); err == nil {
			t.Fatal("4 MiB went to a service that reads nothing")
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	f, err := c.Open(ctx, target("echo.test"), []byte("still here"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(f, make([]byte, 10)); err != nil {
		t.Error(err)
	}
}

// 450 flows at once, more than quic-go's default of 100 streams on each of four
// connections would let through.
func TestManyOpenFlows(t *testing.T) {
	site, gateway := tunneltest.NewSite(t), tunneltest.NewGateway()
	addr := listen(t, site.ServerTLS(h3.NextProto), tunneltest.Domain, tunneltest.Host, gateway)
	c, err := h3.Dial(t.Context(), site.DialConfig(addr, site.Session(t, "s-1", nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for i := range 450 {
		f, err := c.Open(ctx, target("echo.test"), nil)
		if err != nil {
			t.Fatalf("flow %d: %v", i, err)
		}
		defer f.Close()
	}
	if n := len(gateway.Conns()); n != 4 {
		t.Errorf("%d connections; want the flows spread over 4", n)
	}
}

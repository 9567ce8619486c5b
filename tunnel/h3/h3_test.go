package h3_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"sallyport"
	"sallyport/internal/logging"
	"sallyport/tunnel"
	"sallyport/tunnel/h3"
	"sallyport/tunnel/tunneltest"
)

func TestConformance(t *testing.T) { tunneltest.Run(t, carrier) }

var carrier = tunneltest.Carrier{
	Name:      h3.Name,
	NextProto: h3.NextProto,
	Codes:     true,
	Listen:    listen,
	Dial:      h3.Dial,
	Handshake: handshake,
}

func listen(t testing.TB, conf *tls.Config, domain, host string, h tunnel.Handler) string {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := h3.NewServer(h3.ServerConfig{TLS: conf, Domain: domain, Host: host, Handler: h, Log: logging.Discard()})
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, pc) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
		pc.Close()
	})
	return pc.LocalAddr().String()
}

func handshake(ctx context.Context, addr string, conf *tls.Config) error {
	q, err := quic.DialAddr(ctx, addr, conf, nil)
	if err != nil {
		return err
	}
	defer q.CloseWithError(0, "")
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+tunneltest.Host+"/v1/me", nil)
	if err != nil {
		return err
	}
	resp, err := new(http3.Transport).NewClientConn(q).RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("answer %s", resp.Status)
	}
	return nil
}

func BenchmarkDownload(b *testing.B) { tunneltest.BenchmarkDownload(b, carrier) }
func BenchmarkUpload(b *testing.B)   { tunneltest.BenchmarkUpload(b, carrier) }
func BenchmarkOpen(b *testing.B)     { tunneltest.BenchmarkOpen(b, carrier) }
func BenchmarkIdle(b *testing.B)     { tunneltest.BenchmarkIdle(b, carrier) }
func BenchmarkPingPong(b *testing.B) { tunneltest.BenchmarkPingPong(b, carrier) }

func target(host string) sallyport.Target {
	return sallyport.Target{Network: sallyport.TCP, Host: host, Port: 1}
}

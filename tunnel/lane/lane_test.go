package lane_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/internal/logging"
	"sallyport/tunnel"
	"sallyport/tunnel/lane"
	"sallyport/tunnel/tunneltest"
)

func TestConformance(t *testing.T) { tunneltest.Run(t, carrier) }

var carrier = tunneltest.Carrier{
	Name:        lane.Name,
	NextProto:   lane.NextProto,
	WithoutALPN: true,
	Listen:      listen,
	Dial:        lane.Dial,
	Handshake:   handshake,
}

func listen(t testing.TB, conf *tls.Config, domain, host string, h tunnel.Handler) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := lane.NewServer(lane.ServerConfig{Domain: domain, Host: host, Handler: h, Log: logging.Discard()})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { s.ServeConn(ctx, tls.Server(lane.Socket(c), conf)) })
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

func handshake(ctx context.Context, addr string, conf *tls.Config) error {
	c, err := (&tls.Dialer{Config: conf}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	fmt.Fprintf(c, "GET /v1/me HTTP/1.1\r\nHost: %s\r\n\r\n", tunneltest.Host)
	answer, err := io.ReadAll(c)
	if err == nil && !strings.HasPrefix(string(answer), "HTTP/1.1 200") {
		err = fmt.Errorf("answer %.40q", answer)
	}
	return err
}

package demo

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// service is one of the company's, on loopback. It counts who reaches it.
type service struct {
	addr     string
	accepted atomic.Int64

	l     net.Listener
	ctx   context.Context
	stop  context.CancelFunc
	conns sync.WaitGroup
}

// serve starts a service whose connections are handled by handle.
func serve(handle func(ctx context.Context, c net.Conn)) (*service, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &service{addr: l.Addr().String(), l: l}
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			s.accepted.Add(1)
			s.conns.Go(func() {
				end := context.AfterFunc(s.ctx, func() { c.Close() })
				defer end()
				defer c.Close()
				handle(s.ctx, c)
			})
		}
	})
	return s, nil
}

func (s *service) close() {
	s.stop()
	s.l.Close()
	s.conns.Wait()
}

// database answers one line with one line, and streams when asked to.
func database(ctx context.Context, c net.Conn) {
	lines := bufio.NewScanner(io.LimitReader(c, 1<<20))
	for lines.Scan() {
		switch line := strings.TrimSpace(lines.Text()); line {
		case "SELECT 6*7":
			fmt.Fprintln(c, 42)
		case "STREAM":
			stream(ctx, c)
			return
		default:
			fmt.Fprintf(c, "ERROR: this database knows SELECT 6*7 and STREAM, not %.40q\n", line)
		}
	}
}

// stream sends a line each two milliseconds, so that the end of a connection can
// be told to that.
func stream(ctx context.Context, c net.Conn) {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		if _, err := fmt.Fprintf(c, "row %d\n", n); err != nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// wiki speaks HTTP/1.1 on one connection.
func wiki(_ context.Context, c net.Conn) {
	in := bufio.NewReader(c)
	for {
		if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			return
		}
		r, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		body := "<h1>The company wiki</h1>\n"
		_, err = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		if err != nil || r.Close {
			return
		}
	}
}

// reachesWiki fetches a page through a tunnel with an ordinary HTTP client.
func (a *alice) reachesWiki(ctx context.Context) (string, error) {
	c, err := a.connect(ctx, "wiki.internal:80")
	if err != nil {
		return "", err
	}
	defer c.close()
	client := &http.Client{Timeout: patience, Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return c.Conn, nil },
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://wiki.internal/", nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK || !strings.Contains(string(page), "company wiki") {
		return "", fmt.Errorf("the wiki answered %s: %s", resp.Status, page)
	}
	return fmt.Sprintf("%s\nGET http://wiki.internal/ → %s, %d bytes", c.announced, resp.Status, len(page)), nil
}

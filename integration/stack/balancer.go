package stack

import (
	"io"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"
)

// Balancer is the TCP load balancer that a site puts in front of several authds:
// each connection goes to the next of them that accepts. As one that keeps the
// addresses of clients would, it comes from many: authd limits what one may ask.
type Balancer struct {
	l net.Listener

	mu    sync.Mutex // guards what follows
	to    []string
	next  int
	conns map[net.Conn]bool
}

// NewBalancer listens; it ends with the test.
func NewBalancer(t testing.TB) *Balancer {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &Balancer{l: l, conns: map[net.Conn]bool{}}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			all.Go(func() { b.carry(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		b.Drop()
		all.Wait()
	})
	return b
}

// URL is how the balancer is reached under the host's name.
func (b *Balancer) URL(host string) string {
	_, port, err := net.SplitHostPort(b.l.Addr().String())
	if err != nil {
		return ""
	}
	return (&url.URL{Scheme: "https", Host: net.JoinHostPort(host, port)}).String()
}

// To says where connections go, in turn.
func (b *Balancer) To(addrs ...string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.to, b.next = addrs, 0
}

// Drop closes every connection.
func (b *Balancer) Drop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.conns {
		c.Close()
	}
}

func (b *Balancer) carry(in net.Conn) {
	defer in.Close()
	out := b.reach()
	if out == nil {
		return
	}
	defer out.Close()
	b.mu.Lock()
	b.conns[in], b.conns[out] = true, true
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.conns, in)
		delete(b.conns, out)
	}()
	var back sync.WaitGroup
	back.Go(func() {
		_, _ = io.Copy(in, out)
		in.Close()
	})
	_, _ = io.Copy(out, in)
	out.Close()
	back.Wait()
}

// reach connects to the next one that accepts, or to none.
func (b *Balancer) reach() net.Conn {
	b.mu.Lock()
	to, first := b.to, b.next
	b.next++
	b.mu.Unlock()
	from := net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+first%250))}
	d := net.Dialer{Timeout: time.Second, LocalAddr: &from}
	for i := range to {
		if c, err := d.Dial("tcp", to[(first+i)%len(to)]); err == nil {
			return c
		}
	}
	return nil
}

package stack

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// Upstream is a company's service on loopback that counts who reached it. A
// connection that the kernel completed counts, whether or not a byte came: so
// none means that there was no SYN.
type Upstream struct {
	Addr     string
	accepted atomic.Int64
	open     atomic.Int64
}

// Accepted is how many connections were opened so far.
func (u *Upstream) Accepted() int64 { return u.accepted.Load() }

// Open is how many of them are open now.
func (u *Upstream) Open() int64 { return u.open.Load() }

// Listen starts a service whose connections are handled by handle; it ends with
// the test.
func Listen(t testing.TB, handle func(c *net.TCPConn)) *Upstream {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u := &Upstream{Addr: l.Addr().String()}
	var conns sync.Map
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			u.accepted.Add(1)
			u.open.Add(1)
			conns.Store(c, nil)
			all.Go(func() {
				defer u.open.Add(-1)
				defer conns.Delete(c)
				defer c.Close()
				handle(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		conns.Range(func(c, _ any) bool { c.(net.Conn).Close(); return true })
		all.Wait()
	})
	return u
}

// EchoServer sends back what comes, keeps the other direction open after an end
// of stream until all is sent.
func EchoServer(t testing.TB) *Upstream {
	t.Helper()
	return Listen(t, func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
}

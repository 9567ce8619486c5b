package lane

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/tunnel"
)

// linger is how long Close waits for the peer to stop sending. Closing a socket
// that has unread bytes makes the kernel send a reset, which can overtake and
// destroy what was sent before it.
const linger = 500 * time.Millisecond

// conn is a flow on a lane: the TLS stream behind the CONNECT.
type conn struct {
	*tls.Conn
	early []byte // read together with the head; comes first
	raw   net.Conn

	ended  atomic.Bool // the peer's end, or its reset, has been read
	closed sync.Once
}

var _ tunnel.Conn = (*conn)(nil)

// newConn wraps c, whose socket is raw; early comes before what c still holds.
func newConn(c *tls.Conn, early []byte) *conn {
	return &conn{Conn: c, early: early, raw: socket(c)}
}

func (c *conn) Read(b []byte) (int, error) {
	if len(c.early) > 0 {
		n := copy(b, c.early)
		if c.early = c.early[n:]; len(c.early) == 0 {
			c.early = nil
		}
		return n, nil
	}
	n, err := c.Conn.Read(b)
	if err != nil {
		err = c.readError(err)
	}
	return n, err
}

func (c *conn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil {
		err = resetError(err)
	}
	return n, err
}

func (c *conn) readError(err error) error {
	err = resetError(err)
	var reset *tunnel.ResetError
	if err == io.EOF || errors.As(err, &reset) {
		c.ended.Store(true)
	}
	return err
}

// resetError turns what TLS over TCP shows of a cut into a *tunnel.ResetError. An
// end of the TCP stream without close_notify is one: whoever truncates must not
// pass for whoever finished (RFC 8446, section 6.1).
func resetError(err error) error {
	if err == io.ErrUnexpectedEOF || errors.Is(err, errCut) {
		return &tunnel.ResetError{}
	}
	for _, r := range resets {
		if errors.Is(err, r) {
			return &tunnel.ResetError{}
		}
	}
	return err
}

// Close implements tunnel.Conn.
func (c *conn) Close() (err error) {
	c.closed.Do(func() { err = closeGently(c.Conn, c.raw, c.ended.Load()) })
	return err
}

// closeGently sends the end of the stream and, unless the peer has ended its own,
// gives it a moment to read what was sent before the socket closes.
func closeGently(c *tls.Conn, raw net.Conn, ended bool) error {
	if ended {
		return c.Close()
	}
	raw.SetDeadline(time.Now().Add(linger)) // also ends reads and writes that are under way
	c.CloseWrite()
	if tcp, ok := raw.(*net.TCPConn); ok {
		tcp.CloseWrite()
		io.CopyN(io.Discard, struct{ io.Reader }{tcp}, 4<<20)
	}
	return raw.Close()
}

// Reset implements tunnel.Conn: a TCP reset, which has no room for the code.
func (c *conn) Reset(uint64) {
	c.closed.Do(func() { hardClose(c.raw) })
	c.raw.Close() // a Close that lingers ends at once
}

func hardClose(raw net.Conn) {
	if tcp, ok := raw.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	raw.Close()
}

package h3

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"sallyport/tunnel"
)

// stream is what a request stream and an accepted stream have in common.
type stream interface {
	io.ReadWriteCloser // Close ends the sending direction
	CancelRead(quic.StreamErrorCode)
	CancelWrite(quic.StreamErrorCode)
	SetDeadline(time.Time) error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// conn is a flow: a CONNECT stream after its answer.
type conn struct {
	stream
	quic *quic.Conn

	// broken: a write failed, perhaps inside a DATA frame. To end the stream now
	// would pass off a part as the whole.
	broken atomic.Bool
	over   sync.Once
	onOver func() // the flow has been closed or reset
}

var _ tunnel.Conn = (*conn)(nil)

func (c *conn) LocalAddr() net.Addr  { return c.quic.LocalAddr() }
func (c *conn) RemoteAddr() net.Addr { return c.quic.RemoteAddr() }

func (c *conn) Read(b []byte) (int, error) {
	n, err := c.stream.Read(b)
	return n, flowError(err)
}

func (c *conn) Write(b []byte) (int, error) {
	n, err := c.stream.Write(b)
	if err != nil {
		c.broken.Store(true)
	}
	return n, flowError(err)
}

// CloseWrite implements tunnel.Conn.
func (c *conn) CloseWrite() error {
	if c.broken.Load() {
		return errors.New("close write: an earlier write failed")
	}
	return flowError(c.stream.Close())
}

// Close implements tunnel.Conn.
func (c *conn) Close() error {
	c.over.Do(func() {
		c.stream.CancelRead(quic.StreamErrorCode(http3.ErrCodeNoError))
		if c.broken.Load() {
			c.stream.CancelWrite(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
		} else {
			c.stream.Close()
		}
		c.onOver()
	})
	return nil
}

// Reset implements tunnel.Conn.
func (c *conn) Reset(code uint64) {
	c.over.Do(func() {
		cancelStream(c.stream, code)
		c.onOver()
	})
}

func cancelStream(s stream, code uint64) {
	if code == 0 {
		code = uint64(http3.ErrCodeRequestCanceled)
	}
	s.CancelRead(quic.StreamErrorCode(code))
	s.CancelWrite(quic.StreamErrorCode(code))
}

// flowError turns what a stream's end without EOF looks like in quic-go into a
// *tunnel.ResetError.
func flowError(err error) error {
	if err == nil || err == io.EOF || errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	var (
		stream *quic.StreamError
		app    *quic.ApplicationError
	)
	switch {
	case errors.As(err, &stream) && stream.Remote:
		return &tunnel.ResetError{Code: ourCode(uint64(stream.ErrorCode))}
	case errors.As(err, &app) && app.Remote:
		return &tunnel.ResetError{Code: ourCode(uint64(app.ErrorCode))}
	case errors.As(err, &stream), errors.As(err, &app):
		return net.ErrClosed
	}
	return fmt.Errorf("%w: %w", &tunnel.ResetError{}, err)
}

// ourCode returns code if it is one of proto/connect's; HTTP/3's own codes say
// nothing that a flow's user could act upon.
func ourCode(code uint64) uint64 {
	if code >= 0x1000 && code < 0x2000 {
		return code
	}
	return 0
}

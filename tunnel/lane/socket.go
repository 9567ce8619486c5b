package lane

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
)

// errCut is a TCP stream that ended without TLS's close_notify.
var errCut = errors.New("the connection was cut")

// Socket prepares an accepted TCP connection for tls.Server and ServeConn.
// crypto/tls reports a TCP stream that ends between two records as a regular end,
// which lets whoever can forge a FIN truncate a flow unnoticed (RFC 8446, section
// 6.1); behind a Socket it is an error.
func Socket(c net.Conn) net.Conn { return &sock{c} }

type sock struct{ net.Conn }

func (s *sock) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	if err == io.EOF {
		err = errCut
	}
	return n, err
}

// NetConn returns the connection below.
func (s *sock) NetConn() net.Conn { return s.Conn }

// socket returns the TCP connection at the bottom of c, below any TLS to a proxy.
func socket(c *tls.Conn) net.Conn {
	raw := c.NetConn()
	for {
		inner, ok := raw.(interface{ NetConn() net.Conn })
		if !ok {
			return raw
		}
		raw = inner.NetConn()
	}
}

package relay

import "net"

// TCP returns c as a Conn. Reset sends a TCP RST; TCP has no room for a code.
func TCP(c *net.TCPConn) Conn { return tcpConn{c} }

type tcpConn struct{ *net.TCPConn }

// Reset implements Conn.
func (c tcpConn) Reset(uint64) {
	c.SetLinger(0) // fails only on a closed socket
	c.Close()
}

package forward

import "net"

// CheckPeer is checkPeer, for the benchmark.
func (f *Forward) CheckPeer(c net.Conn) error { return f.checkPeer(c) }

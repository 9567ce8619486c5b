//go:build !linux

package h3

import "net"

func batched(pc net.PacketConn) net.PacketConn { return pc }

package h3

import (
	"encoding/binary"
	"net"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

const (
	// One read takes up to groReads datagrams, each of which the kernel may have
	// merged from up to 64 KiB of one sender's packets (UDP_GRO, udp(7)).
	groReads  = 4
	groBuffer = 64 << 10
	groOOB    = 256
)

// batched returns pc such that quic-go reads merged datagrams: one system call,
// and one walk through the network stack, for dozens of packets. It is pc itself
// where the kernel cannot.
func batched(pc net.PacketConn) net.PacketConn {
	udp, ok := pc.(*net.UDPConn)
	if !ok {
		return pc
	}
	raw, err := udp.SyscallConn()
	if err != nil {
		return pc
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 1) }); err != nil || failed != nil {
		return pc
	}
	g := &groConn{UDPConn: udp, batch: ipv4.NewPacketConn(udp), in: make([]ipv4.Message, groReads)}
	for i := range g.in {
		g.in[i].Buffers = [][]byte{make([]byte, groBuffer)}
		g.in[i].OOB = make([]byte, groOOB)
	}
	return g
}

// groConn is a UDP socket whose ReadBatch splits what the kernel has merged. It is
// quic-go's hook: only its reader calls ReadBatch, and one call at a time.
type groConn struct {
	*net.UDPConn
	batch *ipv4.PacketConn

	in   []ipv4.Message // the last read
	read int            // how many of in are filled
	next int            // the first one not handed out to its end
	off  int            // how far it is handed out
	size int            // its packets' size; 0: not looked at yet
}

// ReadBatch fills ms with single packets and returns how many: at least one.
func (g *groConn) ReadBatch(ms []ipv4.Message, flags int) (int, error) {
	filled := 0
	for filled == 0 {
		if g.next >= g.read {
			if err := g.fill(flags); err != nil {
				return 0, err
			}
		}
		for filled < len(ms) && g.next < g.read {
			if g.split(&ms[filled]) {
				filled++
			}
		}
	}
	return filled, nil
}

func (g *groConn) fill(flags int) error {
	for i := range g.in {
		g.in[i].OOB = g.in[i].OOB[:groOOB]
	}
	n, err := g.batch.ReadBatch(g.in, flags)
	g.read, g.next, g.off, g.size = max(n, 0), 0, 0, 0
	return err
}

// split hands out the next packet; false if there was none in this datagram.
func (g *groConn) split(out *ipv4.Message) bool {
	in := &g.in[g.next]
	if g.size == 0 {
		if g.size = segmentSize(in.OOB[:in.NN]); g.size == 0 {
			g.size = max(in.N, 1)
		}
	}
	packet := in.Buffers[0][g.off:min(g.off+g.size, in.N)]
	if g.off += g.size; g.off >= in.N {
		g.next, g.off, g.size = g.next+1, 0, 0
	}
	if len(packet) > len(out.Buffers[0]) || in.NN > len(out.OOB) {
		return false // larger than any QUIC packet we take
	}
	out.N = copy(out.Buffers[0], packet)
	out.NN = copy(out.OOB, in.OOB[:in.NN])
	out.Addr, out.Flags = in.Addr, in.Flags
	return true
}

// segmentSize returns the size of merged packets from a datagram's control
// messages, 0 if it is a single packet.
func segmentSize(oob []byte) int {
	for len(oob) > 0 {
		h, body, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return 0
		}
		if h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && len(body) >= 2 {
			return int(binary.NativeEndian.Uint16(body))
		}
		oob = rest
	}
	return 0
}

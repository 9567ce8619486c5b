package h3

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// What one send merged (UDP_SEGMENT) must come out as the packets it was made of.
func TestMergedDatagramsAreSplit(t *testing.T) {
	listen := func() *net.UDPConn {
		c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(5 * time.Second))
		return c
	}
	from, to := listen(), listen()
	g, ok := batched(to).(*groConn)
	if !ok {
		t.Fatal("this kernel has no UDP_GRO; Linux 5.0 or newer is needed")
	}
	var want [][]byte
	var merged []byte
	for i := range 20 {
		p := bytes.Repeat([]byte{byte(i + 1)}, 1200)
		if i == 19 {
			p = p[:77] // the last may be shorter
		}
		want = append(want, p)
		merged = append(merged, p...)
	}
	oob := make([]byte, unix.CmsgSpace(2))
	binary.NativeEndian.PutUint64(oob, uint64(unix.CmsgLen(2)))
	binary.NativeEndian.PutUint32(oob[8:], unix.IPPROTO_UDP)
	binary.NativeEndian.PutUint32(oob[12:], unix.UDP_SEGMENT)
	binary.NativeEndian.PutUint16(oob[16:], 1200)
	if _, _, err := from.WriteMsgUDP(merged, oob, to.LocalAddr().(*net.UDPAddr)); err != nil {
		t.Fatal(err)
	}
	if _, err := from.WriteTo([]byte("single"), to.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	want = append(want, []byte("single"))

	var got [][]byte
	for len(got) < len(want) {
		ms := make([]ipv4.Message, 8) // as quic-go does
		for i := range ms {
			ms[i].Buffers, ms[i].OOB = [][]byte{make([]byte, 1452)}, make([]byte, 128)
		}
		n, err := g.ReadBatch(ms, 0)
		if err != nil || n == 0 {
			t.Fatalf("%d packets, %v, after %d", n, err, len(got))
		}
		for _, m := range ms[:n] {
			got = append(got, bytes.Clone(m.Buffers[0][:m.N]))
			if m.Addr.String() != from.LocalAddr().String() {
				t.Errorf("packet from %v; want %v", m.Addr, from.LocalAddr())
			}
		}
	}
	for i := range want {
		if !bytes.Equal(got[i], want[i]) {
			t.Errorf("packet %d: %d bytes of %d; want %d of %d", i, len(got[i]), got[i][0], len(want[i]), want[i][0])
		}
	}
}

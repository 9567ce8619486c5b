package tunneltest

import (
	"context"
	"io"
	"net"
	"net/http"
	"runtime"
	"testing"

	"sallyport/internal/relay"
	"sallyport/tunnel"
)

// BenchmarkDownload and BenchmarkUpload carry bytes from one TCP connection to
// another through two relays and the carrier between them, all in this process.
// cpu-s/GB is what the whole process used; the two ends, which do nothing but
// read and write, are part of it.
func BenchmarkDownload(b *testing.B, c Carrier) { benchmarkCarry(b, c, false) }

// BenchmarkUpload is BenchmarkDownload the other way.
func BenchmarkUpload(b *testing.B, c Carrier) { benchmarkCarry(b, c, true) }

func benchmarkCarry(b *testing.B, c Carrier, up bool) {
	near, far := carried(b, c)
	src, dst := near, far
	if !up {
		src, dst = far, near
	}
	chunk, sink := make([]byte, 256<<10), make([]byte, 256<<10)
	total := 0
	done := make(chan error, 1)
	b.SetBytes(int64(len(chunk)))
	b.ReportAllocs()
	b.ResetTimer()
	before := cpu()
	go func() {
		_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{dst}, sink)
		done <- err
	}()
	for b.Loop() {
		if _, err := src.Write(chunk); err != nil {
			b.Fatal(err)
		}
		total += len(chunk)
	}
	src.CloseWrite()
	if err := <-done; err != nil {
		b.Fatal(err)
	}
	b.ReportMetric((cpu()-before).Seconds()/float64(total)*1e9, "cpu-s/GB")
}

// BenchmarkOpen opens a flow, waits for the first byte back, and closes it.
func BenchmarkOpen(b *testing.B, c Carrier) {
	s := newSetup(b, c)
	b.ReportAllocs()
	before, n := cpu(), 0
	for b.Loop() {
		f, err := s.carrier.Open(b.Context(), target(Echo), []byte("x"))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(f, make([]byte, 1)); err != nil {
			b.Fatal(err)
		}
		f.Close()
		n++
	}
	b.ReportMetric(float64((cpu()-before).Microseconds())/float64(n), "cpu-µs/op")
}

// BenchmarkPingPong sends one byte through both relays and waits for it to come
// back.
func BenchmarkPingPong(b *testing.B, c Carrier) {
	near, far := carried(b, c)
	go io.Copy(struct{ io.Writer }{far}, struct{ io.Reader }{far})
	one := make([]byte, 1)
	b.ReportAllocs()
	b.ResetTimer()
	before, n := cpu(), 0
	for b.Loop() {
		if _, err := near.Write(one); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(near, one); err != nil {
			b.Fatal(err)
		}
		n++
	}
	b.ReportMetric(float64((cpu()-before).Microseconds())/float64(n), "cpu-µs/op")
}

// BenchmarkIdle reports what an idle flow holds in both halves of the tunnel, the
// relays' share included and kernel buffers not, in KiB of heap and stacks.
func BenchmarkIdle(b *testing.B, c Carrier) {
	const flows = 300
	service, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer service.Close()
	site := NewSite(b)
	addr := c.Listen(b, site.ServerTLS(c.NextProto), Domain, Host, onward(func() (*net.TCPConn, error) {
		up, err := net.Dial("tcp", service.Addr().String())
		return up.(*net.TCPConn), err
	}))
	carrier, err := c.Dial(b.Context(), site.DialConfig(addr, site.Session(b, "s-1", nil)))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { carrier.Close() })
	for b.Loop() {
		before := inUse()
		for range flows {
			f, err := carrier.Open(b.Context(), target(Echo), []byte("x"))
			if err != nil {
				b.Fatal(err)
			}
			end, err := service.Accept()
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { end.Close() })
			near, far := tcpPair(b)
			done := make(chan struct{})
			go func() {
				defer close(done)
				relay.Splice(b.Context(), relay.TCP(far), f, relay.Options{})
			}()
			b.Cleanup(func() { near.Close(); <-done })
		}
		b.ReportMetric(float64(inUse()-before)/flows/1024, "KiB/flow")
	}
}

func inUse() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// carried returns the outer ends of TCP, relay, carrier, relay, TCP.
func carried(b *testing.B, c Carrier) (near, far *net.TCPConn) {
	site := NewSite(b)
	far, up := tcpPair(b)
	addr := c.Listen(b, site.ServerTLS(c.NextProto), Domain, Host, onward(func() (*net.TCPConn, error) { return up, nil }))
	carrier, err := c.Dial(b.Context(), site.DialConfig(addr, site.Session(b, "s-1", nil)))
	if err != nil {
		b.Fatal(err)
	}
	flow, err := carrier.Open(b.Context(), target(Echo), nil)
	if err != nil {
		b.Fatal(err)
	}
	near, down := tcpPair(b)
	done := make(chan struct{})
	go func() {
		defer close(done)
		relay.Splice(b.Context(), relay.TCP(down), flow, relay.Options{})
	}()
	b.Cleanup(func() {
		near.Close()
		far.Close()
		<-done
		carrier.Close()
	})
	return near, far
}

func tcpPair(b *testing.B) (x, y *net.TCPConn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// onward is a Handler that relays each CONNECT to what it returns.
type onward func() (*net.TCPConn, error)

func (onward) Admit(context.Context, tunnel.ServerConn) (func(), error) { return nil, nil }

func (onward) ServeAPI(http.ResponseWriter, *http.Request, tunnel.ServerConn) {}

func (o onward) Connect(ctx context.Context, s tunnel.ServerStream) {
	up, err := o()
	if err != nil {
		return
	}
	defer up.Close()
	if c, err := s.Accept(nil); err == nil {
		relay.Splice(ctx, c, relay.TCP(up), relay.Options{})
	}
}

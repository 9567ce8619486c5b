package control_test

import (
	"context"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyport"
)

// BenchmarkAuthorize measures one question to another process through gRPC and
// mTLS on loopback, with the answer ready, beside a bare TCP echo of about the
// same size in that process. Each reports calls per second and the latency's
// median and 99th percentile.
func BenchmarkAuthorize(b *testing.B) {
	p := newPKI(b)
	daemon := start(b, p, "policyd")
	grpcAddr, echoAddr := daemon.line(b), daemon.line(b)
	questions := []sallyport.Request{question("db.internal", 443)}
	questions[0].Headers = nil

	for _, callers := range []int{1, 64} {
		b.Run(name("grpc", callers), func(b *testing.B) {
			policy := dial(b, p.client("gateway", "policyd"), grpcAddr).Policy()
			measure(b, callers, func() func() error {
				return func() error {
					_, err := policy.Authorize(context.Background(), questions)
					return err
				}
			})
		})
		b.Run(name("echo", callers), func(b *testing.B) {
			measure(b, callers, func() func() error { return echoCaller(b, echoAddr) })
		})
	}
}

func name(what string, callers int) string {
	if callers == 1 {
		return what + "/callers=1"
	}
	return what + "/callers=64"
}

// measure runs b.N calls by so many callers and reports their latencies. Each
// caller gets a call of its own.
func measure(b *testing.B, callers int, newCall func() func() error) {
	calls := make([]func() error, callers)
	for i := range calls {
		calls[i] = newCall()
		if err := calls[i](); err != nil { // connects
			b.Fatal(err)
		}
	}
	var todo atomic.Int64
	todo.Store(int64(b.N))
	took := make([][]time.Duration, callers)
	b.ReportAllocs()
	b.ResetTimer()
	var wg sync.WaitGroup
	for i, call := range calls {
		wg.Go(func() {
			for todo.Add(-1) >= 0 {
				start := time.Now()
				if err := call(); err != nil {
					b.Error(err)
					return
				}
				took[i] = append(took[i], time.Since(start))
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	all := slices.Concat(took...)
	slices.Sort(all)
	if len(all) > 0 {
		b.ReportMetric(float64(all[len(all)/2].Nanoseconds())/1e3, "p50-µs")
		b.ReportMetric(float64(all[len(all)*99/100].Nanoseconds())/1e3, "p99-µs")
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
	}
}

// echo sends back what it reads, without splice: as a program would answer.
func echo(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
		}()
	}
}

func echoCaller(b *testing.B, addr string) func() error {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	message := make([]byte, 300)
	return func() error {
		if _, err := c.Write(message); err != nil {
			return err
		}
		_, err := io.ReadFull(c, message)
		return err
	}
}

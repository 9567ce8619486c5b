package control_test

import (
	"context"
	"fmt"
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
// same size in that process. The two take turns, so that what else the machine does
// falls on both: what counts is p50-ratio and p99-ratio, gRPC's latency in those of
// the echo.
func BenchmarkAuthorize(b *testing.B) {
	p := newPKI(b)
	daemon := start(b, p, "policyd")
	grpcAddr, echoAddr := daemon.line(b), daemon.line(b)
	questions := []sallyport.Request{question("db.internal", 443)}
	questions[0].Headers = nil
	policy := dial(b, p.client("gateway", "policyd"), grpcAddr).Policy()

	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			grpc, echo := &measured{}, &measured{}
			for range callers {
				grpc.calls = append(grpc.calls, func() error {
					_, err := policy.Authorize(context.Background(), questions)
					return err
				})
				echo.calls = append(echo.calls, echoCaller(b, echoAddr))
			}
			for _, m := range []*measured{echo, grpc} {
				m.run(b, callers) // connects
				m.took, m.all = nil, 0
			}
			b.ResetTimer()
			turn := max(200, 20*callers)
			for done := 0; done < b.N; done += turn {
				n := min(turn, b.N-done)
				echo.run(b, n)
				grpc.run(b, n)
			}
			b.StopTimer()
			grpc.report(b, "grpc")
			echo.report(b, "echo")
			for name, q := range map[string]float64{"p50-ratio": .50, "p99-ratio": .99} {
				b.ReportMetric(float64(grpc.quantile(q))/float64(echo.quantile(q)), name)
			}
		})
	}
}

// measured are the latencies of one kind of call, each caller with one of its own.
type measured struct {
	calls []func() error
	took  []time.Duration
	all   time.Duration
}

// run makes n calls.
func (m *measured) run(b *testing.B, n int) {
	b.Helper()
	var todo atomic.Int64
	todo.Store(int64(n))
	took := make([][]time.Duration, len(m.calls))
	began := time.Now()
	var wg sync.WaitGroup
	for i, call := range m.calls {
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
	m.all += time.Since(began)
	m.took = append(m.took, slices.Concat(took...)...)
}

func (m *measured) quantile(q float64) time.Duration {
	if len(m.took) == 0 {
		return 1
	}
	slices.Sort(m.took)
	return m.took[int(float64(len(m.took)-1)*q)]
}

func (m *measured) report(b *testing.B, name string) {
	b.Helper()
	b.ReportMetric(float64(m.quantile(.50).Nanoseconds())/1e3, name+"-p50-µs")
	b.ReportMetric(float64(m.quantile(.99).Nanoseconds())/1e3, name+"-p99-µs")
	b.ReportMetric(float64(len(m.took))/m.all.Seconds(), name+"-calls/s")
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

package sqlite_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport"
)

var benchSessions = flag.Int("sessions", 10_000, "how many sessions the benchmarks' store holds")

// benchFile returns a file with that many sessions.
func benchFile(b *testing.B) string {
	b.Helper()
	path := filepath.Join(b.TempDir(), "cached.db")
	s, end := serve(b, path)
	defer end()
	for i := 0; i < *benchSessions; {
		var batch []sallyport.Op
		for len(batch) < 1000 && i < *benchSessions {
			batch = append(batch, sessionOp(i))
			i++
		}
		if _, err := s.Apply(b.Context(), batch); err != nil {
			b.Fatal(err)
		}
	}
	return path
}

func BenchmarkGet(b *testing.B) {
	s, end := serve(b, benchFile(b))
	defer end()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Get(b.Context(), sallyport.KindSession, fmt.Sprint("s", rand.IntN(*benchSessions))); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPut is 64 callers that each write one session and wait for it.
func BenchmarkPut(b *testing.B) {
	s, end := serve(b, benchFile(b))
	defer end()
	var n atomic.Int64
	b.SetParallelism(64)
	b.ReportAllocs()
	before := cpuTime(b)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := s.Apply(b.Context(), []sallyport.Op{sessionOp(int(n.Add(1)))}); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/float64(b.N), "cpu-µs/op")
}

// BenchmarkSnapshot is what policyd waits for at its start.
func BenchmarkSnapshot(b *testing.B) {
	s, end := serve(b, benchFile(b))
	defer end()
	for b.Loop() {
		n := 0
		err := s.Watch(b.Context(), sallyport.WatchRequest{}, func(ev sallyport.WatchEvent) error {
			if n += len(ev.Records); ev.Type == sallyport.WatchEnd {
				return errEnough
			}
			return nil
		})
		if n != *benchSessions {
			b.Fatalf("got %d records, %v", n, err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(*benchSessions), "ns/record")
}

var errEnough = fmt.Errorf("enough")

// cpuTime is what this process has used so far.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

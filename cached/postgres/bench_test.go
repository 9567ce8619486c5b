package postgres_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/storetest"
)

var benchSessions = flag.Int("sessions", 10_000, "how many sessions the benchmarks' store holds")

func session(i int) sallyport.Op {
	return sallyport.Put(sallyport.KindSession, fmt.Sprint("s", i), sallyport.Session{
		Login: sallyport.LoginID(fmt.Sprint("l", i)), User: sallyport.UserID(fmt.Sprint("u", i%1000)), Device: sallyport.DeviceID(fmt.Sprint("d", i)),
	})
}

// filled returns a server with that many sessions.
func filled(b *testing.B) *cached.Server {
	b.Helper()
	s := storetest.Serve(b, fresh(b))
	for i := 0; i < *benchSessions; {
		var batch []sallyport.Op
		for len(batch) < 1000 && i < *benchSessions {
			batch = append(batch, session(i))
			i++
		}
		if _, err := s.Apply(b.Context(), batch); err != nil {
			b.Fatal(err)
		}
	}
	return s
}

func BenchmarkGet(b *testing.B) {
	s := filled(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Get(b.Context(), sallyport.KindSession, fmt.Sprint("s", rand.IntN(*benchSessions))); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPut is 64 callers that each write one session and wait for it.
func BenchmarkPut(b *testing.B) {
	s := filled(b)
	var n atomic.Int64
	b.SetParallelism(32)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := s.Apply(b.Context(), []sallyport.Op{session(int(n.Add(1)))}); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// BenchmarkSnapshot is what policyd waits for at its start.
func BenchmarkSnapshot(b *testing.B) {
	s := filled(b)
	for b.Loop() {
		n := 0
		err := s.Watch(b.Context(), sallyport.WatchRequest{}, func(ev sallyport.WatchEvent) error {
			if n += len(ev.Records); ev.Type == sallyport.WatchEnd {
				return errBegun
			}
			return nil
		})
		if n != *benchSessions {
			b.Fatalf("got %d records, %v", n, err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(*benchSessions), "ns/record")
}

package tunneltest

import (
	"io"
	"testing"
	"time"
)

// BenchmarkThroughput carries bytes through an echo, both halves of the tunnel in
// this process.
func BenchmarkThroughput(b *testing.B, c Carrier) {
	s := newSetup(b, c)
	f := s.open(b, Echo, nil)
	f.SetDeadline(time.Time{})
	chunk := make([]byte, 64<<10)
	b.SetBytes(int64(len(chunk)))
	b.ReportAllocs()
	done := make(chan error, 1)
	b.ResetTimer()
	go func() {
		_, err := io.Copy(io.Discard, f)
		done <- err
	}()
	for b.Loop() {
		if _, err := f.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	f.CloseWrite()
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}

// BenchmarkOpen opens a flow, waits for the first byte back, and closes it.
func BenchmarkOpen(b *testing.B, c Carrier) {
	s := newSetup(b, c)
	b.ReportAllocs()
	for b.Loop() {
		f, err := s.carrier.Open(b.Context(), target(Echo), []byte("x"))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(f, make([]byte, 1)); err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
}

// BenchmarkPingPong sends one byte and waits for it to come back.
func BenchmarkPingPong(b *testing.B, c Carrier) {
	s := newSetup(b, c)
	f := s.open(b, Echo, nil)
	f.SetDeadline(time.Time{})
	one := make([]byte, 1)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.Write(one); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(f, one); err != nil {
			b.Fatal(err)
		}
	}
}

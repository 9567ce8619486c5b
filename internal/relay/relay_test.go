package relay

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// tcpPair returns two connected TCP connections on loopback.
func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	deadline := time.Now().Add(20 * time.Second)
	c.SetDeadline(deadline)
	d.SetDeadline(deadline)
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// spliced runs Splice between two fresh pairs and returns their outer ends.
func spliced(t testing.TB, ctx context.Context, o Options) (client, service *net.TCPConn, result <-chan Result) {
	client, down := tcpPair(t)
	service, up := tcpPair(t)
	down.SetDeadline(time.Time{})
	up.SetDeadline(time.Time{})
	out := make(chan Result, 1)
	go func() { out <- Splice(ctx, TCP(down), TCP(up), o) }()
	return client, service, out
}

func random(t testing.TB, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func TestHalfCloseKeepsTheReply(t *testing.T) {
	client, service, result := spliced(t, t.Context(), Options{})
	question, answer := random(t, 1<<20), random(t, 1<<20)
	go func() {
		client.Write(question)
		client.CloseWrite()
	}()
	got, err := io.ReadAll(service)
	if err != nil || sha256.Sum256(got) != sha256.Sum256(question) {
		t.Fatalf("service got %d bytes, %v; want the %d sent", len(got), err, len(question))
	}
	go func() {
		service.Write(answer)
		service.CloseWrite()
	}()
	got, err = io.ReadAll(client)
	if err != nil || sha256.Sum256(got) != sha256.Sum256(answer) {
		t.Fatalf("client got %d bytes, %v; want the %d sent", len(got), err, len(answer))
	}
	if r := <-result; r.End != EndEOF || r.Up != 1<<20 || r.Down != 1<<20 || r.Err != nil {
		t.Errorf("result %+v; want eof with 1 MiB each way", r)
	}
}

func TestServiceResetReachesTheClient(t *testing.T) {
	client, service, result := spliced(t, t.Context(), Options{})
	TCP(service).Reset(0)
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("client read: %v; want a reset", err)
	}
	if r := <-result; r.End != EndUpReset || !errors.Is(r.Err, syscall.ECONNRESET) {
		t.Errorf("result %+v; want up_reset", r)
	}
}

func TestClientResetReachesTheService(t *testing.T) {
	client, service, result := spliced(t, t.Context(), Options{})
	TCP(client).Reset(0)
	if _, err := service.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("service read: %v; want a reset", err)
	}
	if r := <-result; r.End != EndDownReset {
		t.Errorf("result %+v; want down_reset", r)
	}
}

// A service that answers and closes without reading its input (HTTP 413) must get
// its answer across although writing to it fails.
func TestAnswerOfAServiceThatStopsReading(t *testing.T) {
	up := newFake()
	up.writeErr = syscall.EPIPE
	up.feed([]byte("413 too large"), nil)
	up.feed(nil, io.EOF)
	down := newFake()
	down.feed([]byte("a large upload"), nil)
	r := Splice(t.Context(), down, up, Options{UpReset: 7})
	if got := down.written(); string(got) != "413 too large" {
		t.Errorf("client got %q; want the whole answer", got)
	}
	if r.End != EndUpReset || !errors.Is(r.Err, syscall.EPIPE) {
		t.Errorf("result %+v; want up_reset by EPIPE", r)
	}
}

func TestResetCodes(t *testing.T) {
	broken := errors.New("broken")
	o := Options{UpReset: 1, DownReset: 2, Withdrawn: 3, IdleReset: 4}
	tests := []struct {
		name  string
		cause func(down, up *fake, cancel context.CancelCauseFunc)
		end   End
		down  uint64
		up    uint64
	}{
		{"up breaks", func(_, up *fake, _ context.CancelCauseFunc) { up.feed(nil, broken) }, EndUpReset, 1, 1},
		{"down breaks", func(down, _ *fake, _ context.CancelCauseFunc) { down.feed(nil, broken) }, EndDownReset, 2, 2},
		{"withdrawn", func(_, _ *fake, cancel context.CancelCauseFunc) { cancel(nil) }, EndWithdrawn, 3, 3},
		{"cut with a code", func(_, _ *fake, cancel context.CancelCauseFunc) { cancel(&Cut{Code: 9}) }, EndWithdrawn, 9, 9},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			down, up := newFake(), newFake()
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			tt.cause(down, up, cancel)
			r := Splice(ctx, down, up, o)
			if r.End != tt.end {
				t.Errorf("end %v; want %v", r.End, tt.end)
			}
			if down.code() != tt.down || up.code() != tt.up {
				t.Errorf("codes down %d up %d; want %d and %d", down.code(), up.code(), tt.down, tt.up)
			}
		})
	}
}

// A flow that is only being drained is cut as fast as any other.
func TestWithdrawnWhileDraining(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up, down := newFake(), newFake()
		up.writeErr = syscall.EPIPE
		down.feed([]byte("x"), nil)
		ctx, cancel := context.WithCancelCause(t.Context())
		start := time.Now()
		time.AfterFunc(time.Second, func() { cancel(&Cut{Code: 9}) })
		r := Splice(ctx, down, up, Options{UpReset: 1})
		if took := time.Since(start); took != time.Second || down.code() != 9 {
			t.Errorf("cut after %v with code %d; want 1 s and 9", took, down.code())
		}
		if r.End != EndUpReset {
			t.Errorf("end %v; want what came first, up_reset", r.End)
		}
	})
}

func TestIdleLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down, up := newFake(), newFake()
		start := time.Now()
		time.AfterFunc(50*time.Second, func() { down.feed([]byte("x"), nil) })
		r := Splice(t.Context(), down, up, Options{Idle: time.Minute, IdleReset: 5})
		took := time.Since(start)
		if r.End != EndIdle || r.Up != 1 || took < 110*time.Second || took > 126*time.Second {
			t.Errorf("ended %v after %v with %d bytes; want idle a minute after the byte at 50 s", r.End, took, r.Up)
		}
		if down.code() != 5 {
			t.Errorf("code %d; want 5", down.code())
		}
	})
}

func TestMeterIsLive(t *testing.T) {
	var m Meter
	client, service, _ := spliced(t, t.Context(), Options{Meter: &m})
	client.Write([]byte("12345"))
	io.ReadFull(service, make([]byte, 5))
	deadline := time.Now().Add(5 * time.Second)
	for m.Up.Load() != 5 && time.Now().Before(deadline) {
		if _, err := client.Write(nil); err != nil {
			t.Fatal(err)
		}
	}
	if m.Up.Load() != 5 {
		t.Errorf("meter %d; want 5", m.Up.Load())
	}
}

func TestCopyDoesNotAllocate(t *testing.T) {
	data := random(t, 32<<10)
	const reads = 1000
	p := &pump{dst: discard{}, count: new(atomic.Int64)}
	for _, size := range []int{1, len(data)} {
		allocs := testing.AllocsPerRun(10, func() {
			p.src = &repeat{data: data[:size], left: reads}
			p.copy()
		})
		if allocs > 2 { // the reader that the test makes, and a pool miss
			t.Errorf("%d reads of %d bytes: %.0f allocations; want none per read", reads, size, allocs)
		}
	}
}

func BenchmarkSpliceTCP(b *testing.B) {
	client, service, _ := spliced(b, b.Context(), Options{})
	client.SetDeadline(time.Time{})
	service.SetDeadline(time.Time{})
	buf, sink := make([]byte, 64<<10), make([]byte, 64<<10)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := client.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(service, sink); err != nil {
			b.Fatal(err)
		}
	}
}

type discard struct{ Conn }

func (discard) Write(b []byte) (int, error) { return len(b), nil }

type repeat struct {
	Conn
	data []byte
	left int
}

func (r *repeat) Read(b []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	r.left--
	return copy(b, r.data), nil
}

// fake is a connection in memory: what it reads is fed, what it is told is kept.
type fake struct {
	net.Conn
	writeErr error

	mu       sync.Mutex
	wake     *sync.Cond
	in       []fed
	out      bytes.Buffer
	closed   bool
	reset    bool
	resetTo  uint64
	deadline *time.Timer
	expired  bool
}

type fed struct {
	data []byte
	err  error
}

func newFake() *fake {
	f := new(fake)
	f.wake = sync.NewCond(&f.mu)
	return f
}

func (f *fake) feed(data []byte, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.in = append(f.in, fed{data, err})
	f.wake.Broadcast()
}

func (f *fake) Read(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.in) == 0 && !f.closed && !f.expired {
		f.wake.Wait()
	}
	switch {
	case f.closed:
		return 0, net.ErrClosed
	case f.expired:
		return 0, os.ErrDeadlineExceeded
	}
	x := f.in[0]
	f.in = f.in[1:]
	return copy(b, x.data), x.err
}

func (f *fake) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.writeErr != nil {
		return 0, f.writeErr
	}
	return f.out.Write(b)
}

func (f *fake) CloseWrite() error { return nil }

func (f *fake) SetReadDeadline(t time.Time) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.deadline = time.AfterFunc(time.Until(t), func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.expired = true
		f.wake.Broadcast()
	})
	return nil
}

func (f *fake) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	if f.deadline != nil {
		f.deadline.Stop()
	}
	f.wake.Broadcast()
	return nil
}

func (f *fake) Reset(code uint64) {
	f.mu.Lock()
	if !f.reset && !f.closed {
		f.reset, f.resetTo = true, code
	}
	f.mu.Unlock()
	f.Close()
}

func (f *fake) written() []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.out.Bytes()
}

func (f *fake) code() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.resetTo
}

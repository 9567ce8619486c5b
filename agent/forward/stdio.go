package forward

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"sallyport/internal/relay"
)

// Stdio opens one flow and carries in and out over it. It returns when both
// directions have ended, or the flow was cut, or ctx ended. out is closed where
// the service ended its stream, and only there: a program that reads out, like the
// ssh above a ProxyCommand, hangs up on us when it ends, and would do so before
// we could say why a flow was refused or cut. in cannot be interrupted while it
// blocks: after a cut its reader is left behind, which only a process that is about
// to exit may afford.
func (f *Forward) Stdio(ctx context.Context, in io.Reader, out io.WriteCloser) error {
	flow, err := f.Opener.Open(ctx, f.Target)
	if err != nil {
		return err
	}
	local := &stdio{in: in, out: out, over: make(chan struct{})}
	done := make(chan error, 1)
	go func() { done <- f.carry(ctx, local, flow) }()
	select {
	case err := <-done:
		return err
	case <-local.over:
	}
	// The flow is over. Unless somebody still blocks in a read of in, the splice
	// ends now and knows more than we do.
	select {
	case err := <-done:
		return err
	case <-time.After(200 * time.Millisecond):
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return f.verdict(flow, relay.Result{End: relay.EndUpReset, Err: local.cause()})
}

// stdio makes a relay.Conn of two streams.
type stdio struct {
	in   io.Reader
	out  io.WriteCloser
	once sync.Once
	over chan struct{} // closed by Reset, Close, and a deadline on reading
}

func (s *stdio) Read(b []byte) (int, error) {
	n, err := s.in.Read(b)
	select {
	case <-s.over:
		return 0, net.ErrClosed
	default:
		return n, err
	}
}

func (s *stdio) Write(b []byte) (int, error) { return s.out.Write(b) }
func (s *stdio) CloseWrite() error           { return s.out.Close() }

func (s *stdio) end() { s.once.Do(func() { close(s.over) }) }

func (s *stdio) Reset(uint64) { s.end() }

func (s *stdio) Close() error {
	s.end()
	return nil
}

func (s *stdio) cause() error { return net.ErrClosed }

func (s *stdio) LocalAddr() net.Addr              { return stdioAddr{} }
func (s *stdio) RemoteAddr() net.Addr             { return stdioAddr{} }
func (s *stdio) SetDeadline(t time.Time) error    { return s.SetReadDeadline(t) }
func (s *stdio) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

// SetReadDeadline is what the relay uses to end a direction whose other one is
// dead; a blocked read of standard input ends with the process.
func (s *stdio) SetReadDeadline(t time.Time) error {
	if !t.IsZero() {
		time.AfterFunc(time.Until(t), s.end)
	}
	return nil
}

type stdioAddr struct{}

func (stdioAddr) Network() string { return "stdio" }
func (stdioAddr) String() string  { return "stdio" }

package control

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"

	"sallyport"
)

// pulsed runs body with a send that it may call one at a time, and sends empty
// messages whenever body has sent nothing for a Pulse. body's context ends when
// a pulse cannot be sent.
func pulsed[M any](ctx context.Context, send func(*M) error, body func(context.Context, func(*M) error) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	p := &pulse[M]{send: send}
	var beat sync.WaitGroup
	beat.Go(func() {
		if err := p.beat(ctx); err != nil {
			cancel(err)
		}
	})
	err := body(ctx, p.Send)
	if cause := context.Cause(ctx); cause != nil && errors.Is(err, context.Canceled) {
		err = cause
	}
	cancel(nil)
	beat.Wait()
	return err
}

type pulse[M any] struct {
	send func(*M) error
	mu   sync.Mutex // guards sent, and send against itself
	sent bool       // since the last beat
}

// Send blocks while the receiver is slow: that is the back-pressure.
func (p *pulse[M]) Send(m *M) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sent = true
	return p.send(m)
}

func (p *pulse[M]) beat(ctx context.Context) error {
	ticker := time.NewTicker(Pulse / 2)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if err := p.sendIfQuiet(ctx); err != nil {
			return err
		}
	}
}

func (p *pulse[M]) sendIfQuiet(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	quiet := !p.sent
	p.sent = false
	if !quiet || ctx.Err() != nil {
		return nil
	}
	return p.send(new(M))
}

// errSilent is why a stream was given up that said nothing for Silence.
var errSilent = errors.New("no sign of life for " + Silence.String())

// receive opens a stream and hands its messages to each, empty ones included,
// until ctx ends (its error), each fails (that error) or the stream ends: nil
// for an orderly end. While each works the clock of Silence stands still.
func receive[M any](ctx context.Context, c *Client, open func(context.Context, grpc.ClientConnInterface) (grpc.ServerStreamingClient[M], error), each func(*M) error) error {
	conn, err := c.current()
	if err != nil {
		return err
	}
	streamCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	quiet := time.AfterFunc(Silence, func() { cancel(errSilent) })
	defer quiet.Stop()

	stream, err := open(streamCtx, conn)
	for err == nil {
		var m *M
		if m, err = stream.Recv(); err != nil {
			break
		}
		quiet.Stop()
		if err := each(m); err != nil {
			if ctx.Err() == nil {
				c.leave(conn, err) // it tells what cannot be used: another may know better
			}
			return err
		}
		quiet.Reset(Silence)
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return c.streamEnded(ctx, streamCtx, conn, err)
}

// streamEnded says why. A connection on which a stream fell silent is replaced,
// so that the next call can reach another address.
func (c *Client) streamEnded(ctx, streamCtx context.Context, conn *grpc.ClientConn, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if context.Cause(streamCtx) == errSilent {
		c.drop(conn, true, errSilent)
		return unavailable(c.name, errSilent)
	}
	err = c.failed(ctx, err)
	if _, place := placeCodes[sallyport.CodeOf(err)]; place {
		c.leave(conn, err)
	}
	return err
}

package lane

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"sallyport"
)

const (
	// poolSize is how many warm connections a carrier that is in use keeps.
	poolSize = 4
	// clientWarm is how long one is kept unused; below the server's warmTimeout.
	// An agent that opens nothing ends up with none, and costs the gateway nothing.
	clientWarm = 5 * time.Minute
)

// pool keeps warm connections to one gateway. Each has a goroutine that reads:
// only so does a connection that the gateway closed show that it is gone.
type pool struct {
	d      *dialer
	failed func(error) // told when the gateway refuses our certificate
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // dials and watchers

	mu      sync.Mutex
	warm    []*warmConn // the freshest last
	dialing int
	closed  bool
}

type warmConn struct {
	*tls.Conn
	taken   bool  // guarded by pool.mu
	err     error // what the watcher's read ended with; valid after watched
	watched chan struct{}
}

func newPool(d *dialer, failed func(error)) *pool {
	ctx, cancel := context.WithCancel(context.Background())
	return &pool{d: d, failed: failed, ctx: ctx, cancel: cancel}
}

// put adds a connection and watches it.
func (p *pool) put(c *tls.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		c.Close()
		return
	}
	w := &warmConn{Conn: c, watched: make(chan struct{})}
	c.SetReadDeadline(time.Now().Add(clientWarm))
	p.warm = append(p.warm, w)
	p.wg.Go(func() { p.watch(w) })
}

func (p *pool) watch(w *warmConn) {
	var b [1]byte
	n, err := w.Read(b[:])
	if n > 0 {
		err = errors.New("the gateway spoke before it was asked")
	}
	w.err = err
	p.mu.Lock()
	taken := w.taken
	if !taken {
		p.remove(w)
	}
	p.mu.Unlock()
	close(w.watched)
	if taken {
		return
	}
	w.Close()
	if refusal := p.d.failure(err); sallyport.OutcomeOf(refusal) == sallyport.OutcomeLogin {
		p.failed(refusal)
	}
}

// remove takes w out of the list; p.mu is held.
func (p *pool) remove(w *warmConn) {
	for i, x := range p.warm {
		if x == w {
			p.warm = append(p.warm[:i], p.warm[i+1:]...)
			return
		}
	}
}

// take returns a warm connection, or nil.
func (p *pool) take() *tls.Conn {
	for {
		p.mu.Lock()
		if len(p.warm) == 0 {
			p.mu.Unlock()
			return nil
		}
		w := p.warm[len(p.warm)-1]
		p.warm = p.warm[:len(p.warm)-1]
		w.taken = true
		p.mu.Unlock()
		w.SetReadDeadline(time.Unix(1, 0))
		<-w.watched
		if errors.Is(w.err, os.ErrDeadlineExceeded) && w.SetReadDeadline(time.Time{}) == nil {
			return w.Conn
		}
		w.Close()
	}
}

// refill dials, in the background, what is missing. A dial that fails is not
// repeated: the next Open tries again, and meets the error itself.
func (p *pool) refill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.closed && len(p.warm)+p.dialing < poolSize {
		p.dialing++
		p.wg.Go(func() {
			c, err := p.d.dial(p.ctx)
			p.mu.Lock()
			p.dialing--
			p.mu.Unlock()
			if err == nil {
				p.put(c)
			}
		})
	}
}

// close ends everything the pool started and waits for it.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	warm := p.warm
	p.warm = nil
	for _, w := range warm {
		w.taken = true
	}
	p.mu.Unlock()
	p.cancel()
	for _, w := range warm {
		w.SetReadDeadline(time.Unix(1, 0))
		<-w.watched
		w.Close()
	}
	p.wg.Wait()
}

var _ net.Conn = (*warmConn)(nil)

package stack

import (
	"net"
	"sync"
	"testing"
	"time"
)

// Link is a stretch of network between two programs, which a test can take away
// or make slow. It carries TCP.
type Link struct {
	Addr string // where the one that connects finds the other

	target func() string
	all    sync.WaitGroup

	mu      sync.Mutex // guards what follows
	frozen  bool
	delay   time.Duration
	changed chan struct{} // closed, and made anew, when one of the two above changes
	conns   map[net.Conn]struct{}
	ended   bool
}

// NewLink makes a link to whatever target names at the moment of a connection; it
// ends with the test.
func NewLink(t testing.TB, target func() string) *Link {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &Link{Addr: listener.Addr().String(), target: target, changed: make(chan struct{}), conns: map[net.Conn]struct{}{}}
	l.all.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return // closed
			}
			l.all.Go(func() { l.carry(c) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		l.end()
		l.all.Wait()
	})
	return l
}

// Freeze stops all bytes in both directions, as a partition of the network does:
// connections stay open, and new ones are not answered.
func (l *Link) Freeze() { l.set(true, 0) }

// Delay makes every answer, that is every byte towards the one that connected,
// late.
func (l *Link) Delay(d time.Duration) { l.set(false, d) }

// Heal undoes Freeze and Delay; what was held up arrives now.
func (l *Link) Heal() { l.set(false, 0) }

// Break closes all connections; new ones are carried.
func (l *Link) Break() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		c.Close()
	}
}

func (l *Link) set(frozen bool, delay time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.frozen, l.delay = frozen, delay
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *Link) end() {
	l.Heal()
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	l.Break()
}

// keep notes open connections, for the end of the test.
func (l *Link) keep(conns ...net.Conn) (forget func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range conns {
		l.conns[c] = struct{}{}
		if l.ended {
			c.Close()
		}
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, c := range conns {
			c.Close()
			delete(l.conns, c)
		}
	}
}

func (l *Link) carry(client net.Conn) {
	server, err := net.Dial("tcp", l.target())
	if err != nil {
		client.Close()
		return
	}
	defer l.keep(client, server)()
	var both sync.WaitGroup
	both.Go(func() { l.forward(server, client, false) })
	both.Go(func() { l.forward(client, server, true) })
	both.Wait()
}

// piece is what was read at once; none: the end of the stream.
type piece struct {
	bytes []byte
	read  time.Time
}

// forward carries one direction.
func (l *Link) forward(dst, src net.Conn, answers bool) {
	pieces := make(chan piece, 4096)
	l.all.Go(func() {
		defer close(pieces)
		for {
			b := make([]byte, 16<<10)
			n, err := src.Read(b)
			if n > 0 {
				pieces <- piece{b[:n], time.Now()}
			}
			if err != nil {
				return
			}
		}
	})
	var failed error
	for p := range pieces { // to the end, or its sender would wait for ever
		l.hold(p, answers)
		if failed == nil {
			_, failed = dst.Write(p.bytes)
		}
	}
	l.hold(piece{read: time.Now()}, answers)
	if c, ok := dst.(interface{ CloseWrite() error }); ok && failed == nil {
		_ = c.CloseWrite() // the other end may have gone first
		return
	}
	dst.Close()
}

// hold waits until p may go on.
func (l *Link) hold(p piece, answers bool) {
	for {
		l.mu.Lock()
		frozen, left, changed := l.frozen, time.Until(p.read.Add(l.delay)), l.changed
		l.mu.Unlock()
		if !frozen && (!answers || left <= 0) {
			return
		}
		var late <-chan time.Time // never, while it is frozen
		if !frozen {
			late = time.After(left)
		}
		select {
		case <-late:
		case <-changed:
		}
	}
}

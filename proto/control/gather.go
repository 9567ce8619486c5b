package control

import (
	"context"
	"sync"
	"time"

	"sallyport"
)

const (
	// maxFlights is how many calls go side by side before questions wait for one of
	// them to come back.
	maxFlights = 2
	// patience is after how long a call under way counts as slow: then nobody waits
	// for it any more.
	patience = 20 * time.Millisecond
	// maxGathered is how many questions one call carries at most.
	maxGathered = 512
)

// gatherer asks many callers' questions in few calls: while calls are under way,
// questions that come meanwhile go together in the next one. Who comes alone waits
// for nobody. It is safe because an Authorizer fails as a whole or not at all, so
// one caller's question cannot spoil another's answer.
type gatherer struct {
	ask func(context.Context, []sallyport.Request) ([]sallyport.Decision, error)

	mu      sync.Mutex // guards what follows
	flying  int
	since   time.Time      // when the last call started
	next    *gathered      // fills; nil: empty
	flights sync.WaitGroup // calls that outlive who asked for them
	closed  bool           // no more of these
}

// gathered are the questions of one call.
type gathered struct {
	questions []sallyport.Request
	callers   int
	done      chan struct{} // closed when what follows is set
	answers   []sallyport.Decision
	err       error
}

// authorize returns the answers to questions, or ctx's error as soon as it ends.
func (g *gatherer) authorize(ctx context.Context, questions []sallyport.Request) ([]sallyport.Decision, error) {
	if len(questions) >= maxGathered/2 {
		return g.ask(ctx, questions)
	}
	b, first, start := g.join(questions)
	switch {
	case start && b.callers == 1: // nobody else depends on ctx
		g.fly(ctx, b)
	case start:
		g.flyAlone(b)
	}
	select {
	case <-b.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if b.err != nil {
		return nil, b.err
	}
	return b.answers[first : first+len(questions)], nil
}

// join puts questions into the next call, from first on. start: it is to be made
// now, by the caller.
func (g *gatherer) join(questions []sallyport.Request) (b *gathered, first int, start bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.next == nil {
		g.next = &gathered{done: make(chan struct{})}
	}
	b, first = g.next, len(g.next.questions)
	b.questions = append(b.questions, questions...)
	b.callers++
	if g.flying < maxFlights || len(b.questions) >= maxGathered/2 || time.Since(g.since) > patience {
		g.start()
		return b, first, true
	}
	return b, first, false
}

// start counts the next call as under way. The caller holds mu.
func (g *gatherer) start() {
	g.next = nil
	g.flying++
	g.since = time.Now()
}

// fly makes the call.
func (g *gatherer) fly(ctx context.Context, b *gathered) {
	b.answers, b.err = g.ask(ctx, b.questions)
	g.land(b)
}

// land gives the answers out, and makes the next call if questions came meanwhile.
func (g *gatherer) land(b *gathered) {
	close(b.done)
	g.mu.Lock()
	g.flying--
	next := g.next
	if next != nil {
		g.start()
	}
	g.mu.Unlock()
	if next != nil {
		g.flyAlone(next)
	}
}

// flyAlone makes a call that does not end with any one of its callers.
func (g *gatherer) flyAlone(b *gathered) {
	g.mu.Lock()
	closed := g.closed
	if !closed {
		g.flights.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), CallTimeout)
			defer cancel()
			g.fly(ctx, b)
		})
	}
	g.mu.Unlock()
	if closed {
		b.err = errClosed
		g.land(b)
	}
}

// close waits for the calls under way, whose connection must be closed.
func (g *gatherer) close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.flights.Wait()
}

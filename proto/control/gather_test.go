package control

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport"
)

// counter answers each question with its target's host as the rule, and counts
// calls. While slow is above zero a call lasts that long.
type counter struct {
	mu    sync.Mutex
	calls int
	most  int // questions in one call
	slow  time.Duration
	err   error
}

func (c *counter) ask(ctx context.Context, questions []sallyport.Request) ([]sallyport.Decision, error) {
	c.mu.Lock()
	c.calls++
	c.most = max(c.most, len(questions))
	slow, err := c.slow, c.err
	c.mu.Unlock()
	select {
	case <-time.After(slow):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	answers := make([]sallyport.Decision, len(questions))
	for i, q := range questions {
		answers[i].Rule = q.Target.Host
	}
	return answers, nil
}

func ask(g *gatherer, ctx context.Context, host string, n int) error {
	questions := make([]sallyport.Request, n)
	for i := range questions {
		questions[i].Target.Host = fmt.Sprint(host, "-", i)
	}
	answers, err := g.authorize(ctx, questions)
	if err != nil {
		return err
	}
	if len(answers) != n {
		return fmt.Errorf("%d answers to %d questions", len(answers), n)
	}
	for i, a := range answers {
		if a.Rule != questions[i].Target.Host {
			return fmt.Errorf("answer to %s is that to %s", questions[i].Target.Host, a.Rule)
		}
	}
	return nil
}

// Many callers share few calls, and each gets its own answers.
func TestGatherer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &counter{slow: time.Millisecond}
		g := &gatherer{ask: c.ask}
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() {
				for round := range 5 {
					if err := ask(g, t.Context(), fmt.Sprint(i, "-", round), 1+i%3); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		g.close()
		if c.calls > 40 || c.most > maxGathered {
			t.Errorf("%d calls for 1,000 callers, %d questions in one; want few calls, at most %d questions", c.calls, c.most, maxGathered)
		}
	})
}

// One caller alone asks at once, under its own context.
func TestGathererAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &counter{slow: time.Hour}
		g := &gatherer{ask: c.ask}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := ask(g, ctx, "a", 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v; want the caller's deadline", err)
		}
		if g.flying != 0 {
			t.Errorf("%d calls are still counted", g.flying)
		}
	})
}

// Who gives up does not take the others along, and a call that hangs does not hold
// up those that come after it.
func TestGathererDoesNotWaitForSlowCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &counter{slow: time.Hour}
		g := &gatherer{ask: c.ask}
		var wg sync.WaitGroup
		for i := range maxFlights + 3 { // the last three wait, until "late" takes them along
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				err := ask(g, ctx, fmt.Sprint(i), 1)
				if hangs := i < maxFlights; hangs != errors.Is(err, context.DeadlineExceeded) || !hangs && err != nil {
					t.Errorf("%d: got %v; its call hangs: %v", i, err, hangs)
				}
			})
			synctest.Wait()
		}
		<-time.After(2 * patience)
		c.mu.Lock()
		c.slow = 0
		c.mu.Unlock()
		if err := ask(g, t.Context(), "late", 1); err != nil {
			t.Errorf("late: %v", err)
		}
		wg.Wait()
		g.close()
	})
}

// An error is everybody's, and after close nobody waits.
func TestGathererFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &counter{slow: time.Millisecond, err: errors.New("no snapshot")}
		g := &gatherer{ask: c.ask}
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if err := ask(g, t.Context(), "a", 1); !errors.Is(err, c.err) {
					t.Errorf("got %v; want %v", err, c.err)
				}
			})
		}
		wg.Wait()
		g.close()
		g.flying = maxFlights
		done := make(chan error, 1)
		go func() { done <- ask(g, t.Context(), "b", maxGathered/2-1) }()
		synctest.Wait()
		if err := ask(g, t.Context(), "c", 1); !errors.Is(err, errClosed) {
			t.Errorf("got %v; want that the client is closed", err)
		}
		if err := <-done; !errors.Is(err, errClosed) {
			t.Errorf("got %v; want that the client is closed", err)
		}
	})
}

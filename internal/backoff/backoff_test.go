package backoff_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/backoff"
)

func TestNextGrowsToItsLimit(t *testing.T) {
	const ms = time.Millisecond
	b := &backoff.Backoff{First: 10 * ms, Max: 100 * ms}
	for round := range 2 {
		for i, mean := range []time.Duration{10 * ms, 20 * ms, 40 * ms, 80 * ms, 100 * ms, 100 * ms} {
			if got := b.Next(); got < mean/2 || got > mean {
				t.Errorf("round %d, wait %d: got %v; want %v to %v", round, i, got, mean/2, mean)
			}
		}
		if got := b.Attempt(); got != 6 {
			t.Errorf("attempt: got %d; want 6", got)
		}
		b.Reset()
	}
	for range 200 { // far beyond what a shift can hold
		if got := b.Next(); got > 100*ms || got <= 0 {
			t.Fatalf("got %v; want at most 100 ms", got)
		}
	}
}

func TestZeroValueAndJitter(t *testing.T) {
	var seen []time.Duration
	for range 20 {
		var b backoff.Backoff
		wait := b.Next()
		if wait < 50*time.Millisecond || wait > 100*time.Millisecond {
			t.Errorf("first wait: got %v; want 50 to 100 ms", wait)
		}
		seen = append(seen, wait)
	}
	if slices.Min(seen) == slices.Max(seen) {
		t.Errorf("twenty times the same wait, %v", seen[0])
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		b := backoff.Backoff{First: time.Hour, Max: time.Hour}
		if err := b.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Second {
			t.Errorf("got %v after %v; want the deadline after 1 s", err, time.Since(start))
		}
		if err := (&backoff.Backoff{}).Wait(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestKeep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		broken := errors.New("broken")
		runs := 0
		var attempts []int
		var b backoff.Backoff
		err := b.Keep(ctx, func(ctx context.Context) error {
			switch runs++; runs {
			case 4: // a long success, then trouble again
				<-time.After(time.Minute)
			case 6:
				cancel()
			}
			return broken
		}, func(err error, attempt int) {
			if err != broken {
				t.Errorf("failed is told %v; want %v", err, broken)
			}
			attempts = append(attempts, attempt)
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v; want context.Canceled", err)
		}
		if want := []int{1, 2, 3, 1, 2}; !slices.Equal(attempts, want) {
			t.Errorf("attempts: got %v; want %v", attempts, want)
		}
	})
}

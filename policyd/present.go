package policyd

import (
	"context"
	"fmt"
	"slices"
	"time"

	"sallyport"
	"sallyport/policyd/policy"
)

// Present is the records as they are at one moment, without any configuration:
// for those who ask what another one would say now.
type Present struct {
	snap *snapshot
	now  time.Time
}

// ReadPresent lists from cached what decisions look at.
func ReadPresent(ctx context.Context, l sallyport.Lister, now time.Time) (*Present, error) {
	draft := new(snapshot).edit(Config{}, now)
	for _, kind := range kinds {
		if slices.Contains([]sallyport.Kind{sallyport.KindConfig, sallyport.KindTrust}, kind) {
			continue
		}
		records, err := l.List(ctx, kind)
		if err != nil {
			return nil, fmt.Errorf("list %ss: %w", kind, err)
		}
		for _, r := range records {
			draft.apply(r)
		}
	}
	return &Present{draft.finish(), now}, nil
}

// Input returns what q is decided from.
func (p *Present) Input(q *sallyport.Request) *policy.Input {
	a := asker{view: view{snapshot: p.snap, revoked: &overrides{}, now: p.now}}
	a.ask(q)
	return &a.in
}

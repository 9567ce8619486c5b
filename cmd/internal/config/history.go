package config

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"slices"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/policyd/policy"
)

// What is kept of configurations that were in force.
const (
	keepRevisions = 50
	keepBytes     = 32 << 20 // packed; the newest two are kept whatever their size
)

const currentConfig = "current"

// Store is where configurations are applied: cached, or an operator's client of it.
type Store interface {
	sallyport.Records
	sallyport.Lister
}

// Past is a configuration of the history.
type Past struct {
	sallyport.PastConfig
	Revision sallyport.Revision
	id       string
}

// Apply writes next as the configuration record, and beside it into the history.
// If the record already says the same, nothing is written and the revision stays.
// changed tells which happened.
func Apply(ctx context.Context, store Store, next sallyport.Config) (rev sallyport.Revision, changed bool, err error) {
	have, err := store.Get(ctx, sallyport.KindConfig, currentConfig)
	if err != nil && !errors.Is(err, sallyport.ErrNotFound) {
		return 0, false, fmt.Errorf("apply configuration: %w", err)
	}
	if err == nil {
		if old, err := sallyport.Decode[sallyport.Config](have); err == nil && same(old, next) {
			return have.Revision, false, nil
		}
	}
	history, err := History(ctx, store)
	if err != nil {
		return 0, false, err
	}
	rev, err = replace(ctx, store, history, have.Revision, next)
	return rev, err == nil, err
}

// replace makes next the configuration, if the one in force still has the revision
// had (0: there is none), and forgets what the history has too much.
func replace(ctx context.Context, store Store, history []Past, had sallyport.Revision, next sallyport.Config) (sallyport.Revision, error) {
	next.By = username()
	current := sallyport.Put(sallyport.KindConfig, currentConfig, next)
	current.If = sallyport.Condition{Revision: had, Absent: had == 0}
	past, err := pack(next, current.Payload)
	if err != nil {
		return 0, fmt.Errorf("apply configuration: %w", err)
	}
	kept := sallyport.Put(sallyport.KindConfigHistory, sallyport.NewID("c"), past)
	kept.If.Absent = true
	batch := []sallyport.Op{current, kept}
	for _, old := range surplus(history, len(past.Packed)) {
		batch = append(batch, sallyport.Op{Kind: sallyport.KindConfigHistory, ID: old.id, Delete: true})
	}
	rev, err := store.Apply(ctx, batch)
	if err != nil {
		return 0, fmt.Errorf("apply configuration: %w", err)
	}
	return rev, nil
}

// username is who runs this process, as the machine knows them.
func username() string {
	u, err := user.Current()
	if err != nil {
		return fmt.Sprint("uid ", os.Getuid())
	}
	return u.Username
}

// surplus returns those of the history, newest first, that have to go when one of
// size bytes comes.
func surplus(history []Past, size int) []Past {
	for i, p := range history {
		size += len(p.Packed)
		if i > 0 && size > keepBytes || i >= keepRevisions-1 {
			return history[i:]
		}
	}
	return nil
}

// History returns the configurations that are kept, the newest first.
func History(ctx context.Context, l sallyport.Lister) ([]Past, error) {
	records, err := l.List(ctx, sallyport.KindConfigHistory)
	if err != nil {
		return nil, fmt.Errorf("history of the configuration: %w", err)
	}
	var all []Past
	for _, r := range records {
		p, err := sallyport.Decode[sallyport.PastConfig](r)
		if err != nil {
			return nil, fmt.Errorf("history of the configuration: %w", err)
		}
		all = append(all, Past{p, r.Revision, r.ID})
	}
	slices.SortFunc(all, func(a, b Past) int { return cmp.Compare(b.Revision, a.Revision) })
	return all, nil
}

func pack(c sallyport.Config, text []byte) (sallyport.PastConfig, error) {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(text); err != nil {
		return sallyport.PastConfig{}, err
	}
	if err := w.Close(); err != nil {
		return sallyport.PastConfig{}, err
	}
	return sallyport.PastConfig{
		Applied: c.Applied, By: c.By, Source: c.Source, RollbackTo: c.RollbackTo,
		Routes: len(c.Routes), Packed: b.Bytes(),
	}, nil
}

// Unpack returns the configuration itself.
func (p Past) Unpack() (sallyport.Config, error) {
	var c sallyport.Config
	r, err := gzip.NewReader(bytes.NewReader(p.Packed))
	if err == nil {
		var text []byte
		text, err = io.ReadAll(io.LimitReader(r, cached.MaxPayload+1)) // one byte more is no JSON any more
		if err == nil {
			err = json.Unmarshal(text, &c)
		}
	}
	if err != nil {
		return c, fmt.Errorf("configuration of revision %d cannot be read: %w", p.Revision, err)
	}
	return c, nil
}

// ErrNotKept: the history has no such revision.
var ErrNotKept = errors.New("this revision is not kept")

// Rollback makes the configuration of an earlier revision the one in force, as a
// new revision; to 0 means the one before. Where gateways are and what no route may
// point to stay as they are now: they say where processes listen, not who may do
// what. changed is false if it is what is in force already. Errors: ErrNotKept; *LoadError if it does not load today;
// sallyport.ErrConflict if another was applied meanwhile.
func Rollback(ctx context.Context, store Store, to sallyport.Revision, now time.Time) (from Past, rev sallyport.Revision, changed bool, err error) {
	current, err := store.Get(ctx, sallyport.KindConfig, currentConfig)
	if err != nil {
		return Past{}, 0, false, fmt.Errorf("roll back: configuration in force: %w", err)
	}
	live, err := sallyport.Decode[sallyport.Config](current)
	if err != nil {
		live = sallyport.Config{} // one that cannot be read is a reason to go back
	}
	history, err := History(ctx, store)
	if err != nil {
		return Past{}, 0, false, err
	}
	past, err := Find(history, to, current.Revision)
	if err != nil {
		return Past{}, 0, false, err
	}
	next, err := past.Unpack()
	if err != nil {
		return past, 0, false, err
	}
	if live.Domain != "" {
		next.Gateways, next.Forbidden = live.Gateways, live.Forbidden
	}
	if err := Loads(next); err != nil {
		return past, 0, false, &LoadError{past.Revision, err}
	}
	if same(live, next) {
		return past, current.Revision, false, nil
	}
	next.Applied, next.RollbackTo = now.UTC(), past.Revision
	rev, err = replace(ctx, store, history, current.Revision, next)
	return past, rev, err == nil, err
}

// Find returns the configuration of a revision; of 0, the newest that is older
// than the one in force.
func Find(history []Past, want, inForce sallyport.Revision) (Past, error) {
	for _, p := range history {
		if p.Revision == want || want == 0 && p.Revision < inForce {
			return p, nil
		}
	}
	if want == 0 {
		return Past{}, fmt.Errorf("there is none before revision %d: %w", inForce, ErrNotKept)
	}
	return Past{}, fmt.Errorf("revision %d: %w", want, ErrNotKept)
}

// LoadError says why an earlier configuration does not load today.
type LoadError struct {
	Revision sallyport.Revision
	Err      error
}

func (e *LoadError) Error() string {
	return fmt.Sprintf("the configuration of revision %d does not load today: %v", e.Revision, e.Err)
}

func (e *LoadError) Unwrap() error { return e.Err }

// Loads returns nil if policyd would take c.
func Loads(c sallyport.Config) error { return loads(c, nil) }

// loads is Loads for who has read some of the policies already.
func loads(c sallyport.Config, known func(text string) *policy.Policy) error {
	_, err := policy.Compile(c.Routes, policy.Options{
		Sources: c.PostureSources, TTL: c.PostureTTL, Forbidden: c.Forbidden, ExplainGroups: c.ExplainGroups, Known: known,
	})
	return err
}

// same compares what two configurations mean, not where they came from.
func same(a, b sallyport.Config) bool {
	if !slices.Equal(a.Routes, b.Routes) { // nearly all of it
		return false
	}
	for _, c := range []*sallyport.Config{&a, &b} {
		c.Routes = nil
		c.Applied, c.By, c.Source, c.RollbackTo = time.Time{}, "", "", 0
	}
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

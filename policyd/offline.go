package policyd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sallyport"
	"sallyport/policyd/policy"
)

// Offline answers as a Server would whose cached held certain records, without
// cached, audit and clock: for tests of policies and for questions about one that
// is not applied yet. It is immutable.
type Offline struct {
	snapshot *snapshot
}

// ReadPeople lists from cached everything that decisions look at, but for the
// configuration.
func ReadPeople(ctx context.Context, l sallyport.Lister) ([]sallyport.Record, error) {
	var all []sallyport.Record
	for _, kind := range kinds {
		if kind == sallyport.KindConfig || kind == sallyport.KindTrust {
			continue
		}
		records, err := l.List(ctx, kind)
		if err != nil {
			return nil, fmt.Errorf("list %ss: %w", kind, err)
		}
		all = append(all, records...)
	}
	return all, nil
}

// NewOffline returns what c decides for people, records as ReadPeople returns them.
// Its error says why the configuration does not load (a fault.List is in its
// chain), or which record cannot be read.
func NewOffline(cfg Config, c sallyport.Config, people []sallyport.Record) (*Offline, error) {
	cfg = cfg.withDefaults()
	rules, err := compile(cfg, &c, 0, nil)
	if err != nil {
		return nil, err
	}
	draft := new(snapshot).edit(cfg, time.Time{})
	draft.rules = rules
	for _, r := range people {
		draft.apply(r)
	}
	if len(draft.faults) > 0 {
		return nil, errors.Join(draft.faults...)
	}
	return &Offline{draft.finish()}, nil
}

// Decide answers q at now, with the reasons of every rule that could have allowed
// it. The decision has no id: it stands in no audit log.
func (o *Offline) Decide(q sallyport.Request, now time.Time) sallyport.Decision {
	d := o.asker(now).explain(&q)
	d.ID = ""
	return d
}

// Input returns what q is decided from at now, for another Set than that of the
// records.
func (o *Offline) Input(q *sallyport.Request, now time.Time) *policy.Input {
	a := o.asker(now)
	a.ask(q)
	return &a.in
}

// List is Server.List at now.
func (o *Offline) List(q sallyport.ListRequest, now time.Time) (sallyport.Listing, error) {
	return o.asker(now).list(q)
}

// Cover calls f with every criterion of the route that q asks for, and with what
// it says to q.
func (o *Offline) Cover(q sallyport.Request, now time.Time, f func(policy.Seen)) {
	o.snapshot.rules.set.Cover(o.Input(&q, now), f)
}

func (o *Offline) asker(now time.Time) *asker {
	return &asker{view: view{snapshot: o.snapshot, revoked: &overrides{}, now: now}}
}

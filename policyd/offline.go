package policyd

import (
	"errors"
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

// NewOffline returns what records decide; one of them must be a configuration.
// Its error says why the configuration does not load (a fault.List is in its
// chain), or which record cannot be read.
func NewOffline(cfg Config, records []sallyport.Record) (*Offline, error) {
	draft := new(snapshot).edit(cfg.withDefaults(), time.Time{})
	for _, r := range records {
		draft.apply(r)
	}
	s := draft.finish()
	switch {
	case len(draft.faults) > 0:
		return nil, errors.Join(draft.faults...)
	case s.broken != nil:
		return nil, s.broken
	case s.rules == nil:
		return nil, errors.New("there is no configuration among the records")
	}
	return &Offline{s}, nil
}

// Decide answers q at now, with the reasons of every rule that could have allowed
// it. The decision has no id: it stands in no audit log.
func (o *Offline) Decide(q sallyport.Request, now time.Time) sallyport.Decision {
	a := o.asker(now)
	d := a.decide(&q)
	d.ID, d.Reasons = "", o.snapshot.rules.set.Reasons(&a.in, a.answer, true)
	return d
}

// List is Server.List at now.
func (o *Offline) List(q sallyport.ListRequest, now time.Time) (sallyport.Listing, error) {
	a := o.asker(now)
	return a.list(q)
}

// Cover calls f with every criterion of the route that q asks for, and with what
// it says to q.
func (o *Offline) Cover(q sallyport.Request, now time.Time, f func(policy.Seen)) {
	a := o.asker(now)
	a.ask(&q)
	o.snapshot.rules.set.Cover(&a.in, f)
}

func (o *Offline) asker(now time.Time) *asker {
	return &asker{view: view{snapshot: o.snapshot, revoked: &overrides{}, now: now}}
}

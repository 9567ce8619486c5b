package gateway

import (
	"errors"
	"fmt"
	"time"

	"sallyport"
)

const (
	// silence is how long policyd's stream may say nothing (it sends a notice each
	// second) before new flows are refused.
	silence = 3 * time.Second
	// defaultMaxStale is Notice.MaxStale where a notice names none.
	defaultMaxStale = 30 * time.Second
	// ringSize is how many changed subjects are remembered. A decision that is
	// older than the ring is asked again, never trusted.
	ringSize = 8192
)

// freshness is what a gateway knows about the records behind its decisions: how
// far they have come, which subjects changed lately, and when their source was
// last heard. It is pure: times come in, nothing goes out. The zero freshness
// has heard nothing and lets nothing in.
type freshness struct {
	epoch    sallyport.Epoch
	revision sallyport.Revision // the highest of this epoch's notices
	policy   sallyport.Revision // the highest policy revision of this epoch's notices
	floor    sallyport.Revision // the highest policy revision of its notices and answers

	// start is where the ring starts: changes up to it may be missing. Questions
	// asked before startStamp were asked on an earlier stream.
	start      sallyport.Revision
	startStamp stamp
	ring       []ringEntry // ring[next] is the oldest once it is full
	next       int
	last       map[sallyport.Subject]change // the newest change of each subject in the ring

	now stamp

	heard     time.Time // when the last notice came; zero: never
	confirmed time.Time // when the source last said that the records are current; zero: never
	never     bool      // policyd has not heard from its source at all
	maxStale  time.Duration
}

// stamp orders what happens at one gateway. Every change and every question
// takes one, so that "did this change come after that question?" has an answer
// also where both carry the same revision (a revocation that policyd took
// directly has the revision of the snapshot that it applies to).
type stamp uint64

// ringEntry says that subject changed at that stamp. The ring is the order in
// which changes are forgotten; what is known about them stands in last.
type ringEntry struct {
	subject sallyport.Subject
	at      stamp
}

// change is the newest one of a subject.
type change struct {
	revision sallyport.Revision
	at       stamp
}

// policySubject is what every decision depends on.
var policySubject = sallyport.Subject{Kind: sallyport.SubjectPolicy}

// effect is what a notice asks of live grants.
type effect struct {
	all     bool // ask again for everything
	changes []sallyport.SubjectChange
	at      stamp
}

// errBehind refuses a policyd that knows less than one heard before.
var errBehind = errors.New("policyd is behind what this gateway has already seen")

// take enters a notice. An error means that its sender is behind another policyd
// of the same epoch: nothing was entered, and the stream must be dropped.
func (f *freshness) take(now time.Time, n sallyport.Notice) (effect, error) {
	if n.Epoch == f.epoch && !f.heard.IsZero() {
		if n.Revision < f.revision || n.PolicyRevision < f.policy {
			return effect{}, fmt.Errorf("revision %d with policy %d after %d with policy %d: %w",
				n.Revision, n.PolicyRevision, f.revision, f.policy, errBehind)
		}
	}
	e := effect{at: f.tick(), changes: n.Changes}
	if n.First || n.Epoch != f.epoch || f.heard.IsZero() {
		e.all = true
		f.restart(n, e.at)
	}
	f.revision, f.policy = n.Revision, n.PolicyRevision
	f.floor = max(f.floor, n.PolicyRevision)
	for _, c := range n.Changes {
		f.remember(c, e.at)
	}
	f.hear(now, n)
	return e, nil
}

// restart forgets the ring: what changed before this notice may be missing in it.
func (f *freshness) restart(n sallyport.Notice, at stamp) {
	if n.Epoch != f.epoch {
		f.floor = 0 // revisions of different epochs cannot be compared
	}
	f.epoch = n.Epoch
	f.start, f.startStamp = n.Revision, at
	f.ring, f.next = f.ring[:0], 0
	f.last = make(map[sallyport.Subject]change)
}

func (f *freshness) remember(c sallyport.SubjectChange, at stamp) {
	had, ok := f.last[c.Subject]
	f.last[c.Subject] = change{max(had.revision, c.Revision), at}
	if ok && had.at == at {
		return // a merged notice names a subject twice
	}
	entry := ringEntry{c.Subject, at}
	if len(f.ring) < ringSize {
		f.ring = append(f.ring, entry)
		return
	}
	f.forget(f.ring[f.next])
	f.ring[f.next] = entry
	f.next = (f.next + 1) % ringSize
}

// forget drops the oldest entry. If nothing newer is known about its subject,
// the ring starts behind it from now on.
func (f *freshness) forget(e ringEntry) {
	if c := f.last[e.subject]; c.at == e.at {
		f.start, f.startStamp = max(f.start, c.revision), max(f.startStamp, c.at)
		delete(f.last, e.subject)
	}
}

func (f *freshness) hear(now time.Time, n sallyport.Notice) {
	f.heard = now
	f.maxStale = n.MaxStale
	if f.maxStale <= 0 {
		f.maxStale = defaultMaxStale
	}
	f.never = n.SourceAge < 0
	if !f.never {
		f.confirmed = now.Add(-n.SourceAge)
	}
}

// tick returns a stamp that is later than all before it.
func (f *freshness) tick() stamp {
	f.now++
	return f.now
}

// mayOpen returns why nothing new may be let in at now, or nil.
func (f *freshness) mayOpen(now time.Time) error {
	switch {
	case f.heard.IsZero():
		return errors.New("policyd has not been heard yet")
	case now.Sub(f.heard) > silence:
		return fmt.Errorf("policyd has been silent for %s", now.Sub(f.heard).Round(time.Second))
	case f.never:
		return errors.New("policyd has not heard from cached yet")
	case f.stale(now):
		return fmt.Errorf("the records behind decisions are %s old", now.Sub(f.confirmed).Round(time.Second))
	}
	return nil
}

// stale reports whether the source has been unheard for longer than max_stale:
// nothing that lives may go on then.
func (f *freshness) stale(now time.Time) bool {
	if f.heard.IsZero() {
		return true
	}
	return now.Sub(f.confirmed) > f.maxStale
}

// current reports whether d, the answer to a question that was asked at the
// stamp asked about session, still stands against everything heard since.
func (f *freshness) current(d sallyport.Decision, session sallyport.SessionID, asked stamp) bool {
	switch {
	case d.Epoch != f.epoch, asked < f.startStamp, d.AsOf < f.start, d.PolicyRevision < f.floor:
		return false
	case f.touched(policySubject, d, asked):
		return false
	case f.touched(sallyport.Subject{Kind: sallyport.SubjectSession, ID: string(session)}, d, asked):
		return false
	}
	for _, s := range d.DependsOn {
		if f.touched(s, d, asked) {
			return false
		}
	}
	return true
}

// saw enters an answer that was current: none with an older policy is, from now
// on.
func (f *freshness) saw(d sallyport.Decision) { f.floor = max(f.floor, d.PolicyRevision) }

func (f *freshness) touched(s sallyport.Subject, d sallyport.Decision, asked stamp) bool {
	c, ok := f.last[s]
	return ok && (c.revision > d.AsOf || c.revision == d.AsOf && c.at > asked)
}

package policyd

import (
	"time"

	"sallyport"
)

// difference lists what changed between two complete snapshots, for a stream
// that could not be continued. Of another epoch nothing can be said in detail
// that would be sure, so everything is to be asked again.
func difference(old, next *snapshot, now time.Time) []sallyport.SubjectChange {
	if old == nil {
		return nil // watchers start over with the first epoch they see
	}
	c := comparison{revision: next.revision, continued: old.epoch == next.epoch}
	policy := sallyport.Subject{Kind: sallyport.SubjectPolicy}
	switch {
	case !c.continued:
		c.changes = append(c.changes, sallyport.SubjectChange{Subject: policy, Revision: next.revision, Why: "the records were replaced"})
	case old.rules == nil && next.rules != nil,
		old.rules != nil && next.rules != nil && old.rules.revision != next.rules.revision:
		c.changes = append(c.changes, sallyport.SubjectChange{Subject: policy, Revision: next.rules.revision, Why: "policy changed"})
	}
	d := snapshotDraft{now: now}
	compareTables(&c, sallyport.KindLogin, old.logins, next.logins, d.loginWords)
	compareTables(&c, sallyport.KindSession, old.sessions, next.sessions, d.sessionWords)
	compareTables(&c, sallyport.KindUser, old.users, next.users, userWords)
	compareTables(&c, sallyport.KindDirectoryUser, old.directory, next.directory, directoryWords)
	compareTables(&c, sallyport.KindDevice, old.devices, next.devices, deviceWords)
	compareTables(&c, sallyport.KindPosture, old.postures, next.postures, postureWords)
	compareTables(&c, sallyport.KindRecord, old.externals, next.externals, externalWords)
	return c.changes
}

// comparison collects what differs between two snapshots.
type comparison struct {
	revision  sallyport.Revision // of the later one
	continued bool               // both are of one epoch: a record of the same revision is the same
	changes   []sallyport.SubjectChange
}

func (c *comparison) add(kind sallyport.Kind, id, why string, rev sallyport.Revision) {
	if subject, ok := sallyport.SubjectOf(kind, id); ok && why != "" {
		c.changes = append(c.changes, sallyport.SubjectChange{Subject: subject, Revision: rev, Why: why})
	}
}

func compareTables[T any](c *comparison, kind sallyport.Kind, old, next table[*held[T]], words func(old, new *held[T]) string) {
	for was := range old.all() {
		is, ok := next.get(was.id)
		switch {
		case !ok:
			c.add(kind, was.id, words(was, nil), c.revision)
		case !c.continued || is.revision != was.revision:
			c.add(kind, is.id, words(was, is), is.revision)
		}
	}
	for is := range next.all() {
		if _, ok := old.get(is.id); !ok {
			c.add(kind, is.id, words(nil, is), is.revision)
		}
	}
}

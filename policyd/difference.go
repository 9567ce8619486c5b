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
	var out []sallyport.SubjectChange
	policy := sallyport.Subject{Kind: sallyport.SubjectPolicy}
	switch {
	case old.epoch != next.epoch:
		out = append(out, sallyport.SubjectChange{Subject: policy, Revision: next.revision, Why: "the records were replaced"})
	case old.rules == nil && next.rules != nil,
		old.rules != nil && next.rules != nil && old.rules.revision != next.rules.revision:
		out = append(out, sallyport.SubjectChange{Subject: policy, Revision: next.rules.revision, Why: "policy changed"})
	}
	d := snapshotDraft{now: now}
	out = compareTables(out, sallyport.KindLogin, old.logins, next.logins, d.loginWords, next.revision)
	out = compareTables(out, sallyport.KindSession, old.sessions, next.sessions, d.sessionWords, next.revision)
	out = compareTables(out, sallyport.KindUser, old.users, next.users, userWords, next.revision)
	out = compareTables(out, sallyport.KindDirectoryUser, old.directory, next.directory, directoryWords, next.revision)
	out = compareTables(out, sallyport.KindDevice, old.devices, next.devices, deviceWords, next.revision)
	out = compareTables(out, sallyport.KindPosture, old.postures, next.postures, postureWords, next.revision)
	return compareTables(out, sallyport.KindRecord, old.externals, next.externals, externalWords, next.revision)
}

func compareTables[T any](out []sallyport.SubjectChange, kind sallyport.Kind, old, next table[*held[T]],
	words func(old, new *held[T]) string, rev sallyport.Revision,
) []sallyport.SubjectChange {
	add := func(id, why string, rev sallyport.Revision) {
		if subject, ok := sallyport.SubjectOf(kind, id); ok && why != "" {
			out = append(out, sallyport.SubjectChange{Subject: subject, Revision: rev, Why: why})
		}
	}
	for was := range old.all() {
		if is, ok := next.get(was.id); !ok {
			add(was.id, words(was, nil), rev)
		} else {
			add(was.id, words(was, is), is.revision)
		}
	}
	for is := range next.all() {
		if _, ok := old.get(is.id); !ok {
			add(is.id, words(nil, is), is.revision)
		}
	}
	return out
}

package cached

import (
	"encoding/json"
	"slices"

	"sallyport"
)

// Ending says that a record, as it stood before a revision, counts no more:
// somebody lost what it gave. An engine with a journal makes endings durable
// apart from the rows, so that they outlive the loss of the rows.
type Ending struct {
	Key
	Revision sallyport.Revision
	// Marked records stay: a device is marked revoked, a user disabled.
	Marked bool
}

// Journal is what a journal says about the endings of a store.
type Journal struct {
	Epoch sallyport.Epoch
	// After and Reached bound it: it has every ending above After, and the last one
	// is at Reached.
	After, Reached sallyport.Revision
	Ended          []Ending // in order of revision
}

// Covers reports whether j has everything that ended since head.
func (j *Journal) Covers(head Head) bool {
	return j != nil && j.Epoch == head.Epoch && j.After <= head.Revision
}

// ends reports whether row, written over old, ends something: the record is
// deleted, or marked as no longer good, or a group is taken away. Records that
// had expired ended by themselves.
func (v *view) ends(old, row *Row) (Ending, bool) {
	e := Ending{Key: row.Key(), Revision: row.Revision}
	switch row.Kind {
	case sallyport.KindLogin, sallyport.KindSession, sallyport.KindUser, sallyport.KindDirectoryUser, sallyport.KindDevice:
	default:
		return e, false
	}
	if old != nil && (old.Deleted || expired(&old.Record, v.server.clock.now())) {
		return e, false
	}
	if row.Deleted {
		return e, true
	}
	if row.Kind == sallyport.KindDirectoryUser {
		return e, old != nil && losesGroup(old.Payload, row.Payload)
	}
	e.Marked = isMarked(row)
	return e, e.Marked
}

// mark is the field that says of a record of the kind that it is no longer good.
func mark(kind sallyport.Kind) string {
	switch kind {
	case sallyport.KindDevice:
		return "revoked"
	case sallyport.KindUser:
		return "disabled"
	}
	return ""
}

func isMarked(row *Row) bool {
	name := mark(row.Kind)
	if name == "" {
		return false
	}
	var fields map[string]json.RawMessage
	return json.Unmarshal(row.Payload, &fields) == nil && string(fields[name]) == "true"
}

// losesGroup reports whether a group of the directory user was there before and is
// not now. What cannot be read has no groups.
func losesGroup(before, now []byte) bool {
	var was, is sallyport.DirectoryUser
	if json.Unmarshal(before, &was) != nil {
		return false
	}
	if json.Unmarshal(now, &is) != nil {
		return len(was.Groups) > 0
	}
	return slices.ContainsFunc(was.Groups, func(g sallyport.Group) bool {
		return !slices.ContainsFunc(is.Groups, func(h sallyport.Group) bool { return g.ID == h.ID })
	})
}

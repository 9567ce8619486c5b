package policyd

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"sallyport"
)

// Words for changes. Each function compares a record's payload before and after
// (nil: there is none) and returns "" if no decision can depend on the
// difference.

func (d *snapshotDraft) sessionWords(old, new *held[session]) string {
	switch {
	case new == nil && old == nil:
		return ""
	case new == nil:
		return ended("session", d.now, old.expires, old.value.expires)
	case old == nil:
		return "session created"
	}
	return lived("session", old.value != new.value, earliest(old.value.expires, old.expires), earliest(new.value.expires, new.expires))
}

func (d *snapshotDraft) loginWords(old, new *held[login]) string {
	switch {
	case new == nil && old == nil:
		return ""
	case new == nil:
		return ended("login", d.now, old.expires, old.value.expires)
	case old == nil:
		return "login created"
	}
	return lived("login", old.value != new.value, earliest(old.value.expires, old.expires), earliest(new.value.expires, new.expires))
}

// ended tells a record that ran out from one that was taken away.
func ended(what string, now time.Time, ends ...instant) string {
	if earliest(ends...).passed(now) {
		return what + " expired"
	}
	return what + " revoked"
}

func lived(what string, changed bool, was, is instant) string {
	switch {
	case is > was:
		return what + " extended"
	case is < was:
		return what + " shortened"
	case changed:
		return what + " changed"
	}
	return ""
}

func userWords(old, new *held[user]) string {
	switch {
	case new == nil && old == nil:
		return ""
	case new == nil:
		return "user removed"
	case old == nil:
		return "user created"
	case new.value.Disabled && !old.value.Disabled:
		return "user disabled"
	case !new.value.Disabled && old.value.Disabled:
		return "user enabled"
	case new.value.Email != old.value.Email:
		return "e-mail address changed"
	case !reflect.DeepEqual(old.value.User, new.value.User):
		return "user changed"
	}
	return ""
}

func directoryWords(old, new *held[directory]) string {
	var before, after []string
	var wasEmail, isEmail string
	if old != nil {
		before, wasEmail = old.value.names, old.value.Email
	}
	if new != nil {
		after, isEmail = new.value.names, new.value.Email
	}
	var out []string
	out = append(out, groupWords(before, after, "removed")...)
	out = append(out, groupWords(after, before, "added")...)
	if wasEmail != isEmail {
		out = append(out, "e-mail address changed")
	}
	if len(out) == 0 && (old == nil) != (new == nil) {
		out = append(out, "directory entry changed") // known without groups, or not known
	}
	if len(out) == 0 && old != nil && !reflect.DeepEqual(old.value.Groups, new.value.Groups) {
		out = append(out, "groups changed")
	}
	return strings.Join(out, ", ")
}

// groupWords lists the groups of a that b lacks, at most three by name.
func groupWords(a, b []string, what string) []string {
	const most = 3
	var out []string
	left := 0
	for _, g := range a {
		switch {
		case slices.Contains(b, g):
		case len(out) < most:
			out = append(out, fmt.Sprintf("group %q %s", g, what))
		default:
			left++
		}
	}
	if left > 0 {
		out = append(out, fmt.Sprintf("%d more %s", left, what))
	}
	return out
}

func deviceWords(old, new *held[sallyport.Device]) string {
	switch {
	case new == nil && old == nil:
		return ""
	case new == nil:
		return "device removed"
	case old == nil:
		return "device created"
	case new.value.Revoked && !old.value.Revoked:
		return "device revoked"
	case !new.value.Revoked && old.value.Revoked:
		return "device is no longer revoked"
	case new.value.Approved && !old.value.Approved:
		return "device approved"
	case !new.value.Approved && old.value.Approved:
		return "device is no longer approved"
	case !reflect.DeepEqual(old.value, new.value):
		return "device changed"
	}
	return ""
}

// postureWords is silent about a report that only confirms the last one: it
// makes answers last longer, and gateways ask again when theirs end.
func postureWords(old, new *held[sallyport.Posture]) string {
	var before, after map[string]sallyport.Fact
	if old != nil {
		before = old.value.Facts
	}
	if new != nil {
		after = new.value.Facts
	}
	var out []string
	for _, name := range slices.Sorted(maps.Keys(before)) {
		is, ok := after[name]
		switch {
		case !ok:
			out = append(out, "device."+name+" is no longer known")
		case !sameFact(before[name], is):
			out = append(out, fmt.Sprintf("device.%s is now %s", name, factWords(is)))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(after)) {
		if _, ok := before[name]; !ok {
			out = append(out, fmt.Sprintf("device.%s is now %s", name, factWords(after[name])))
		}
	}
	const most = 3
	if len(out) > most {
		out = append(out[:most], fmt.Sprintf("%d more facts changed", len(out)-most))
	}
	return strings.Join(out, ", ")
}

// externalWords does not name fields: they may be about other people than the one
// whose connection ends.
func externalWords(old, new *held[sallyport.External]) string {
	switch {
	case new == nil && old == nil:
		return ""
	case new == nil:
		return "record " + old.value.Type + " removed"
	case old == nil:
		return "record " + new.value.Type + " added"
	case !reflect.DeepEqual(old.value, new.value):
		return "record " + new.value.Type + " changed"
	}
	return ""
}

func sameFact(a, b sallyport.Fact) bool {
	return a.Source == b.Source && reflect.DeepEqual(a.Value, b.Value)
}

func sameFacts(a, b map[string]sallyport.Fact) bool { return maps.EqualFunc(a, b, sameFact) }

func factWords(f sallyport.Fact) string {
	if s, ok := f.Value.(string); ok {
		return s
	}
	b, err := json.Marshal(f.Value)
	if err != nil {
		return "unreadable"
	}
	return string(b)
}

package cached

import (
	"encoding/json"
	"fmt"
	"time"

	"sallyport"
)

// Limits of a batch. A configuration of 10,000 routes is a few megabytes.
const (
	MaxOps     = 10_000   // ops in a batch
	MaxPayload = 16 << 20 // bytes of one payload
	MaxBatch   = 32 << 20 // bytes of all payloads of a batch
	maxID      = 512      // bytes of an id
	maxKind    = 32       // bytes of a kind
)

// latest is the end of time: what still fits into nanoseconds since 1970.
var latest = time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)

// UnixNano returns t in nanoseconds since 1970, and 0 for the zero time, which
// means never. Engines store expiry like this.
func UnixNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// FromUnixNano is the way back from UnixNano.
func FromUnixNano(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

// expired reports whether the record has ended by itself.
func expired(r *sallyport.Record, now time.Time) bool {
	return !r.Expires.IsZero() && !now.Before(r.Expires)
}

// checkBatch refuses what no store should hold, before anything is queued.
func checkBatch(batch []sallyport.Op) error {
	if len(batch) == 0 {
		return refuse("the batch is empty")
	}
	if len(batch) > MaxOps {
		return refuse("the batch has %d ops, %d are allowed", len(batch), MaxOps)
	}
	seen := make(map[Key]struct{}, len(batch))
	total := 0
	for i := range batch {
		op := &batch[i]
		if err := checkOp(op); err != nil {
			return err
		}
		k := Key{op.Kind, op.ID}
		if _, twice := seen[k]; twice {
			return refuse("%s %q stands twice in the batch", op.Kind, op.ID)
		}
		seen[k] = struct{}{}
		total += len(op.Payload)
	}
	if total > MaxBatch {
		return refuse("the batch has %d bytes, %d are allowed", total, MaxBatch)
	}
	return nil
}

func checkOp(op *sallyport.Op) error {
	if !validKind(op.Kind) {
		return refuse("%q is not a kind", op.Kind)
	}
	if err := reachable(op.Kind, op.ID); err != nil {
		return err
	}
	if op.ID == "" || len(op.ID) > maxID || hasControl(op.ID) {
		return refuse("%s: %q is not an id", op.Kind, op.ID)
	}
	if op.Delete && (len(op.Payload) > 0 || !op.Expires.IsZero()) {
		return refuse("%s %q: a delete has neither payload nor expiry", op.Kind, op.ID)
	}
	if len(op.Payload) > MaxPayload {
		return refuse("%s %q: the payload has %d bytes, %d are allowed", op.Kind, op.ID, len(op.Payload), MaxPayload)
	}
	if len(op.Payload) > 0 && op.Kind != sallyport.KindIDPToken && !json.Valid(op.Payload) {
		return refuse("%s %q: the payload is not JSON", op.Kind, op.ID)
	}
	if !op.Expires.IsZero() && (op.Expires.Unix() <= 0 || op.Expires.After(latest)) {
		return refuse("%s %q: expires at an impossible time", op.Kind, op.ID)
	}
	if c := op.If; c.Absent && (c.Exists || c.Revision != 0) {
		return refuse("%s %q: cannot be absent and exist", op.Kind, op.ID)
	}
	return nil
}

func validKind(k sallyport.Kind) bool {
	for i := range len(k) {
		if c := k[i]; (c < 'a' || c > 'z') && c != '_' {
			return false
		}
	}
	return k != "" && len(k) <= maxKind
}

func hasControl(s string) bool {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] == 0x7f {
			return true
		}
	}
	return false
}

// refuse returns the error for a request that is wrong in itself.
func refuse(format string, args ...any) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUsage,
		Code:    "records.bad_request",
		Message: fmt.Sprintf(format, args...),
	}
}

// recordOf returns the record that op leaves behind at revision rev.
func recordOf(op *sallyport.Op, rev sallyport.Revision) sallyport.Record {
	r := sallyport.Record{Kind: op.Kind, ID: op.ID, Version: op.Version, Revision: rev}
	if r.Version == 0 {
		r.Version = 1
	}
	if op.Delete {
		r.Deleted = true
		return r
	}
	r.Payload = append([]byte(nil), op.Payload...)
	if !op.Expires.IsZero() {
		r.Expires = FromUnixNano(UnixNano(op.Expires))
	}
	return r
}

// holds reports whether the precondition holds for the live record, which is
// nil if there is none.
func holds(c sallyport.Condition, live *sallyport.Record) bool {
	switch {
	case c.Absent:
		return live == nil
	case c.Revision != 0:
		return live != nil && live.Revision == c.Revision
	case c.Exists:
		return live != nil
	}
	return true
}

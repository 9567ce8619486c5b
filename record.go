package sallyport

import (
	"context"
	"errors"
	"io"
	"time"
)

// Kind says what a record is about.
type Kind string

// The kinds of records. Their payloads are the JSON of the type named beside
// them; see payload.go.
const (
	KindLogin         Kind = "login"          // Login
	KindSession       Kind = "session"        // Session
	KindUser          Kind = "user"           // User
	KindDirectoryUser Kind = "directory_user" // DirectoryUser, id = user id
	KindDevice        Kind = "device"         // Device
	KindPosture       Kind = "posture"        // Posture, id = device id
	KindIDPToken      Kind = "idp_token"      // bytes sealed by authd; stored, never streamed
	KindCode          Kind = "code"           // authd's single-use codes, states and nonces; never streamed
	KindConfig        Kind = "config"         // Config, id = "current"
	KindTrust         Kind = "trust"          // Trust, id = "current"
	KindConfigHistory Kind = "config_history" // PastConfig, one of each revision that was in force lately; never streamed
	KindRecord        Kind = "record"         // External, id = type/id
	KindLease         Kind = "lease"          // who holds a lease, id = its name; written by Lease alone, never streamed
	KindKeyring       Kind = "keyring"        // a daemon's wrapped data keys (internal/keyring), id = daemon; never streamed
	KindAuditHead     Kind = "audit_head"     // the last signed head of a daemon's audit chain, id = daemon; never streamed
)

// Streamed reports whether records of the kind may leave cached in a watch.
// Secrets may not (DESIGN section 5: gateways and policyd hold no token), and
// housekeeping has no readers.
func (k Kind) Streamed() bool {
	switch k {
	case KindIDPToken, KindCode, KindLease, KindAuditHead, KindKeyring, KindConfigHistory:
		return false
	}
	return true
}

// Revision orders everything that ever changed in one epoch of a store. It
// starts at 1; a batch has one revision. 0 means "before everything".
type Revision uint64

// Epoch names one uninterrupted history of a store: a restored backup has a new
// one. Revisions of different epochs cannot be compared.
type Epoch string

// Record is the one thing that cached keeps.
type Record struct {
	Kind Kind   `json:"kind"`
	ID   string `json:"id"`
	// Version is the version of the payload's format; 1 for all of today's.
	Version uint16 `json:"version"`
	// Payload is JSON for all kinds but KindIDPToken.
	Payload  []byte   `json:"payload,omitempty"`
	Revision Revision `json:"revision"`
	// Deleted marks a tombstone: Payload is then empty.
	Deleted bool `json:"deleted,omitempty"`
	// Expires is when the record ends by itself; zero means never. An expired
	// record reads as missing from that instant on, and is swept into a
	// tombstone soon after.
	Expires time.Time `json:"expires,omitzero"`
}

// Op is one change in a batch.
type Op struct {
	Kind    Kind      `json:"kind"`
	ID      string    `json:"id"`
	Version uint16    `json:"version,omitempty"` // 0 is written as 1
	Payload []byte    `json:"payload,omitempty"`
	Expires time.Time `json:"expires,omitzero"`
	Delete  bool      `json:"delete,omitempty"`
	// If must hold for the stored record, or the whole batch fails with
	// ErrConflict.
	If Condition `json:"if,omitzero"`
}

// Condition is a precondition on the stored record of an Op. The zero Condition
// always holds.
type Condition struct {
	// Absent: there is no live record.
	Absent bool `json:"absent,omitempty"`
	// Exists: there is a live record.
	Exists bool `json:"exists,omitempty"`
	// Revision: there is a live record with exactly this revision.
	Revision Revision `json:"revision,omitempty"`
}

// Errors of Records. Test with errors.Is; they survive the wire.
var (
	// ErrNotFound: no live record of that kind and id.
	ErrNotFound = errors.New("record not found")
	// ErrConflict: a precondition did not hold; nothing was written.
	ErrConflict = errors.New("record changed meanwhile")
	// ErrCompacted: the asked-for revision is too old or of another epoch; start
	// again with a snapshot (Since 0).
	ErrCompacted = errors.New("revision no longer available, start with a snapshot")
	// ErrLeaseHeld: somebody else holds the lease.
	ErrLeaseHeld = errors.New("lease is held by another")
)

// WatchRequest asks for a stream of changes.
type WatchRequest struct {
	// Kinds to stream; empty means all streamed kinds. Kinds that are never
	// streamed are refused.
	Kinds []Kind `json:"kinds,omitempty"`
	// Epoch and Since continue an earlier watch after that revision. Since 0
	// asks for a snapshot first.
	Epoch Epoch    `json:"epoch,omitempty"`
	Since Revision `json:"since,omitempty"`
}

// WatchEventType orders a stream: Begin, Items*, End, then Change and Heartbeat
// in any order. A continued watch starts with End.
type WatchEventType uint8

// The types of watch events.
const (
	WatchBegin     WatchEventType = iota + 1 // a snapshot starts: Epoch, Revision
	WatchItems                               // part of a snapshot: Records, live ones only
	WatchEnd                                 // the snapshot is complete: Revision, Count of its records
	WatchChange                              // one batch: Revision, Records (tombstones included); catching up, several merged
	WatchHeartbeat                           // each second: Revision reached; nothing below it is missing
)

// WatchEvent is one message of a watch. Its slices belong to the receiver.
type WatchEvent struct {
	Type     WatchEventType `json:"type"`
	Epoch    Epoch          `json:"epoch"`
	Revision Revision       `json:"revision"`
	Records  []Record       `json:"records,omitempty"`
	Count    int            `json:"count,omitempty"`
}

// Records is the store of sessions and identity as its users see it.
// Implementations: cached.Server in the same process, proto/control's client.
type Records interface {
	// Get returns the live record or ErrNotFound.
	Get(ctx context.Context, kind Kind, id string) (Record, error)
	// Apply writes the whole batch or nothing, and returns its revision after it
	// is durable. Ops of one batch name different records.
	Apply(ctx context.Context, batch []Op) (Revision, error)
	// Watch calls each for every event until ctx ends, each returns an error, or
	// the stream breaks; it returns that error. Changes come in order of
	// revision, without gap or double, a batch in one piece.
	Watch(ctx context.Context, q WatchRequest, each func(WatchEvent) error) error
	// Lease runs hold while this process holds the named lease and returns its
	// error. hold's context ends when the lease is lost. ErrLeaseHeld if another
	// holds it. ttl (at least 1 s) is how long a dead holder blocks others.
	Lease(ctx context.Context, name string, ttl time.Duration, hold func(context.Context) error) error
}

// Lister lists the live records of a streamed kind or of KindConfigHistory;
// cached.Server has it, and so does its client. It is for operators' tools: daemons
// watch.
type Lister interface {
	List(ctx context.Context, kind Kind) ([]Record, error)
}

// Backuper writes a backup: everything in the store, at one instant. cached.Server
// has it, and so does its client.
type Backuper interface {
	Backup(ctx context.Context, w io.Writer) error
}

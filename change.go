package sallyport

import (
	"context"
	"time"
)

// SubjectKind says what a Subject is.
type SubjectKind string

// The kinds of subjects. A directory user is its user, a posture its device.
const (
	SubjectLogin   SubjectKind = "login"
	SubjectSession SubjectKind = "session"
	SubjectUser    SubjectKind = "user"
	SubjectDevice  SubjectKind = "device"
	SubjectRecord  SubjectKind = "record"
	SubjectPolicy  SubjectKind = "policy" // ID empty; every decision depends on it
)

// Subject is something whose change can change decisions.
type Subject struct {
	Kind SubjectKind `json:"kind"`
	ID   string      `json:"id,omitempty"`
}

// String returns kind:id.
func (s Subject) String() string {
	if s.ID == "" {
		return string(s.Kind)
	}
	return string(s.Kind) + ":" + s.ID
}

// SubjectOf returns the subject that a record of the kind is about; ok is false
// for kinds that no decision depends on.
func SubjectOf(kind Kind, id string) (s Subject, ok bool) {
	switch kind {
	case KindLogin:
		return Subject{SubjectLogin, id}, true
	case KindSession:
		return Subject{SubjectSession, id}, true
	case KindUser, KindDirectoryUser:
		return Subject{SubjectUser, id}, true
	case KindDevice, KindPosture:
		return Subject{SubjectDevice, id}, true
	case KindRecord:
		return Subject{SubjectRecord, id}, true
	case KindConfig:
		return Subject{Kind: SubjectPolicy}, true
	}
	return Subject{}, false
}

// Notice is one message from policyd to a gateway: at the start of a stream, at
// every change, and at least each second.
type Notice struct {
	// Epoch and Revision are those of the snapshot that decides now.
	Epoch          Epoch    `json:"epoch"`
	Revision       Revision `json:"revision"`
	PolicyRevision Revision `json:"policy_revision"`
	// SourceAge is how long ago cached last confirmed that the snapshot is
	// current, by policyd's clock, at sending. Below zero: never.
	SourceAge time.Duration `json:"source_age"`
	// MaxStale is the configured bound on SourceAge for live flows; 0: 30 s.
	MaxStale time.Duration `json:"max_stale,omitempty"`
	// Changes lists what changed since the previous notice of this stream.
	Changes []SubjectChange `json:"changes,omitempty"`
	// Trust is set in the first notice and whenever it changed. It holds what counts
	// at that moment, without terms.
	Trust *Trust `json:"trust,omitempty"`
	// Forbidden are addresses gateways never dial (Config.Forbidden); sent like
	// Trust.
	Forbidden []string `json:"forbidden,omitempty"`
	// First marks the first notice of a stream: ask again for everything.
	First bool `json:"first,omitempty"`
}

// SubjectChange says that a subject changed, at which revision, and in words why
// ("session revoked", "device.disk_encrypted is now false", "group removed").
// Direct revocations that cached has not taken yet carry the snapshot's revision.
type SubjectChange struct {
	Subject  Subject  `json:"subject"`
	Revision Revision `json:"revision"`
	Why      string   `json:"why,omitempty"`
}

// Changes tells gateways which subjects changed. Watch calls each for every
// notice, one at a time, until ctx ends, each returns an error, or the stream
// breaks; it returns that error. A slow receiver gets merged notices, never a
// gap. Implementations: policyd.Server, proto/control's client.
type Changes interface {
	Watch(ctx context.Context, each func(Notice) error) error
}

// Revocation ends sessions.
type Revocation struct {
	// Subjects to end: sessions, logins, users (all their logins), devices.
	Subjects []Subject `json:"subjects"`
	Reason   string    `json:"reason,omitempty"`
	By       string    `json:"by,omitempty"`
}

// Revoked acknowledges a Revocation.
type Revoked struct {
	// Sessions is how many live sessions ended.
	Sessions int `json:"sessions"`
	// Durable is false when policyd took the revocation directly while cached was
	// out of reach: it holds, but would not survive policyd's end until it is
	// replayed into cached.
	Durable  bool     `json:"durable"`
	Revision Revision `json:"revision,omitempty"`
}

// Revoker ends sessions. cached.Server does it durably, policyd.Server directly.
type Revoker interface {
	Revoke(ctx context.Context, r Revocation) (Revoked, error)
}

// Package control is how daemons talk to each other: the root package's
// interfaces over gRPC, both ways. A [Server] offers what a daemon implements;
// a [Client] gives the same interfaces to whoever is on another machine, so
// that cmd passes one or the other and nobody else can tell.
//
// It owns the messages (.proto, internal/pb), how errors survive the wire, who
// may call what (access.go), and how a dead or frozen peer is noticed. It does
// not own what the calls mean, nor certificates (internal/tlsid).
//
// # When the other side is gone
//
// A call on a service that is down fails at once; it never waits for the service
// to come back. A call on one that has frozen fails at the caller's deadline, or
// after CallTimeout if it has none. A stream says something each second, even if
// only that its sender lives, and breaks after Silence without a word. Both sides
// bound what they read (MaxMessage). The client connects anew by itself, at most
// half a second between two attempts, and with several addresses it stays with
// the first that answers.
package control

//go:generate ./generate.sh

import "time"

// Limits of calls and streams.
const (
	// CallTimeout ends a call whose context has no deadline.
	CallTimeout = 10 * time.Second
	// Pulse is how long a stream's sender is silent at most.
	Pulse = time.Second
	// Silence is after how long without a word a receiver gives a stream up.
	Silence = 3 * time.Second
	// MaxMessage bounds one message, in bytes. A batch of operations must fit:
	// cached.MaxBatch, and what is said about the payloads.
	MaxMessage = 33 << 20
)

// Flow-control windows (RFC 9113, section 5.2), in bytes. They are fixed:
// gRPC's estimator would send a ping of its own beside every call.
const (
	streamWindow = 1 << 20
	connWindow   = 16 << 20
)

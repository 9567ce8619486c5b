// Package policyd answers questions of access from an immutable snapshot in
// memory. A Server is sallyport.Authorizer, Explainer, Changes, PostureSink and
// Revoker.
//
// It owns the snapshot (fed by cached's stream), who counts as a live session,
// the telling of changes to gateways, the acceptance of posture reports, and the
// audit of decisions. It does not own the language (policyd/policy), the records
// (cached), flows (gateway) or the wire (proto/control). It keeps nothing on
// disk and no state of flows.
//
// # The snapshot
//
// One goroutine follows cached's stream and puts each new state behind an
// atomic pointer: a complete one at the end of a snapshot, and one more for each
// change, which shares everything that did not change. Questions read the
// pointer once a batch and take no lock.
//
// # Fail closed
//
// An answer is refused with an error, and so never an allow, while there is no
// complete snapshot, no policy that loads, when cached has not confirmed the
// snapshot for max_stale, or when the decision cannot be audited. A record that
// cannot be read counts as missing, and missing means revoked.
//
// # A direct revocation
//
// When cached is out of reach, Revoke takes effect in memory, and is written to
// cached before cached's next heartbeat counts as a confirmation. Until its own
// snapshot shows it, it stays in memory.
package policyd

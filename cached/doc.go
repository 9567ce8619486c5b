// Package cached keeps the records of Sallyport (logins, sessions, users,
// devices, posture, configuration) and tells every change of them in order. A
// [Server] is [sallyport.Records], [sallyport.Lister] and [sallyport.Revoker]
// over a [Store], the engine that makes rows durable.
//
// It owns revisions, preconditions, expiry, leases, revocation, the change
// stream and the code of every row (HMAC-SHA256: a row that does not verify
// reads as missing, so a changed bit or a hand in the file can end a session
// but never make one). It does not own how rows lie on disk (cached/sqlite,
// cached/memory), what a payload means (whoever writes it), or the wire
// (proto/control).
//
// # One write
//
// Apply queues its batch. The first caller to find nobody committing takes the
// whole queue, checks each batch's preconditions against the store and the
// batches before it, gives each its revision, audits it, writes all of them in
// one durable transaction, publishes them to the watches and tells the callers.
// Batches that come meanwhile wait for the next round, so a disk flush serves
// everybody who waited for it and no goroutine has to run for it.
//
// # One watch
//
// A watch holds nothing but the revision it has reached. It reads the batches
// after it from the [feed], a bounded ring in memory, and from the store where
// the ring no longer reaches back; a slow watcher therefore costs no memory and
// never misses a change.
package cached

// Package cached keeps the records of Sallyport (logins, sessions, users,
// devices, posture, configuration) and tells every change of them in order. A
// [Server] is [sallyport.Records], [sallyport.Lister] and [sallyport.Revoker]
// over a [Store], the engine that makes rows durable.
//
// It owns revisions, preconditions, expiry, leases, revocation, the change
// stream, the code of every row (HMAC-SHA256: a row that does not verify reads
// as missing, so a changed bit or a hand in the file can end a session but never
// make one) and the seal of the [Head], which shows a row that was put back as it
// once was. It does not own how rows lie on disk (cached/sqlite, cached/postgres,
// cached/memory), what a payload means (whoever writes it), or the wire
// (proto/control).
//
// # One write
//
// Apply queues its batch. The first caller to find nobody committing takes the
// whole queue and has the engine stand still ([Store.Update]): while nobody else
// writes, in this process or another, it reads what the batches touch, checks each
// batch's preconditions against that and the batches before it, gives each its
// revision, audits it, and seals the new head. The engine makes all of it durable
// in one transaction; then the watches and the callers are told. Batches that come
// meanwhile wait for the next round, so a disk flush serves everybody who waited
// for it and no goroutine has to run for it.
//
// # Several servers
//
// On an engine that is [Shared], revisions are given out under the store's own
// lock, so the order of commits is the order of revisions whoever commits. Each
// server follows what the others wrote (a notification, and a look each 250 ms)
// into its ring, and has the store confirm once a second that it is still the one
// that everybody writes to. Without that proof watches hear no heartbeat, and
// policyd and the gateways count how old their knowledge is.
//
// # One watch
//
// A watch holds nothing but the revision it has reached. It reads the batches
// after it from the [feed], a bounded ring in memory, and from the store where
// the ring no longer reaches back; a slow watcher therefore costs no memory and
// never misses a change.
package cached

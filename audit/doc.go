// Package audit is a daemon's own record of what it did: lines of JSON, each
// chained to the one before it by SHA-256, with heads signed by the daemon's
// audit key every second and at the end. [Open] writes, [Verify] checks, [Read]
// and [Tail] read. What is worth a record is decided by whoever appends; which
// types exist stands in sallyport.AuditRecord.
//
// # On disk
//
// A directory a daemon, holding segments named after their first sequence
// number, the last signed head, and a lock file:
//
//	00000000000000000001.jsonl  00000000000000040000.jsonl  head.json  lock
//
// A line is
//
//	{"seq":7,"prev":"<hash of line 6>","up_ms":1200,"record":{…},"hash":"<hash>"}
//
// where hash is the SHA-256, in hex, of the line's bytes before `,"hash"`. The
// first line's prev is the hash of the chain's label. In place of "record" a line
// can hold "head", a signed [Head] of the line before it.
//
// # What it proves
//
// An altered, removed or moved line breaks the chain at its sequence number.
// Whoever writes the rest of the chain anew breaks the next signed head; whoever
// cuts the end off falls short of head.json, or, having put an older one there,
// of the head that was kept elsewhere (Options.Keep). Lines after the last head
// (at most a second of them) are chained but not signed.
//
// Append returns once the line is with the operating system, so it survives the
// daemon's end; a flush each 50 ms makes it survive the machine's. A daemon
// killed within a write leaves one cut line: the next Open says in its first
// line how many bytes are torn, and the chain goes on behind them.
package audit

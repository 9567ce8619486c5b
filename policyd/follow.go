package policyd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sallyport"
	"sallyport/internal/backoff"
)

// silence is after how long without an event a stream counts as broken;
// heartbeats come each second.
const silence = 5 * time.Second

// follow keeps a stream from cached open until ctx ends.
func (s *Server) follow(ctx context.Context) error {
	f := &follower{Server: s}
	var retry backoff.Backoff
	_ = retry.Keep(ctx, f.stream, func(err error, attempt int) { // its error is ctx's
		s.log.Warn("stream from cached ended", "error", err, "attempt", attempt)
	})
	return nil
}

// follower turns one stream after the other into snapshots. It belongs to one
// goroutine.
type follower struct {
	*Server
	draft    *snapshotDraft // between Begin and End
	count    int            // records since Begin
	complete bool           // this stream has reached End
	again    bool           // the next stream must start with a snapshot
}

var errSilent = errors.New("no heartbeat from cached")

// stream follows one stream to its end.
func (f *follower) stream(ctx context.Context) error {
	f.draft, f.complete = nil, false
	defer f.replay.connected.Store(false)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(2*silence, func() { cancel(errSilent) })
	defer watchdog.Stop()
	q := sallyport.WatchRequest{Kinds: kinds}
	if snap := f.snap.Load(); snap != nil && !f.again {
		q.Epoch, q.Since = snap.epoch, snap.revision
	}
	err := f.records.Watch(ctx, q, func(e sallyport.WatchEvent) error {
		watchdog.Stop() // taking an event in may last; only waiting for one is silence
		defer watchdog.Reset(silence)
		return f.event(ctx, e)
	})
	if cause := context.Cause(ctx); errors.Is(cause, errSilent) {
		return cause
	}
	f.again = f.again || errors.Is(err, sallyport.ErrCompacted)
	return err
}

func (f *follower) event(ctx context.Context, e sallyport.WatchEvent) error {
	switch e.Type {
	case sallyport.WatchBegin:
		f.begin(e)
		return nil
	case sallyport.WatchItems:
		return f.items(e)
	case sallyport.WatchEnd:
		return f.end(ctx, e)
	}
	snap := f.snap.Load()
	if !f.complete || snap == nil || e.Epoch != snap.epoch {
		f.again = true
		return fmt.Errorf("event of epoch %q out of order", e.Epoch)
	}
	switch e.Type {
	case sallyport.WatchChange:
		f.change(ctx, snap, e)
	case sallyport.WatchHeartbeat:
		f.heartbeat(snap, e.Revision)
	}
	return nil
}

// begin starts an empty snapshot; of the old one only what stays in force
// without records is kept: the last rules that loaded, and the trust bundle.
func (f *follower) begin(e sallyport.WatchEvent) {
	empty := snapshot{epoch: e.Epoch, revision: e.Revision}
	f.draft, f.count = empty.edit(f.cfg, time.Now()), 0
	f.draft.known, f.draft.silent = f.known, true
	if old := f.snap.Load(); old != nil {
		f.draft.rules, f.draft.trust, f.draft.common = old.rules, old.trust, old.common
	}
}

func (f *follower) items(e sallyport.WatchEvent) error {
	if f.draft == nil || e.Epoch != f.draft.epoch {
		return errors.New("records outside of a snapshot")
	}
	f.count += len(e.Records)
	f.draft.applyAll(e.Records)
	return nil
}

// end completes a snapshot, or the start of a continued stream.
func (f *follower) end(ctx context.Context, e sallyport.WatchEvent) error {
	if f.draft == nil {
		if snap := f.snap.Load(); snap == nil || snap.epoch != e.Epoch {
			f.again = true
			return errors.New("the stream goes on from a snapshot that is not there")
		}
		f.complete = true
		return nil // the first heartbeat confirms that nothing is missing
	}
	if f.count != e.Count {
		f.again = true
		return fmt.Errorf("snapshot of %d records, %d announced", f.count, e.Count)
	}
	draft := f.draft
	f.draft, f.complete, f.again = nil, true, false
	old, next := f.snap.Load(), draft.finish()
	if old != nil && next.rules == old.rules && next.broken == nil {
		next.broken = errors.New("the configuration is gone")
	}
	f.report(ctx, draft, old)
	f.publish(next, difference(old, next, draft.now))
	f.heartbeat(next, e.Revision)
	f.log.Info("snapshot complete", "epoch", string(next.epoch), "revision", uint64(next.revision), "records", e.Count)
	return nil
}

func (f *follower) change(ctx context.Context, snap *snapshot, e sallyport.WatchEvent) {
	if e.Revision <= snap.revision {
		return // told already
	}
	draft := snap.edit(f.cfg, time.Now())
	draft.revision, draft.known = e.Revision, f.known
	for _, r := range e.Records {
		draft.apply(r)
	}
	f.report(ctx, draft, snap)
	f.publish(draft.finish(), draft.changes)
}

// heartbeat confirms the snapshot, unless a direct revocation still has to be
// written to cached: until then cached does not know what is in force here.
func (f *follower) heartbeat(snap *snapshot, rev sallyport.Revision) {
	if rev > snap.revision { // records that are not streamed to us
		next := *snap
		next.revision = rev
		f.publish(&next, nil)
	}
	f.replay.connected.Store(true)
	if f.revoked.Load().pending() {
		f.replay.wake()
		return
	}
	age := f.sourceAge()
	f.confirm()
	if age < 0 || age > 2*noticeEvery {
		f.fanout.wake() // gateways refuse until they hear that the records are current again
	}
}

// report logs and audits what could not be used.
func (f *follower) report(ctx context.Context, d *snapshotDraft, old *snapshot) {
	for _, err := range d.faults {
		f.log.Error("record cannot be read and counts as missing", "error", err)
	}
	if d.broken == nil || old != nil && old.broken != nil && old.broken.Error() == d.broken.Error() {
		return
	}
	f.log.Error("configuration refused, the old one stays in force", "error", d.broken)
	f.auditBroken(ctx, d.broken)
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	const mark = "…"
	n -= len(mark)
	for n > 0 && s[n]&0xC0 == 0x80 { // in the middle of a character
		n--
	}
	return s[:n] + mark
}

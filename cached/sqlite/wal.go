package sqlite

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"sallyport"
	"sallyport/cached"
)

// The write-ahead log grows with each commit until a checkpoint has written it
// back, and none can go beyond what somebody still reads. These are the steps
// that keep it within 256 MiB; the largest batch has 32 MiB.
const (
	// checkpointAt is from how many pages on the log is written back.
	checkpointAt = 1_000

	// shrinkAt is from which size on the file is cut back once nobody needs it.
	shrinkAt = 64 << 20

	// scansEndAt is at which size those who read for long in this process have to
	// begin again.
	scansEndAt = 128 << 20

	// additionsEndAt is at which size only what ends something is still taken.
	// That happens when another process reads for long.
	additionsEndAt = 192 << 20

	frameSize = 4096 + 24 // a page in the log
)

// wal is what is known of the log.
type wal struct {
	size         atomic.Int64 // bytes that hold commits since it last began anew
	reserve      int64        // bytes of the disk it always has
	checkpointAt int          // pages
}

// logState is what SQLite says about the log.
type logState struct{ busy, pages, done int }

// whole reports whether everything in the log is in the database, too.
func (l logState) whole() bool { return l.busy == 0 && l.done >= l.pages }

func (s *Store) logState(ctx context.Context, mode string) (l logState, err error) {
	err = s.writer.QueryRowContext(ctx, `PRAGMA wal_checkpoint(`+mode+`)`).Scan(&l.busy, &l.pages, &l.done)
	s.wal.size.Store(int64(max(l.pages, 0)) * frameSize)
	return l, classify(err)
}

// checkpoint writes a log that has grown back into the database, as far as nobody
// reads what was there before. The caller holds writeMu.
func (s *Store) checkpoint(ctx context.Context) error {
	l, err := s.logState(ctx, "NOOP")
	if err != nil || l.pages < s.wal.checkpointAt || l.whole() {
		return err
	}
	if l, err = s.logState(ctx, "PASSIVE"); err != nil || l.whole() {
		return err
	}
	if s.wal.size.Load() > scansEndAt && s.scans.end() {
		s.log.Warn("write-ahead log cannot be written back: whoever reads for long begins again", "bytes", s.wal.size.Load())
	}
	return nil
}

// shrinkLog cuts an overgrown log back, if no reader is in the way. The caller
// holds writeMu.
func (s *Store) shrinkLog(ctx context.Context) error {
	info, err := os.Stat(s.path + "-wal")
	if err != nil || info.Size() <= shrinkAt {
		return nil // it is not there before the first write
	}
	if l, err := s.logState(ctx, "PASSIVE"); err != nil || !l.whole() {
		return err
	}
	// Nobody shall wait for a reader that another process has.
	if _, err := s.writer.ExecContext(ctx, `PRAGMA busy_timeout = 0`); err != nil {
		return classify(err)
	}
	_, err = s.logState(ctx, "TRUNCATE")
	_, again := s.writer.ExecContext(ctx, fmt.Sprintf(`PRAGMA busy_timeout = %d`, s.busy.Milliseconds()))
	if err := errors.Join(err, classify(again)); err != nil {
		return err
	}
	s.reserve()
	return nil
}

// scans are the reads that may take long.
type scans struct {
	open  atomic.Int64
	round atomic.Pointer[scanRound]
}

// scanRound is those scans that are ended together.
type scanRound struct {
	context.Context
	end context.CancelFunc
}

// renew begins another round, and returns the one before it.
func (s *scans) renew() *scanRound {
	ctx, cancel := context.WithCancel(context.Background())
	return s.round.Swap(&scanRound{ctx, cancel})
}

// enter returns the context of a scan, and what to call after it.
func (s *scans) enter(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.round.Load(), func() { cancel(cached.ErrScanTooLong) })
	s.open.Add(1)
	return ctx, func() {
		stop()
		cancel(nil)
		s.open.Add(-1)
	}
}

// end ends every scan that is under way, and reports whether there was one.
func (s *scans) end() bool {
	if s.open.Load() == 0 {
		return false
	}
	s.renew().end()
	return true
}

func logFull(path string) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable,
		Code:    codeFull,
		Message: "the write-ahead log of the record store is as large as it may be; only revocations are taken",
		Hint:    fmt.Sprintf("end the program that reads %s (`fuser %[1]s` names it); cached goes on by itself", path),
	}
}

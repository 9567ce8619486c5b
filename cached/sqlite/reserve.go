package sqlite

import (
	"context"
	"os"

	"golang.org/x/sys/unix"

	"sallyport"
)

const (
	// reserved is how much of the disk the write-ahead log owns from the start.
	// A deletion writes a few pages into it, and a later checkpoint makes it free
	// again, so that revocations go on when the disk is full.
	reserved = 16 << 20

	// roomWanted is what must be left of the disk for a write that adds something.
	roomWanted = 8 << 20

	// logMax is from which size on the log is cut back after a long read.
	logMax = 64 << 20
)

// reserve gives the log its blocks without changing its size, which SQLite would
// notice. Where the file system cannot, a full disk stops revocations, too.
func (s *Store) reserve() {
	f, err := os.OpenFile(s.path+"-wal", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		s.log.Warn("space for revocations is not reserved", "error", err)
		return
	}
	defer f.Close() // SQLite's locks are on the other two files
	if err := allocate(f, reserved); err != nil {
		s.log.Warn("space for revocations is not reserved", "error", err)
	}
}

// Room implements cached.Store.
func (s *Store) Room(context.Context) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(s.marker.Fd()), &fs); err != nil {
		return err
	}
	if uint64(fs.Bavail)*uint64(fs.Bsize) >= roomWanted {
		return nil
	}
	return full(nil)
}

// shrinkLog cuts an overgrown log back, if no reader is in the way.
func (s *Store) shrinkLog(ctx context.Context) error {
	info, err := os.Stat(s.path + "-wal")
	if err != nil || info.Size() <= logMax {
		return nil // it is not there before the first write
	}
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	var busy, pages, done int
	if err := s.writer.QueryRowContext(ctx, `PRAGMA wal_checkpoint(PASSIVE)`).Scan(&busy, &pages, &done); err != nil {
		return classify(err)
	}
	if busy != 0 || done < pages {
		return nil
	}
	if _, err := s.writer.ExecContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`); err != nil {
		return classify(err)
	}
	s.reserve()
	return nil
}

func full(cause error) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable,
		Code:    "storage.full",
		Message: "the disk of the record store is full; only revocations are taken",
		Hint:    "free space on it; cached goes on by itself",
		Err:     cause,
	}
}

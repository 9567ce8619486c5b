package audit

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sallyport"
	"sallyport/internal/logging"
)

// Options says how a Log writes. The zero value is right for a daemon.
type Options struct {
	// SegmentBytes is when a new segment starts; 0: 64 MiB.
	SegmentBytes int64
	// FlushEvery is how long a line may be with the operating system alone; 0:
	// 50 ms.
	FlushEvery time.Duration
	// HeadEvery is how often a head is signed while there are new records; 0: 1 s.
	HeadEvery time.Duration
	// Keep, if set, stores a new head elsewhere, where whoever owns this
	// directory cannot set it back. It is called by one goroutine at a time; its
	// error is logged.
	Keep func(context.Context, Head) error
	// Log; nil: nothing is logged.
	Log logging.Logger
}

// maxDetail is how many characters of AuditRecord.Detail are kept.
const maxDetail = 200

// Log appends to a daemon's chain. It implements sallyport.Auditor.
type Log struct {
	dir     string
	name    string
	key     ed25519.PrivateKey
	opts    Options
	started time.Time
	lock    *os.File

	mu       sync.Mutex // guards what follows
	f        *os.File   // the last segment
	size     int64
	sequence uint64 // of the last line
	hash     string // of the last line
	records  uint64 // appended since Open
	signed   uint64 // records when the last head was signed
	unsynced bool
	retired  []*os.File // full segments that are not flushed yet
	broken   error      // why nothing can be appended any more
	buf      []byte

	headMu sync.Mutex // one head at a time; taken before mu
	head   Head       // the last one written; guarded by mu

	stop    context.CancelFunc
	stopped chan struct{} // closed when the flusher has ended
}

// Open continues the chain in dir, or starts one (the directory is made, 0700).
// name is the daemon's. Errors: audit.in_use (another process writes there),
// audit.broken (the end of the chain is not as it was written; Verify tells).
func Open(dir, name string, key ed25519.PrivateKey, opts Options) (*Log, error) {
	if len(key) != ed25519.PrivateKeySize {
		return nil, fmt.Errorf("open audit log: the key has %d bytes, want %d", len(key), ed25519.PrivateKeySize)
	}
	if opts.SegmentBytes <= 0 {
		opts.SegmentBytes = 64 << 20
	}
	if opts.FlushEvery <= 0 {
		opts.FlushEvery = 50 * time.Millisecond
	}
	if opts.HeadEvery <= 0 {
		opts.HeadEvery = time.Second
	}
	if opts.Log == nil {
		opts.Log = logging.Discard()
	}
	l := &Log{dir: dir, name: name, key: key, opts: opts, started: time.Now(), stopped: make(chan struct{})}
	if err := l.open(); err != nil {
		return nil, fmt.Errorf("open audit log %s: %w", dir, errors.Join(err, l.closeFiles()))
	}
	ctx, cancel := context.WithCancel(context.Background())
	l.stop = cancel
	go l.run(ctx)
	return l, nil
}

func (l *Log) open() error {
	if err := os.MkdirAll(l.dir, 0o700); err != nil {
		return err
	}
	if err := l.lockDir(); err != nil {
		return err
	}
	end, err := l.recover()
	var fault *Fault
	if errors.As(err, &fault) {
		return &sallyport.Error{
			Outcome: sallyport.OutcomeInternal,
			Code:    "audit.broken",
			Message: "the audit log is not as it was written: " + fault.Error(),
			Hint:    "run `sallyport audit verify`, then move " + l.dir + " away to start a new chain",
			Err:     err,
		}
	}
	if err != nil {
		return err
	}
	if err := l.openLast(end); err != nil {
		return err
	}
	return l.writeHead()
}

func (l *Log) lockDir() (err error) {
	path := filepath.Join(l.dir, "lock")
	l.lock, err = os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	err = unix.Flock(int(l.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if !errors.Is(err, unix.EWOULDBLOCK) {
		return err
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal,
		Code:    "audit.in_use",
		Message: "another process writes this audit log",
		Hint:    "stop the other daemon, or give this one a directory of its own",
	}
}

// recover finds the end of the chain, reading no more than the last segment
// that has a line.
func (l *Log) recover() (end tail, err error) {
	starts, err := segments(l.dir)
	if err != nil {
		return end, err
	}
	w := &walker{genuine: l.genuine, hash: genesis}
	for first := len(starts) - 1; first >= 0; first-- {
		*w = walker{genuine: l.genuine, hash: genesis}
		if first > 0 {
			w.sequence, w.hash = starts[first]-1, ""
		}
		if end, err = w.segments(l.dir, starts[first:]); err != nil {
			return end, err
		}
		if w.hash != "" {
			break // else the last was made and not written any more
		}
	}
	head, err := readHead(l.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) && w.sequence == 0: // a new chain
	case errors.Is(err, fs.ErrNotExist):
		return end, w.fault("head.json is gone, nothing says that the chain ends here")
	case err != nil:
		return end, err
	case !l.genuine(&head):
		return end, &Fault{Sequence: 1, Until: head.Sequence, Reason: "the last head is not signed by this daemon's key"}
	case head.Sequence > w.sequence:
		return end, w.fault(fmt.Sprintf("the end is cut off, the signed head says %d", head.Sequence))
	}
	l.sequence, l.hash = w.sequence, w.hash
	return end, nil
}

func (l *Log) genuine(h *Head) bool {
	return h.Name == l.name && h.Genuine(l.key.Public().(ed25519.PublicKey))
}

// openLast opens the last segment for appending. Where it ends within a line,
// the chain goes on behind that: a signed line says how much is torn, written in
// one piece with the newline that ends the torn part.
func (l *Log) openLast(end tail) (err error) {
	l.unsynced = true // whoever wrote it may not have come to that
	if end.start == 0 {
		l.f, err = l.createSegment(l.sequence + 1)
		return err
	}
	l.f, err = os.OpenFile(filepath.Join(l.dir, segmentName(end.start)), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil || !end.unterminated {
		l.size = end.size
		return err
	}
	if end.cut == 0 {
		l.size = end.size + 1
		_, err = l.f.Write([]byte{'\n'}) // the line is whole but for its newline
		return err
	}
	l.opts.Log.Warn("audit log ends within a line that was never acknowledged", "sequence", l.sequence+1, "bytes", end.cut)
	l.size = end.size
	return l.appendHead([]byte{'\n'}, end.cut+1, l.sign())
}

func (l *Log) createSegment(start uint64) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(l.dir, segmentName(start)), os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	d, err := os.Open(l.dir)
	if err == nil {
		err = errors.Join(d.Sync(), d.Close())
	}
	if err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	return f, nil
}

// Append implements sallyport.Auditor: when it returns nil the record is with
// the operating system, in order. Detail is cut to 200 characters; a zero Time
// is now.
func (l *Log) Append(_ context.Context, r sallyport.AuditRecord) error {
	if r.Time.IsZero() {
		r.Time = time.Now()
	}
	r.Time = r.Time.UTC().Round(0)
	r.Detail = shorten(r.Detail)
	content, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.append(nil, 0, "record", content); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	l.records++
	return nil
}

func shorten(s string) string {
	if len(s) <= maxDetail {
		return s
	}
	n := 0
	for i := range s {
		if n++; n > maxDetail {
			return s[:i]
		}
	}
	return s
}

// appendHead writes a line that holds a head. The caller holds mu.
func (l *Log) appendHead(prefix []byte, torn int64, h Head) error {
	content, err := json.Marshal(h)
	if err != nil {
		return err
	}
	return l.append(prefix, torn, "head", content)
}

// append writes the next line behind prefix, which ends a torn line if there is
// one. The caller holds mu.
func (l *Log) append(prefix []byte, torn int64, field string, content []byte) error {
	if l.broken != nil {
		return l.broken
	}
	next := place{sequence: l.sequence + 1, prev: l.hash, up: time.Since(l.started), torn: torn}
	text, hash, err := appendLine(append(l.buf[:0], prefix...), next, field, content)
	if err != nil {
		return err
	}
	// A large line's buffer is not kept.
	if l.buf = text[:0]; cap(l.buf) > 64<<10 {
		l.buf = nil
	}
	if torn == 0 {
		if err := l.makeRoom(int64(len(text))); err != nil {
			return err
		}
	}
	if n, err := l.f.Write(text); err != nil {
		return l.undo(n, err)
	}
	l.size += int64(len(text))
	l.sequence, l.hash, l.unsynced = next.sequence, hash, true
	return nil
}

// undo takes back a write that failed half-way, so that the chain can go on once
// the disk has room again.
func (l *Log) undo(written int, cause error) error {
	if written == 0 {
		return cause
	}
	if err := l.f.Truncate(l.size); err != nil {
		l.broken = fmt.Errorf("a line is half written: %w", errors.Join(cause, err))
		return l.broken
	}
	return cause
}

// makeRoom starts a new segment if n bytes no longer fit into this one.
func (l *Log) makeRoom(n int64) error {
	if l.size == 0 || l.size+n <= l.opts.SegmentBytes {
		return nil
	}
	f, err := l.createSegment(l.sequence + 1)
	if err != nil {
		return err
	}
	l.retired = append(l.retired, l.f)
	l.f, l.size = f, 0
	return nil
}

// run flushes and signs until ctx ends.
func (l *Log) run(ctx context.Context) {
	defer close(l.stopped)
	flush := time.NewTicker(l.opts.FlushEvery)
	defer flush.Stop()
	sign := time.NewTicker(l.opts.HeadEvery)
	defer sign.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return
		case <-flush.C:
			err = l.flush()
		case <-sign.C:
			err = l.advanceHead(ctx)
		}
		if err != nil {
			l.opts.Log.Error("audit log is not written", "error", err)
		}
	}
}

// flush makes every line durable that was appended before. After a failure the
// log takes nothing more: what the disk has is not known, and a second flush of
// lost pages succeeds.
func (l *Log) flush() error {
	l.mu.Lock()
	f, retired, unsynced, broken := l.f, l.retired, l.unsynced, l.broken
	l.retired, l.unsynced = nil, false
	l.mu.Unlock()
	if !unsynced || broken != nil {
		return nil
	}
	var errs []error
	for _, old := range retired {
		errs = append(errs, old.Sync(), old.Close())
	}
	err := errors.Join(append(errs, f.Sync())...)
	if err == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.broken = fmt.Errorf("flush: %w", err)
	return l.broken
}

// sign returns the signed head of the last line. The caller holds mu.
func (l *Log) sign() Head {
	h := Head{Name: l.name, Sequence: l.sequence, Hash: l.hash, Time: time.Now().UTC().Round(0)}
	h.sign(l.key)
	return h
}

// advanceHead signs a head for the records since the last one, if there are any,
// and keeps it.
func (l *Log) advanceHead(ctx context.Context) error {
	l.headMu.Lock()
	defer l.headMu.Unlock()
	l.mu.Lock()
	if l.records == l.signed {
		l.mu.Unlock()
		return nil
	}
	head := l.sign()
	signed := l.records
	err := l.appendHead(nil, 0, head)
	l.mu.Unlock()
	if err != nil {
		return fmt.Errorf("sign: %w", err)
	}
	if err := l.store(head); err != nil {
		return err
	}
	l.mu.Lock()
	l.signed = signed
	l.mu.Unlock()
	l.keep(ctx, head)
	return nil
}

// keepTime bounds a call of Options.Keep.
const keepTime = 2 * time.Second

func (l *Log) keep(ctx context.Context, head Head) {
	if l.opts.Keep == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, keepTime)
	defer cancel()
	if err := l.opts.Keep(ctx, head); err != nil {
		l.opts.Log.Warn("audit head is not kept elsewhere", "sequence", head.Sequence, "error", err)
	}
}

// writeHead puts down the head of the chain as Open found it.
func (l *Log) writeHead() error {
	l.mu.Lock()
	head := l.sign()
	l.mu.Unlock()
	return l.store(head)
}

// store makes the lines durable and then the head that covers them: a head must
// never say more than the disk has.
func (l *Log) store(head Head) error {
	if err := l.flush(); err != nil {
		return err
	}
	text, err := json.Marshal(head)
	if err != nil {
		return err
	}
	path := filepath.Join(l.dir, headFile)
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.head = head
	return nil
}

// Head returns the last signed head.
func (l *Log) Head() Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// Close signs a last head, flushes, and lets another process open the log.
// Appends fail afterwards.
func (l *Log) Close() error {
	l.stop()
	<-l.stopped
	err := l.advanceHead(context.Background())
	l.mu.Lock()
	defer l.mu.Unlock()
	if errors.Is(l.broken, fs.ErrClosed) {
		return nil // closed before
	}
	l.broken = fmt.Errorf("the log is closed: %w", fs.ErrClosed)
	return errors.Join(err, l.closeFiles())
}

func (l *Log) closeFiles() error {
	var errs []error
	for _, f := range append(l.retired, l.f, l.lock) {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

var _ sallyport.Auditor = (*Log)(nil)

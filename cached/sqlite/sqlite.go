// Package sqlite is the engine of cached that keeps rows in one SQLite file:
// write-ahead log, synchronous=FULL, one transaction for each group of batches.
// It is the only package that knows SQLite (through cgo), and it decides what a
// file must look like to be started from; what the rows mean and whether they
// are genuine is the business of package cached.
//
// # Files
//
//	cached.db, cached.db-wal, cached.db-shm   SQLite's
//	cached.db.lock                            ours: held locked while the store is open
//	cached.db.journal                         ours: what ended, for restoring a backup
//	cached.db.restored*                       a store on its way to take this one's place
//	cached.db.replaced-TIME*                  a store whose place was taken; nobody needs it
//
// The lock file is also the marker: it remembers that a store was made here, and
// the highest revision known to be written. A store whose database is missing or
// empty is therefore never mistaken for a new one, and one that lies behind, or
// whose marker is missing, is refused.
//
// The journal outlives the database: see ADR 0018. It is read by ReadJournal; a
// store that is moved away takes it along.
//
// # Failures
//
// A write, flush or checkpoint that the disk fails ends the store: it takes no
// write any more and does not even close the database, because that would write
// and flush again, and the second flush of lost pages succeeds. What is on the
// disk is read back by whoever opens it next. A disk that is only full ends
// nothing: see ADR 0006.
package sqlite

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/internal/marker"
	"sallyport/internal/keyring"
	"sallyport/internal/logging"
)

// Config says how to open a store. The zero value is right for a daemon.
type Config struct {
	// BusyTimeout is how long a read or write waits for a lock that another
	// process (a backup) holds before it fails with storage.busy; 0: 2 s.
	BusyTimeout time.Duration
	// JournalKey proves that the journal of revocations is ours; zero: it is only
	// protected against damage.
	JournalKey keyring.KEK
	// Restore opens a store that is not the one written last, for
	// cached.RestoreInPlace. Others refuse it until a new history has begun in it.
	Restore bool
	// Log; nil: nothing is logged.
	Log logging.Logger

	// Bytes, fewer in tests that open thousands of stores.
	reserve int64
	journal int64 // negative: there is none
	// step is told before each step of a replacement, in tests.
	step func()
}

// Store implements cached.Store over a file.
type Store struct {
	path   string
	busy   time.Duration
	log    logging.Logger
	marker *marker.Marker

	head   atomic.Pointer[cached.Head] // follows what is committed
	failed atomic.Bool                 // the disk failed a write: see above
	scans  scans
	wal    wal

	readers    *sql.DB
	get        *sql.Stmt
	changed    *sql.Stmt
	expired    *sql.Stmt
	tombstones *sql.Stmt
	owned      [3]*sql.Stmt // by login, user, device

	writeMu sync.Mutex // guards what follows: one transaction at a time
	writers *sql.DB
	writer  *sql.Conn
	put     *sql.Stmt
	forget  *sql.Stmt
	putHead *sql.Stmt

	journal     *journal // nil: there is none
	journalSize int64
	journalKeys [][]byte
	// unproven is the name of a store that the marker does not vouch for.
	unproven string
}

var _ cached.Store = (*Store)(nil)

const columns = `kind, id, version, revision, deleted, expires, of_login, of_user, of_device, payload, mac`

// Open opens the store in the file path, making it if it never existed. Errors:
// storage.in_use (another process has it), storage.corrupt (missing although it
// was there, damaged, not ours), schema.too_new (written by a newer version; the
// file is untouched).
func Open(path string, cfg Config) (*Store, error) {
	if cfg.BusyTimeout == 0 {
		cfg.BusyTimeout = 2 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = logging.Discard()
	}
	m, err := openMarker(path, cfg.Restore)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	s := &Store{path: path, busy: cfg.BusyTimeout, log: cfg.Log, marker: m}
	s.wal.reserve, s.wal.checkpointAt = cmp.Or(cfg.reserve, reserved), checkpointAt
	s.journalSize, s.journalKeys = max(0, cmp.Or(cfg.journal, journalSize)), journalKeys(cfg.JournalKey)
	s.scans.renew()
	if err := s.open(path, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, err), s.close())
	}
	return s, nil
}

func (s *Store) open(path string, cfg Config) error {
	if err := finishReplacement(path, s.marker, cfg.step); err != nil {
		return err
	}
	if err := prepareFile(path, s.marker, cfg.Restore); err != nil {
		return err
	}
	if err := s.connect(path); err != nil {
		return damaged(path, err)
	}
	if err := s.migrate(); err != nil {
		return damaged(path, err)
	}
	if err := s.inspect(path); err != nil {
		return damaged(path, err)
	}
	if err := s.prepare(); err != nil {
		return damaged(path, err)
	}
	if err := s.load(path, cfg.Restore); err != nil {
		return damaged(path, err)
	}
	if err := s.checkKey(cfg.JournalKey); err != nil {
		return err
	}
	s.reserve()
	if s.unproven == "" {
		s.openJournal()
	}
	return errors.Join(s.mark(), s.syncMarker(context.Background()))
}

// connect opens one connection for writes and a pool for reads.
func (s *Store) connect(path string) (err error) {
	if s.writers, err = sql.Open("sqlite3", dsn(path, s.busy, false)); err != nil {
		return err
	}
	if s.writer, err = s.writers.Conn(context.Background()); err != nil {
		return err
	}
	// A checkpoint inside COMMIT would keep its failure to itself: tend makes them.
	if _, err = s.writer.ExecContext(context.Background(), `PRAGMA wal_autocheckpoint = 0`); err != nil {
		return err
	}
	if s.readers, err = sql.Open("sqlite3", dsn(path, s.busy, true)); err != nil {
		return err
	}
	s.readers.SetMaxOpenConns(32)
	s.readers.SetMaxIdleConns(8)
	return nil
}

func (s *Store) prepare() error {
	ctx := context.Background()
	for _, p := range []struct {
		stmt **sql.Stmt
		on   interface {
			PrepareContext(context.Context, string) (*sql.Stmt, error)
		}
		text string
	}{
		{&s.put, s.writer, `INSERT INTO record (` + columns + `) VALUES (?,?,?,?,?,?,?,?,?,?,?)
			ON CONFLICT (kind, id) DO UPDATE SET version=excluded.version, revision=excluded.revision,
			deleted=excluded.deleted, expires=excluded.expires, of_login=excluded.of_login, of_user=excluded.of_user,
			of_device=excluded.of_device, payload=excluded.payload, mac=excluded.mac`},
		{&s.forget, s.writer, `DELETE FROM record WHERE kind = ? AND id = ?`},
		{&s.putHead, s.writer, `UPDATE head SET epoch = ?, revision = ?, compacted = ?, seal = ?`},
		{&s.tombstones, s.readers, `SELECT ` + columns + ` FROM record WHERE deleted = 1 AND revision <= ? LIMIT ?`},
		{&s.get, s.readers, `SELECT ` + columns + ` FROM record WHERE kind = ? AND id = ?`},
		{&s.changed, s.readers, `SELECT ` + columns + ` FROM record WHERE revision > ? ORDER BY revision LIMIT ?`},
		{&s.expired, s.readers, `SELECT ` + columns + ` FROM record
			WHERE expires > 0 AND expires <= ? AND deleted = 0 ORDER BY expires LIMIT ?`},
		{&s.owned[0], s.readers, ownedBy("of_login")},
		{&s.owned[1], s.readers, ownedBy("of_user")},
		{&s.owned[2], s.readers, ownedBy("of_device")},
	} {
		stmt, err := p.on.PrepareContext(ctx, p.text)
		if err != nil {
			return err
		}
		*p.stmt = stmt
	}
	return nil
}

func ownedBy(column string) string {
	return `SELECT ` + columns + ` FROM record WHERE ` + column + ` = ? AND ` + column + ` <> '' AND deleted = 0`
}

// Close writes back what the log still holds and lets another process open the
// file. No other method may be under way.
func (s *Store) Close() error {
	var err error
	if !s.failed.Load() {
		err = errors.Join(s.mark(), s.syncMarker(context.Background()))
	}
	return errors.Join(err, s.close())
}

func (s *Store) close() error {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	var errs []error
	if s.readers != nil {
		errs = append(errs, s.readers.Close())
	}
	s.closeJournal()
	if s.failed.Load() { // the writer stays open: see Failures
		return errors.Join(append(errs, s.marker.Close())...)
	}
	for _, stmt := range []*sql.Stmt{s.put, s.forget, s.putHead} {
		if stmt != nil {
			errs = append(errs, stmt.Close())
		}
	}
	if s.writer != nil {
		errs = append(errs, s.writer.Close())
	}
	if s.writers != nil {
		errs = append(errs, s.writers.Close())
	}
	return errors.Join(append(errs, s.marker.Close())...)
}

// Head implements cached.Store.
func (s *Store) Head(context.Context) (cached.Head, error) { return *s.head.Load(), nil }

func (s *Store) revision() uint64 {
	if h := s.head.Load(); h != nil {
		return uint64(h.Revision)
	}
	return 0
}

// Get implements cached.Store.
func (s *Store) Get(ctx context.Context, kind sallyport.Kind, id string) (cached.Row, error) {
	if err := ctx.Err(); err != nil {
		return cached.Row{}, err
	}
	// A context that can end costs the driver a goroutine, and one row takes less
	// time than that.
	rows, err := collect(s.get.QueryContext(context.WithoutCancel(ctx), string(kind), id))
	if err != nil {
		return cached.Row{}, err
	}
	if len(rows) == 0 {
		return cached.Row{}, sallyport.ErrNotFound
	}
	return rows[0], nil
}

// Update implements cached.Store.
func (s *Store) Update(ctx context.Context, plan func(cached.Tx) (cached.Change, error)) error {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	if s.failed.Load() {
		return errFailed
	}
	change, err := plan(tx{s})
	if err != nil || change.Empty() {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if err := s.transaction(ctx, func() error { return s.carryOut(ctx, &change) }); err != nil {
		return fmt.Errorf("write: %w", s.note(err))
	}
	before := s.head.Swap(&change.Head)
	if before.Epoch != change.Head.Epoch {
		if err := s.beginHistory(ctx); err != nil {
			return s.note(err)
		}
	}
	return s.note(s.tend(ctx))
}

// beginHistory has the journal and the marker follow a new epoch, which proves a
// store that was put in order.
func (s *Store) beginHistory(ctx context.Context) error {
	s.openJournal()
	if s.unproven == "" {
		return nil
	}
	s.marker.Adopt(s.unproven)
	s.unproven = ""
	return errors.Join(s.mark(), s.syncMarker(ctx))
}

var errFailed = fmt.Errorf("%w: the disk has failed a write", cached.ErrBroken)

// note remembers that a write has failed for good, and passes err on.
func (s *Store) note(err error) error {
	if errors.Is(err, cached.ErrBroken) {
		s.failed.Store(true)
	}
	return err
}

func (s *Store) carryOut(ctx context.Context, c *cached.Change) error {
	for i := range c.Rows {
		if err := s.putRow(ctx, &c.Rows[i]); err != nil {
			return err
		}
	}
	for _, k := range c.Forget {
		if _, err := s.forget.ExecContext(ctx, string(k.Kind), k.ID); err != nil {
			return err
		}
	}
	_, err := s.putHead.ExecContext(ctx, string(c.Head.Epoch), int64(c.Head.Revision), int64(c.Head.Compacted), c.Head.Seal)
	if err != nil {
		return err
	}
	return s.writeDown(c) // last, so that what is refused is seldom in the journal
}

// tx is the store while nobody else writes: the lock on the file keeps other
// processes out, writeMu everybody in this one.
type tx struct{ *Store }

// Head implements cached.Tx.
func (t tx) Head() cached.Head { return *t.head.Load() }

// Rows implements cached.Tx.
func (t tx) Rows(keys ...cached.Key) ([]cached.Row, error) {
	var all []cached.Row
	for _, k := range keys {
		rows, err := collect(t.get.QueryContext(context.Background(), string(k.Kind), k.ID))
		if err != nil {
			return nil, err
		}
		all = append(all, rows...)
	}
	return all, nil
}

// Tombstones implements cached.Tx.
func (t tx) Tombstones(upTo sallyport.Revision, limit int) ([]cached.Row, error) {
	return collect(t.tombstones.QueryContext(context.Background(), int64(upTo), limit))
}

func (s *Store) putRow(ctx context.Context, r *cached.Row) error {
	payload := r.Payload
	if payload == nil {
		payload = []byte{}
	}
	_, err := s.put.ExecContext(ctx, string(r.Kind), r.ID, int64(r.Version), int64(r.Revision), r.Deleted,
		cached.UnixNano(r.Expires), string(r.Owner.Login), string(r.Owner.User), string(r.Owner.Device), payload, r.MAC)
	return err
}

// transaction runs do between BEGIN and COMMIT. After an error nothing of it is
// left, unless the error wraps cached.ErrBroken. The caller holds writeMu, or is
// still opening the store.
func (s *Store) transaction(ctx context.Context, do func() error) error {
	if _, err := s.writer.ExecContext(ctx, `BEGIN IMMEDIATE`); err != nil {
		return classify(err)
	}
	err := do()
	if err == nil {
		_, err = s.writer.ExecContext(ctx, `COMMIT`)
	}
	if err != nil {
		// SQLite has rolled back by itself after most failures; then this fails too.
		_, _ = s.writer.ExecContext(context.WithoutCancel(ctx), `ROLLBACK`)
		return classify(err)
	}
	return nil
}

// Scan implements cached.Store. A scan that keeps the log from being written back
// for too long is ended: its hold on the database goes at once, even while each
// does not return.
func (s *Store) Scan(ctx context.Context, q cached.Query, begin func(cached.Head) error, each func(cached.Row) error) error {
	ctx, leave := s.scans.enter(ctx)
	defer leave()
	err := s.scan(ctx, q, begin, each)
	if err != nil && errors.Is(context.Cause(ctx), cached.ErrScanTooLong) {
		return cached.ErrScanTooLong
	}
	return err
}

func (s *Store) scan(ctx context.Context, q cached.Query, begin func(cached.Head) error, each func(cached.Row) error) error {
	return s.snapshot(ctx, func(tx *sql.Tx, head cached.Head) error {
		if err := begin(head); err != nil {
			return err
		}
		text, args := selecting(q)
		rows, err := tx.QueryContext(ctx, text, args...)
		if err != nil {
			return classify(err)
		}
		defer rows.Close()
		for rows.Next() {
			row, err := read(rows)
			if err != nil {
				return classify(err)
			}
			if err := each(row); err != nil {
				return err
			}
		}
		return classify(rows.Err())
	})
}

// selecting returns the statement of a query and its arguments.
func selecting(q cached.Query) (text string, args []any) {
	text = `SELECT ` + columns + ` FROM record`
	var terms []string
	if !q.Tombstones {
		terms = append(terms, `deleted = 0`)
	}
	if n := len(q.Kinds); n > 0 {
		column := `kind`
		if n > 1 {
			// Who asks for several kinds wants most of the file: reading all of it in
			// order is quicker than to look up each row that the index names. The plus
			// hides the column from the index.
			column = `+kind`
		}
		terms = append(terms, column+` IN (?`+strings.Repeat(`, ?`, n-1)+`)`)
	}
	for _, kind := range q.Kinds {
		args = append(args, string(kind))
	}
	if len(terms) > 0 {
		text += ` WHERE ` + strings.Join(terms, ` AND `)
	}
	return text, args
}

// Changed implements cached.Store.
func (s *Store) Changed(ctx context.Context, after sallyport.Revision, limit int) (rows []cached.Row, head cached.Head, err error) {
	err = s.snapshot(ctx, func(tx *sql.Tx, at cached.Head) error {
		head = at
		rows, err = collect(tx.StmtContext(ctx, s.changed).QueryContext(ctx, int64(after), limit))
		return err
	})
	return rows, head, err
}

// snapshot runs do on one instant of the history.
func (s *Store) snapshot(ctx context.Context, do func(*sql.Tx, cached.Head) error) error {
	tx, err := s.readers.BeginTx(ctx, nil)
	if err != nil {
		return classify(err)
	}
	defer tx.Rollback()
	head, err := readHead(tx.QueryRowContext(ctx, selectHead))
	if err != nil {
		return classify(err)
	}
	return do(tx, head)
}

// Owned implements cached.Tx.
func (t tx) Owned(owner cached.Owner) ([]cached.Row, error) {
	seen := map[cached.Key]bool{}
	all := []cached.Row{}
	for i, value := range []string{string(owner.Login), string(owner.User), string(owner.Device)} {
		if value == "" {
			continue
		}
		rows, err := collect(t.owned[i].QueryContext(context.Background(), value))
		if err != nil {
			return nil, err
		}
		for _, row := range rows {
			if k := row.Key(); !seen[k] {
				seen[k] = true
				all = append(all, row)
			}
		}
	}
	return all, nil
}

// Expired implements cached.Store.
func (s *Store) Expired(ctx context.Context, now time.Time, limit int) ([]cached.Row, error) {
	return collect(s.expired.QueryContext(ctx, cached.UnixNano(now), limit))
}

// Maintain implements cached.Store: the marker becomes durable, and a log that grew
// during a long read shrinks again.
func (s *Store) Maintain(ctx context.Context) error {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	if s.failed.Load() {
		return errFailed
	}
	ctx = context.WithoutCancel(ctx)
	for _, step := range []func(context.Context) error{s.tend, s.syncMarker, s.shrinkLog} {
		if err := step(ctx); err != nil {
			return s.note(err)
		}
	}
	return nil
}

// tend is what follows each commit. The commit stands, so the only error is one
// that ends the store. The caller holds writeMu.
func (s *Store) tend(ctx context.Context) error {
	for _, err := range []error{s.mark(), s.checkpoint(ctx)} {
		if errors.Is(err, cached.ErrBroken) {
			return err
		}
		if err != nil {
			s.log.Warn("store is not maintained", "error", err)
		}
	}
	return nil
}

func (s *Store) syncMarker(context.Context) error { return ofMarker(s.marker.Sync()) }

// mark has the marker follow the revision.
func (s *Store) mark() error {
	if s.unproven != "" {
		return nil
	}
	return ofMarker(s.marker.Write(s.revision()))
}

// ofMarker says what an error of the marker means for the store.
func ofMarker(err error) error {
	if errors.Is(err, unix.ENOSPC) {
		return full(err)
	}
	return err
}

func collect(rows *sql.Rows, err error) ([]cached.Row, error) {
	if err != nil {
		return nil, classify(err)
	}
	defer rows.Close()
	all := []cached.Row{}
	for rows.Next() {
		row, err := read(rows)
		if err != nil {
			return nil, classify(err)
		}
		all = append(all, row)
	}
	return all, classify(rows.Err())
}

func readHead(row *sql.Row) (h cached.Head, err error) {
	err = row.Scan(&h.Epoch, &h.Revision, &h.Compacted, &h.Seal)
	return h, err
}

// read scans into plain texts and its own integers: to convert to other types
// database/sql takes as long as for all the rest.
func read(rows *sql.Rows) (r cached.Row, err error) {
	var kind, login, user, device string
	var version, revision, deleted, expires integer
	err = rows.Scan(&kind, &r.ID, &version, &revision, &deleted, &expires, &login, &user, &device, &r.Payload, &r.MAC)
	r.Kind, r.Version, r.Revision = sallyport.Kind(kind), uint16(version), sallyport.Revision(revision)
	r.Deleted, r.Expires = deleted != 0, cached.FromUnixNano(int64(expires))
	r.Owner = cached.Owner{Login: sallyport.LoginID(login), User: sallyport.UserID(user), Device: sallyport.DeviceID(device)}
	if len(r.Payload) == 0 {
		r.Payload = nil
	}
	return r, err
}

// integer is a column that always holds one.
type integer int64

// Scan implements sql.Scanner.
func (i *integer) Scan(column any) error {
	n, ok := column.(int64)
	if !ok {
		return fmt.Errorf("a column holds %T", column)
	}
	*i = integer(n)
	return nil
}

// Package postgres is the engine of cached that keeps rows in PostgreSQL, where
// several servers write them at the same time. It is the only package that knows
// PostgreSQL. What the rows mean, and whether they are genuine, is the business
// of package cached.
//
// # One writer at a time
//
// Each Update begins by locking the one row of the table head. Whoever has it may
// read and write; the others wait for the end of its transaction. Statements after
// the lock see everything that was committed before it (READ COMMITTED), so the
// order of commits is the order of revisions, and no transaction ever fails
// because of another one.
//
// # What counts as written
//
// A transaction counts once PostgreSQL has said so, with synchronous_commit at
// least on: where there is a synchronous standby, that one has it, too. When the
// connection is lost between COMMIT and the answer, the next attempt finds out: each
// transaction leaves its number in the row of its server, and whoever holds the
// lock of the head reads there whether it took place. Asking PostgreSQL for the
// status of the transaction id would not do: after the promotion of a standby
// that never heard of it, another transaction may bear the same id.
//
// # Only the primary
//
// Every connection is asked at its start whether it leads to a primary, one that
// takes writes, and no primary of an earlier timeline than was seen before. That
// is no proof that nobody took over meanwhile: that proof is [Store.Confirm].
//
// The engine goes on by itself when PostgreSQL comes back: none of its errors
// wraps cached.ErrBroken.
package postgres

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/internal/marker"
	"sallyport/internal/logging"
)

// Config says how to open a store.
type Config struct {
	// URL names database and user, as in cached.Config.Store. Required.
	URL string
	// PasswordFile holds the password, which may change while the store is open.
	// Empty: none is sent, or that of the environment (PGPASSWORD, .pgpass).
	PasswordFile string
	// Marker is the file that remembers that there was a store, which one, and how
	// far it was written. Required.
	Marker string
	// Restore opens a store that is not the one written last, for
	// cached.RestoreInPlace. Others refuse it until a new history has begun in it.
	Restore bool
	// Log; nil: nothing is logged.
	Log logging.Logger

	schema string // empty: that of the URL
	sole   bool   // nobody else may have the store open
	step   func() // told before each step of a replacement, in tests
}

// Bounds of what one store takes of PostgreSQL. Each read that lasts (a snapshot
// for a policyd) has its own connection; the rest is for writes, the confirmation,
// and short reads.
const (
	maxConns = 12
	maxScans = 4
)

// Deadlines.
const (
	// openFor bounds the opening: another server may be making the tables.
	openFor = 10 * time.Second
	// updateFor bounds an Update with all its attempts.
	updateFor = 5 * time.Second
	// readFor bounds a short read with all its attempts.
	readFor = 5 * time.Second
	// scanFor bounds a long one.
	scanFor = 5 * time.Minute
	// attemptFor bounds one attempt of a short read.
	attemptFor = 2500 * time.Millisecond
	// confirmFor is what a commit takes at most where the standby works.
	confirmFor = 2 * time.Second
)

// Store implements cached.Shared.
type Store struct {
	id      string // of this store's row in the table server
	schema  string
	log     logging.Logger
	marker  *marker.Marker
	primary *primary
	pool    *pgxpool.Pool

	known   atomic.Uint64 // highest revision that the standby has, too
	restore bool          // see Config
	// unproven is the name of a store that the marker does not vouch for.
	unproven atomic.Pointer[string]

	writing chan struct{} // room for one: the Update under way
	writes  int64         // the last transaction's number; whoever is writing has it
	scans   chan struct{} // as many as may run

	wake      chan struct{} // room for one: somebody wrote
	listening sync.Once
	ended     context.Context // at Close
	stop      context.CancelFunc
	listener  sync.WaitGroup
}

var _ cached.Shared = (*Store)(nil)

const (
	columns    = `kind, id, version, revision, deleted, expires, of_login, of_user, of_device, payload, mac`
	selectHead = `SELECT epoch, revision, compacted, seal FROM head`
	selectRow  = `SELECT ` + columns + ` FROM record WHERE kind = $1 AND id = $2`
	changed    = `SELECT ` + columns + ` FROM record WHERE revision > $1 ORDER BY revision LIMIT $2`
	expired    = `SELECT ` + columns + ` FROM record WHERE expires > 0 AND expires <= $1 AND NOT deleted ORDER BY expires LIMIT $2`
)

// Open opens the store, making it in an empty database if it never existed. ctx
// bounds the opening. Errors: those of the engine, and storage.corrupt (missing
// although it was there), storage.rolled_back (not what was written last),
// storage.in_use (another process has the marker), schema.too_new.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.Log == nil {
		cfg.Log = logging.Discard()
	}
	pool, p, err := newPool(cfg)
	if err != nil {
		return nil, fmt.Errorf("open the record store: %w", err)
	}
	s := &Store{
		id: rand.Text(), schema: p.schema, log: cfg.Log, primary: p, pool: pool, restore: cfg.Restore,
		writing: make(chan struct{}, 1), scans: make(chan struct{}, maxScans), wake: make(chan struct{}, 1),
	}
	s.ended, s.stop = context.WithCancel(context.Background())
	if s.marker, err = marker.Open(cfg.Marker, nil); err == nil {
		err = s.attempt(ctx, openFor, s.prepare)
	}
	if err == nil {
		err = s.mark()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the record store: %w", err), s.close())
	}
	return s, nil
}

// Close ends all connections. No other method may be under way.
func (s *Store) Close() error {
	return errors.Join(s.mark(), s.close())
}

func (s *Store) close() error {
	s.stop()
	s.listener.Wait()
	s.pool.Close()
	if s.marker == nil {
		return nil
	}
	return s.marker.Close()
}

// knows notes a revision that is written for good. What was only read may be
// gone after a failover.
func (s *Store) knows(head cached.Head) {
	for rev := uint64(head.Revision); ; {
		known := s.known.Load()
		if rev <= known || s.known.CompareAndSwap(known, rev) {
			return
		}
	}
}

// Head implements cached.Store.
func (s *Store) Head(ctx context.Context) (head cached.Head, err error) {
	err = s.read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		head, err = readHead(conn.QueryRow(ctx, selectHead))
		return err
	})
	return head, err
}

// Get implements cached.Store.
func (s *Store) Get(ctx context.Context, kind sallyport.Kind, id string) (cached.Row, error) {
	rows, err := s.rows(ctx, selectRow, string(kind), []byte(id))
	if err != nil {
		return cached.Row{}, err
	}
	if len(rows) == 0 {
		return cached.Row{}, sallyport.ErrNotFound
	}
	return rows[0], nil
}

// Expired implements cached.Store.
func (s *Store) Expired(ctx context.Context, now time.Time, limit int) ([]cached.Row, error) {
	return s.rows(ctx, expired, cached.UnixNano(now), limit)
}

// rows returns what one statement finds.
func (s *Store) rows(ctx context.Context, text string, args ...any) (rows []cached.Row, err error) {
	err = s.read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		rows, err = collect(conn.Query(ctx, text, args...))
		return err
	})
	return rows, err
}

// Room implements cached.Store. Nobody can tell from here what is left of
// PostgreSQL's disk; that it is full shows when something is written.
func (s *Store) Room(context.Context) error { return nil }

const beginSnapshot = `BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY`

// Changed implements cached.Store, in one round trip.
func (s *Store) Changed(ctx context.Context, after sallyport.Revision, limit int) (rows []cached.Row, head cached.Head, err error) {
	err = s.read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		var b pgx.Batch
		b.Queue(beginSnapshot)
		b.Queue(selectHead).QueryRow(func(row pgx.Row) (err error) {
			head, err = readHead(row)
			return err
		})
		b.Queue(changed, int64(after), limit).Query(func(found pgx.Rows) (err error) {
			rows, err = collect(found, nil)
			return err
		})
		b.Queue(`COMMIT`)
		return conn.SendBatch(ctx, &b).Close()
	})
	return rows, head, err
}

// Scan implements cached.Store. PostgreSQL sends the rows as they are taken.
func (s *Store) Scan(ctx context.Context, q cached.Query, begin func(cached.Head) error, each func(cached.Row) error) error {
	select {
	case s.scans <- struct{}{}:
		defer func() { <-s.scans }()
	case <-ctx.Done():
		return ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, scanFor)
	defer cancel()
	return s.attempt(ctx, readFor, func(_ context.Context, conn *pgx.Conn) error {
		head, err := beginScan(ctx, conn)
		if err != nil {
			return err
		}
		if err := begin(head); err != nil {
			return passed{err}
		}
		if err := scan(ctx, conn, q, each); err != nil { // too late to begin again
			return passed{classify(ctx, err)}
		}
		return nil
	})
}

// beginScan opens a transaction in which all statements see one instant.
func beginScan(ctx context.Context, conn *pgx.Conn) (cached.Head, error) {
	text := fmt.Sprintf(beginSnapshot+`; SET LOCAL statement_timeout = %d; SET LOCAL enable_seqscan = on`, scanFor.Milliseconds())
	if _, err := conn.PgConn().Exec(ctx, text).ReadAll(); err != nil {
		return cached.Head{}, err
	}
	return readHead(conn.QueryRow(ctx, selectHead))
}

func scan(ctx context.Context, conn *pgx.Conn, q cached.Query, each func(cached.Row) error) error {
	text, args := selecting(q)
	rows, err := conn.Query(ctx, text, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		row, err := read(rows)
		if err != nil {
			return err
		}
		if err := each(row); err != nil {
			// What is still to come would be read to its end otherwise.
			conn.PgConn().Conn().Close()
			return passed{err}
		}
	}
	if err := rows.Err(); err != nil {
		return err
	}
	_, err = conn.Exec(ctx, `COMMIT`)
	return err
}

// selecting returns the statement of a query and its arguments.
func selecting(q cached.Query) (text string, args []any) {
	var terms []string
	if !q.Tombstones {
		terms = append(terms, `NOT deleted`)
	}
	if len(q.Kinds) > 0 {
		kinds := make([]string, len(q.Kinds))
		for i, kind := range q.Kinds {
			kinds[i] = string(kind)
		}
		terms, args = append(terms, `kind = ANY ($1)`), append(args, kinds)
	}
	text = `SELECT ` + columns + ` FROM record`
	if len(terms) > 0 {
		text += ` WHERE ` + strings.Join(terms, ` AND `)
	}
	return text, args
}

// Maintain implements cached.Store: the marker follows the revision.
func (s *Store) Maintain(context.Context) error { return s.mark() }

// mark has the marker follow the revision, for good.
func (s *Store) mark() error {
	if s.unproven.Load() != nil {
		return nil
	}
	return errors.Join(s.marker.Write(s.known.Load()), s.marker.Sync())
}

func collect(rows pgx.Rows, err error) ([]cached.Row, error) {
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	all := []cached.Row{}
	for rows.Next() {
		row, err := read(rows)
		if err != nil {
			return nil, err
		}
		all = append(all, row)
	}
	return all, rows.Err()
}

func readHead(row pgx.Row) (h cached.Head, err error) {
	var epoch string
	var revision, compacted int64
	err = row.Scan(&epoch, &revision, &compacted, &h.Seal)
	h.Epoch, h.Revision, h.Compacted = sallyport.Epoch(epoch), sallyport.Revision(revision), sallyport.Revision(compacted)
	return h, err
}

func read(rows pgx.Rows) (r cached.Row, err error) {
	var (
		kind                    string
		id, login, user, device pgtype.DriverBytes // not ours: the next row overwrites them
		version                 int32
		revision, expires       int64
	)
	err = rows.Scan(&kind, &id, &version, &revision, &r.Deleted, &expires, &login, &user, &device, &r.Payload, &r.MAC)
	r.Kind, r.ID, r.Version = sallyport.Kind(kind), string(id), uint16(version)
	r.Revision, r.Expires = sallyport.Revision(revision), cached.FromUnixNano(expires)
	r.Owner = cached.Owner{Login: sallyport.LoginID(login), User: sallyport.UserID(user), Device: sallyport.DeviceID(device)}
	if len(r.Payload) == 0 {
		r.Payload = nil
	}
	return r, err
}

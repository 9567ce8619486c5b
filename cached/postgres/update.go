package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sallyport"
	"sallyport/cached"
)

// Update implements cached.Store. A transaction that did not take place because
// of PostgreSQL (a lost connection, a failover) begins anew, the plan included.
func (s *Store) Update(ctx context.Context, plan func(cached.Tx) (cached.Change, error)) error {
	select {
	case s.writing <- struct{}{}:
		defer func() { <-s.writing }()
	case <-ctx.Done():
		return ctx.Err()
	}
	u := &update{store: s, plan: plan, ends: time.Now().Add(updateFor)}
	err := s.attempt(ctx, updateFor, u.run)
	if err != nil && u.unknown != 0 {
		return unknown(err)
	}
	return err
}

// update is an Update on its way, through all of its attempts.
type update struct {
	store *Store
	plan  func(cached.Tx) (cached.Change, error)
	ends  time.Time
	// unknown is the number of a transaction whose COMMIT was sent and never
	// answered; 0: there is none.
	unknown int64
}

// run is one attempt.
func (u *update) run(ctx context.Context, conn *pgx.Conn) error {
	head, last, err := u.lock(ctx, conn)
	if code, _ := stateOf(err); code == lockNotAvailable && u.unknown != 0 {
		return errLocked
	}
	if err != nil {
		return err
	}
	// Nobody may leave in the middle of what follows: how it ended would be unknown.
	ctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), u.ends)
	defer cancel()
	if u.unknown != 0 && u.unknown == last {
		return u.confirm(ctx, conn, head)
	}
	u.unknown = 0
	tx := &tx{ctx: ctx, conn: conn, head: head}
	change, err := u.plan(tx)
	if tx.err != nil {
		return tx.err
	}
	if err != nil || change.Empty() {
		_, _ = conn.Exec(ctx, `ROLLBACK`) // a connection where this fails is closed, which does the same
		return pass(err)
	}
	if err := u.commit(ctx, conn, &change); err != nil {
		return err
	}
	if change.Head.Epoch != head.Epoch {
		return pass(u.store.beginHistory())
	}
	return nil
}

// lock begins a transaction and has everybody else wait. It returns the number
// of the last transaction of this store that took place.
func (u *update) lock(ctx context.Context, conn *pgx.Conn) (head cached.Head, last int64, err error) {
	var b pgx.Batch
	b.Queue(`BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE`)
	b.Queue(selectHead + ` FOR UPDATE`).QueryRow(func(row pgx.Row) (err error) {
		head, err = readHead(row)
		return err
	})
	// A statement of its own: it must see what was committed before the lock.
	b.Queue(`SELECT coalesce((SELECT write FROM server WHERE id = $1), 0)`, u.store.id).QueryRow(func(row pgx.Row) error {
		return row.Scan(&last)
	})
	err = conn.SendBatch(ctx, &b).Close()
	return head, last, err
}

const putRows = `INSERT INTO record (` + columns + `)
	SELECT * FROM unnest($1::text[], $2::bytea[], $3::int[], $4::bigint[], $5::bool[], $6::bigint[],
		$7::bytea[], $8::bytea[], $9::bytea[], $10::bytea[], $11::bytea[])
	ON CONFLICT (kind, id) DO UPDATE SET version = excluded.version, revision = excluded.revision,
		deleted = excluded.deleted, expires = excluded.expires, of_login = excluded.of_login, of_user = excluded.of_user,
		of_device = excluded.of_device, payload = excluded.payload, mac = excluded.mac`

const forget = `DELETE FROM record USING unnest($1::text[], $2::bytea[]) AS gone (kind, id)
	WHERE record.kind = gone.kind AND record.id = gone.id`

const putServer = `INSERT INTO server (id, write, beat) VALUES ($1, $2, now())
	ON CONFLICT (id) DO UPDATE SET write = excluded.write, beat = excluded.beat`

// commit sends the change with its COMMIT in one round trip. An error of any
// statement has PostgreSQL skip the rest.
func (u *update) commit(ctx context.Context, conn *pgx.Conn, c *cached.Change) error {
	s := u.store
	s.writes++
	var b pgx.Batch
	for _, part := range parts(c.Rows) {
		b.Queue(putRows, part.arguments()...)
	}
	if len(c.Forget) > 0 {
		kinds, ids := arrays(c.Forget)
		b.Queue(forget, kinds, ids)
	}
	b.Queue(`UPDATE head SET epoch = $1, revision = $2, compacted = $3, seal = $4`,
		string(c.Head.Epoch), int64(c.Head.Revision), int64(c.Head.Compacted), bytesOf(c.Head.Seal))
	b.Queue(putServer, s.id, s.writes)
	b.Queue(`SELECT pg_notify($1, $2)`, s.schema, s.id)
	if err := s.commit(ctx, conn, &b); err != nil {
		if !aborted(err) {
			u.unknown = s.writes
		}
		return err
	}
	s.knows(c.Head)
	return nil
}

// beginHistory has the marker follow a new epoch, which proves a store that was put
// in order.
func (s *Store) beginHistory() error {
	name := s.unproven.Swap(nil)
	if name == nil {
		return nil
	}
	s.marker.Adopt(*name)
	return s.mark()
}

// confirm says yes to the transaction before, which took place although its
// answer was lost. It may not have reached the standby yet, but a later one does
// not get there before it.
func (u *update) confirm(ctx context.Context, conn *pgx.Conn, head cached.Head) error {
	var b pgx.Batch
	b.Queue(putServer, u.store.id, u.unknown)
	if err := u.store.commit(ctx, conn, &b); err != nil {
		return err
	}
	u.unknown = 0
	u.store.knows(head)
	return nil
}

// commit carries out the batch and commits. Success is the word of PostgreSQL and
// of its synchronous standby. A primary that does not give it is left for another
// one, if there is any.
func (s *Store) commit(ctx context.Context, conn *pgx.Conn, b *pgx.Batch) error {
	ctx, cancel := context.WithTimeout(ctx, confirmFor)
	defer cancel()
	err := end(ctx, conn, b)
	if code, _ := stateOf(err); err != nil && !aborted(err) || code == lockNotAvailable {
		s.leave(conn)
	}
	return err
}

// leave has another primary looked for.
func (s *Store) leave(conn *pgx.Conn) {
	if s.primary.shun(conn.PgConn()) {
		s.pool.Reset()
	}
	conn.PgConn().Conn().Close() // the driver would wait for an end that may never come
}

func end(ctx context.Context, conn *pgx.Conn, b *pgx.Batch) error {
	b.Queue(`SET LOCAL statement_timeout = 0`) // it would end the wait for the standby
	tag := ""
	b.Queue(`COMMIT`).Exec(func(ct pgconn.CommandTag) error {
		tag = ct.String()
		return nil
	})
	warned := warnings(conn)
	if err := conn.SendBatch(ctx, b).Close(); err != nil {
		return err
	}
	if warnings(conn) != warned {
		return errNotReplicated
	}
	if tag != "COMMIT" {
		return errRolledBack
	}
	return nil
}

var (
	// errNotReplicated: PostgreSQL was told to wait no longer, and has committed
	// where only this primary has it.
	errNotReplicated = errors.New("the synchronous standby has not confirmed the commit")
	errRolledBack    = errors.New("the transaction was rolled back")
	// errLocked: a lock is held by a transaction that may wait for the standby.
	errLocked = errors.New("another transaction does not end; it may wait for the synchronous standby")
)

// aborted reports whether an error at the end of a transaction proves that it did
// not take place: PostgreSQL refused a statement and lives on.
func aborted(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && e.SeverityUnlocalized == "ERROR" || errors.Is(err, errRolledBack) || pgconn.SafeToRetry(err)
}

// A part is as many rows as one statement takes.
const (
	partRows  = 4_096
	partBytes = 16 << 20
)

type part []*cached.Row

// parts returns the last row of each record, in parts: a statement cannot write
// a row twice.
func parts(rows []cached.Row) (all []part) {
	last := make(map[cached.Key]int, len(rows))
	for i := range rows {
		last[rows[i].Key()] = i
	}
	var p part
	size := 0
	for i := range rows {
		if last[rows[i].Key()] != i {
			continue
		}
		if size += len(rows[i].Payload); len(p) == partRows || len(p) > 0 && size > partBytes {
			all, p, size = append(all, p), nil, len(rows[i].Payload)
		}
		p = append(p, &rows[i])
	}
	if len(p) > 0 {
		all = append(all, p)
	}
	return all
}

// arguments are those of putRows: an array for each column.
func (p part) arguments() []any {
	n := len(p)
	kinds, versions, revisions := make([]string, n), make([]int32, n), make([]int64, n)
	deleted, expires := make([]bool, n), make([]int64, n)
	var blobs [6][][]byte // id, of_login, of_user, of_device, payload, mac
	for i := range blobs {
		blobs[i] = make([][]byte, n)
	}
	for i, r := range p {
		kinds[i], versions[i], revisions[i] = string(r.Kind), int32(r.Version), int64(r.Revision)
		deleted[i], expires[i] = r.Deleted, cached.UnixNano(r.Expires)
		for j, b := range [6][]byte{
			[]byte(r.ID), []byte(r.Owner.Login), []byte(r.Owner.User), []byte(r.Owner.Device), r.Payload, r.MAC,
		} {
			blobs[j][i] = bytesOf(b)
		}
	}
	return []any{kinds, blobs[0], versions, revisions, deleted, expires, blobs[1], blobs[2], blobs[3], blobs[4], blobs[5]}
}

// bytesOf keeps nil from becoming NULL.
func bytesOf(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// arrays are the keys as two arrays.
func arrays(keys []cached.Key) (kinds []string, ids [][]byte) {
	for _, k := range keys {
		kinds, ids = append(kinds, string(k.Kind)), append(ids, []byte(k.ID))
	}
	return kinds, ids
}

// tx implements cached.Tx on a transaction that holds the lock.
type tx struct {
	ctx  context.Context
	conn *pgx.Conn
	head cached.Head
	err  error // the first failed read, after which the transaction is over
}

// Head implements cached.Tx.
func (t *tx) Head() cached.Head { return t.head }

// Rows implements cached.Tx, in one round trip.
func (t *tx) Rows(keys ...cached.Key) ([]cached.Row, error) {
	if len(keys) == 1 {
		return t.query(selectRow, string(keys[0].Kind), []byte(keys[0].ID))
	}
	kinds, ids := arrays(keys)
	return t.query(`SELECT `+columns+` FROM record JOIN unnest($1::text[], $2::bytea[]) AS wanted (kind, id) USING (kind, id)`, kinds, ids)
}

// Owned implements cached.Tx.
func (t *tx) Owned(owner cached.Owner) ([]cached.Row, error) {
	return t.query(ownedBy("of_login", 1)+` UNION `+ownedBy("of_user", 2)+` UNION `+ownedBy("of_device", 3),
		[]byte(owner.Login), []byte(owner.User), []byte(owner.Device))
}

func ownedBy(column string, argument int) string {
	return fmt.Sprintf(`SELECT %s FROM record WHERE %s = $%d AND %[2]s <> '' AND NOT deleted`, columns, column, argument)
}

// Tombstones implements cached.Tx.
func (t *tx) Tombstones(upTo sallyport.Revision, limit int) ([]cached.Row, error) {
	return t.query(`SELECT `+columns+` FROM record WHERE deleted AND revision <= $1 LIMIT $2`, int64(upTo), limit)
}

func (t *tx) query(text string, args ...any) ([]cached.Row, error) {
	if t.err != nil {
		return nil, classify(t.ctx, t.err)
	}
	rows, err := collect(t.conn.Query(t.ctx, text, args...))
	if err != nil {
		t.err = err
		return nil, classify(t.ctx, err)
	}
	return rows, nil
}

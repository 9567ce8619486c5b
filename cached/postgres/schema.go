package postgres

import (
	"context"
	"crypto/rand"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5"

	"sallyport"
	"sallyport/cached"
)

// schema is what each version adds to the one before it; meta has the version.
// Ids are bytes, not text: they need no encoding, and compare byte by byte
// whatever the collation of the database.
var schema = []string{`
	CREATE TABLE record (
		kind      text COLLATE "C" NOT NULL,
		id        bytea   NOT NULL,
		version   integer NOT NULL,
		revision  bigint  NOT NULL,
		deleted   boolean NOT NULL,
		expires   bigint  NOT NULL, -- nanoseconds since 1970; 0: never
		of_login  bytea   NOT NULL,
		of_user   bytea   NOT NULL,
		of_device bytea   NOT NULL,
		payload   bytea   NOT NULL,
		mac       bytea   NOT NULL,
		PRIMARY KEY (kind, id)
	) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
	CREATE INDEX record_revision  ON record (revision);
	CREATE INDEX record_tombstone ON record (revision)  WHERE deleted;
	CREATE INDEX record_expires   ON record (expires)   WHERE NOT deleted AND expires > 0;
	CREATE INDEX record_of_login  ON record (of_login)  WHERE NOT deleted AND of_login <> '';
	CREATE INDEX record_of_user   ON record (of_user)   WHERE NOT deleted AND of_user <> '';
	CREATE INDEX record_of_device ON record (of_device) WHERE NOT deleted AND of_device <> '';
	CREATE TABLE head (
		one       boolean PRIMARY KEY DEFAULT true CHECK (one),
		epoch     text    NOT NULL,
		revision  bigint  NOT NULL,
		compacted bigint  NOT NULL,
		seal      bytea   NOT NULL
	) WITH (fillfactor = 10);
	CREATE TABLE server ( -- a row for each store that is open
		id    text   COLLATE "C" PRIMARY KEY,
		write bigint NOT NULL, -- its last transaction
		beat  timestamptz NOT NULL
	) WITH (fillfactor = 10);
`}

// advisory is the first half of the lock under which a schema is made or changed.
const advisory = 0x534c5054 // "SLPT"

// advisoryUse is the first half of the lock that every connection holds, shared,
// and who replaces the store alone.
const advisoryUse = advisory + 1

// prepare leaves the database as this version wants it, in one transaction, or
// refuses it. Of several servers that begin at once, one makes the store and the
// others find it.
func (s *Store) prepare(ctx context.Context, conn *pgx.Conn) error {
	tx, err := conn.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted})
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx))
	if err := s.lockSchema(ctx, tx); err != nil {
		return err
	}
	version, err := s.version(ctx, tx)
	if err != nil {
		return err
	}
	if version == 0 && (s.restore || !s.marker.Making) {
		return s.corrupt("the record store is missing, although there was one", nil)
	}
	if err := s.migrate(ctx, tx, version); err != nil {
		return err
	}
	head, err := s.load(ctx, tx)
	if err != nil {
		return err
	}
	var b pgx.Batch
	b.Queue(putBeat, s.id) // so that there is something to confirm
	if err := s.commit(ctx, conn, &b); err != nil {
		return err
	}
	s.knows(head)
	return nil
}

// lockSchema has others that open the store wait. One that stays locked may be on a
// primary that was cut off, where nothing ends.
func (s *Store) lockSchema(ctx context.Context, tx pgx.Tx) error {
	_, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1, hashtext($2))`, advisory, s.schema)
	if code, _ := stateOf(err); code == lockNotAvailable {
		s.leave(tx.Conn())
		return errLocked
	}
	return err
}

// version returns the version of the schema; 0: there is none.
func (s *Store) version(ctx context.Context, tx pgx.Tx) (version int, err error) {
	var there bool
	name := pgx.Identifier{s.schema, "meta"}.Sanitize()
	if err := tx.QueryRow(ctx, `SELECT to_regclass($1) IS NOT NULL`, name).Scan(&there); err != nil || !there {
		return 0, err
	}
	value, err := meta(ctx, tx, "schema")
	if err != nil {
		return 0, err
	}
	if version, err = strconv.Atoi(value); err != nil || version < 1 {
		return 0, s.corrupt("the database is not a record store of Sallyport", err)
	}
	if version > len(schema) {
		return 0, &sallyport.Error{
			Outcome: sallyport.OutcomeUsage,
			Code:    "schema.too_new",
			Message: fmt.Sprintf("the record store has schema %d, this version knows %d", version, len(schema)),
			Hint:    "start the version that wrote it, or a newer one",
		}
	}
	return version, nil
}

func meta(ctx context.Context, tx pgx.Tx, name string) (value string, err error) {
	err = tx.QueryRow(ctx, `SELECT coalesce((SELECT value FROM meta WHERE name = $1), '')`, name).Scan(&value)
	return value, err
}

// migrate brings the tables to today's schema.
func (s *Store) migrate(ctx context.Context, tx pgx.Tx, version int) error {
	var todo []string
	if version == 0 {
		todo = append(todo,
			`CREATE TABLE meta (name text PRIMARY KEY, value text NOT NULL)`,
			fmt.Sprintf(`INSERT INTO meta VALUES ('schema', '0'), ('store', '%s')`, rand.Text()))
		if err := s.makeSchema(ctx, tx); err != nil {
			return err
		}
	}
	todo = append(todo, schema[version:]...)
	if version == 0 {
		todo = append(todo, fmt.Sprintf(`INSERT INTO head (epoch, revision, compacted, seal) VALUES ('%s', 0, 0, '')`, sallyport.NewID("e")))
	}
	if version < len(schema) {
		todo = append(todo, fmt.Sprintf(`UPDATE meta SET value = '%d' WHERE name = 'schema'`, len(schema)))
	}
	todo = append(todo, `DELETE FROM server WHERE beat < now() - interval '1 day'`)
	for _, text := range todo {
		if _, err := tx.Conn().PgConn().Exec(ctx, text).ReadAll(); err != nil {
			return fmt.Errorf("migrate from schema %d: %w", version, err)
		}
	}
	return nil
}

// makeSchema makes the namespace, unless an administrator has done so.
func (s *Store) makeSchema(ctx context.Context, tx pgx.Tx) error {
	var there bool
	if err := tx.QueryRow(ctx, `SELECT to_regnamespace($1) IS NOT NULL`, pgx.Identifier{s.schema}.Sanitize()).Scan(&there); err != nil || there {
		return err
	}
	_, err := tx.Exec(ctx, `CREATE SCHEMA `+pgx.Identifier{s.schema}.Sanitize())
	return err
}

// load reads the head, and refuses a store that lies behind what the marker knows
// to have been written: somebody put an older one in its place.
func (s *Store) load(ctx context.Context, tx pgx.Tx) (cached.Head, error) {
	store, err := meta(ctx, tx, "store")
	if err != nil {
		return cached.Head{}, err
	}
	head, err := readHead(tx.QueryRow(ctx, selectHead))
	if err != nil {
		return cached.Head{}, err
	}
	if s.restore {
		s.unproven.Store(&store)
		return head, nil
	}
	if !s.marker.Fits(store, uint64(head.Revision)) {
		return cached.Head{}, s.rolledBack(uint64(head.Revision), s.marker)
	}
	s.marker.Adopt(store)
	return head, nil
}

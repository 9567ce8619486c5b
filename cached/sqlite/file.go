package sqlite

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"sallyport"
	"sallyport/cached/internal/marker"
)

const (
	magic         = "SQLite format 3\x00"
	applicationID = 0x534c5054 // "SLPT"

	// Larger files are not read through at the start; damage in them shows when
	// it is met, and a damaged row never verifies.
	inspectMax = 256 << 20
)

// schema is what each version adds to the one before it; user_version counts
// them.
var schema = []string{`
	CREATE TABLE meta (
		name  TEXT PRIMARY KEY,
		value ANY NOT NULL
	) STRICT;
	CREATE TABLE record (
		rowid     INTEGER PRIMARY KEY,
		kind      TEXT    NOT NULL,
		id        TEXT    NOT NULL,
		version   INTEGER NOT NULL,
		revision  INTEGER NOT NULL,
		deleted   INTEGER NOT NULL,
		expires   INTEGER NOT NULL, -- nanoseconds since 1970; 0: never
		of_login  TEXT    NOT NULL,
		of_user   TEXT    NOT NULL,
		of_device TEXT    NOT NULL,
		payload   BLOB    NOT NULL,
		mac       BLOB    NOT NULL,
		UNIQUE (kind, id)
	) STRICT;
	CREATE INDEX record_revision  ON record (revision);
	CREATE INDEX record_tombstone ON record (revision)  WHERE deleted = 1;
	CREATE INDEX record_expires   ON record (expires)   WHERE deleted = 0 AND expires > 0;
	CREATE INDEX record_of_login  ON record (of_login)  WHERE deleted = 0 AND of_login <> '';
	CREATE INDEX record_of_user   ON record (of_user)   WHERE deleted = 0 AND of_user <> '';
	CREATE INDEX record_of_device ON record (of_device) WHERE deleted = 0 AND of_device <> '';
`, `
	CREATE TABLE head (
		one       INTEGER PRIMARY KEY CHECK (one = 1),
		epoch     TEXT    NOT NULL,
		revision  INTEGER NOT NULL,
		compacted INTEGER NOT NULL,
		seal      BLOB    NOT NULL
	) STRICT;
	INSERT INTO head SELECT 1, e, max(coalesce((SELECT max(revision) FROM record), 0), c), c, x''
		FROM (SELECT (SELECT value FROM meta WHERE name = 'epoch') AS e, (SELECT value FROM meta WHERE name = 'compacted') AS c);
	DELETE FROM meta WHERE name IN ('epoch', 'compacted');
`}

const selectHead = `SELECT epoch, revision, compacted, seal FROM head`

func dsn(path string, busy time.Duration, readOnly bool) string {
	v := url.Values{}
	v.Set("mode", "rw") // never create: prepareFile does that
	v.Set("_busy_timeout", strconv.FormatInt(busy.Milliseconds(), 10))
	v.Set("_journal_mode", "WAL")
	v.Set("_synchronous", "FULL")
	v.Set("_cache_size", "-16384") // KiB
	if readOnly {
		v.Set("_query_only", "true")
	}
	return "file:" + (&url.URL{Path: path}).EscapedPath() + "?" + v.Encode()
}

// prepareFile leaves a database at path that this version may open, or says why
// there is none. It makes one only where there never was one.
func prepareFile(path string, m *marker.Marker, restore bool) error {
	there, err := hasText(path)
	if err != nil {
		return err
	}
	if there {
		return checkHeader(path)
	}
	if !m.Making {
		return corrupt(path, "the record store is missing or empty, although there was one", nil)
	}
	if restore {
		return corrupt(path, "there is no record store", nil)
	}
	if err := neverWritten(path); err != nil {
		return err
	}
	return create(path)
}

// openMarker opens the marker of the store at path. Who puts the store in order gets
// one even if it is missing.
func openMarker(path string, restore bool) (*marker.Marker, error) {
	fresh := neverWritten(path)
	if restore && fresh != nil {
		return marker.Take(path + ".lock")
	}
	return marker.Open(path+".lock", func() error { return fresh })
}

// Reached returns the highest revision that the marker of the store at path knows to
// be written, whether or not the store is there. The error wraps fs.ErrNotExist if
// there is no marker.
func Reached(path string) (sallyport.Revision, error) {
	revision, err := marker.Revision(path + ".lock")
	return sallyport.Revision(revision), err
}

// neverWritten returns nil if nothing of a store lies at path: only there may one be
// made, as the marker itself may be what is missing.
func neverWritten(path string) error {
	for _, part := range []string{path, path + "-wal", path + journalSuffix} {
		_, err := os.Lstat(part)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		return unmarked(path)
	}
	return nil
}

// hasText reports whether path is a file with something in it.
func hasText(path string) (bool, error) {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return info.Size() > 0, nil
}

// checkHeader reads the file's header (SQLite file format, section 1.3) without
// SQLite, which could already change the file.
func checkHeader(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	var h [100]byte
	if _, err := f.ReadAt(h[:], 0); err != nil {
		return corrupt(path, "the record store is cut off", err)
	}
	if string(h[:len(magic)]) != magic || binary.BigEndian.Uint32(h[68:]) != applicationID {
		return corrupt(path, "the file is not a record store of Sallyport", nil)
	}
	return checkVersion(int(binary.BigEndian.Uint32(h[60:])))
}

func checkVersion(v int) error {
	if v <= len(schema) {
		return nil
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUsage,
		Code:    "schema.too_new",
		Message: fmt.Sprintf("the record store has schema %d, this version knows %d", v, len(schema)),
		Hint:    "start the version that wrote it, or a newer one",
	}
}

// create makes an empty database beside path and moves it there whole.
func create(path string) (err error) {
	tmp := path + ".new"
	for _, old := range []string{tmp, tmp + "-journal"} {
		if err := os.Remove(old); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := initialise(tmp); err != nil {
		return fmt.Errorf("make the database: %w", err)
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return marker.SyncDir(filepath.Dir(path))
}

// initialise fills the new file with the first schema, an identity and an
// epoch; migrate does the rest, as for every older file.
func initialise(path string) (err error) {
	db, err := sql.Open("sqlite3", "file:"+(&url.URL{Path: path}).EscapedPath()+"?mode=rw&_synchronous=FULL")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	for _, text := range append(migration(0), fmt.Sprintf(`PRAGMA application_id = %d`, applicationID)) {
		if _, err := db.Exec(text); err != nil {
			return err
		}
	}
	for _, kv := range [][2]any{{"store", rand.Text()}, {"epoch", sallyport.NewID("e")}, {"compacted", 0}} {
		if _, err := db.Exec(`INSERT INTO meta (name, value) VALUES (?, ?)`, kv[0], kv[1]); err != nil {
			return err
		}
	}
	return nil
}

// migration returns the statements that lead from schema v to v+1.
func migration(v int) []string {
	return []string{schema[v], fmt.Sprintf(`PRAGMA user_version = %d`, v+1)}
}

// migrate brings the file to today's schema, each version in a transaction.
func (s *Store) migrate() error {
	ctx := context.Background()
	var v int
	if err := s.writer.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&v); err != nil {
		return err
	}
	if err := checkVersion(v); err != nil {
		return err
	}
	for ; v < len(schema); v++ {
		err := s.transaction(ctx, func() error {
			for _, text := range migration(v) {
				if _, err := s.writer.ExecContext(ctx, text); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("migrate to schema %d: %w", v+1, err)
		}
	}
	// The header in the file itself must tell the version, not the log.
	_, err := s.writer.ExecContext(ctx, `PRAGMA wal_checkpoint(PASSIVE)`)
	return err
}

// inspect reads a file of ordinary size through.
func (s *Store) inspect(path string) error {
	info, err := os.Stat(path)
	if err != nil || info.Size() > inspectMax {
		return err
	}
	var verdict string
	if err := s.writer.QueryRowContext(context.Background(), `PRAGMA quick_check(1)`).Scan(&verdict); err != nil {
		return err
	}
	if verdict != "ok" {
		return corrupt(path, "the record store is damaged", errors.New(verdict))
	}
	return nil
}

// load reads the head, and refuses a store that lies behind what the marker knows
// to have been written: somebody put an older file in its place.
func (s *Store) load(path string, restore bool) error {
	ctx := context.Background()
	var store string
	if err := s.writer.QueryRowContext(ctx, `SELECT value FROM meta WHERE name = 'store'`).Scan(&store); err != nil {
		return err
	}
	head, err := readHead(s.writer.QueryRowContext(ctx, selectHead))
	if err != nil {
		return err
	}
	s.head.Store(&head)
	if restore {
		s.unproven = store
		return nil
	}
	if !s.marker.Fits(store, uint64(head.Revision)) {
		return rolledBack(path, uint64(head.Revision), s.marker)
	}
	s.marker.Adopt(store)
	return nil
}

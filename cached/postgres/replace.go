package postgres

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"sallyport"
	"sallyport/cached/internal/marker"
	"sallyport/internal/logging"
)

const (
	restoredSuffix = "_restored"
	asideForm      = "_replaced_20060102t150405.000z"
	maxIdentifier  = 63 // bytes: PostgreSQL cuts longer names
)

// Replace puts another store in the place of the one that cfg names, of which
// nothing need be there or be sound: an empty one that fill has filled. Until it is
// complete, and if fill fails, nothing has changed; then one transaction exchanges
// the schemas. The old one is called aside, which is empty if there was none. No
// cached may be connected (storage.in_use), and none can connect meanwhile. Other
// errors: those of Open and fill.
func Replace(ctx context.Context, cfg Config, fill func(*Store) error) (aside string, err error) {
	if cfg.Log == nil {
		cfg.Log = logging.Discard()
	}
	aside, err = replace(ctx, cfg, fill)
	if err != nil {
		return aside, fmt.Errorf("replace the record store: %w", err)
	}
	return aside, nil
}

// Reached returns the highest revision that the marker knows to be written. The
// error wraps fs.ErrNotExist if there is no marker.
func Reached(path string) (sallyport.Revision, error) {
	revision, err := marker.Revision(path)
	return sallyport.Revision(revision), err
}

func replace(ctx context.Context, cfg Config, fill func(*Store) error) (aside string, err error) {
	m, err := marker.Open(cfg.Marker, nil)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	cfg.sole = true
	pool, p, err := newPool(cfg)
	if err != nil {
		return "", err
	}
	defer pool.Close()
	if len(p.schema)+len(asideForm) > maxIdentifier {
		return "", fmt.Errorf("the name of schema %s is too long for another one beside it", p.schema)
	}
	conn, err := pool.Acquire(ctx) // and with it the store
	if err != nil {
		return "", classify(ctx, err)
	}
	defer conn.Release()
	r := &replacement{cfg: cfg, schema: p.schema, conn: conn.Conn(), marker: m}
	next, err := r.build(ctx, fill)
	if err != nil {
		return "", errors.Join(err, r.discard(ctx))
	}
	return r.exchange(ctx, next)
}

// replacement is a store on its way into another one's place.
type replacement struct {
	cfg    Config
	schema string
	conn   *pgx.Conn // holds the lock of use
	marker *marker.Marker
}

// build makes the new store in a schema beside the old one.
func (r *replacement) build(ctx context.Context, fill func(*Store) error) (next marker.Next, err error) {
	if err := r.discard(ctx); err != nil {
		return next, err
	}
	cfg := r.cfg
	cfg.schema, cfg.Marker, cfg.sole, cfg.Restore = r.schema+restoredSuffix, r.cfg.Marker+".restored", false, false
	s, err := Open(ctx, cfg)
	if err != nil {
		return next, err
	}
	r.step()
	if err := fill(s); err != nil {
		return next, errors.Join(err, s.Close())
	}
	head, err := s.Head(ctx)
	next = marker.Next{Store: s.marker.Store, Revision: uint64(head.Revision)}
	return next, errors.Join(err, s.Close(), removeMarker(cfg.Marker))
}

// discard takes away what a replacement that came to nothing has left.
func (r *replacement) discard(ctx context.Context) error {
	_, err := r.conn.Exec(ctx, `DROP SCHEMA IF EXISTS `+name(r.schema+restoredSuffix)+` CASCADE`)
	return errors.Join(classify(ctx, err), removeMarker(r.cfg.Marker+".restored"))
}

// exchange lets the schemas change places. The marker takes either of them until it
// is known which one it is.
func (r *replacement) exchange(ctx context.Context, next marker.Next) (aside string, err error) {
	var there bool
	if err := r.conn.QueryRow(ctx, `SELECT to_regnamespace($1) IS NOT NULL`, name(r.schema)).Scan(&there); err != nil {
		return "", classify(ctx, err)
	}
	var b pgx.Batch
	b.Queue(`BEGIN`)
	if there {
		aside = r.schema + strings.Replace(time.Now().UTC().Format(asideForm), ".", "", 1)
		next.Aside = aside
		b.Queue(`ALTER SCHEMA ` + name(r.schema) + ` RENAME TO ` + name(aside))
	}
	b.Queue(`ALTER SCHEMA ` + name(r.schema+restoredSuffix) + ` RENAME TO ` + name(r.schema))
	r.step()
	if err := r.marker.Expect(next); err != nil {
		return "", err
	}
	r.step()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), updateFor)
	defer cancel()
	if err := end(ctx, r.conn, &b); err != nil {
		return "", classify(ctx, err)
	}
	r.step()
	r.marker.Adopt(next.Store)
	return aside, errors.Join(r.marker.Write(next.Revision), r.marker.Sync())
}

func (r *replacement) step() {
	if r.cfg.step != nil {
		r.cfg.step()
	}
}

func name(schema string) string { return pgx.Identifier{schema}.Sanitize() }

func removeMarker(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

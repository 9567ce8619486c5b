package cached

import (
	"context"
	"errors"
	"time"

	"sallyport"
)

// ErrBroken marks an engine's error after which the state of the store is not
// known (a failed write or flush, a damaged file). The server then takes no
// writes any more and its Run ends: only a restart, which reads back what is
// really there, may go on. A write is never tried again after a failed flush,
// because the second flush of lost pages succeeds.
var ErrBroken = errors.New("store failed and must be opened again")

// Row is a record as an engine keeps it.
type Row struct {
	sallyport.Record
	// Owner is copied from the payload by the server, so that an engine finds
	// what hangs on a login, user or device without reading payloads.
	Owner Owner
	// MAC covers everything else in the row.
	MAC []byte
}

// Owner says on which login, user and device a record hangs; empty fields are
// none. Only sessions and logins have owners.
type Owner struct {
	Login  sallyport.LoginID
	User   sallyport.UserID
	Device sallyport.DeviceID
}

// State is what a store knows about its history.
type State struct {
	Epoch sallyport.Epoch
	// Revision is the last one written; 0 in an empty store.
	Revision sallyport.Revision
	// Compacted is the highest revision whose tombstones may be gone: nobody can
	// catch up from below it.
	Compacted sallyport.Revision
}

// Store is an engine. One server uses it and is its only writer; Write and Purge
// are never called at the same time as each other. Rows that it returns belong
// to the caller. Errors are *sallyport.Error with a storage.* code, or wrap
// ErrBroken. Engines: cached/sqlite, cached/memory; the suite is storetest.Store.
type Store interface {
	// State returns where the store's history stands.
	State(ctx context.Context) (State, error)
	// Get returns a row, be it live, expired or a tombstone, or
	// sallyport.ErrNotFound if there never was one.
	Get(ctx context.Context, kind sallyport.Kind, id string) (Row, error)
	// Write makes all rows durable or none, in order: a later row of the same
	// record replaces an earlier one. Revisions are above every one written
	// before and do not fall.
	Write(ctx context.Context, rows []Row) error
	// Room returns an error, storage.full, while the store should only take what
	// ends something: what is left of the disk is kept for revocations.
	Room(ctx context.Context) error
	// Scan calls begin with the state and then each for every row of the kinds
	// (all if empty) that is no tombstone, all at one instant of the store's
	// history. The first error ends it and is returned.
	Scan(ctx context.Context, kinds []sallyport.Kind, begin func(State) error, each func(Row) error) error
	// Changed returns at most limit rows, tombstones included, whose revision is
	// above after, in order of revision, and the state at that instant.
	Changed(ctx context.Context, after sallyport.Revision, limit int) ([]Row, State, error)
	// Owned returns the rows, tombstones excluded, that share at least one
	// non-empty field with owner.
	Owned(ctx context.Context, owner Owner) ([]Row, error)
	// Expired returns at most limit rows, tombstones excluded, that end at now or
	// before, the oldest first.
	Expired(ctx context.Context, now time.Time, limit int) ([]Row, error)
	// Purge forgets at most limit tombstones up to a revision, having durably
	// raised State.Compacted to it, and returns how many.
	Purge(ctx context.Context, upTo sallyport.Revision, limit int) (int, error)
	// Maintain does the engine's own housekeeping; called about each second.
	Maintain(ctx context.Context) error
}

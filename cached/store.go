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

// ErrScanTooLong ends a scan that stands in the engine's way. It can be begun
// again.
var ErrScanTooLong = &sallyport.Error{
	Outcome: sallyport.OutcomeUnavailable,
	Code:    "storage.snapshot_too_long",
	Message: "reading the record store took so long that its log could not be written back",
	Hint:    "try again; a reader that takes its records more quickly is left alone",
}

// Row is a record as an engine keeps it.
type Row struct {
	sallyport.Record
	// Owner is copied from the payload by the server, so that an engine finds
	// what hangs on a login, user or device without reading payloads.
	Owner Owner
	// MAC covers everything else in the row, and names its key.
	MAC []byte
}

// Key names the row.
func (r *Row) Key() Key { return Key{r.Kind, r.ID} }

// Key names a record.
type Key struct {
	Kind sallyport.Kind
	ID   string
}

// Owner says on which login, user and device a record hangs; empty fields are
// none. Only sessions and logins have owners.
type Owner struct {
	Login  sallyport.LoginID
	User   sallyport.UserID
	Device sallyport.DeviceID
}

// Head is what a store says about all of its rows. There is one, and every write
// replaces it.
type Head struct {
	Epoch sallyport.Epoch
	// Revision is the last one written; 0 in an empty store.
	Revision sallyport.Revision
	// Compacted is the highest revision whose tombstones may be gone: nobody can
	// catch up from below it.
	Compacted sallyport.Revision
	// Seal is the server's word for the rest of the head and for the sum of the
	// rows. Empty before the first write.
	Seal []byte
}

// Change is what a plan wants written. The zero Change writes nothing.
type Change struct {
	// Rows replace what stands under their keys, in this order.
	Rows []Row
	// Forget names rows that go without a trace.
	Forget []Key
	// Ended is what the rows end; an engine with a journal writes it down first.
	Ended []Ending
	// Head replaces the store's.
	Head Head
}

// Empty reports whether there is nothing to write.
func (c *Change) Empty() bool {
	return len(c.Rows) == 0 && len(c.Forget) == 0 && c.Head.Epoch == ""
}

// Tx is a store that stands still: nobody else writes, in this process or in
// another, until the plan that sees it has been carried out.
type Tx interface {
	// Head returns what the plan follows on.
	Head() Head
	// Rows returns those rows of the keys that are there, live, expired or
	// tombstones, in any order.
	Rows(keys ...Key) ([]Row, error)
	// Owned returns the rows, tombstones excluded, that share at least one
	// non-empty field with owner.
	Owned(owner Owner) ([]Row, error)
	// Tombstones returns at most limit tombstones up to a revision.
	Tombstones(upTo sallyport.Revision, limit int) ([]Row, error)
}

// Query says which rows a scan passes.
type Query struct {
	Kinds      []sallyport.Kind // empty: all
	Tombstones bool             // these, too
}

// Store is an engine. Rows that it returns belong to the caller. Errors are
// *sallyport.Error with a storage.* code, or wrap ErrBroken. Engines:
// cached/sqlite, cached/postgres, cached/memory; the suite is storetest.Store.
type Store interface {
	// Head returns where the store's history stands.
	Head(ctx context.Context) (Head, error)
	// Get returns a row, be it live, expired or a tombstone, or
	// sallyport.ErrNotFound if there never was one.
	Get(ctx context.Context, kind sallyport.Kind, id string) (Row, error)
	// Update lets the store stand still, asks plan what to write, and makes all of
	// it durable or nothing. It may ask plan again (when the engine has to start
	// over); the last answer counts. An error of plan is returned, and nothing is
	// written. ctx bounds the wait for other writers, not the commit.
	Update(ctx context.Context, plan func(Tx) (Change, error)) error
	// Room returns an error, storage.full, while the store should only take what
	// ends something: what is left of the disk is kept for revocations.
	Room(ctx context.Context) error
	// Scan calls begin with the head and then each for every row that the query
	// asks for, all at one instant of the store's history. The first error ends it
	// and is returned. An engine whose history is held back for too long by it ends
	// it with ErrScanTooLong.
	Scan(ctx context.Context, q Query, begin func(Head) error, each func(Row) error) error
	// Changed returns at most limit rows, tombstones included, whose revision is
	// above after, in order of revision, and the head at that instant.
	Changed(ctx context.Context, after sallyport.Revision, limit int) ([]Row, Head, error)
	// Expired returns at most limit rows, tombstones excluded, that end at now or
	// before, the oldest first.
	Expired(ctx context.Context, now time.Time, limit int) ([]Row, error)
	// Maintain does the engine's own housekeeping; called about each second.
	Maintain(ctx context.Context) error
}

// Shared is an engine whose store several servers write at the same time. What
// one of them writes, the others learn by reading.
type Shared interface {
	Store
	// Wait returns when somebody may have written since it returned last, and
	// after max at the latest.
	Wait(ctx context.Context, max time.Duration) error
	// Confirm returns nil once the store has proved that it is the one that
	// everybody writes to. A standby cannot, nor can a primary that was cut off
	// from its synchronous standby while that one took over: what they hold may be
	// older than what others go by.
	Confirm(ctx context.Context) error
}

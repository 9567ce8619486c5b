package cached

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"sallyport"
	"sallyport/internal/keyring"
)

// RestoreOptions say what is taken from an earlier store.
type RestoreOptions struct {
	// Journal knows what ended since. Unless it covers the whole time since, every
	// session ends: nobody could tell which of them were revoked.
	Journal *Journal
	// Above is the highest revision known to have been given out; the restored
	// store goes on above it.
	Above sallyport.Revision
	// DropDamaged takes what is genuine of a backup that is not as it was made, and
	// ends every session.
	DropDamaged bool
}

// Restored is what became of an earlier store.
type Restored struct {
	From BackupInfo
	Head Head // of the restored store
	// Rows are those in the restored store; Dropped did not verify.
	Rows, Dropped int
	// SessionsEnded and SessionsKept add up to those that lived when the backup was
	// made and have not expired. Applied are endings of the journal that met a row.
	SessionsEnded, SessionsKept, Applied int
	Users, Devices                       int
	DevicesRevoked                       int // of Devices
	// Config is the revision of the configuration; 0: there is none.
	Config        sallyport.Revision
	ConfigApplied time.Time
}

// source is a store as it was at one instant: a Store's Scan, or a backup.
type source func(begin func(BackupInfo) error, each func(Row) error) error

func backupSource(r io.ReadSeeker) source {
	return func(begin func(BackupInfo) error, each func(Row) error) error {
		if _, err := r.Seek(0, io.SeekStart); err != nil {
			return err
		}
		return ReadBackup(r, begin, each)
	}
}

func storeSource(ctx context.Context, s Store) source {
	return func(begin func(BackupInfo) error, each func(Row) error) error {
		return s.Scan(ctx, Query{Tombstones: true}, func(h Head) error { return begin(BackupInfo{Head: h}) }, each)
	}
}

// VerifyBackup reads a backup whole and checks every row and their sum with the
// key in deps; it needs nothing else of deps. A backup that was changed is
// backup.changed; a row that did not verify in the store either is counted.
func VerifyBackup(r io.ReadSeeker, deps Deps) (BackupInfo, error) {
	from := backupSource(r)
	seal, err := from.sealer(deps.KEK)
	if err != nil {
		return BackupInfo{}, err
	}
	return seal.examine(from)
}

// sealer opens the ring of keys that travels with the rows.
func (from source) sealer(kek keyring.KEK) (seal *sealer, err error) {
	err = from(func(BackupInfo) error { return nil }, func(row Row) error {
		if row.Key() != ringKey {
			return nil
		}
		if seal, _, err = openRing(&row, kek); err != nil {
			return err
		}
		return errFound
	})
	switch {
	case errors.Is(err, errFound):
		return seal, nil
	case sallyport.CodeOf(err) == codeRolledBack:
		return nil, changedBackup(err)
	case err == nil:
		return nil, changedBackup(errors.New("it holds no ring of keys"))
	}
	return nil, err
}

var errFound = errors.New("found")

// examine reads a source whole. The error is backup.changed if its rows are not
// those that its head was sealed over.
func (s *sealer) examine(from source) (info BackupInfo, err error) {
	var want, got sum
	var sealed error
	err = from(func(i BackupInfo) error {
		info = i
		want, sealed = s.openHead(i.Head)
		return nil
	}, func(row Row) error {
		info.Rows++
		if !s.genuine(&row) {
			info.Damaged++
		}
		got.add(s.term(&row))
		return nil
	})
	switch {
	case err != nil:
		return info, err
	case sealed != nil:
		return info, changedBackup(sealed)
	case want != got:
		return info, changedBackup(errors.New("rows were changed, put in or taken out"))
	}
	return info, nil
}

func changedBackup(cause error) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal,
		Code:    "backup.changed",
		Message: "the backup is not what was written",
		Hint:    "take another one; --drop-damaged takes the records of this one that verify, and ends every session",
		Err:     cause,
	}
}

// Restore writes the backup into the empty store of deps as a new history: a new
// epoch, revisions above all that were given out, no tombstones. A store in which
// this was not finished is refused by New (storage.unfinished).
func Restore(ctx context.Context, deps Deps, r io.ReadSeeker, opts RestoreOptions) (Restored, error) {
	from := backupSource(r)
	seal, err := from.sealer(deps.KEK)
	if err != nil {
		return Restored{}, fmt.Errorf("restore: %w", err)
	}
	info, err := seal.examine(from)
	if err == nil && info.Damaged > 0 {
		err = changedBackup(fmt.Errorf("%d of %d rows do not verify", info.Damaged, info.Rows))
	}
	if sallyport.CodeOf(err) == "backup.changed" && opts.DropDamaged {
		opts.Journal, err = nil, nil // rows may be missing, and the journal does not know which
	}
	if err != nil {
		return Restored{}, fmt.Errorf("restore: %w", err)
	}
	f := newFilter(seal, deps.now(), info, opts)
	w := &restoring{ctx: ctx, store: deps.Store, head: f.Head}
	if err := w.begin(); err != nil {
		return Restored{}, fmt.Errorf("restore: %w", err)
	}
	err = from(func(BackupInfo) error { return nil }, func(row Row) error {
		if row, ok := f.take(row); ok {
			return w.add(row)
		}
		return nil
	})
	if err == nil && f.read != info.Rows {
		err = changedBackup(errors.New("it was changed while it was read"))
	}
	if err == nil {
		f.Head = seal.sealHead(f.Head, f.sum)
		err = w.end(f.Head)
	}
	if err != nil {
		return Restored{}, fmt.Errorf("restore: %w", err)
	}
	return f.Restored, nil
}

// RestoreInPlace makes of a store that is refused, because it is not what was
// written last, one that may be used: what verifies stays, everything else goes,
// every session ends, and a new history begins. All of it happens in one
// transaction.
func RestoreInPlace(ctx context.Context, deps Deps, opts RestoreOptions) (Restored, error) {
	from := storeSource(ctx, deps.Store)
	seal, err := from.sealer(deps.KEK)
	if err != nil {
		return Restored{}, fmt.Errorf("restore in place: %w", err)
	}
	info, err := seal.examine(from)
	if err != nil && sallyport.CodeOf(err) != "backup.changed" {
		return Restored{}, fmt.Errorf("restore in place: %w", err)
	}
	if isUnfinished(info.Head) {
		return Restored{}, fmt.Errorf("restore in place: %w", unfinished())
	}
	f := newFilter(seal, deps.now(), info, RestoreOptions{Above: opts.Above})
	var forget []Key
	err = from(func(BackupInfo) error { return nil }, func(row Row) error {
		if _, ok := f.take(row); !ok {
			forget = append(forget, row.Key())
		}
		return nil
	})
	if err == nil {
		err = deps.Store.Update(ctx, func(tx Tx) (Change, error) {
			if now := tx.Head(); now.Revision != info.Head.Revision || now.Epoch != info.Head.Epoch {
				return Change{}, sallyport.ErrConflict // somebody else writes
			}
			f.Head = seal.sealHead(f.Head, f.sum)
			return Change{Forget: forget, Head: f.Head}, nil
		})
	}
	if err != nil {
		return Restored{}, fmt.Errorf("restore in place: %w", err)
	}
	return f.Restored, nil
}

// now is the clock of deps.
func (d *Deps) now() time.Time {
	if d.Now != nil {
		return d.Now()
	}
	return time.Now()
}

// filter decides what of an earlier store goes into the restored one.
type filter struct {
	seal  *sealer
	now   time.Time
	ended map[Key]Ending // the last one of each; nil: every session ends
	read  int
	sum   sum // of the rows that were taken
	Restored
}

func newFilter(seal *sealer, now time.Time, info BackupInfo, opts RestoreOptions) *filter {
	f := &filter{seal: seal, now: now}
	f.From = info
	above := max(opts.Above, info.Head.Revision)
	if j := opts.Journal; j.Covers(info.Head) {
		above = max(above, j.Reached)
		f.ended = make(map[Key]Ending, len(j.Ended))
		for _, e := range j.Ended {
			f.ended[e.Key] = e
		}
	}
	// Nobody can catch up in a history that has just begun.
	f.Head = Head{Epoch: sallyport.Epoch(sallyport.NewID("e")), Revision: above + 1, Compacted: above + 1}
	return f
}

// take returns the row as it stands in the restored store, and whether it does.
func (f *filter) take(row Row) (Row, bool) {
	f.read++
	if !f.seal.genuine(&row) {
		f.Dropped++
		return row, false
	}
	if row.Deleted || expired(&row.Record, f.now) {
		return row, false
	}
	keep := f.keeps(&row)
	if row.Kind == sallyport.KindSession && !keep {
		f.SessionsEnded++
	}
	if keep {
		f.count(&row)
		f.sum.add(f.seal.term(&row))
	}
	return row, keep
}

// keeps reports whether a live row is still good, and marks it where the journal
// says so.
func (f *filter) keeps(row *Row) bool {
	key := row.Key()
	switch row.Kind {
	case sallyport.KindCode, sallyport.KindLease:
		return false // used up, or held by somebody who does not know this history
	case sallyport.KindIDPToken:
		key.Kind = sallyport.KindLogin // it has the login's id, and ends with it
		fallthrough
	case sallyport.KindLogin, sallyport.KindSession:
		if f.ended == nil {
			return false
		}
	}
	e, ended := f.ended[key]
	if !ended || e.Revision <= row.Revision {
		return true
	}
	f.Applied++
	return e.Marked && f.mark(row)
}

// mark marks a device revoked or a user disabled, keeping every other field. A row
// that cannot be marked is not kept.
func (f *filter) mark(row *Row) bool {
	var fields map[string]json.RawMessage
	if json.Unmarshal(row.Payload, &fields) != nil || fields == nil {
		return false
	}
	fields[mark(row.Kind)] = json.RawMessage("true")
	payload, err := json.Marshal(fields)
	if err != nil {
		return false
	}
	row.Payload, row.Revision = payload, f.Head.Revision
	*row = f.seal.seal(row.Record)
	return true
}

func (f *filter) count(row *Row) {
	f.Rows++
	switch row.Kind {
	case sallyport.KindSession:
		f.SessionsKept++
	case sallyport.KindUser:
		f.Users++
	case sallyport.KindDevice:
		f.Devices++
		if isMarked(row) {
			f.DevicesRevoked++
		}
	case sallyport.KindConfig:
		f.Config = row.Revision
		if c, err := sallyport.Decode[sallyport.Config](row.Record); err == nil {
			f.ConfigApplied = c.Applied
		}
	}
}

// restoring writes rows into an empty store, in transactions of some rows. Until
// the last one the head has no seal that opens, so nobody serves half of a store.
type restoring struct {
	ctx   context.Context
	store Store
	head  Head
	rows  []Row
}

const restoreGroup = 1_000

// unfinishedSeal stands where the head's seal will be.
const unfinishedSeal = "sallyport restore is not finished"

const codeUnfinished = "storage.unfinished"

func isUnfinished(h Head) bool { return string(h.Seal) == unfinishedSeal }

func unfinished() error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal,
		Code:    codeUnfinished,
		Message: "a backup was being restored into the record store, and that was not finished",
		Hint:    "restore again: sallyport restore FILE --config FILE",
	}
}

func (w *restoring) begin() error {
	now, err := w.store.Head(w.ctx)
	if err != nil {
		return err
	}
	if now.Revision != 0 || isUnfinished(now) {
		return &sallyport.Error{
			Outcome: sallyport.OutcomeInternal,
			Code:    "storage.not_empty",
			Message: "the store to restore into is not empty",
			Hint:    "restore into an empty database, and keep the old one until all is well",
		}
	}
	w.head.Seal = []byte(unfinishedSeal)
	return w.flush()
}

func (w *restoring) add(row Row) error {
	if w.rows = append(w.rows, row); len(w.rows) < restoreGroup {
		return nil
	}
	return w.flush()
}

func (w *restoring) end(head Head) error {
	w.head = head
	return w.flush()
}

func (w *restoring) flush() error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	rows := w.rows
	w.rows = nil
	return w.store.Update(w.ctx, func(Tx) (Change, error) { return Change{Rows: rows, Head: w.head}, nil })
}

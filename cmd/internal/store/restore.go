package store

import (
	"context"
	"errors"
	"io/fs"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/postgres"
	"sallyport/cached/sqlite"
	"sallyport/cmd/internal/config"
	"sallyport/internal/keyring"
)

// Replace fills an empty store and puts it in the place of the one that the
// configuration names, which nobody may have open. Until fill has returned nil
// the old one stays, and is as it was; aside is where it is kept after that.
func Replace(ctx context.Context, f *config.File, key keyring.KEK, fill func(cached.Store) error) (aside string, err error) {
	if f.Cached.OnPostgres() {
		aside, err = postgres.Replace(ctx, onPostgres(f), func(s *postgres.Store) error { return fill(s) })
	} else {
		aside, err = sqlite.Replace(f.Layout().Database(), sqlite.Config{JournalKey: key}, func(s *sqlite.Store) error { return fill(s) })
	}
	return aside, inUse(err)
}

// InPlace runs do with the store that the configuration names, also with one that
// cached refuses because it is not what was written last. Nobody else may have it
// open.
func InPlace(ctx context.Context, f *config.File, key keyring.KEK, do func(cached.Store) error) error {
	var engine interface {
		cached.Store
		Close() error
	}
	var err error
	if f.Cached.OnPostgres() {
		cfg := onPostgres(f)
		cfg.Restore = true
		engine, err = postgres.Open(ctx, cfg)
	} else {
		engine, err = sqlite.Open(f.Layout().Database(), sqlite.Config{JournalKey: key, Restore: true})
	}
	if err != nil {
		return inUse(err)
	}
	return errors.Join(do(engine), engine.Close())
}

// Journal reads the revocation journal beside the store of the configuration; nil,
// and why, where there is none that can be read.
func Journal(f *config.File, key keyring.KEK) (j *cached.Journal, why string) {
	if f.Cached.OnPostgres() {
		return nil, "PostgreSQL has none"
	}
	j, err := JournalAt(f.Layout().Database(), key)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, "there is none beside " + f.Layout().Database()
	case err != nil:
		return nil, err.Error()
	}
	return j, ""
}

// JournalAt reads the revocation journal of the SQLite database at path, which need
// not be there any more.
func JournalAt(path string, key keyring.KEK) (*cached.Journal, error) {
	j, err := sqlite.ReadJournal(path, key)
	if err != nil {
		return nil, err
	}
	return &j, nil
}

// Reached is the highest revision that the store of the configuration is known to
// have given out, also if the store is gone; 0: nobody knows.
func Reached(f *config.File) (sallyport.Revision, error) {
	reached, where := sqlite.Reached, f.Layout().Database()
	if f.Cached.OnPostgres() {
		reached, where = postgres.Reached, f.Layout().PostgresMarker()
	}
	revision, err := reached(where)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return revision, err
}

// inUse says of a store that is open what to do about it.
func inUse(err error) error {
	if sallyport.CodeOf(err) != "storage.in_use" {
		return err
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal, Code: "storage.in_use",
		Message: "cached is running, and nobody may write while a store is restored", Err: err,
		Hint: "stop cached (or sallyport serve), then run it again",
	}
}

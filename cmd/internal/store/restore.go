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
)

// Replace fills an empty store and puts it in the place of the one that the
// configuration names, which nobody may have open. Until fill has returned nil
// the old one stays; aside is where it is kept after that.
func Replace(ctx context.Context, f *config.File, fill func(cached.Store) error) (aside string, err error) {
	if f.Cached.OnPostgres() {
		aside, err = postgres.Replace(ctx, onPostgres(f), func(s *postgres.Store) error { return fill(s) })
	} else {
		aside, err = sqlite.Replace(f.Layout().Database(), sqlite.Config{}, func(s *sqlite.Store) error { return fill(s) })
	}
	return aside, inUse(err)
}

// InPlace runs do with the store that the configuration names, also with one that
// cached refuses because it is not what was written last. Nobody else may have it
// open.
func InPlace(ctx context.Context, f *config.File, do func(cached.Store) error) error {
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
		engine, err = sqlite.Open(f.Layout().Database(), sqlite.Config{Restore: true})
	}
	if err != nil {
		return inUse(err)
	}
	return errors.Join(do(engine), engine.Close())
}

// Journal reads the revocation journal beside the store of the configuration; nil,
// and why, where there is none.
func Journal(f *config.File) (j *cached.Journal, why string, err error) {
	if f.Cached.OnPostgres() {
		return nil, "PostgreSQL has none", nil
	}
	return JournalAt(f.Layout().Database())
}

// JournalAt reads the revocation journal of the SQLite store at path; nil, and
// why, where there is none.
func JournalAt(path string) (j *cached.Journal, why string, err error) {
	j, err = sqlite.ReadJournal(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "there is none beside " + path, nil
	}
	return j, "", err
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

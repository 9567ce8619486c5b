package sqlite

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/mattn/go-sqlite3"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/internal/marker"
)

const (
	codeBusy = "storage.busy"
	codeFull = "storage.full"
)

// classify turns SQLite's errors into those that cached.Store promises.
func classify(err error) error {
	var e sqlite3.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.Code {
	case sqlite3.ErrBusy, sqlite3.ErrLocked:
		return &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable,
			Code:    codeBusy,
			Message: "the record store is locked by another process",
			Hint:    "end the program that holds the database file; cached goes on by itself",
			Err:     err,
		}
	case sqlite3.ErrFull:
		return full(err)
	case sqlite3.ErrIoErr, sqlite3.ErrCorrupt, sqlite3.ErrNotADB, sqlite3.ErrCantOpen, sqlite3.ErrReadonly, sqlite3.ErrProtocol:
		return fmt.Errorf("%w: %w", cached.ErrBroken, err)
	}
	return err
}

// corrupt returns the refusal to start from what lies at path.
func corrupt(path, message string, cause error) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal,
		Code:    "storage.corrupt",
		Message: message,
		Hint: fmt.Sprintf("bring back a backup: `sallyport restore FILE --config FILE`; to start with nothing, "+
			"so that everybody must log in again and the configuration is applied anew, move away every file named %s*", path),
		Err: cause,
	}
}

// rolledBack returns the refusal to start from a file that is not the one that was
// written last.
func rolledBack(path string, revision uint64, m *marker.Marker) error {
	message := fmt.Sprintf("the record store is at revision %d, and %d was written: an older file was put in its place", revision, m.Revision)
	switch {
	case m.Store == "":
		message = "what was written to the record store last cannot be told: " + path + ".lock is damaged"
	case m.Revision <= revision:
		message = "the record store is not the one that was written here last"
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal,
		Code:    "storage.rolled_back",
		Message: message,
		Hint: fmt.Sprintf("put back %s as it was; or run `sallyport restore --in-place --config FILE`, "+
			"which takes it as it is and ends every session", path),
	}
}

// unmarked returns the refusal to start from files that no marker vouches for:
// whether they are the newest, and all of them, nobody can tell.
func unmarked(path string) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal,
		Code:    "storage.rolled_back",
		Message: fmt.Sprintf("there is a record store, but %s.lock, which knows what was written to it last, is missing", path),
		Hint: fmt.Sprintf("put back %[1]s.lock as it was; or run `sallyport restore --in-place --config FILE`, which takes the "+
			"store as it is and ends every session; to start with nothing, move away every file named %[1]s*", path),
	}
}

// damaged says which of the errors at opening mean that the file is no good.
func damaged(path string, err error) error {
	if err == nil || sallyport.CodeOf(err) != "" {
		return err
	}
	classified := classify(err)
	var e sqlite3.Error
	var outside *fs.PathError
	unreadable := !errors.As(err, &e) && !errors.As(err, &outside) // a row is missing, or holds something else
	if errors.Is(classified, cached.ErrBroken) || e.Code == sqlite3.ErrError || unreadable {
		return corrupt(path, "the record store is damaged", err)
	}
	return classified
}

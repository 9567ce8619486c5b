package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"sallyport"
	"sallyport/cached/internal/marker"
)

const lockNotAvailable = "55P03"

// transient reports whether the same may succeed in a moment: it was not
// PostgreSQL's answer, or one that tells to try again.
func transient(err error) bool {
	if sallyport.CodeOf(err) != "" {
		return false
	}
	code, ok := stateOf(err)
	if !ok {
		return true // a lost connection, or nobody there
	}
	switch {
	case strings.HasPrefix(code, "08"), strings.HasPrefix(code, "40"): // connection, serialization and deadlock
		return true
	}
	switch code {
	case "57P01", "57P02", "57P03", // is shutting down, has crashed, is starting
		"57P05", "25P03", // were idle for too long: this process stood still
		"25006", // has become a standby
		"53300", // has no connection left
		"0A000": // a table has changed under a prepared statement
		return true
	}
	return false
}

func stateOf(err error) (string, bool) {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code, true
	}
	return "", false
}

const goesOn = "cached goes on by itself"

// classify turns the driver's errors into those that cached.Store promises. One
// of ctx stays what it is.
func classify(ctx context.Context, err error) error {
	var p passed
	if errors.As(err, &p) {
		return p.error
	}
	if err == nil || sallyport.CodeOf(err) != "" {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	e := &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable,
		Code:    "storage.unavailable",
		Message: "PostgreSQL cannot be reached",
		Hint:    "check PostgreSQL, the network, and cached.store; " + goesOn,
		Err:     err,
	}
	code, ok := stateOf(err)
	switch {
	case !ok && !errors.Is(err, errLocked):
	case !ok, code == lockNotAvailable, code == "57014", code == "53300", strings.HasPrefix(code, "40"):
		e.Code, e.Message = "storage.busy", "the record store is locked, or PostgreSQL has too much to do"
		e.Hint = "look for long transactions in pg_stat_activity, and at max_connections; " + goesOn
	case code == "53100":
		e.Code, e.Message = "storage.full", "the disk of PostgreSQL is full"
		e.Hint = "free space on it; " + goesOn
	case strings.HasPrefix(code, "28"):
		e.Message, e.Hint = "PostgreSQL refuses the login of cached", "check the user in cached.store, cached.store_password_file, and pg_hba.conf"
	case code == "3D000":
		e.Message, e.Hint = "the database does not exist", "make it (createdb), or correct cached.store"
	case code == "42501":
		e.Message, e.Hint = "the user of cached lacks a right", "make that user the owner of the database, or of the schema"
	case !transient(err):
		e.Message, e.Hint = "PostgreSQL refuses what cached asks for", "the log has the reason"
	}
	return e
}

// unknown says that a change was sent, and that PostgreSQL never said what became
// of it.
func unknown(cause error) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable,
		Code:    "storage.unknown",
		Message: "PostgreSQL did not say whether the change was written: it may have happened",
		Hint:    "look whether it did, and try again if not; if this lasts, check the synchronous standby",
		Err:     cause,
	}
}

// corrupt returns the refusal to take this database.
func (s *Store) corrupt(message string, cause error) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal,
		Code:    "storage.corrupt",
		Message: message,
		Hint: fmt.Sprintf("check cached.store, or restore the database from a backup; to start with nothing, so that everybody must log in again "+
			"and the configuration is applied anew, move %s away", s.marker.Path()),
		Err: cause,
	}
}

func inUse() error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal,
		Code:    "storage.in_use",
		Message: "another process has the record store open",
		Hint:    "stop every cached that uses this database, on all machines",
	}
}

// rolledBack returns the refusal to start from a database that is not the one that
// was written last.
func (s *Store) rolledBack(revision uint64, m *marker.Marker) error {
	message := fmt.Sprintf("the record store is at revision %d, and %d was written: an older copy, or a standby that lay behind, took its place", revision, m.Revision)
	if m.Revision <= revision {
		message = "the record store is not the one that was written last"
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal,
		Code:    "storage.rolled_back",
		Message: message,
		Hint: fmt.Sprintf("if a backup was restored into it from another machine, move %s away; else bring back the database as it was; "+
			"or run `sallyport restore --in-place --config FILE`, which takes it as it is and ends every session", s.marker.Path()),
	}
}

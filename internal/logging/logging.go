// Package logging is where hclog enters the house: how a daemon's log is made,
// which levels and formats exist, and what a package logs to when nobody
// listens. Names of fields stand in docs/logging.md; what may be logged is the
// business of whoever logs (never tokens, codes, cookies, keys, query strings).
package logging

import (
	"fmt"
	"io"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// Logger is what every package takes. Messages are constant and lower case;
// what varies goes into fields.
type Logger = hclog.Logger

// The formats of New.
const (
	FormatText = "text"
	FormatJSON = "json"
)

// timeFormat is RFC 3339 with microseconds: exact enough to order the lines of
// two daemons on one machine.
const timeFormat = "2006-01-02T15:04:05.000000Z07:00"

// New returns a logger that writes one line for each message to w. Level is
// trace, debug, info, warn or error, in any case; empty means info. Format is
// json or text; empty means text. Lines of concurrent callers do not mix.
func New(w io.Writer, level, format string) (Logger, error) {
	lvl, err := parseLevel(level)
	if err != nil {
		return nil, err
	}
	asJSON, err := parseFormat(format)
	if err != nil {
		return nil, err
	}
	return hclog.New(&hclog.LoggerOptions{
		Level:      lvl,
		Output:     w,
		JSONFormat: asJSON,
		TimeFormat: timeFormat,
	}), nil
}

// Discard returns a logger that writes nothing.
func Discard() Logger { return hclog.NewNullLogger() }

// Check tells whether New would take level and format.
func Check(level, format string) error {
	_, err := New(io.Discard, level, format)
	return err
}

func parseLevel(s string) (hclog.Level, error) {
	switch strings.ToLower(s) {
	case "":
		return hclog.Info, nil
	case "trace", "debug", "info", "warn", "error":
		return hclog.LevelFromString(s), nil
	}
	return 0, fmt.Errorf("log level %.20q: want trace, debug, info, warn or error", s)
}

func parseFormat(s string) (asJSON bool, err error) {
	switch strings.ToLower(s) {
	case "", FormatText:
		return false, nil
	case FormatJSON:
		return true, nil
	}
	return false, fmt.Errorf("log format %.20q: want text or json", s)
}

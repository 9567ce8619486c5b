package main

import (
	"fmt"
	"io"
	"time"

	"sallyport"
	"sallyport/authd"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
)

// rotateSessionCA makes a new session CA beside the one in force. Each authd takes
// it over by itself once the files are where it looks for them.
func rotateSessionCA(f *config.File, now time.Time, out io.Writer) error {
	layout, spread, overlap := f.Layout(), authd.Spread(f.Policyd.MaxStale), f.Authd.Session.Overlap()
	if err := rotationOver(layout, now.Add(-spread-overlap)); err != nil {
		return err
	}
	if err := layout.RotateSessionCA(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(out, `a new session CA is in %s
it signs in %s, once gateways know it; the one before is refused %s after that
an authd on another machine needs these files too, and takes them over by itself
`, layout.Dir, rounded(spread), rounded(overlap))
	return err
}

// rotationOver refuses a second rotation while the first is under way: the CA that
// it would push out may be the one that signs. since is when that began at the
// latest.
func rotationOver(layout config.Layout, since time.Time) error {
	cas, err := layout.SessionCAs()
	if err != nil || len(cas) < 2 {
		return nil // what is wrong with the files the rotation itself says
	}
	made := cas[0].Made()
	if made.Before(since) {
		return nil
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUsage, Code: "session_ca.rotating",
		Message: "the session CA was rotated at " + made.UTC().Format(time.RFC3339) + ", and certificates of the one before may be in use",
		Hint:    "run it again in " + rounded(made.Sub(since)),
	}
}

// rotate replaces what is named; see rotateSessionCA.
func rotate(what string, f *config.File, now time.Time, out io.Writer) error {
	if what != config.SessionCA {
		return run.Usage("what can be rotated: "+config.SessionCA, "--rotate %q", what)
	}
	return rotateSessionCA(f, now, out)
}

package policyd

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"sallyport"
	"sallyport/policyd/policy"
	"sallyport/proto/proof"
)

const (
	maxReport      = 64 << 10 // bytes of a report's JSON
	maxReportDepth = 5
	maxFacts       = 64
)

// accept verifies a report as far as that is possible without the ones before
// it: who signed it, for whom it speaks, when it was made, and what it says.
func (s *Server) accept(v view, session sallyport.SessionID, jws string) (sallyport.Posture, error) {
	var none sallyport.Posture
	a := asker{view: v}
	a.ask(&sallyport.Request{Session: session})
	if a.in.Person == nil {
		return none, &sallyport.Error{
			Outcome: sallyport.OutcomeLogin, Code: "session.revoked", Message: a.in.Absent, Hint: "run: agent login",
		}
	}
	if len(jws) > proof.MaxSize {
		return none, malformed(fmt.Errorf("longer than %d bytes", maxReport))
	}
	var body json.RawMessage
	key, err := proof.Verify(jws, proof.TypePosture, &body)
	if err != nil {
		return none, &sallyport.Error{
			Outcome: sallyport.OutcomeUsage, Code: "posture.bad_signature",
			Message: "the report is not signed by a device key", Err: err,
		}
	}
	r, err := readReport(body)
	if err != nil {
		return none, malformed(err)
	}
	switch {
	case key.ID != r.Device, r.Device != a.person.Session.Device:
		return none, refusePosture("posture.wrong_device", "the report is not by this session's device")
	case r.Session != session:
		return none, refusePosture("posture.wrong_session", "the report was made for another session")
	}
	if off := v.now.Sub(time.UnixMilli(r.Sequence)).Abs(); off > v.rules.ttl {
		return none, &sallyport.Error{
			Outcome: sallyport.OutcomeUsage, Code: "posture.stale",
			Message: fmt.Sprintf("the report's time is off by %v", off.Round(time.Second)), Hint: "set this machine's clock",
		}
	}
	return sallyport.Posture{Device: r.Device, Session: session, Sequence: r.Sequence, Received: v.now, Facts: r.Facts}, nil
}

func malformed(err error) error {
	return &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: "posture.malformed", Message: "the report cannot be read", Err: err}
}

// readReport reads a report strictly: bounded, no key twice, known types.
func readReport(body []byte) (sallyport.PostureReport, error) {
	var r sallyport.PostureReport
	if len(body) > maxReport {
		return r, fmt.Errorf("longer than %d bytes", maxReport)
	}
	if err := checkJSON(body); err != nil {
		return r, err
	}
	if err := json.Unmarshal(body, &r); err != nil {
		return r, err
	}
	if len(r.Facts) > maxFacts {
		return r, fmt.Errorf("%d facts; at most %d", len(r.Facts), maxFacts)
	}
	for name, f := range r.Facts {
		if err := policy.CheckFact(name, f.Value); err != nil {
			return r, err
		}
		switch {
		case f.Source != sallyport.SourceOS && f.Source != sallyport.SourceFile:
			// Nothing here could check an attestation, so nobody may claim one.
			return r, fmt.Errorf("fact %s: source %.20q cannot be reported", name, f.Source)
		case f.At.IsZero():
			return r, fmt.Errorf("fact %s has no time", name)
		}
	}
	return r, nil
}

// checkJSON refuses nesting and keys that stand twice (in any case of letters,
// because encoding/json folds them), which decoders read in different ways.
func checkJSON(body []byte) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	var keys []map[string]bool // of the objects around; nil: an array
	wantKey := func() bool { return len(keys) > 0 && keys[len(keys)-1] != nil }
	atKey := false
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if s, ok := t.(string); ok && atKey {
			s = strings.ToLower(s)
			if keys[len(keys)-1][s] {
				return fmt.Errorf("key %.40q stands twice", s)
			}
			keys[len(keys)-1][s] = true
			atKey = false
			continue
		}
		switch t {
		case json.Delim('{'):
			keys = append(keys, map[string]bool{})
		case json.Delim('['):
			keys = append(keys, nil)
		case json.Delim('}'), json.Delim(']'):
			keys = keys[:len(keys)-1]
		}
		if len(keys) > maxReportDepth {
			return fmt.Errorf("nested deeper than %d", maxReportDepth)
		}
		atKey = wantKey()
	}
}

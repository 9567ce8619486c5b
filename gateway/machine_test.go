package gateway

import (
	"testing"

	"pgregory.net/rapid"
)

var (
	allStates = []state{pending, deciding, dialling, open, withdrawn, closed}
	allEvents = []event{ask, allow, accept, renew, withdraw, end}
)

// TestMachineSweep feeds every event to every state. The matrix is written out
// so that a changed transition must be changed here too.
func TestMachineSweep(t *testing.T) {
	const no = state(99) // the event has no meaning there
	want := map[state][]state{
		//          ask       allow     accept renew     withdraw   end
		pending:   {deciding, no, no, no, withdrawn, closed},
		deciding:  {deciding, dialling, no, no, withdrawn, closed},
		dialling:  {deciding, no, open, dialling, withdrawn, closed},
		open:      {no, no, no, open, withdrawn, closed},
		withdrawn: {no, no, no, no, no, closed},
		closed:    {no, no, no, no, no, no},
	}
	for _, s := range allStates {
		for i, e := range allEvents {
			got, ok := s.step(e)
			switch {
			case want[s][i] == no && (ok || got != s):
				t.Errorf("%s + %s: got %s, %v; want no meaning", s, e, got, ok)
			case want[s][i] != no && (!ok || got != want[s][i]):
				t.Errorf("%s + %s: got %s, %v; want %s", s, e, got, ok, want[s][i])
			}
		}
	}
}

// TestMachineNeverOpensWhatWasWithdrawn holds for every order of events.
func TestMachineNeverOpensWhatWasWithdrawn(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, lost, asked := pending, false, false
		for _, e := range rapid.SliceOfN(rapid.SampledFrom(allEvents), 1, 40).Draw(t, "events") {
			next, ok := s.step(e)
			if !ok && next != s {
				t.Fatalf("%s + %s moved to %s without a meaning", s, e, next)
			}
			if ok && e == allow && s != deciding {
				t.Fatalf("allow taken in %s", s)
			}
			asked = asked || next == deciding
			lost = lost || next == withdrawn || next == closed
			if next == open && (lost || !asked) {
				t.Fatalf("%s + %s opened; lost %v, asked %v", s, e, lost, asked)
			}
			s = next
		}
	})
}

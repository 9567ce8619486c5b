package gateway

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"sallyport"
)

var (
	t0    = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	alice = sallyport.Subject{Kind: sallyport.SubjectUser, ID: "alice"}
	bob   = sallyport.Subject{Kind: sallyport.SubjectUser, ID: "bob"}
)

func first(rev sallyport.Revision) sallyport.Notice {
	return sallyport.Notice{Epoch: "e1", Revision: rev, PolicyRevision: 1, First: true}
}

func changed(rev sallyport.Revision, s ...sallyport.Subject) sallyport.Notice {
	n := sallyport.Notice{Epoch: "e1", Revision: rev, PolicyRevision: 1}
	for _, s := range s {
		n.Changes = append(n.Changes, sallyport.SubjectChange{Subject: s, Revision: rev})
	}
	return n
}

func decisionAt(rev sallyport.Revision, s ...sallyport.Subject) sallyport.Decision {
	return sallyport.Decision{Verdict: sallyport.VerdictAllow, Epoch: "e1", AsOf: rev, PolicyRevision: 1, DependsOn: s}
}

func mustTake(t *testing.T, f *freshness, n sallyport.Notice) effect {
	t.Helper()
	e, err := f.take(t0, n)
	if err != nil {
		t.Fatalf("take(revision %d): %v", n.Revision, err)
	}
	return e
}

func TestFreshnessCurrent(t *testing.T) {
	tests := []struct {
		name string
		// run takes notices and returns the decision and the stamp of its question.
		run  func(t *testing.T, f *freshness) (sallyport.Decision, stamp)
		want bool
	}{
		{"nothing changed", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			return decisionAt(10, alice), f.tick()
		}, true},
		{"another subject changed", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			at := f.tick()
			mustTake(t, f, changed(11, bob))
			return decisionAt(10, alice), at
		}, true},
		{"its subject changed after", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			at := f.tick()
			mustTake(t, f, changed(11, alice))
			return decisionAt(10, alice), at
		}, false},
		{"the answer knows of the change already", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			at := f.tick()
			mustTake(t, f, changed(11, alice))
			return decisionAt(12, alice), at
		}, true},
		{"direct revocation: same revision, after the question", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			at := f.tick()
			mustTake(t, f, changed(10, alice))
			return decisionAt(10, alice), at
		}, false},
		{"direct revocation: same revision, before the question", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			mustTake(t, f, changed(10, alice))
			return decisionAt(10, alice), f.tick()
		}, true},
		{"the session changed though the answer does not name it", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			at := f.tick()
			mustTake(t, f, changed(11, sallyport.Subject{Kind: sallyport.SubjectSession, ID: "s1"}))
			return decisionAt(10, alice), at
		}, false},
		{"the policy changed", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			at := f.tick()
			mustTake(t, f, changed(11, policySubject))
			return decisionAt(10, alice), at
		}, false},
		{"older than the ring", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			return decisionAt(9, alice), f.tick()
		}, false},
		{"asked on an earlier stream", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			at := f.tick()
			mustTake(t, f, first(10))
			return decisionAt(10, alice), at
		}, false},
		{"another epoch", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			d := decisionAt(10, alice)
			d.Epoch = "e0"
			return d, f.tick()
		}, false},
		{"policy below the highest told", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			n := changed(11)
			n.PolicyRevision = 2
			mustTake(t, f, n)
			return decisionAt(11, alice), f.tick()
		}, false},
		{"policy below the highest answered", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			f.saw(sallyport.Decision{PolicyRevision: 3})
			return decisionAt(11, alice), f.tick()
		}, false},
		{"an answer ahead of the stream", func(t *testing.T, f *freshness) (sallyport.Decision, stamp) {
			return decisionAt(99, alice), f.tick()
		}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var f freshness
			mustTake(t, &f, first(10))
			d, asked := tt.run(t, &f)
			if got := f.current(d, "s1", asked); got != tt.want {
				t.Errorf("current: got %v; want %v", got, tt.want)
			}
		})
	}
}

// TestFreshnessEpoch: a new epoch starts revisions afresh and asks for all.
func TestFreshnessEpoch(t *testing.T) {
	var f freshness
	mustTake(t, &f, first(100))
	f.saw(sallyport.Decision{PolicyRevision: 50})
	e := mustTake(t, &f, sallyport.Notice{Epoch: "e2", Revision: 3, PolicyRevision: 2})
	if !e.all {
		t.Error("new epoch: got no re-asking of everything")
	}
	d := sallyport.Decision{Epoch: "e2", AsOf: 3, PolicyRevision: 2}
	if !f.current(d, "s1", f.tick()) {
		t.Error("an answer of the new epoch is not current")
	}
}

// TestFreshnessRing: what fell out of the ring is asked again, what is in it is
// told apart, in notices that are larger than the ring too.
func TestFreshnessRing(t *testing.T) {
	var f freshness
	mustTake(t, &f, first(10))
	before := f.tick()
	for i := range ringSize {
		mustTake(t, &f, changed(sallyport.Revision(11+i), sallyport.Subject{Kind: sallyport.SubjectUser, ID: fmt.Sprint("u", i)}))
	}
	if !f.current(decisionAt(10, alice), "s1", before) {
		t.Fatal("full ring: an untouched decision is not current")
	}
	mustTake(t, &f, changed(sallyport.Revision(11+ringSize), bob))
	if f.current(decisionAt(10, alice), "s1", before) {
		t.Error("the ring starts after the decision, and it is current")
	}
	if !f.current(decisionAt(11, alice), "s1", f.tick()) {
		t.Error("a decision from where the ring starts is not current")
	}
	if len(f.last) > ringSize || len(f.ring) > ringSize {
		t.Errorf("ring holds %d entries, %d subjects; want at most %d", len(f.ring), len(f.last), ringSize)
	}
}

// TestFreshnessRingNeverForgets: whatever changes come in whatever notices, a
// decision that a later change touches is never current.
func TestFreshnessRingNeverForgets(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var f freshness
		if _, err := f.take(t0, first(1)); err != nil {
			t.Fatal(err)
		}
		rev := sallyport.Revision(1)
		newest := map[string]sallyport.Revision{}
		for range rapid.IntRange(1, 40).Draw(t, "notices") {
			n := sallyport.Notice{Epoch: "e1", PolicyRevision: 1}
			for range rapid.IntRange(0, 5).Draw(t, "changes") {
				rev += sallyport.Revision(rapid.IntRange(0, 2).Draw(t, "step"))
				id := rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "user")
				newest[id] = max(newest[id], rev)
				n.Changes = append(n.Changes, sallyport.SubjectChange{Subject: sallyport.Subject{Kind: sallyport.SubjectUser, ID: id}, Revision: rev})
			}
			n.Revision = rev
			if _, err := f.take(t0, n); err != nil {
				t.Fatal(err)
			}
		}
		asOf := sallyport.Revision(rapid.IntRange(1, int(rev)).Draw(t, "as_of"))
		for id, changedAt := range newest {
			d := decisionAt(asOf, sallyport.Subject{Kind: sallyport.SubjectUser, ID: id})
			if got, want := f.current(d, "s1", f.tick()), changedAt <= asOf; got != want {
				t.Fatalf("user %s changed at %d, decision as of %d: current %v, want %v", id, changedAt, asOf, got, want)
			}
		}
	})
}

func TestCase_M12_LowerRevisionIsRefused(t *testing.T) {
	tests := []struct {
		name   string
		notice sallyport.Notice
		ok     bool
	}{
		{"lower revision", sallyport.Notice{Epoch: "e1", Revision: 9, PolicyRevision: 5, First: true}, false},
		{"lower policy revision", sallyport.Notice{Epoch: "e1", Revision: 10, PolicyRevision: 4, First: true}, false},
		{"the same", sallyport.Notice{Epoch: "e1", Revision: 10, PolicyRevision: 5, First: true}, true},
		{"higher", sallyport.Notice{Epoch: "e1", Revision: 11, PolicyRevision: 6}, true},
		{"another epoch", sallyport.Notice{Epoch: "e2", Revision: 1, PolicyRevision: 1, First: true}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var f freshness
			mustTake(t, &f, sallyport.Notice{Epoch: "e1", Revision: 10, PolicyRevision: 5, First: true})
			later := t0.Add(2 * time.Second)
			_, err := f.take(later, tt.notice)
			if (err == nil) != tt.ok || err != nil && !errors.Is(err, errBehind) {
				t.Fatalf("got %v; want ok %v", err, tt.ok)
			}
			if heard := f.heard.Equal(later); heard != tt.ok {
				t.Errorf("a refused notice counts as heard: %v", heard)
			}
		})
	}
}

func TestFreshnessClock(t *testing.T) {
	hear := func(f *freshness, at time.Time, age, maxStale time.Duration) {
		n := first(10)
		n.SourceAge, n.MaxStale = age, maxStale
		if _, err := f.take(at, n); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		name    string
		setup   func(f *freshness)
		after   time.Duration
		mayOpen bool
		stale   bool
	}{
		{"nothing heard", func(*freshness) {}, 0, false, true},
		{"just heard", func(f *freshness) { hear(f, t0, 0, 0) }, 0, true, false},
		{"silent for 3 s", func(f *freshness) { hear(f, t0, 0, 0) }, 3 * time.Second, true, false},
		{"silent for longer", func(f *freshness) { hear(f, t0, 0, 0) }, 3*time.Second + 1, false, false},
		{"30 s after the source spoke", func(f *freshness) { hear(f, t0, 0, 0) }, 30 * time.Second, false, false},
		{"later than that", func(f *freshness) { hear(f, t0, 0, 0) }, 30*time.Second + 1, false, true},
		{"heard, but the source is old", func(f *freshness) { hear(f, t0, 29*time.Second, 0) }, time.Second, true, false},
		{"age at sending and since then add up", func(f *freshness) { hear(f, t0, 29*time.Second, 0) }, time.Second + 1, false, true},
		{"configured bound", func(f *freshness) { hear(f, t0, 2*time.Second, 3*time.Second) }, time.Second + 1, false, true},
		{"policyd never heard its source", func(f *freshness) { hear(f, t0, -1, 0) }, 0, false, true},
		{"it heard it before it was restarted", func(f *freshness) { hear(f, t0, 0, 0); hear(f, t0.Add(time.Second), -1, 0) }, 2 * time.Second, false, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var f freshness
			tt.setup(&f)
			now := t0.Add(tt.after)
			if err := f.mayOpen(now); (err == nil) != tt.mayOpen {
				t.Errorf("mayOpen: got %v; want ok %v", err, tt.mayOpen)
			}
			if got := f.stale(now); got != tt.stale {
				t.Errorf("stale: got %v; want %v", got, tt.stale)
			}
		})
	}
}

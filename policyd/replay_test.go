package policyd

import (
	"testing"
	"time"

	"sallyport"
	"sallyport/policyd/policy"
)

// What the audit log keeps of any decision is enough to make it again: allowed
// and denied ones, logins, hidden and unknown targets, observed rules, carriers.
func TestAuditedDecisionsCanBeMadeAgain(t *testing.T) {
	watched := append([]sallyport.Route{{From: "tcp://watched.internal:1", Policy: `
- name: all
  allow: {or: [{authenticated_user: true}]}
- name: strict
  mode: observe
  deny: {or: [{device: {firewall: {is: false, max_age: 1m}}}, {claim/dept: x}]}
`}}, routes...)
	inSite(t, Config{}, watched, func(t *testing.T, s *site) {
		s.signIn("u2", "l2", "s2", "d2")
		s.groups("u2", "vault", "staff")
		ask := func() {
			for _, session := range []sallyport.SessionID{"s1", "s2", "s9", ""} {
				for _, to := range []string{"", db, vault, wiki, "tcp://watched.internal:1", "tcp://absent.internal:1"} {
					s.decide(session, to)
				}
			}
		}
		ask()
		if err := s.report("s1", map[string]any{"disk_encrypted": true, "firewall": false}); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			ask()
			pass(5*time.Minute + 300*time.Microsecond)
		}
		set := s.snap.Load().rules.set
		seen := map[sallyport.Verdict]int{}
		for _, r := range s.Server.audit.(*ledger).of(sallyport.AuditDecision) {
			seen[r.Decision.Verdict]++
			recording, err := policy.ReadRecording(&r)
			if err != nil {
				t.Fatal(err)
			}
			got := set.Replay(recording)
			if !got.Certain || got.Verdict != r.Decision.Verdict || r.Decision.Rule != "" && got.Rule != r.Decision.Rule {
				t.Errorf("%s to %q: got %+v; want %v by %q from %s", r.Session, r.Target, got, r.Decision.Verdict, r.Decision.Rule, r.Inputs)
			}
		}
		for _, v := range []sallyport.Verdict{sallyport.VerdictAllow, sallyport.VerdictDeny, sallyport.VerdictLogin, sallyport.VerdictNoRoute} {
			if seen[v] == 0 {
				t.Errorf("no decision was %v", v)
			}
		}
		// Other policies can be told of what only an observed rule looked at.
		strict, err := policy.Compile([]sallyport.Route{{From: "tcp://watched.internal:1", Policy: `allow: {and: [{device: {firewall: true}}]}`}}, policy.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range s.Server.audit.(*ledger).of(sallyport.AuditDecision) {
			if recording, err := policy.ReadRecording(&r); err != nil || r.Target == "tcp://watched.internal:1" && !strict.Replay(recording).Certain {
				t.Errorf("%s: %v, cannot be told from %s", r.Session, err, r.Inputs)
			}
		}
	})
}

// Whoever asks offline gets the answers of policyd itself.
func TestOfflineAnswersLikePolicyd(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		if err := s.report("s1", map[string]any{"disk_encrypted": true}); err != nil {
			t.Fatal(err)
		}
		s.signIn("u2", "l2", "s2", "d2")
		s.groups("u2", "staff")
		s.remove(sallyport.KindLogin, "l2")
		records, err := ReadPeople(t.Context(), s.cached)
		if err != nil {
			t.Fatal(err)
		}
		o, err := NewOffline(Config{}, *s.snap.Load().rules.config, records)
		if err != nil {
			t.Fatal(err)
		}
		for _, session := range []sallyport.SessionID{"s1", "s2", "s9"} {
			for _, to := range []string{"", db, vault, wiki} {
				q := question(session, to)
				d := s.decide(session, to)
				if a := o.Decide(q, time.Now()); a.Verdict != d.Verdict || a.Rule != d.Rule {
					t.Errorf("%s to %q: got %v by %q; want %v by %q", session, to, a.Verdict, a.Rule, d.Verdict, d.Rule)
				}
				if a := s.snap.Load().rules.set.Decide(o.Input(&q, time.Now())); a.Verdict != d.Verdict {
					t.Errorf("%s to %q: got %v of another set; want %v", session, to, a.Verdict, d.Verdict)
				}
			}
		}
	})
}

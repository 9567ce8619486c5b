package policyd

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport"
)

func subject(kind sallyport.SubjectKind, id string) sallyport.Revocation {
	return sallyport.Revocation{Subjects: []sallyport.Subject{{Kind: kind, ID: id}}, By: "root", Reason: "laptop stolen"}
}

// With cached away a direct revocation holds at once, and is durable as soon as
// cached is back, before its word counts as fresh.
func TestCase_M4_directRevocationWhileCachedIsAway(t *testing.T) {
	for _, tt := range []struct {
		kind sallyport.SubjectKind
		id   func(*site) string
		why  string
		dead []sallyport.SessionID
		live []sallyport.SessionID
	}{
		{"session", func(*site) string { return "s1" }, "session revoked", []sallyport.SessionID{"s1"}, []sallyport.SessionID{"s1b", "s2"}},
		{"login", func(*site) string { return "l1" }, "login revoked", []sallyport.SessionID{"s1"}, []sallyport.SessionID{"s1b", "s2"}},
		{"user", func(*site) string { return "u1" }, "login revoked", []sallyport.SessionID{"s1", "s1b"}, []sallyport.SessionID{"s2"}},
		{"device", func(s *site) string { return string(s.device) }, "device revoked", []sallyport.SessionID{"s1"}, []sallyport.SessionID{"s1b", "s2"}},
	} {
		t.Run(string(tt.kind), func(t *testing.T) {
			inSite(t, Config{}, routes, func(t *testing.T, s *site) {
				s.signIn("u1", "l1b", "s1b", "d1b")
				s.signIn("u2", "l2", "s2", "d2")
				gateway := s.watch()
				s.link.setDown(true)
				gateway.take()
				got, err := s.Revoke(t.Context(), subject(tt.kind, tt.id(s)))
				if err != nil {
					t.Fatal(err)
				}
				if got.Durable || got.Sessions != len(tt.dead) {
					t.Errorf("got %+v; want %d sessions, not durable", got, len(tt.dead))
				}
				check := func(when string) {
					t.Helper()
					for _, id := range tt.dead {
						if d := s.want(id, db, sallyport.VerdictLogin); when == "away" && d.Reasons[0].Found != tt.why {
							t.Errorf("%s: got %q; want %q", id, d.Reasons[0].Found, tt.why)
						}
					}
					for _, id := range tt.live {
						s.want(id, db, sallyport.VerdictAllow)
					}
				}
				check("away")
				if words := gateway.words(); !slices.Equal(words, []string{string(tt.kind) + ":" + tt.id(s) + ": " + tt.why}) {
					t.Errorf("gateways were told %q", words)
				}
				s.link.setDown(false)
				pass(3 * time.Second)
				check("back")
				if n := len(s.revoked.Load().all); n != 0 {
					t.Errorf("%d overrides are kept though cached has them", n)
				}
				for _, id := range tt.dead {
					if _, err := s.cached.Get(t.Context(), sallyport.KindSession, string(id)); !errors.Is(err, sallyport.ErrNotFound) {
						t.Errorf("%s in cached: %v; want not found", id, err)
					}
				}
				// Another policyd, started now, sees the same.
				other := startPolicyd(t, Config{}, s.link, s.Server.audit)
				synctest.Wait()
				ds, err := other.Authorize(t.Context(), []sallyport.Request{question(tt.dead[0], db), question("s2", db)})
				if err != nil || ds[0].Allowed() || !ds[1].Allowed() {
					t.Errorf("another policyd: %v, %v", ds, err)
				}
			})
		})
	}
}

// Until the revocation is written, what cached says does not count as fresh.
func TestReplayComesBeforeFreshness(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		s.link.setDown(true)
		if _, err := s.Revoke(t.Context(), subject("session", "s1")); err != nil {
			t.Fatal(err)
		}
		s.link.setStuck(true)
		s.link.setDown(false)
		pass(20 * time.Second)
		if age := s.sourceAge(); age < 20*time.Second {
			t.Errorf("source age %v while the revocation is not written; want it to grow", age)
		}
		s.want("s1", db, sallyport.VerdictLogin)
		pass(12 * time.Second)
		s.refused("policy.stale")
		s.link.setStuck(false)
		pass(5 * time.Second)
		s.want("s1", db, sallyport.VerdictLogin)
		if age := s.sourceAge(); age > 2*time.Second {
			t.Errorf("source age %v afterwards", age)
		}
	})
}

// With cached in reach a direct revocation is durable when it returns.
func TestDirectRevocationWithCachedInReach(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		got, err := s.Revoke(t.Context(), subject("user", "u1"))
		if err != nil || !got.Durable || got.Sessions != 1 || got.Revision == 0 {
			t.Errorf("got %+v, %v; want one session, durable", got, err)
		}
		s.want("s1", db, sallyport.VerdictLogin)
		synctest.Wait()
		// N9: a new login lives, the old session never again.
		s.signIn("u1", "l9", "s9", s.device)
		s.want("s9", db, sallyport.VerdictAllow)
		s.want("s1", db, sallyport.VerdictLogin)
		audited := s.Server.audit.(*ledger).of(sallyport.AuditRevocation)
		if len(audited) != 1 || audited[0].User != "u1" || audited[0].Detail != "direct: user:u1 by root: laptop stolen" {
			t.Errorf("audited %+v", audited)
		}
	})
}

// What cached knows and has not told yet is revoked there too: a session that was
// made milliseconds before, by whatever it is named.
func TestCase_M4_DirectRevocationOfWhatIsOnItsWay(t *testing.T) {
	for _, tt := range []struct {
		kind   sallyport.SubjectKind
		id     string
		others sallyport.Verdict
	}{
		{"session", "s7", sallyport.VerdictAllow},
		{"login", "l7", sallyport.VerdictAllow},
		{"user", "u1", sallyport.VerdictLogin},
		{"device", "d7", sallyport.VerdictAllow},
	} {
		t.Run(string(tt.kind), func(t *testing.T) {
			inSite(t, Config{}, routes, func(t *testing.T, s *site) {
				thaw := s.link.freeze()
				s.signIn("u1", "l7", "s7", "d7")
				if _, err := s.Revoke(t.Context(), subject(tt.kind, tt.id)); err != nil {
					t.Fatal(err)
				}
				thaw()
				for range 3 {
					pass(time.Second)
					s.want("s7", db, sallyport.VerdictLogin)
				}
				s.want("s1", db, tt.others)
			})
		})
	}
}

// A revocation is told and holds even before there is any snapshot, and even if
// it cannot be audited.
func TestRevocationBeforeTheFirstSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &script{}
		log := &ledger{broken: errors.New("disk full")}
		s := &site{Server: startPolicyd(t, Config{MaxStale: time.Hour}, &stuckScript{fake}, log), t: t}
		if _, err := s.Revoke(t.Context(), subject("session", "s1")); err != nil {
			t.Fatal(err)
		}
		live := liveRecords(time.Now())
		fake.play([]sallyport.WatchEvent{
			{Type: sallyport.WatchBegin, Epoch: "e", Revision: 5},
			{Type: sallyport.WatchItems, Epoch: "e", Records: live},
			{Type: sallyport.WatchEnd, Epoch: "e", Revision: 5, Count: len(live)},
		})
		pass(3 * time.Second)
		log.set(nil, false)
		// cached takes no revocation, so its word never counts and nothing is answered.
		s.refused("policy.stale")
	})
}

type stuckScript struct{ *script }

func (*stuckScript) Revoke(context.Context, sallyport.Revocation) (sallyport.Revoked, error) {
	return sallyport.Revoked{}, errCut
}

func TestRevocationOfNothing(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		for name, r := range map[string]sallyport.Revocation{
			"no subject": {},
			"policy":     {Subjects: []sallyport.Subject{{Kind: sallyport.SubjectPolicy}}},
			"no id":      {Subjects: []sallyport.Subject{{Kind: sallyport.SubjectSession}}},
			"no real id": {Subjects: []sallyport.Subject{{Kind: sallyport.SubjectSession, ID: "s1\x00"}}},
			"a long id":  {Subjects: []sallyport.Subject{{Kind: sallyport.SubjectLogin, ID: strings.Repeat("l", 256)}}},
			"too many":   {Subjects: make([]sallyport.Subject, maxSubjects+1)},
		} {
			if _, err := s.Revoke(t.Context(), r); sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
				t.Errorf("%s: got %v; want a usage error", name, err)
			}
		}
		got, err := s.Revoke(t.Context(), subject("session", "unknown"))
		if err != nil || got.Sessions != 0 || !got.Durable {
			t.Errorf("an unknown session: got %+v, %v", got, err)
		}
		s.want("s1", db, sallyport.VerdictAllow)
	})
}

// A store restored from a backup does not know what was revoked: it is told again.
func TestOverrideSurvivesANewEpoch(t *testing.T) {
	o := &override{subject: sallyport.Subject{Kind: "session", ID: "s1"}, done: make(chan struct{}), epoch: "e", revision: 7}
	close(o.done)
	s := &Server{}
	s.revoked.Store(newOverrides([]*override{o}))
	s.settle(&snapshot{epoch: "e", revision: 6})
	if s.revoked.Load().pending() || len(s.revoked.Load().all) != 1 {
		t.Error("written, not seen yet: it must be kept and not written again")
	}
	s.settle(&snapshot{epoch: "e2", revision: 9})
	if !s.revoked.Load().pending() {
		t.Error("in another epoch it must be written again")
	}
	o = s.revoked.Load().all[0]
	o.epoch, o.revision = "e2", 10
	close(o.done)
	s.settle(&snapshot{epoch: "e2", revision: 10})
	if len(s.revoked.Load().all) != 0 {
		t.Error("seen: it must go")
	}
}

package policyd

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport"

	"github.com/google/go-cmp/cmp"
)

// inWindow runs f at a site whose bubble begins at midnight of Saturday, 1 January
// 2000, with one route that has the policy.
func inWindow(t *testing.T, policy string, f func(*testing.T, *site)) {
	inSite(t, Config{}, []sallyport.Route{{From: db, Policy: policy}}, f)
}

// A window admits and cuts at its second; until then the answer holds, and it says
// for how long.
func TestCase_I13_windowsAdmitAndCutAtTheirSecond(t *testing.T) {
	for name, tt := range map[string]struct {
		policy         string
		opens, lasting time.Duration // since the start
		condition      string
	}{
		"time_of_day": {"{name: w, allow: {and: [{time_of_day: {timezone: Europe/Berlin, after: 2:00, before: 4:00}}, {groups: dba}]}}", time.Hour + 1, 2*time.Hour - 1, "time_of_day"},
		"day_of_week": {"{name: w, allow: {and: [{day_of_week: {is: sun, timezone: America/New_York}}, {groups: dba}]}}", 29 * time.Hour, 24 * time.Hour, "day_of_week"},
		"date":        {"{name: w, allow: {and: [{date: {after: 2000-01-01T00:10:00, before: 2000-01-01T00:20:00+00:00}}, {groups: dba}]}}", 10*time.Minute + 1, 10*time.Minute - 1, "date"},
	} {
		t.Run(name, func(t *testing.T) {
			inWindow(t, tt.policy, func(t *testing.T, s *site) {
				s.signInFor("s2", 100*time.Hour)
				start := time.Now()
				d := s.want("s2", db, sallyport.VerdictDeny)
				if d.ValidFor != tt.opens {
					t.Errorf("closed for %v; want %v", d.ValidFor, tt.opens)
				}
				pass(d.ValidFor - 1)
				s.want("s2", db, sallyport.VerdictDeny)
				pass(1)
				d = s.want("s2", db, sallyport.VerdictAllow)
				if d.ValidFor != tt.lasting {
					t.Errorf("open for %v; want %v", d.ValidFor, tt.lasting)
				}
				pass(d.ValidFor - 1)
				s.want("s2", db, sallyport.VerdictAllow)
				pass(1)
				d = s.want("s2", db, sallyport.VerdictDeny)
				if got := time.Since(start); got != tt.opens+tt.lasting {
					t.Errorf("closed after %v; want %v", got, tt.opens+tt.lasting)
				}
				if len(d.Reasons) != 1 || d.Reasons[0].Condition != tt.condition {
					t.Errorf("reasons %+v; want one for %s", d.Reasons, tt.condition)
				}
			})
		})
	}
}

// signInFor makes a session s of a login of its own that lives for d.
func (s *site) signInFor(session sallyport.SessionID, d time.Duration) {
	s.t.Helper()
	now := time.Now()
	login := "login-of-" + sallyport.LoginID(session)
	s.apply(
		sallyport.Put(sallyport.KindLogin, string(login), sallyport.Login{ID: login, User: "u1", Created: now, Expires: now.Add(d), AuthMethods: []string{"pwd"}}),
		sallyport.Put(sallyport.KindSession, string(session), sallyport.Session{
			ID: session, Login: login, User: "u1", Device: s.device, Created: now, Expires: now.Add(d), AuthMethods: []string{"pwd"},
		}),
	)
}

// A login grows too old at its second, and a new one, as "agent extend" makes it,
// admits again: the login is told to have changed.
func TestSessionAgeCutsAtItsSecond(t *testing.T) {
	inWindow(t, `{name: fresh, allow: {and: [{session_age: {"<": 1h}}]}}`, func(t *testing.T, s *site) {
		d := s.want("s1", db, sallyport.VerdictAllow)
		if d.ValidFor != time.Hour {
			t.Errorf("valid for %v; want 1h", d.ValidFor)
		}
		pass(d.ValidFor - 1)
		s.want("s1", db, sallyport.VerdictAllow)
		pass(1)
		d = s.want("s1", db, sallyport.VerdictDeny)
		want := [][]sallyport.Remedy{{{Condition: "session_age", Want: "less than 1h", Hint: "log in again: agent extend"}}}
		if diff := cmp.Diff(want, d.WouldAllowIf); diff != "" {
			t.Errorf("would_allow_if -want +got:\n%s", diff)
		}
		now := time.Now()
		s.put(sallyport.KindLogin, "l1", sallyport.Login{ID: "l1", User: "u1", Created: now.Add(-time.Hour), Authenticated: now, Expires: now.Add(12 * time.Hour)})
		if d := s.want("s1", db, sallyport.VerdictAllow); d.ValidFor != time.Hour {
			t.Errorf("after a new login valid for %v; want 1h", d.ValidFor)
		}
	})
}

// An external record that changes, comes, goes or ends by itself changes decisions
// on live flows: they depend on it, and gateways are told.
func TestARecordThatChangesCuts(t *testing.T) {
	inWindow(t, `{name: calm, allow: {and: [{record: {type: risk, field: score, "<": 10}}]}, deny: {and: [{record: {type: tor, of: peer, exists: true}}]}}`, func(t *testing.T, s *site) {
		risk := sallyport.Subject{Kind: sallyport.SubjectRecord, ID: "risk/u1"}
		tor := sallyport.Subject{Kind: sallyport.SubjectRecord, ID: "tor/192.0.2.7"}
		gateway := s.watch()
		score := func(n float64) {
			s.put(sallyport.KindRecord, "risk/u1", sallyport.External{Type: "risk", ID: "u1", Fields: map[string]any{"score": n}})
		}
		told := func(want ...string) {
			t.Helper()
			if got := gateway.words(); !slices.Equal(got, want) {
				t.Errorf("gateways were told %q; want %q", got, want)
			}
		}
		d := s.want("s1", db, sallyport.VerdictDeny)
		if !slices.Contains(d.DependsOn, risk) || !slices.Contains(d.DependsOn, tor) || !d.DependsOnPeer {
			t.Errorf("depends on %v; want %v and %v, which do not exist yet, and the peer", d.DependsOn, risk, tor)
		}
		gateway.take()
		score(5)
		told("record:risk/u1: record risk added")
		d = s.want("s1", db, sallyport.VerdictAllow)
		if !slices.Contains(d.DependsOn, risk) || !slices.Contains(d.DependsOn, tor) {
			t.Errorf("depends on %v", d.DependsOn)
		}
		score(15)
		told("record:risk/u1: record risk changed")
		d = s.want("s1", db, sallyport.VerdictDeny)
		if d.Reasons[0].Condition != "record.risk.score" || d.Reasons[0].Found != "15" {
			t.Errorf("got %+v", d.Reasons)
		}
		score(9.5)
		s.put(sallyport.KindRecord, "tor/192.0.2.7", sallyport.External{Type: "tor", ID: "192.0.2.7"})
		s.want("s1", db, sallyport.VerdictDeny)
		s.remove(sallyport.KindRecord, "tor/192.0.2.7")
		s.want("s1", db, sallyport.VerdictAllow)
		gateway.take()
		s.remove(sallyport.KindRecord, "risk/u1")
		told("record:risk/u1: record risk removed")
		s.want("s1", db, sallyport.VerdictDeny)

		op := sallyport.Put(sallyport.KindRecord, "risk/u1", sallyport.External{Type: "risk", ID: "u1", Fields: map[string]any{"score": 1}})
		op.Expires = time.Now().Add(time.Minute)
		s.apply(op)
		if d := s.want("s1", db, sallyport.VerdictAllow); d.ValidFor != time.Minute {
			t.Errorf("on a record that ends in a minute: valid for %v", d.ValidFor)
		}
		pass(time.Minute)
		s.want("s1", db, sallyport.VerdictDeny)
	})
}

// A batch of denials with twelve facts each, whose search has everything to try,
// stays below the decision timeout, and says the same as each question alone.
func TestABatchOfDenialsIsInTime(t *testing.T) {
	var b strings.Builder
	b.WriteString("- {name: groups, allow: {and: [{groups: nobody}]}}\n")
	for i := range 50 {
		fmt.Fprintf(&b, "- {name: r%d, allow: {and: [{device: {f%d: true}}, {device: {f%d: true}}, {device: {f%d: true}}, {device: {f%d: false}}]}}\n",
			i, i%11, (i*5+1)%11, (i*7+2)%11, i%11)
	}
	b.WriteString("- {name: easy, allow: {and: [{groups: dba}, {device: {firewall: true}}]}}\n")
	now := time.Now()
	draft := (&snapshot{}).edit(Config{}.withDefaults(), now)
	for _, r := range liveRecords(now) {
		draft.apply(r)
	}
	for _, op := range []sallyport.Op{
		sallyport.Put(sallyport.KindConfig, "current", sallyport.Config{Routes: []sallyport.Route{{From: db, Policy: b.String()}}}),
		sallyport.Put(sallyport.KindSession, "s1", sallyport.Session{ID: "s1", Login: "l1", User: "u1", Device: "d1", Expires: now.Add(time.Hour)}),
		sallyport.Put(sallyport.KindDevice, "d1", sallyport.Device{ID: "d1"}),
	} {
		draft.apply(sallyport.Record{Kind: op.Kind, ID: op.ID, Version: 1, Payload: op.Payload, Revision: 4})
	}
	v := view{draft.finish(), &overrides{}, now}
	q := question("s1", db)
	alone := (&asker{view: v}).decide(&q)
	if alone.Verdict != sallyport.VerdictDeny || len(alone.WouldAllowIf) == 0 {
		t.Fatalf("got %v %v with %v; want a denial with a remedy", alone.Verdict, v.broken, alone.WouldAllowIf)
	}
	a := asker{view: v}
	all := make([]sallyport.Decision, 512)
	start := time.Now()
	for i := range all {
		all[i] = a.decide(&q)
	}
	took := time.Since(start)
	t.Logf("512 denials in %v", took)
	// It is some 50 ms of work; the rest is for busy machines and the race detector.
	if most := (Config{}).withDefaults().DecisionTimeout; took > most {
		t.Errorf("512 denials took %v; want less than %v", took, most)
	}
	for _, d := range []sallyport.Decision{all[0], all[511]} {
		d.ID, d.WouldAllowIf = alone.ID, alone.WouldAllowIf
		if diff := cmp.Diff(alone, d); diff != "" {
			t.Fatalf("in a batch -alone +got:\n%s", diff)
		}
	}
}

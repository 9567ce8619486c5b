package policyd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport"

	"github.com/google/go-cmp/cmp"
)

const (
	db    = "tcp://db.internal:5432"
	vault = "tcp://vault.internal:8200"
	wiki  = "tcp://wiki.internal:80"
)

var routes = []sallyport.Route{
	{From: db, To: "tcp://10.0.3.7:5432", Name: "db", Carrier: "bulk", Policy: `
- name: dba
  allow: {and: [{groups: {has: dba}}]}
`},
	{From: vault, Hidden: true, Policy: `
- name: vault
  allow: {and: [{groups: {has: vault}}, {device: {disk_encrypted: true}}]}
`},
	{From: wiki, Policy: `
- name: secure
  allow: {and: [{device: {disk_encrypted: true}}, {authenticated_user: true}]}
`},
}

func TestAllow(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		d := s.want("s1", db, sallyport.VerdictAllow)
		snap := s.snap.Load()
		want := sallyport.Decision{
			ID: d.ID, Verdict: sallyport.VerdictAllow, Rule: "dba", Route: db, Carrier: "bulk", ValidFor: 8 * time.Hour,
			DependsOn: []sallyport.Subject{
				{Kind: "session", ID: "s1"}, {Kind: "login", ID: "l1"}, {Kind: "user", ID: "u1"}, {Kind: "device", ID: string(s.device)}, {Kind: "policy"},
			},
			Upstream: sallyport.Upstream{Network: "tcp", Host: "10.0.3.7", Port: 5432, Literal: true},
			Epoch:    snap.epoch, AsOf: snap.revision, PolicyRevision: 1,
			Who: sallyport.Identity{
				Session: "s1", Login: "l1", User: "u1", Email: "u1@corp.example", Name: "Name u1",
				Groups: []string{"dba"}, Device: s.device, ExpiresIn: 8 * time.Hour,
			},
		}
		if diff := cmp.Diff(want, d); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if !strings.HasPrefix(string(d.ID), "d-") || len(d.ID) != 18 || d.ID == s.decide("s1", db).ID {
			t.Errorf("decision id %q: want d- and 80 random bits, new each time", d.ID)
		}
		if snap.revision == 0 || snap.epoch == "" {
			t.Errorf("epoch %q, revision %d", snap.epoch, snap.revision)
		}
	})
}

func TestAnswersComeInOrder(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		s.signIn("u2", "l2", "s2", "d2")
		s.groups("u2", "staff")
		ds, err := s.Authorize(t.Context(), []sallyport.Request{
			question("s2", db), question("s1", ""), question("s1", db), question("s9", ""), question("s1", vault), question("s1", "tcp://10.0.3.7:5432"),
		})
		if err != nil {
			t.Fatal(err)
		}
		var got []sallyport.Verdict
		for _, d := range ds {
			got = append(got, d.Verdict)
		}
		want := []sallyport.Verdict{
			sallyport.VerdictDeny, sallyport.VerdictAllow, sallyport.VerdictAllow, sallyport.VerdictLogin, sallyport.VerdictNoRoute,
			sallyport.VerdictNoRoute, // G9: an address where only names are granted
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if ds[0].Who.User != "u2" || ds[2].Who.User != "u1" || ds[3].Who.User != "" {
			t.Errorf("identities are mixed up: %q, %q, %q", ds[0].Who.User, ds[2].Who.User, ds[3].Who.User)
		}
		if ds[0].Upstream != (sallyport.Upstream{}) {
			t.Errorf("a denial names the upstream %+v", ds[0].Upstream)
		}
	})
}

func TestDenialSaysWhyAndWhatHelps(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		if err := s.report("s1", map[string]any{"disk_encrypted": false}); err != nil {
			t.Fatal(err)
		}
		pass(9 * time.Second)
		d := s.want("s1", wiki, sallyport.VerdictDeny)
		wantReasons := []sallyport.Reason{{
			Rule: "secure", Condition: "device.disk_encrypted", Wanted: "is true", Found: "false", Age: 9 * time.Second, Result: "false",
		}}
		wantFix := [][]sallyport.Remedy{{{Condition: "device.disk_encrypted", Want: "true", Hint: "turn on disk encryption"}}}
		if diff := cmp.Diff(wantReasons, d.Reasons); diff != "" {
			t.Errorf("reasons -want +got:\n%s", diff)
		}
		if diff := cmp.Diff(wantFix, d.WouldAllowIf); diff != "" {
			t.Errorf("would_allow_if -want +got:\n%s", diff)
		}
	})
}

// Whatever of session, login, user and device is gone, over or somebody else's:
// there is no session, and the reason says so.
func TestASessionIsLiveOnlyWithAllThatStandsBehindIt(t *testing.T) {
	now := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC) // where bubbles start
	for _, tt := range []struct {
		name, want string
		change     func(*site)
	}{
		{"session gone", "session revoked", func(s *site) { s.remove(sallyport.KindSession, "s1") }},
		{"login gone", "login revoked", func(s *site) { s.remove(sallyport.KindLogin, "l1") }},
		{"user gone", "user removed", func(s *site) { s.remove(sallyport.KindUser, "u1") }},
		{"user disabled", "user disabled", func(s *site) { s.put(sallyport.KindUser, "u1", sallyport.User{ID: "u1", Disabled: true}) }},
		{"device gone", "device removed", func(s *site) { s.remove(sallyport.KindDevice, string(s.device)) }},
		{"device revoked", "device revoked", func(s *site) {
			s.put(sallyport.KindDevice, string(s.device), sallyport.Device{ID: s.device, Revoked: true})
		}},
		{"session over", "session expired", func(s *site) { pass(8 * time.Hour) }},
		{"login over", "login expired", func(s *site) {
			s.put(sallyport.KindLogin, "l1", sallyport.Login{ID: "l1", User: "u1", Expires: now.Add(time.Minute)})
			pass(time.Minute)
		}},
		{"login without an end", "login expired", func(s *site) { s.put(sallyport.KindLogin, "l1", sallyport.Login{ID: "l1", User: "u1"}) }},
		{"session without an end", "session expired", func(s *site) {
			s.put(sallyport.KindSession, "s1", sallyport.Session{ID: "s1", Login: "l1", User: "u1", Device: s.device})
		}},
		{"somebody else's login", "login revoked", func(s *site) {
			s.put(sallyport.KindLogin, "l1", sallyport.Login{ID: "l1", User: "u2", Expires: now.Add(time.Hour)})
		}},
		{"session without a login", "login revoked", func(s *site) {
			s.put(sallyport.KindSession, "s1", sallyport.Session{ID: "s1", User: "u1", Expires: now.Add(time.Hour)})
		}},
		{"record over before its payload", "session revoked", func(s *site) {
			op := sallyport.Put(sallyport.KindSession, "s1", sallyport.Session{ID: "s1", Login: "l1", User: "u1", Expires: now.Add(time.Hour)})
			op.Expires = time.Now().Add(time.Minute)
			s.apply(op)
			s.want("s1", "", sallyport.VerdictAllow)
			pass(2 * time.Minute) // cached sweeps it meanwhile
		}},
		{"a session under another's id", "session revoked", func(s *site) {
			s.signIn("u2", "l2", "s2", "d2")
			r, err := s.cached.Get(s.t.Context(), sallyport.KindSession, "s2")
			if err != nil {
				s.t.Fatal(err)
			}
			s.apply(sallyport.Op{Kind: sallyport.KindSession, ID: "s1", Payload: r.Payload})
		}},
		{"unreadable session", "session revoked", func(s *site) {
			s.apply(sallyport.Op{Kind: sallyport.KindSession, ID: "s1", Payload: []byte(`{"id":5}`)})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inSite(t, Config{}, routes, func(t *testing.T, s *site) {
				s.want("s1", db, sallyport.VerdictAllow)
				tt.change(s)
				for _, to := range []string{"", db, vault, "tcp://nowhere.internal:1"} {
					d := s.want("s1", to, sallyport.VerdictLogin)
					if len(d.Reasons) != 1 || d.Reasons[0].Condition != "session" || d.Reasons[0].Found != tt.want {
						t.Errorf("%s: got %+v; want %q", to, d.Reasons, tt.want)
					}
					if d.Who.User != "" || d.Who.Groups != nil {
						t.Errorf("%s: tells who: %+v", to, d.Who)
					}
				}
			})
		})
	}
}

// An expired record reads as missing from that instant on, also before cached
// has swept it away.
func TestExpiryNeedsNoSweep(t *testing.T) {
	inSite(t, Config{MaxStale: time.Hour}, routes, func(t *testing.T, s *site) {
		op := sallyport.Put(sallyport.KindUser, "u1", sallyport.User{ID: "u1"})
		op.Expires = time.Now().Add(time.Minute)
		s.apply(op)
		s.want("s1", db, sallyport.VerdictAllow)
		s.link.freeze()
		pass(time.Minute)
		s.want("s1", db, sallyport.VerdictLogin)
	})
}

func TestCase_M1_noAnswerBeforeACompleteSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &script{}
		s := &site{Server: startPolicyd(t, Config{}, fake, &ledger{}), t: t}
		live := liveRecords(time.Now())
		for name, events := range map[string][]sallyport.WatchEvent{
			"nothing":         nil,
			"only begun":      {{Type: sallyport.WatchBegin, Epoch: "e", Revision: 5}},
			"no end":          {{Type: sallyport.WatchBegin, Epoch: "e", Revision: 5}, {Type: sallyport.WatchItems, Epoch: "e", Records: live}},
			"one missing":     {{Type: sallyport.WatchBegin, Epoch: "e", Revision: 5}, {Type: sallyport.WatchItems, Epoch: "e", Records: live}, {Type: sallyport.WatchEnd, Epoch: "e", Revision: 5, Count: len(live) + 1}},
			"end of another":  {{Type: sallyport.WatchEnd, Epoch: "e", Revision: 5}},
			"only heartbeats": {{Type: sallyport.WatchHeartbeat, Epoch: "e", Revision: 5}},
			"a change":        {{Type: sallyport.WatchChange, Epoch: "e", Revision: 5, Records: live}},
			"mixed epochs":    {{Type: sallyport.WatchBegin, Epoch: "e", Revision: 5}, {Type: sallyport.WatchItems, Epoch: "f", Records: live}},
		} {
			fake.play(events)
			pass(3 * time.Second)
			if _, err := s.Authorize(t.Context(), []sallyport.Request{question("s1", db)}); sallyport.CodeOf(err) != "policy.source" {
				t.Errorf("%s: got %v; want policy.source", name, err)
			}
			if s.Ready() == nil {
				t.Errorf("%s: ready", name)
			}
		}
		fake.play([]sallyport.WatchEvent{
			{Type: sallyport.WatchBegin, Epoch: "e", Revision: 5},
			{Type: sallyport.WatchItems, Epoch: "e", Records: live},
			{Type: sallyport.WatchEnd, Epoch: "e", Revision: 5, Count: len(live)},
		})
		pass(3 * time.Second)
		s.want("s1", db, sallyport.VerdictAllow)
		if err := s.Ready(); err != nil {
			t.Error(err)
		}
	})
}

// script plays events to whoever watches, and keeps the stream open afterwards.
type script struct {
	Cached // the other methods are not called

	mu     sync.Mutex
	events []sallyport.WatchEvent
	asked  []sallyport.WatchRequest
	end    chan struct{}
}

// play replaces the events; the stream that is open breaks.
func (s *script) play(events []sallyport.WatchEvent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = events
	if s.end != nil {
		close(s.end)
	}
	s.end = make(chan struct{})
}

func (s *script) Watch(ctx context.Context, q sallyport.WatchRequest, each func(sallyport.WatchEvent) error) error {
	s.mu.Lock()
	if s.end == nil {
		s.end = make(chan struct{})
	}
	events, end := s.events, s.end
	s.asked = append(s.asked, q)
	s.mu.Unlock()
	for _, e := range events {
		if err := each(e); err != nil {
			return err
		}
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-end:
		return errors.New("broken")
	}
}

// liveRecords are alice's, and the routes.
func liveRecords(now time.Time) []sallyport.Record {
	var out []sallyport.Record
	for _, op := range []sallyport.Op{
		sallyport.Put(sallyport.KindConfig, "current", sallyport.Config{Routes: routes}),
		sallyport.Put(sallyport.KindUser, "u1", sallyport.User{ID: "u1"}),
		sallyport.Put(sallyport.KindDirectoryUser, "u1", sallyport.DirectoryUser{User: "u1", Groups: []sallyport.Group{{ID: "dba"}}}),
		sallyport.Put(sallyport.KindLogin, "l1", sallyport.Login{ID: "l1", User: "u1", Expires: now.Add(time.Hour)}),
		sallyport.Put(sallyport.KindSession, "s1", sallyport.Session{ID: "s1", Login: "l1", User: "u1", Expires: now.Add(time.Hour)}),
	} {
		out = append(out, sallyport.Record{Kind: op.Kind, ID: op.ID, Version: 1, Payload: op.Payload, Revision: 3})
	}
	return out
}

// A new snapshot under way changes nothing until its end: neither does what is
// not in it live on afterwards.
func TestSnapshotIsSwappedOnlyAtItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		live := liveRecords(time.Now())
		full := []sallyport.WatchEvent{
			{Type: sallyport.WatchBegin, Epoch: "e", Revision: 5},
			{Type: sallyport.WatchItems, Epoch: "e", Records: live},
			{Type: sallyport.WatchEnd, Epoch: "e", Revision: 5, Count: len(live)},
		}
		fake := &script{}
		fake.play(full)
		s := &site{Server: startPolicyd(t, Config{}, fake, &ledger{}), t: t}
		synctest.Wait()
		s.want("s1", db, sallyport.VerdictAllow)

		without := slices.DeleteFunc(slices.Clone(live), func(r sallyport.Record) bool { return r.Kind == sallyport.KindSession })
		again := []sallyport.WatchEvent{
			{Type: sallyport.WatchBegin, Epoch: "e2", Revision: 2}, {Type: sallyport.WatchItems, Epoch: "e2", Records: without},
		}
		fake.play(again)
		pass(time.Second)
		if d := s.want("s1", db, sallyport.VerdictAllow); d.Epoch != "e" {
			t.Errorf("epoch %q before the end of the new snapshot", d.Epoch)
		}
		fake.play(append(again, sallyport.WatchEvent{Type: sallyport.WatchEnd, Epoch: "e2", Revision: 2, Count: len(without)}))
		pass(2 * time.Second)
		if d := s.want("s1", db, sallyport.VerdictLogin); d.Epoch != "e2" || d.AsOf != 2 {
			t.Errorf("got epoch %q, revision %d; want e2, 2", d.Epoch, d.AsOf)
		}
	})
}

func TestNoPolicyIsNoAllow(t *testing.T) {
	inSite(t, Config{}, nil, func(t *testing.T, s *site) {
		s.refused("policy.none")
		if sallyport.CodeOf(s.Ready()) != "policy.none" {
			t.Errorf("ready: %v; want policy.none", s.Ready())
		}
		s.put(sallyport.KindConfig, "current", sallyport.Config{Routes: []sallyport.Route{{From: db, Policy: "alow: 1"}}})
		s.refused("policy.none")
		s.put(sallyport.KindConfig, "current", sallyport.Config{})
		s.want("s1", db, sallyport.VerdictNoRoute)
	})
}

func TestCase_I10_brokenConfigurationKeepsTheOld(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		gateway := s.watch()
		gateway.take()
		for name, spoil := range map[string]func(){
			"policy": func() {
				s.put(sallyport.KindConfig, "current", sallyport.Config{Routes: []sallyport.Route{{From: db, Policy: "allow: {or: [{accept: false}]}"}}})
			},
			"metadata": func() {
				s.put(sallyport.KindConfig, "current", sallyport.Config{Routes: []sallyport.Route{{From: db, To: "tcp://169.254.169.254:80", Policy: "allow: {or: [{accept: true}]}"}}})
			},
			"payload": func() {
				s.apply(sallyport.Op{Kind: sallyport.KindConfig, ID: "current", Payload: []byte(`{"routes":7}`)})
			},
			"removed": func() { s.remove(sallyport.KindConfig, "current") },
		} {
			before := len(s.Server.audit.(*ledger).of(sallyport.AuditPolicyBroken))
			spoil()
			d := s.want("s1", db, sallyport.VerdictAllow)
			if d.Rule != "dba" || d.PolicyRevision != 1 {
				t.Errorf("%s: decided by %q of policy revision %d; want the old one", name, d.Rule, d.PolicyRevision)
			}
			if err := s.Ready(); sallyport.CodeOf(err) != "policy.stale" {
				t.Errorf("%s: ready: %v; want policy.stale", name, err)
			}
			if s.gauge(func(snap *snapshot) float64 { return oneIf(snap.broken != nil) }) != 1 {
				t.Errorf("%s: the figure does not show it", name)
			}
			if got := len(s.Server.audit.(*ledger).of(sallyport.AuditPolicyBroken)) - before; got != 1 {
				t.Errorf("%s: %d policy.broken records; want 1", name, got)
			}
			if got := gateway.words(); len(got) != 0 {
				t.Errorf("%s: gateways were told %q; want nothing", name, got)
			}
		}
		// Also across a new snapshot of cached.
		s.link.setDown(true)
		s.link.setDown(false)
		pass(time.Second)
		s.want("s1", db, sallyport.VerdictAllow)
		if sallyport.CodeOf(s.Ready()) != "policy.stale" {
			t.Errorf("ready after a reconnect: %v; want policy.stale", s.Ready())
		}
		s.put(sallyport.KindConfig, "current", sallyport.Config{Routes: routes[2:]})
		s.want("s1", db, sallyport.VerdictNoRoute)
		if err := s.Ready(); err != nil {
			t.Errorf("ready after the repair: %v", err)
		}
		if got := gateway.words(); !slices.Contains(got, "policy: policy changed") {
			t.Errorf("gateways were told %q", got)
		}
	})
}

func TestStaleSourceIsRefused(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		gateway := s.watch()
		thaw := s.link.freeze()
		gateway.take()
		pass(30 * time.Second) // the last heartbeat came a moment before
		s.want("s1", db, sallyport.VerdictAllow)
		all := gateway.take()
		if len(all) < 29 {
			t.Fatalf("%d notices in 30 s; want one each second", len(all))
		}
		last := all[len(all)-1]
		if last.SourceAge < 29*time.Second || last.MaxStale != 30*time.Second {
			t.Errorf("told source age %v of at most %v; want 30 s of 30 s", last.SourceAge, last.MaxStale)
		}
		pass(2 * time.Second)
		s.refused("policy.stale")
		if sallyport.CodeOf(s.Ready()) != "policy.stale" {
			t.Errorf("ready: %v; want policy.stale", s.Ready())
		}
		thaw()
		pass(3 * time.Second)
		s.want("s1", db, sallyport.VerdictAllow)
	})
}

// After a broken stream the next one goes on where the last one ended, and what
// changed meanwhile is told.
func TestReconnectContinues(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		gateway := s.watch()
		at := s.snap.Load().revision
		s.link.setDown(true)
		s.groups("u1", "staff")
		s.remove(sallyport.KindSession, "s1")
		gateway.take()
		s.want("s1", db, sallyport.VerdictAllow) // it cannot know yet
		s.link.setDown(false)
		pass(2 * time.Second)
		if q := s.link.lastWatch(); q.Since != at || q.Epoch == "" {
			t.Errorf("the stream was continued from %q, %d; want %d", q.Epoch, q.Since, at)
		}
		s.want("s1", db, sallyport.VerdictLogin)
		want := []string{"session:s1: session revoked", `user:u1: group "dba" removed, group "staff" added`}
		if diff := cmp.Diff(want, gateway.words()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}

// A stream that works stays: heartbeats keep it.
func TestHealthyStreamStays(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		pass(time.Minute)
		s.link.mu.Lock()
		defer s.link.mu.Unlock()
		if n := len(s.link.watches); n != 1 {
			t.Errorf("%d streams in a minute; want one", n)
		}
	})
}

// What was told already is not taken again: it may be older than what is there.
func TestOldChangeIsIgnored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		live := liveRecords(time.Now())
		gone := live[4]
		gone.Deleted, gone.Payload = true, nil
		fake := &script{}
		fake.play([]sallyport.WatchEvent{
			{Type: sallyport.WatchBegin, Epoch: "e", Revision: 5},
			{Type: sallyport.WatchItems, Epoch: "e", Records: live},
			{Type: sallyport.WatchEnd, Epoch: "e", Revision: 5, Count: len(live)},
			{Type: sallyport.WatchChange, Epoch: "e", Revision: 5, Records: []sallyport.Record{gone}},
		})
		s := &site{Server: startPolicyd(t, Config{}, fake, &ledger{}), t: t}
		synctest.Wait()
		s.want("s1", db, sallyport.VerdictAllow)
	})
}

// A silent stream is given up: a frozen cached may hang on to its connection.
func TestSilentStreamIsGivenUp(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		thaw := s.link.freeze()
		pass(20 * time.Second)
		s.link.mu.Lock()
		streams := len(s.link.watches)
		s.link.mu.Unlock()
		thaw()
		if streams < 2 {
			t.Errorf("%d streams in 20 s of silence; want a new try", streams)
		}
	})
}

// A stream that cannot be continued starts with a snapshot; what differs is told
// in the same words, and in another epoch everything is to be asked again.
func TestSnapshotAgainTellsTheDifference(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &script{}
		now := time.Now()
		live := liveRecords(now)
		complete := func(epoch sallyport.Epoch, rev sallyport.Revision, records []sallyport.Record) []sallyport.WatchEvent {
			return []sallyport.WatchEvent{
				{Type: sallyport.WatchBegin, Epoch: epoch, Revision: rev},
				{Type: sallyport.WatchItems, Epoch: epoch, Records: records},
				{Type: sallyport.WatchEnd, Epoch: epoch, Revision: rev, Count: len(records)},
			}
		}
		fake.play(complete("e", 5, live))
		s := &site{Server: startPolicyd(t, Config{MaxStale: time.Hour}, fake, &ledger{}), t: t}
		gateway := s.watch()
		gateway.take()

		changed := slices.Clone(live)
		changed[2].Payload, changed[2].Revision = []byte(`{"user":"u1","groups":[{"id":"staff"}]}`), 7
		changed = append(changed[:3], changed[4:]...) // the login is gone
		fake.play(complete("e", 8, changed))
		pass(2 * time.Second)
		want := []string{"login:l1: login revoked", `user:u1: group "dba" removed, group "staff" added`}
		if diff := cmp.Diff(want, gateway.words()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}

		fake.play(complete("e2", 2, changed))
		pass(2 * time.Second)
		if got := gateway.words(); !slices.Contains(got, "policy: the records were replaced") {
			t.Errorf("another epoch: got %q; want that everything is asked again", got)
		}
	})
}

func TestEveryDecisionIsAudited(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		d := s.decide("s1", db)
		q := question("s1", db+"")
		q.Path = "/x?token=secret"
		if _, err := s.Authorize(t.Context(), []sallyport.Request{q}); err != nil {
			t.Fatal(err)
		}
		s.decide("s9", wiki)
		records := s.Server.audit.(*ledger).of(sallyport.AuditDecision)
		if len(records) != 3 {
			t.Fatalf("%d records; want one for each decision", len(records))
		}
		r := records[0]
		if r.DecisionID != d.ID || r.User != "u1" || r.Session != "s1" || r.Device != s.device || r.Flow != "f-1" ||
			r.Target != db || r.Peer != "192.0.2.7:4711" || r.Code != "allow" || r.Decision.Rule != "dba" || r.Decision.AsOf != d.AsOf || r.Request == nil {
			t.Errorf("got %+v", r)
		}
		var inputs map[string]any
		if err := json.Unmarshal(r.Inputs, &inputs); err != nil {
			t.Fatal(err)
		}
		if _, err := time.Parse(time.RFC3339Nano, fmt.Sprint(inputs["now"])); err != nil {
			t.Errorf("the clock of the decision: %v", err)
		}
		delete(inputs, "now")
		if diff := cmp.Diff(map[string]any{"groups": map[string]any{"dba": true}, "group_count": 2.0}, inputs); diff != "" {
			t.Errorf("inputs -want +got:\n%s", diff)
		}
		if strings.Contains(fmt.Sprintf("%+v", *records[1].Request), "secret") {
			t.Error("a query string is in the audit log")
		}
		if records[2].Code != "login" {
			t.Errorf("got %q; want login", records[2].Code)
		}
	})
}

func TestRechecksAreAuditedWhenTheyDoNotAllow(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		q := question("s1", db)
		q.Recheck = "d-OLD"
		ask := func() sallyport.Decision {
			ds, err := s.Authorize(t.Context(), []sallyport.Request{q})
			if err != nil {
				t.Fatal(err)
			}
			return ds[0]
		}
		count := func() int { return len(s.Server.audit.(*ledger).of(sallyport.AuditDecision)) }
		if ask(); count() != 0 {
			t.Errorf("%d records of an allowed re-check; want none", count())
		}
		s.groups("u1")
		if d := ask(); d.Verdict != sallyport.VerdictDeny || count() != 1 {
			t.Errorf("got %v and %d records; want deny and 1", d.Verdict, count())
		}
		s.Server.audit.(*ledger).set(errors.New("disk full"), false)
		if d := ask(); d.Verdict != sallyport.VerdictDeny {
			t.Errorf("without an audit log: got %v; want the denial, or nothing is cut", d.Verdict)
		}
	})
}

func TestNothingIsAllowedWithoutAudit(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		s.Server.audit.(*ledger).set(errors.New("disk full"), false)
		s.refused("policy.audit")
		s.Server.audit.(*ledger).set(nil, true) // M3: it hangs
		start := time.Now()
		s.refused("policy.audit")
		if took := time.Since(start); took != 2*time.Second {
			t.Errorf("took %v; want decision_timeout", took)
		}
	})
}

func TestExplainIsNotAnAccess(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		d, err := s.Explain(t.Context(), question("s1", db))
		if err != nil {
			t.Fatal(err)
		}
		if !d.Allowed() || len(d.Reasons) != 1 || d.Reasons[0].Result != "true" {
			t.Errorf("got %v %+v; want an allow that says why", d.Verdict, d.Reasons)
		}
		if n := len(s.Server.audit.(*ledger).of(sallyport.AuditDecision)); n != 0 {
			t.Errorf("%d audit records; want none", n)
		}
		if d, err = s.Explain(t.Context(), question("s1", vault)); err != nil || d.Verdict != sallyport.VerdictNoRoute || d.Reasons != nil || d.Route != "" {
			t.Errorf("a hidden route: got %+v, %v; want nothing", d, err)
		}
	})
}

func TestList(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		if err := s.report("s1", map[string]any{"disk_encrypted": false, "os": "linux"}); err != nil {
			t.Fatal(err)
		}
		pass(5 * time.Second)
		l, err := s.List(t.Context(), sallyport.ListRequest{Session: "s1"})
		if err != nil {
			t.Fatal(err)
		}
		if l.Me.User != "u1" || l.Me.ExpiresIn != 8*time.Hour-5*time.Second || l.PolicyRevision != 1 || len(l.Facts) != 2 || l.FactAges["os"] != 5000 {
			t.Errorf("got %+v", l)
		}
		if want := []sallyport.ListedTarget{{From: db, Name: "db", Verdict: sallyport.VerdictAllow, Rule: "dba"}}; !cmp.Equal(want, l.Targets) {
			t.Errorf("-want +got:\n%s", cmp.Diff(want, l.Targets))
		}
		if l, err = s.List(t.Context(), sallyport.ListRequest{Session: "s1", All: true}); err != nil || len(l.Targets) != 2 {
			t.Fatalf("all: got %+v, %v; want db and wiki, never the hidden one", l.Targets, err)
		}
		if w := l.Targets[1]; w.From != wiki || w.Verdict != sallyport.VerdictDeny || len(w.Reasons) != 1 {
			t.Errorf("got %+v; want wiki with a reason", w)
		}
		if _, err = s.List(t.Context(), sallyport.ListRequest{Session: "s9"}); sallyport.OutcomeOf(err) != sallyport.OutcomeLogin {
			t.Errorf("without a session: got %v; want that a login is needed", err)
		}
	})
}

// Questions and changes at the same time, for the race detector: every answer is
// of one state or the other.
func TestQuestionsWhileThingsChange(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 200 {
					ds, err := s.Authorize(t.Context(), []sallyport.Request{question("s1", db), question("s1", db)})
					if err != nil {
						t.Error(err)
						return
					}
					if ds[0].Verdict != ds[1].Verdict || ds[0].AsOf != ds[1].AsOf {
						t.Errorf("one batch, two states: %v at %d, %v at %d", ds[0].Verdict, ds[0].AsOf, ds[1].Verdict, ds[1].AsOf)
					}
					if _, err := s.List(t.Context(), sallyport.ListRequest{Session: "s1", All: true}); err != nil {
						t.Error(err)
					}
				}
			})
		}
		for i := range 100 {
			s.groups("u1", []string{"dba", "staff"}[i%2])
		}
		wg.Wait()
	})
}

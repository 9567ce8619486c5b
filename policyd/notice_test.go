package policyd

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport"
	"sallyport/internal/tlsid"

	"github.com/google/go-cmp/cmp"
)

func TestFirstNoticeAndTrust(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		gateway := s.watch()
		all := gateway.take()
		if len(all) != 1 {
			t.Fatalf("%d notices at the start; want one", len(all))
		}
		n := all[0]
		snap := s.snap.Load()
		if !n.First || n.Epoch != snap.epoch || n.Revision != snap.revision || n.PolicyRevision != 1 || n.Trust == nil ||
			n.Trust.SessionCAs != "pem" || !slices.Equal(n.Forbidden, []string{"10.9.9.9:1"}) || n.SourceAge < 0 || n.MaxStale != 30*time.Second {
			t.Errorf("got %+v", n)
		}
		pass(3500 * time.Millisecond)
		all = gateway.take()
		if len(all) != 3 {
			t.Errorf("%d notices in 3.5 s; want one each second", len(all))
		}
		for _, n := range all {
			if n.First || n.Trust != nil || n.Forbidden != nil || len(n.Changes) != 0 || n.SourceAge > 2*time.Second {
				t.Errorf("got %+v; want a plain heartbeat", n)
			}
		}
		s.put(sallyport.KindTrust, "current", sallyport.Trust{SessionCAs: "pem2"})
		s.put(sallyport.KindConfig, "current", sallyport.Config{Routes: routes})
		pass(time.Second)
		var trust []string
		forbidden := 0
		for _, n := range gateway.take() {
			if n.Trust != nil {
				trust = append(trust, n.Trust.SessionCAs)
			}
			forbidden += len(n.Forbidden)
		}
		if !slices.Equal(trust, []string{"pem2"}) || forbidden != 0 {
			t.Errorf("told trust %q and %d forbidden addresses; want pem2 once", trust, forbidden)
		}
	})
}

// A session CA that retires is taken out of the bundle at its time, with nothing
// written and cached away.
func TestCase_O1_RetiredSessionCAIsTakenBack(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		newest, earlier := sessionCA(t), sessionCA(t)
		gateway := s.watch()
		s.put(sallyport.KindTrust, "current", sallyport.Trust{
			SessionCAs: string(newest.PEM()) + string(earlier.PEM()),
			Terms:      map[string]sallyport.TrustTerm{sallyport.CertificateID(earlier.Certificate().Raw): {Retires: time.Now().Add(10 * time.Second)}},
		})
		told := func() (bundles []string) {
			for _, n := range gateway.take() {
				if n.Trust != nil {
					bundles = append(bundles, n.Trust.SessionCAs)
				}
			}
			return bundles
		}
		pass(9 * time.Second)
		if got := told(); len(got) != 2 || got[1] != string(newest.PEM())+string(earlier.PEM()) {
			t.Errorf("told %q; want the first bundle and both CAs", got)
		}
		s.link.setDown(true)
		pass(2 * time.Second)
		if got := told(); len(got) != 1 || got[0] != string(newest.PEM()) {
			t.Errorf("told %q; want the newest CA alone", got)
		}
		if n := s.watch().take()[0]; n.Trust == nil || n.Trust.SessionCAs != string(newest.PEM()) {
			t.Errorf("a gateway that joins is told %+v", n.Trust)
		}
	})
}

// A gateway learns that cached is back with the heartbeat that says so, not with
// the notice of the next second.
func TestCase_M4_RecoveryIsToldAtOnce(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		gateway := s.watch()
		s.link.setDown(true)
		pass(10*time.Second + 300*time.Millisecond)
		gateway.take()
		s.link.setDown(false)
		for range 40 {
			pass(100 * time.Millisecond)
			if s.sourceAge() > time.Second {
				continue
			}
			if all := gateway.take(); len(all) == 0 || all[len(all)-1].SourceAge > time.Second {
				t.Errorf("policyd knows that cached is back, and its gateway is told %+v", all)
			}
			return
		}
		t.Error("policyd does not notice that cached is back")
	})
}

func sessionCA(t *testing.T) *tlsid.CA {
	t.Helper()
	ca, err := tlsid.NewCA("session-ca", 0)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// A gateway that joins before policyd knows anything learns that, and then the
// first epoch.
func TestNoticesBeforeTheFirstSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &script{}
		s := &site{Server: startPolicyd(t, Config{}, fake, &ledger{}), t: t}
		gateway := s.watch()
		pass(time.Second)
		for _, n := range gateway.take() {
			if n.Epoch != "" || n.SourceAge >= 0 {
				t.Errorf("got %+v; want no epoch and a source age below zero", n)
			}
		}
		live := liveRecords(time.Now())
		fake.play([]sallyport.WatchEvent{
			{Type: sallyport.WatchBegin, Epoch: "e", Revision: 5},
			{Type: sallyport.WatchItems, Epoch: "e", Records: live},
			{Type: sallyport.WatchEnd, Epoch: "e", Revision: 5, Count: len(live)},
		})
		pass(2 * time.Second)
		all := gateway.take()
		if n := all[len(all)-1]; n.Epoch != "e" || n.Revision != 5 || n.SourceAge < 0 {
			t.Errorf("got %+v; want epoch e", n)
		}
	})
}

func TestWordsOfChanges(t *testing.T) {
	now := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	session := func(s *site, end time.Duration) sallyport.Session {
		return sallyport.Session{ID: "s1", Login: "l1", User: "u1", Device: s.device, Kind: sallyport.AgentSession, Created: now, Expires: now.Add(end)}
	}
	for _, tt := range []struct {
		name   string
		change func(*site)
		want   []string // D stands for the device's id
	}{
		{"logout", func(s *site) { s.remove(sallyport.KindSession, "s1") }, []string{"session:s1: session revoked"}},
		{"extend", func(s *site) { s.put(sallyport.KindSession, "s1", session(s, 9*time.Hour)) }, []string{"session:s1: session extended"}},
		{"shorten", func(s *site) { s.put(sallyport.KindSession, "s1", session(s, time.Hour)) }, []string{"session:s1: session shortened"}},
		{"nothing", func(s *site) { s.put(sallyport.KindSession, "s1", session(s, 8*time.Hour)) }, nil},
		{"login", func(s *site) { s.remove(sallyport.KindLogin, "l1") }, []string{"login:l1: login revoked"}},
		{"group", func(s *site) { s.groups("u1", "staff") }, []string{`user:u1: group "dba" removed, group "staff" added`}},
		{"groups", func(s *site) { s.groups("u1", "a", "b", "c", "d", "e") }, []string{
			`user:u1: group "dba" removed, group "a" added, group "b" added, group "c" added, 2 more added`,
		}},
		{"disabled", func(s *site) { s.put(sallyport.KindUser, "u1", sallyport.User{ID: "u1", Disabled: true}) }, []string{"user:u1: user disabled"}},
		{"device", func(s *site) {
			s.put(sallyport.KindDevice, string(s.device), sallyport.Device{ID: s.device, Type: "file", Revoked: true})
		}, []string{"device:D: device revoked"}},
		{"approval", func(s *site) {
			s.put(sallyport.KindDevice, string(s.device), sallyport.Device{ID: s.device, Type: "file", Approved: true})
		}, []string{"device:D: device approved"}},
		{"posture", func(s *site) {
			if err := s.report("s1", map[string]any{"disk_encrypted": true, "firewall": true}); err != nil {
				s.t.Fatal(err)
			}
			pass(time.Second)
			if err := s.report("s1", map[string]any{"disk_encrypted": false}); err != nil {
				s.t.Fatal(err)
			}
		}, []string{
			"device:D: device.disk_encrypted is now false, device.firewall is no longer known",
			"device:D: device.disk_encrypted is now true, device.firewall is now true",
		}},
		{"policy", func(s *site) { s.put(sallyport.KindConfig, "current", sallyport.Config{Routes: routes}) }, []string{"policy: policy changed"}},
		{"a whole login", func(s *site) {
			if _, err := s.cached.Revoke(s.t.Context(), sallyport.Revocation{Subjects: []sallyport.Subject{{Kind: "user", ID: "u1"}}}); err != nil {
				s.t.Fatal(err)
			}
		}, []string{"login:l1: login revoked", "session:s1: session revoked"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inSite(t, Config{}, routes, func(t *testing.T, s *site) {
				gateway := s.watch()
				gateway.take()
				tt.change(s)
				got := gateway.words()
				for i := range got {
					got[i] = strings.ReplaceAll(got[i], string(s.device), "D")
				}
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Errorf("-want +got:\n%s", diff)
				}
			})
		})
	}
}

// A session that ran out is told in other words than one that was taken away.
func TestExpiryIsNoRevocation(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		op := sallyport.Put(sallyport.KindSession, "s1", sallyport.Session{ID: "s1", Login: "l1", User: "u1", Expires: time.Now().Add(time.Minute)})
		op.Expires = time.Now().Add(time.Minute)
		s.apply(op)
		gateway := s.watch()
		gateway.take()
		pass(3 * time.Minute)
		if got := gateway.words(); !slices.Equal(got, []string{"session:s1: session expired"}) {
			t.Errorf("got %q", got)
		}
	})
}

// A slow gateway gets one merged notice: every subject that changed is in it,
// and the revision covers all of it.
func TestSlowGatewayMissesNothing(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		slow, quick := s.watch(), s.watch()
		hold := make(chan struct{})
		slow.mu.Lock()
		slow.hold = hold
		slow.mu.Unlock()
		s.groups("u1", "x") // it is busy with this one
		slow.take()
		quick.take()
		var want []string
		for i := range 200 {
			id := fmt.Sprintf("u%03d", i%50)
			s.groups(sallyport.UserID(id), fmt.Sprint("g", i))
			if i < 50 {
				want = append(want, "user:"+id)
			}
		}
		last := s.snap.Load().revision
		slow.mu.Lock()
		slow.hold = nil
		slow.mu.Unlock()
		close(hold)
		all := slow.take()
		if len(all) != 1 {
			t.Fatalf("%d notices; want one merged", len(all))
		}
		var got []string
		highest := sallyport.Revision(0)
		for _, c := range all[0].Changes {
			got = append(got, c.Subject.String())
			highest = max(highest, c.Revision)
		}
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if all[0].Revision != last || highest != last {
			t.Errorf("revision %d, highest change %d; want %d", all[0].Revision, highest, last)
		}
		seen := 0
		for _, n := range quick.take() {
			for _, c := range n.Changes {
				if c.Revision > n.Revision {
					t.Errorf("a change of revision %d in a notice of %d", c.Revision, n.Revision)
				}
				seen++
			}
		}
		if seen != 200 {
			t.Errorf("the quick gateway saw %d changes; want all 200", seen)
		}
	})
}

// Beyond a bound, one word stands for all: ask again for everything.
func TestTooManyChangesBecomeOne(t *testing.T) {
	f := fanout{}
	w := f.join()
	changes := make([]sallyport.SubjectChange, maxPending+10)
	for i := range changes {
		changes[i] = sallyport.SubjectChange{Subject: sallyport.Subject{Kind: "session", ID: fmt.Sprint(i)}, Revision: sallyport.Revision(i)}
	}
	f.tell(changes)
	got := f.take(w)
	if len(got) > 11 || got[0].Subject.Kind != sallyport.SubjectPolicy {
		t.Errorf("%d changes, the first %+v; want one for the policy", len(got), got[0])
	}
	f.leave(w)
	f.tell(changes[:1])
	if got := f.take(w); got != nil {
		t.Errorf("a gateway that left still collects %v", got)
	}
}

func TestJoinWords(t *testing.T) {
	long := strings.Repeat("x", maxWhy)
	for _, tt := range []struct{ old, new, want string }{
		{"", "a", "a"}, {"a", "", "a"}, {"a", "a", "a"}, {"a", "b", "a; b"}, {"a; b", "b", "a; b"}, {long, "b", "b"},
	} {
		if got := joinWords(tt.old, tt.new); got != tt.want {
			t.Errorf("%.10q + %q: got %.10q; want %.10q", tt.old, tt.new, got, tt.want)
		}
	}
}

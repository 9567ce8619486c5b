package policyd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sallyport"
	"sallyport/proto/proof"
)

func good() map[string]any { return map[string]any{"disk_encrypted": true} }

func bad() map[string]any { return map[string]any{"disk_encrypted": false} }

func wantCode(t *testing.T, what string, err error, code string) {
	t.Helper()
	if sallyport.CodeOf(err) != code {
		t.Errorf("%s: got %v; want %s", what, err, code)
	}
}

// It returns after the report governs, so the next question sees it.
func TestReportGovernsWhenItReturns(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		d := s.want("s1", wiki, sallyport.VerdictDeny)
		if d.Reasons[0].Found != "unknown (no report)" {
			t.Errorf("got %+v", d.Reasons)
		}
		for i := range 6 {
			facts, want := good(), sallyport.VerdictAllow
			if i%2 == 1 {
				facts, want = bad(), sallyport.VerdictDeny
			}
			if err := s.report("s1", facts); err != nil {
				t.Fatal(err)
			}
			s.want("s1", wiki, want)
			pass(2 * time.Second)
		}
	})
}

func TestCase_K1_reportsThatProveNothing(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		s.signIn("u2", "l2", "s2", "d2")
		stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		now := time.Now()
		valid := s.signed(s.key, "s1", now, good())
		header, rest, _ := strings.Cut(valid, ".")
		body, _, _ := strings.Cut(rest, ".")
		login, err := proof.Sign(s.key, proof.TypeLogin, sallyport.PostureReport{Device: s.device, Session: "s1", Sequence: now.UnixMilli()})
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			name, jws string
			session   sallyport.SessionID
			code      string
		}{
			{"unsigned", header + "." + body + ".", "s1", "posture.bad_signature"},
			{"not a JWS", "hello", "s1", "posture.bad_signature"},
			{"empty", "", "s1", "posture.bad_signature"},
			{"changed", strings.Replace(valid, body, body[:len(body)-4]+"AAAA", 1), "s1", "posture.bad_signature"},
			{"a login proof", login, "s1", "posture.bad_signature"},
			{"another key", s.signed(stranger, "s1", now, good()), "s1", "posture.wrong_device"},
			{"another session's device", s.signed(s.key, "s2", now, good()), "s2", "posture.wrong_device"},
			{"made for another session", s.signed(s.key, "s2", now, good()), "s1", "posture.wrong_session"},
			{"no session", valid, "s9", "session.revoked"},
			{"too old", s.signed(s.key, "s1", now.Add(-11*time.Minute), good()), "s1", "posture.stale"},
			{"from the future", s.signed(s.key, "s1", now.Add(11*time.Minute), good()), "s1", "posture.stale"},
		} {
			wantCode(t, tt.name, s.ReportPosture(t.Context(), tt.session, tt.jws), tt.code)
		}
		s.want("s1", wiki, sallyport.VerdictDeny)
		if n := s.link.writes(); n != 0 {
			t.Errorf("%d writes for refused reports; want none", n)
		}
		if err := s.ReportPosture(t.Context(), "s1", valid); err != nil {
			t.Errorf("the valid one: %v", err)
		}
		s.want("s1", wiki, sallyport.VerdictAllow)
		s.want("s2", wiki, sallyport.VerdictDeny) // the report is not another device's
		pass(10 * time.Minute)
		if d := s.want("s1", wiki, sallyport.VerdictDeny); d.Reasons[0].Result != "unknown" {
			t.Errorf("an expired report: got %+v; want unknown", d.Reasons)
		}
	})
}

func TestCase_K2_malformedReports(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		if err := s.report("s1", good()); err != nil {
			t.Fatal(err)
		}
		pass(time.Minute)
		now := time.Now()
		report := func(facts string) string {
			return fmt.Sprintf(`{"device":%q,"session":"s1","sequence":%d,"facts":%s}`, s.device, now.UnixMilli(), facts)
		}
		fact := func(name, value string) string {
			return report(fmt.Sprintf(`{%q:{"value":%s,"at":%q,"source":"os"}}`, name, value, now.Format(time.RFC3339Nano)))
		}
		many := `{`
		for i := range maxFacts + 1 {
			many += fmt.Sprintf(`"f%d":{"value":true,"at":%q,"source":"os"},`, i, now.Format(time.RFC3339Nano))
		}
		for name, body := range map[string]string{
			"too long":              fact("edr", `"`+strings.Repeat("x", 65<<10)+`"`),
			"10 MiB":                fact("edr", `"`+strings.Repeat("x", 10<<20)+`"`),
			"nested":                fact("edr", strings.Repeat("[", 9000)+strings.Repeat("]", 9000)),
			"a little nested":       fact("edr", `{"a":[1]}`),
			"nested elsewhere":      `{"extra":[[[[[[1]]]]]],` + fact("firewall", "true")[1:],
			"a list":                fact("edr", `[1]`),
			"null":                  fact("disk_encrypted", `null`),
			"wrong type":            fact("disk_encrypted", `"yes"`),
			"negative version":      fact("os_version", `"-15.4"`),
			"absurd version":        fact("os_version", `"9999"`),
			"empty version":         fact("os_version", `""`),
			"unknown os":            fact("os", `"templeos"`),
			"duplicate fact":        report(`{"firewall":{"value":true,"at":"2000-01-01T00:00:00Z","source":"os"},"firewall":{"value":false,"at":"2000-01-01T00:00:00Z","source":"os"}}`),
			"duplicate key":         `{"sequence":1,` + fact("firewall", "true")[1:],
			"key in two cases":      `{"FACTS":{},` + fact("firewall", "true")[1:],
			"claims an attestation": report(fmt.Sprintf(`{"disk_encrypted":{"value":true,"at":%q,"source":"attested"}}`, now.Format(time.RFC3339Nano))),
			"unknown source":        report(fmt.Sprintf(`{"disk_encrypted":{"value":true,"at":%q,"source":"me"}}`, now.Format(time.RFC3339Nano))),
			"no time":               report(`{"disk_encrypted":{"value":true,"source":"os"}}`),
			"bad name":              fact("Disk Encrypted", `true`),
			"reserved name":         fact("approved", `true`),
			"too many":              report(many[:len(many)-1] + "}"),
			"no object":             `[]`,
			"facts no object":       report(`7`),
			"sequence too big":      strings.Replace(fact("firewall", "true"), fmt.Sprint(now.UnixMilli()), "1e99", 1),
		} {
			jws, err := proof.Sign(s.key, proof.TypePosture, rawJSON(body))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			err = s.ReportPosture(t.Context(), "s1", jws)
			wantCode(t, name, err, "posture.malformed")
			if sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
				t.Errorf("%s: outcome %v; want usage", name, sallyport.OutcomeOf(err))
			}
		}
		if d := s.want("s1", wiki, sallyport.VerdictAllow); d.ValidFor != 9*time.Minute {
			t.Errorf("valid for %v; want 9m: the earlier report is not extended", d.ValidFor)
		}
	})
}

type rawJSON string

func (r rawJSON) MarshalJSON() ([]byte, error) { return []byte(r), nil }

func TestCase_K4_replayedReports(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		old := s.signed(s.key, "s1", time.Now(), good())
		if err := s.ReportPosture(t.Context(), "s1", old); err != nil {
			t.Fatal(err)
		}
		wantCode(t, "at once", s.ReportPosture(t.Context(), "s1", old), "posture.replayed")
		pass(time.Minute)
		unchanged := s.signed(s.key, "s1", time.Now(), good())
		if err := s.ReportPosture(t.Context(), "s1", unchanged); err != nil {
			t.Fatal(err)
		}
		wantCode(t, "unchanged and not written", s.ReportPosture(t.Context(), "s1", unchanged), "posture.replayed")
		pass(time.Minute)
		if err := s.report("s1", bad()); err != nil {
			t.Fatal(err)
		}
		wantCode(t, "from better days", s.ReportPosture(t.Context(), "s1", old), "posture.replayed")

		// Another policyd, which has seen none of them, knows from the record.
		other := startPolicyd(t, Config{}, s.link, s.Server.audit)
		synctest.Wait()
		wantCode(t, "at another policyd", other.ReportPosture(t.Context(), "s1", unchanged), "posture.replayed")
		s.want("s1", wiki, sallyport.VerdictDeny)
		pass(24 * time.Hour)
		s.signIn("u1", "l1", "s1", s.device)
		wantCode(t, "yesterday's", s.ReportPosture(t.Context(), "s1", old), "posture.stale")
	})
}

func TestCase_K5_flippingReportsAreDebounced(t *testing.T) {
	for end, want := range map[bool]sallyport.Verdict{true: sallyport.VerdictAllow, false: sallyport.VerdictDeny} {
		inSite(t, Config{}, routes, func(t *testing.T, s *site) {
			gateway := s.watch()
			gateway.take()
			before := s.link.writes()
			var wg sync.WaitGroup
			for i := range 100 { // 10 s at 10 Hz, the last one says end
				facts := good()
				if (i%2 == 1) != end {
					facts = bad()
				}
				jws := s.signed(s.key, "s1", time.Now(), facts)
				wg.Go(func() {
					if err := s.ReportPosture(t.Context(), "s1", jws); err != nil {
						t.Errorf("report %d: %v", i, err)
					}
				})
				pass(100 * time.Millisecond)
			}
			wg.Wait()
			written := s.link.writes() - before
			if written > 10+postureBurst+1 || written < 5 {
				t.Errorf("%d writes in 10 s; want about one a second", written)
			}
			s.want("s1", wiki, want)
			if n := len(s.Server.audit.(*ledger).records); n > 2 {
				t.Errorf("%d audit records", n)
			}
			told := 0
			for _, n := range gateway.take() {
				told += len(n.Changes)
			}
			if told > written {
				t.Errorf("gateways were told %d changes for %d writes", told, written)
			}
		})
	}
}

// The first bad report counts at once, whatever came before.
func TestABadReportIsNotHeldBack(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		for range 5 { // an agent that is well behaved
			if err := s.report("s1", good()); err != nil {
				t.Fatal(err)
			}
			pass(time.Minute)
		}
		start := time.Now()
		if err := s.report("s1", bad()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("took %v", took)
		}
		s.want("s1", wiki, sallyport.VerdictDeny)
	})
}

func TestCase_K7_agentStopsReporting(t *testing.T) {
	inSite(t, Config{PostureTTL: 6 * time.Minute}, routes, func(t *testing.T, s *site) {
		if err := s.report("s1", good()); err != nil {
			t.Fatal(err)
		}
		d := s.want("s1", wiki, sallyport.VerdictAllow)
		if d.ValidFor != 6*time.Minute {
			t.Errorf("valid for %v; want posture_ttl", d.ValidFor)
		}
		pass(d.ValidFor - time.Second)
		s.want("s1", wiki, sallyport.VerdictAllow)
		pass(time.Second)
		d = s.want("s1", wiki, sallyport.VerdictDeny)
		if d.Reasons[0].Found != "unknown (too old)" {
			t.Errorf("got %+v", d.Reasons)
		}
	})
}

func TestCase_K8_versionsByReport(t *testing.T) {
	versions := []sallyport.Route{{
		From: wiki, Policy: `allow: {or: [{device: {os_version: {">": "1.9"}, agent_version: {">=": "1.2.3"}}}]}`,
	}}
	inSite(t, Config{}, versions, func(t *testing.T, s *site) {
		for _, tt := range []struct {
			os, agent string
			want      sallyport.Verdict
		}{
			{"1.10", "1.2.3", sallyport.VerdictAllow},
			{"1.9", "1.2.3", sallyport.VerdictDeny},
			{"1.9.0", "1.2.10", sallyport.VerdictDeny},
			{"1.10", "1.2.3-beta", sallyport.VerdictDeny},
			{"1.10", "1.2.4-beta", sallyport.VerdictAllow},
		} {
			if err := s.report("s1", map[string]any{"os_version": tt.os, "agent_version": tt.agent}); err != nil {
				t.Fatalf("%+v: %v", tt, err)
			}
			s.want("s1", wiki, tt.want)
			pass(2 * time.Second)
		}
		for _, empty := range []string{"", " ", "beta", "-1.10"} {
			err := s.report("s1", map[string]any{"os_version": empty, "agent_version": "1.2.4"})
			wantCode(t, fmt.Sprintf("os_version %q", empty), err, "posture.malformed")
			pass(2 * time.Second)
		}
		s.want("s1", wiki, sallyport.VerdictAllow) // the last good report still governs
	})
}

// Unchanged reports, one a minute, keep access alive with few writes.
func TestUnchangedReportsAreWrittenAtEachThird(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		gateway := s.watch()
		for range 60 {
			if err := s.report("s1", good()); err != nil {
				t.Fatal(err)
			}
			s.want("s1", wiki, sallyport.VerdictAllow)
			pass(time.Minute)
		}
		if n := s.link.writes(); n > 18 {
			t.Errorf("%d writes in an hour; want one each 3m20s", n)
		}
		told := 0
		for _, n := range gateway.take() {
			told += len(n.Changes)
		}
		if told != 1 {
			t.Errorf("gateways were told %d changes; want the first report only", told)
		}
	})
}

// A rule with a short max_age makes reports be written more often.
func TestShortMaxAgeIsKeptUp(t *testing.T) {
	short := []sallyport.Route{{From: wiki, Policy: "allow: {or: [{device: {disk_encrypted: {is: true, max_age: 90s}}}]}"}}
	inSite(t, Config{}, short, func(t *testing.T, s *site) {
		for range 20 {
			if err := s.report("s1", good()); err != nil {
				t.Fatal(err)
			}
			pass(59 * time.Second)
			s.want("s1", wiki, sallyport.VerdictAllow)
			pass(time.Second)
		}
	})
}

func TestReportWhileCachedIsAway(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		if err := s.report("s1", good()); err != nil {
			t.Fatal(err)
		}
		s.link.setDown(true)
		err := s.report("s1", good()) // the same sequence in this bubble's standing clock
		wantCode(t, "replay", err, "posture.replayed")
		pass(time.Second)
		err = s.report("s1", bad())
		wantCode(t, "away", err, "posture.unavailable")
		if sallyport.OutcomeOf(err) != sallyport.OutcomeUnavailable {
			t.Errorf("outcome %v", sallyport.OutcomeOf(err))
		}
		s.link.setDown(false)
		pass(2 * time.Second)
		if err := s.report("s1", bad()); err != nil {
			t.Fatal(err)
		}
		s.want("s1", wiki, sallyport.VerdictDeny)
	})
}

// Two policyds get reports of one device in turn: the newest one stays.
func TestTwoPolicydsOneDevice(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		other := startPolicyd(t, Config{}, s.link, s.Server.audit)
		synctest.Wait()
		older := s.signed(s.key, "s1", time.Now(), good())
		pass(time.Second)
		newer := s.signed(s.key, "s1", time.Now(), bad())
		pass(time.Second)
		thaw := s.link.freeze() // neither hears of the other's write
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := other.ReportPosture(t.Context(), "s1", newer); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			wantCode(t, "older", s.ReportPosture(t.Context(), "s1", older), "posture.replayed")
		})
		synctest.Wait()
		thaw()
		wg.Wait()
		s.want("s1", wiki, sallyport.VerdictDeny)
		pass(time.Second)
		if err := s.report("s1", good()); err != nil {
			t.Fatal(err)
		}
		s.want("s1", wiki, sallyport.VerdictAllow)
	})
}

func TestDeskForgetsQuietDevices(t *testing.T) {
	inSite(t, Config{}, routes, func(t *testing.T, s *site) {
		if err := s.report("s1", good()); err != nil {
			t.Fatal(err)
		}
		count := func() int {
			s.desk.mu.Lock()
			defer s.desk.mu.Unlock()
			return len(s.desk.devices)
		}
		pass(10 * time.Minute)
		if count() != 1 {
			t.Error("forgotten while a recorded report could still be replayed")
		}
		pass(15 * time.Minute)
		if count() != 0 {
			t.Error("a quiet device is kept for ever")
		}
	})
}

func FuzzReadReport(f *testing.F) {
	for _, s := range []string{
		`{"device":"d","session":"s","sequence":1,"facts":{"firewall":{"value":true,"at":"2026-01-01T00:00:00Z","source":"os"}}}`,
		`{"facts":{"a":{"value":[[[[[[]]]]]]}}}`, `{"a":1,"A":2}`, `[`, `{"facts":null}`, `0`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := readReport(body)
		if err != nil {
			return
		}
		for name, fact := range r.Facts {
			switch fact.Value.(type) {
			case bool, string, float64:
			default:
				t.Errorf("fact %q has a %T", name, fact.Value)
			}
			if fact.At.IsZero() || fact.Source == sallyport.SourceAttested {
				t.Errorf("fact %q: %+v", name, fact)
			}
		}
	})
}

package policy

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"sallyport"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// recorded is what the audit log keeps of the decision a, as policyd writes it and
// as it is read again.
func recorded(t interface{ Fatal(...any) }, in *Input, a Answer) *Recording {
	d := &sallyport.Decision{ID: "d1", Verdict: a.Verdict, Rule: a.Rule()}
	if p := in.Person; p != nil {
		d.Who = sallyport.Identity{Session: p.Session.ID, Login: p.Session.Login, User: p.User.ID, Email: p.Email, Device: p.Session.Device, ExpiresIn: p.ExpiresIn}
	}
	inputs, err := json.Marshal(a.Inputs(in))
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(sallyport.AuditRecord{Type: sallyport.AuditDecision, Request: in.Request, Decision: d, Inputs: inputs})
	if err != nil {
		t.Fatal(err)
	}
	var rec sallyport.AuditRecord
	if err := json.Unmarshal(text, &rec); err != nil {
		t.Fatal(err)
	}
	out, err := ReadRecording(&rec)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// atTheLimit moves facts to within a millisecond of the ages up to which they
// count.
func atTheLimit(t *rapid.T, in *Input) {
	if in.Person == nil || in.Person.Posture == nil {
		return
	}
	p := in.Person.Posture
	in.Now = in.Now.Add(time.Duration(rapid.IntRange(0, 999_999).Draw(t, "within a millisecond")))
	for name, f := range p.Facts {
		if limit := rapid.SampledFrom([]time.Duration{0, time.Minute, 10 * time.Minute}).Draw(t, name+" limit"); limit != 0 {
			p.Received = in.Now
			f.At = in.Now.Add(-limit + time.Duration(rapid.IntRange(-1_100_000, 1_100_000).Draw(t, name+" off by")))
			p.Facts[name] = f
		}
	}
}

// The policy that made a decision makes it again from what the log says of it.
func TestReplayRepeats(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		for range 100 { // 100 checks make 10,000 decisions
			text := drawPolicy(t)
			hidden := rapid.Bool().Draw(t, "hidden")
			set, err := Compile([]sallyport.Route{{From: "tcp://db.internal:5432", Policy: text, Hidden: hidden}}, Options{})
			if err != nil {
				t.Fatal(err)
			}
			in := drawInput(t)
			atTheLimit(t, in)
			a := set.Decide(in)
			got := set.Replay(recorded(t, in, a))
			if !got.Certain || got.Verdict != a.Verdict {
				t.Fatalf("%s\ngot %+v; want %v", text, got, a.Verdict)
			}
			if !hidden && got.Rule != a.Rule() {
				t.Fatalf("%s\ngot rule %q; want %q", text, got.Rule, a.Rule())
			}
			if want := set.Reasons(in, a, false); !hidden && !slices.EqualFunc(got.Reasons, want, sameReason) {
				t.Fatalf("%s\nreasons %s", text, cmp.Diff(want, got.Reasons))
			}
		}
	})
}

// sameReason compares without what the log does not tell: whether a fact is not
// there for want of a report.
func sameReason(a, b sallyport.Reason) bool {
	if a.Result == "unknown" && b.Result == "unknown" {
		a.Found, b.Found = "", ""
	}
	return a == b
}

// What another policy is certain of is what it would have said then.
func TestReplayByAnotherPolicyIsRight(t *testing.T) {
	told, all := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		for range 100 {
			set, text := drawSet(t)
			other, otherText := drawSet(t)
			in := drawInput(t)
			atTheLimit(t, in)
			recording := recorded(t, in, set.Decide(in))
			want := other.Decide(in)
			got := other.Replay(recording)
			all++
			if !got.Certain {
				if len(got.Missing) == 0 || got.Verdict == sallyport.VerdictAllow {
					t.Fatalf("made by\n%s\nreplayed by\n%s\nuncertain, and got %+v", text, otherText, got)
				}
				continue
			}
			told++
			if got.Verdict != want.Verdict || got.Rule != "" && got.Rule != want.Rule() {
				t.Fatalf("made by\n%s\nreplayed by\n%s\ngot %v by %q; want %v by %q", text, otherText, got.Verdict, got.Rule, want.Verdict, want.Rule())
			}
		}
	})
	if told*4 < all {
		t.Errorf("only %d of %d could be told", told, all)
	}
}

func TestReplayNamesWhatIsMissing(t *testing.T) {
	was := compileOne(t, `allow: {and: [{groups: dba}]}`)
	for _, tt := range []struct{ ask, policy, want string }{
		{"groups=dba", `allow: {and: [{groups: dba}]}`, "allow"},
		{"groups=dba", `allow: {and: [{groups: sre}]}`, "deny"}, // it is the only one
		{"groups=dba,sre", `allow: {and: [{groups: sre}]}`, `missing [group "sre"]`},
		{"groups=dba,sre", `allow: {or: [{groups: sre}, {groups: dba}]}`, "allow"},
		{"groups=dba", `allow: {and: [{groups: dba}, {device: {firewall: true}}]}`, `missing [fact "firewall"]`},
		{"groups=ops", `allow: {and: [{groups: dba}, {device: {firewall: true}}]}`, "deny"},
		{"groups=dba", `[{allow: {and: [{groups: dba}]}}, {deny: {or: [{claim/dept: x}]}}]`, `missing [claim "dept"]`},
		{"groups=dba no-device", `allow: {and: [{device: {firewall: true}}]}`, "deny"},
		{"groups=dba", `allow: {and: [{device: {approved: true}}]}`, "missing [device.approved]"},
		{"groups=dba email=a@b", `allow: {and: [{domain: b}]}`, "allow"},
		{"no-directory", `allow: {and: [{groups: {exclude: sre}}]}`, "deny"},
		{"nobody", `allow: {and: [{groups: sre}, {device: {firewall: true}}]}`, "login"},
	} {
		in := asker(t, tt.ask)
		r := compileOne(t, tt.policy).Replay(recorded(t, in, was.Decide(in)))
		got := r.Verdict.String()
		if !r.Certain {
			got = fmt.Sprint("missing ", r.Missing)
		}
		if got != tt.want {
			t.Errorf("%s by %s: got %s; want %s", tt.ask, tt.policy, got, tt.want)
		}
	}
}

// Ages are recorded exactly: what was at a limit is so again.
func TestReplayAtALimit(t *testing.T) {
	set := compileOne(t, `allow: {and: [{device: {firewall: {is: true, max_age: 1500us}}}]}`)
	for _, age := range []time.Duration{1499_999, 1500_000, 1500_001} {
		in := asker(t, "fact.firewall=true")
		f := in.Person.Posture.Facts["firewall"]
		f.At = in.Now.Add(-age)
		in.Person.Posture.Facts["firewall"] = f
		a := set.Decide(in)
		if got := set.Replay(recorded(t, in, a)); !got.Certain || got.Verdict != a.Verdict {
			t.Errorf("%v old: got %+v; want %v", age, got, a.Verdict)
		}
	}
}

// Carriers and unknown targets have no rules to look at.
func TestReplayWithoutRoute(t *testing.T) {
	set := compileOne(t, anyone)
	for _, q := range []string{"", "tcp://other.internal:22"} {
		for _, who := range []string{"", "nobody"} {
			in := asker(t, who)
			in.Request.Target = sallyport.Target{}
			if q != "" {
				in.Request.Target = target(t, q)
			}
			a := set.Decide(in)
			if got := set.Replay(recorded(t, in, a)); !got.Certain || got.Verdict != a.Verdict {
				t.Errorf("%q %q: got %+v; want %v", q, who, got, a.Verdict)
			}
		}
	}
}

// A denial on a hidden route leaves in the log what it was made from, though the
// person is told of nothing.
func TestHiddenDenialsRecordTheirInputs(t *testing.T) {
	set, err := Compile([]sallyport.Route{{From: "tcp://db.internal:5432", Hidden: true, Policy: `[{allow: {and: [{groups: dba}]}}, {mode: observe, deny: {or: [{device: {firewall: false}}]}}]`}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	in := asker(t, "groups=ops fact.firewall=true@20s")
	a := set.Decide(in)
	got := a.Inputs(in)
	want := Inputs{
		Now: in.Now, Groups: map[string]bool{"dba": false}, GroupCount: 1,
		Device: &DeviceInput{ID: in.Person.Device.ID, Approved: in.Person.Device.Approved, Type: in.Person.Device.Type},
		Facts:  map[string]*FactInput{"firewall": {true, "os", 20 * time.Second}},
	}
	if diff := cmp.Diff(want, got); a.Verdict != sallyport.VerdictNoRoute || a.ValidFor != 0 || diff != "" {
		t.Errorf("%v, valid for %v\n%s", a.Verdict, a.ValidFor, diff)
	}
}

func TestRecordedRecordsAreFound(t *testing.T) {
	r := recordedRecords{"risk/u1": {"score": 5.0}, "risk/u2": nil, "risk/u3": {}}
	for id, want := range map[string]bool{"u1": true, "u2": false, "u3": true, "u4": false} {
		if _, ok := r.External("risk", id); ok != want {
			t.Errorf("%s: got %v; want %v", id, ok, want)
		}
	}
}

// Whatever stands in a log, replaying it neither fails nor allows what the log
// does not bear out.
func FuzzReplay(f *testing.F) {
	f.Add(`{"now":"2026-06-01T12:00:00Z","groups":{"a":true},"group_count":1,"facts":{"firewall":{"value":true,"source":"os","age_ms":20}},"device":{"id":"d1"}}`, "s1")
	f.Add(`{"now":"2026-06-01T12:00:00Z","group_count":-1,"facts":{"firewall":{"age_ms":9223372036854775807}},"claims":{"x":[1]},"login":{"age_ms":-1}}`, "s1")
	f.Add(`{"now":"2026-06-01T12:00:00Z"}`, "")
	set, err := Compile([]sallyport.Route{{From: "tcp://db.internal:5432", Policy: `[{allow: {and: [{groups: a}, {device: {firewall: true}}, {claim/x: 1}]}}, {deny: {or: [{user: {not: u1}}]}}]`}}, Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, inputs, session string) {
		r := &sallyport.AuditRecord{
			Request:  &sallyport.Request{Target: sallyport.Target{Network: "tcp", Host: "db.internal", Port: 5432}},
			Decision: &sallyport.Decision{Who: sallyport.Identity{Session: sallyport.SessionID(session), User: "u1", Device: "d1"}}, Inputs: []byte(inputs),
		}
		recording, err := ReadRecording(r)
		if err != nil {
			return
		}
		got := set.Replay(recording)
		if got.Verdict == sallyport.VerdictAllow && (session == "" || !recording.Inputs.Groups["a"] || recording.Inputs.Facts["firewall"] == nil) {
			t.Fatalf("%s: got %+v", inputs, got)
		}
	})
}

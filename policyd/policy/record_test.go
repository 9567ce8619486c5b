package policy

import (
	"encoding/json"
	"testing"

	"sallyport"

	"github.com/google/go-cmp/cmp"
)

const recordsPolicy = `
- allow: {or: [{record: {type: risk, field: score, "<": 10}}, {record: {type: risk, field: score, ">": 90}}, {record: {type: a/b, exists: true}}]}
- deny: {or: [{record: {type: mdm, of: device, field: state, is: lost}}, {record: {type: tor, of: peer, exists: true}}]}
`

// A decision depends on every record that its rules look at, there or not.
func TestSubjectsOfRecords(t *testing.T) {
	for _, tt := range []struct {
		name, words string
		want        []string
	}{
		{"all", `peer=::ffff:192.0.2.1 record.risk/u1={"score":1}`, []string{
			"session:s1", "login:l1", "user:u1", "device:d1", "record:mdm/d1", "record:tor/192.0.2.1", "record:risk/u1", "record:a/b/u1", "policy",
		}},
		{"no device, no address", `no-device`, []string{"session:s1", "login:l1", "user:u1", "record:risk/u1", "record:a/b/u1", "policy"}},
		{"nobody", `nobody peer=192.0.2.1`, []string{"session:s1", "record:tor/192.0.2.1", "policy"}},
	} {
		set := compileOne(t, recordsPolicy)
		in := asker(t, tt.words)
		a := set.Decide(in)
		var got []string
		for _, s := range a.Subjects(in) {
			got = append(got, s.String())
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: -want +got:\n%s", tt.name, diff)
		}
	}
}

func TestPeerRecordDependsOnThePeer(t *testing.T) {
	set := compileOne(t, "allow: {and: [{record: {type: net, of: peer, exists: true}}]}")
	in := asker(t, "peer=192.0.2.1")
	if a := set.Decide(in); !a.DependsOnPeer || a.Verdict != sallyport.VerdictDeny {
		t.Errorf("got %+v; want a denial that depends on the peer", a)
	}
}

// What was looked at, and what another policy could still ask of it.
func TestInputsOfRecordsAndLogins(t *testing.T) {
	set := compileOne(t, recordsPolicy+`- allow: {and: [{session_age: {"<": 1h}}, {auth_method: mfa}]}`)
	in := asker(t, `peer=192.0.2.1 logged-in=90m auth=pwd record.risk/u1={"score":50,"other":1} record.mdm/d1={"owner":"x"}`)
	got := set.Decide(in).Inputs(in)
	text, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"now":"2026-06-01T12:00:00Z","device":{"id":"d1","approved":false},"login":{"age":5400000000000,"auth_methods":["pwd"]},` +
		`"records":{"a/b/u1":null,"mdm/d1":{"state":null},"risk/u1":{"score":50},"tor/192.0.2.1":null}}`
	if string(text) != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
	var read Inputs
	if err := json.Unmarshal(text, &read); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]bool{
		"record: {type: risk, field: score, is: x}":             true,
		"record: {type: risk, exists: true}":                    true,
		"record: {type: risk, field: other, is: x}":             false, // not noted
		"record: {type: risk, of: device, field: score, is: x}": false,
		"record: {type: a/b, field: any, is: x}":                true, // there is no record
		"record: {type: a, field: any, is: x}":                  false,
		"record: {type: mdm, of: device, exists: true}":         true,
		"record: {type: mdm, field: state, is: x}":              false, // of the user
		"record: {type: tor, of: peer, field: x, is: z}":        true,
		"record: {type: tor, exists: true}":                     false,
		"session_age: {\">\": 2h}":                              true,
		"auth_method: hwk":                                      true,
		"date: {after: 2026-01-01}":                             true,
		"day_of_week: mon":                                      true,
		"time_of_day: {timezone: UTC, after: 1:00}":             true,
	} {
		p, err := Parse([]byte("allow: {and: [{" + text + "}]}"))
		if err != nil {
			t.Fatal(err)
		}
		if got := p.allow[0].when.of[0].is.recalled(&read); got != want {
			t.Errorf("%s: recalled %v; want %v", text, got, want)
		}
	}
	if (&sessionAge{}).recalled(&Inputs{}) {
		t.Error("a login that nobody noted is recalled")
	}
}

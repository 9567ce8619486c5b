package policy

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var noon = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

// TestGolden runs testdata/*.txtar: one idea each. A file has the policy, the
// askers (one a line) and what they are told; or why the policy does not load.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden files (%v)", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) { golden(t, file) })
	}
}

func TestCase_I2_unknownWords(t *testing.T)         { golden(t, "testdata/bad_unknown.txtar") }
func TestCase_I4_separatorsInNames(t *testing.T)    { golden(t, "testdata/bad_names.txtar") }
func TestCase_I4_namesCompareExactly(t *testing.T)  { golden(t, "testdata/list_operators.txtar") }
func TestCase_I5_noImplicitConversion(t *testing.T) { golden(t, "testdata/bad_scalars.txtar") }
func TestCase_I7_denyBeatsAllow(t *testing.T)       { golden(t, "testdata/deny_beats_allow.txtar") }
func TestCase_I1_anchorsAndDuplicates(t *testing.T) {
	golden(t, "testdata/bad_yaml.txtar")
	golden(t, "testdata/bad_duplicates.txtar")
}

func golden(t *testing.T, file string) {
	a, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	got := runGolden(t, section(a, "policy"), section(a, "ask"), section(a, "site"))
	if *update {
		setSection(a, "want", got)
		if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(section(a, "want"), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

func section(a *txtar.Archive, name string) string {
	for _, f := range a.Files {
		if f.Name == name {
			return string(f.Data)
		}
	}
	return ""
}

func setSection(a *txtar.Archive, name, text string) {
	for i := range a.Files {
		if a.Files[i].Name == name {
			a.Files[i].Data = []byte(text)
			return
		}
	}
	a.Files = append(a.Files, txtar.File{Name: name, Data: []byte(text)})
}

func runGolden(t *testing.T, text, askers, site string) string {
	r := sallyport.Route{From: "tcp://db.internal:5432", To: "tcp://10.0.3.7:5432", Policy: text}
	opts := Options{ExplainGroups: strings.Contains(site, "explain_groups")}
	r.Hidden = strings.Contains(site, "hidden")
	set, err := Compile([]sallyport.Route{r}, opts)
	if err != nil {
		return strings.ReplaceAll(err.Error(), "routes[0].policy: ", "") + "\n"
	}
	var out strings.Builder
	for line := range strings.Lines(askers) {
		name, words, _ := strings.Cut(strings.TrimSpace(line), ":")
		in := asker(t, words)
		in.Request = &sallyport.Request{Session: "s1", Target: sallyport.Target{Network: "tcp", Host: "db.internal", Port: 5432}}
		fmt.Fprintf(&out, "%s: %s", name, describe(set, in))
	}
	return out.String()
}

// describe prints an answer with everything a person is told.
func describe(set *Set, in *Input) string {
	var out strings.Builder
	a := set.Decide(in)
	fmt.Fprint(&out, a.Verdict)
	if a.Rule() != "" {
		fmt.Fprintf(&out, " by %q", a.Rule())
	}
	if a.ValidFor != 0 {
		fmt.Fprintf(&out, " for %v", a.ValidFor)
	}
	fmt.Fprintln(&out)
	for _, r := range set.Reasons(in, a, false) {
		fmt.Fprintf(&out, "  %s: %s: wanted %q, found %q", r.Rule, r.Condition, r.Wanted, r.Found)
		if r.Age != 0 {
			fmt.Fprintf(&out, " %v ago", r.Age)
		}
		fmt.Fprintf(&out, " (%s)\n", r.Result)
	}
	for _, set := range set.Remedies(in, a) {
		var words []string
		for _, m := range set {
			w := m.Condition + " = " + m.Want
			if m.Hint != "" {
				w += " (" + m.Hint + ")"
			}
			words = append(words, w)
		}
		fmt.Fprintf(&out, "  fix: %s\n", strings.Join(words, " and "))
	}
	return out.String()
}

// asker reads a person: "user=u1 email=a@b groups=dba,sre claim.dept=["ops"]
// session.claim.x=1 fact.firewall=true@20s/os approved=true type=tpm expires=1h",
// "nobody" for no session, "no-directory", "no-device", "no-report".
func asker(t *testing.T, words string) *Input {
	in := &Input{Now: noon, Absent: "session revoked"}
	if strings.TrimSpace(words) == "nobody" {
		return in
	}
	p := &Person{
		Session: &sallyport.Session{ID: "s1", User: "u1", Login: "l1", Device: "d1", Claims: map[string]any{}},
		Login:   &sallyport.Login{ID: "l1"},
		User:    &sallyport.User{ID: "u1", Claims: map[string]any{}},
		Groups:  NewGroups(nil),
		Device:  &sallyport.Device{ID: "d1"},
		Posture: &sallyport.Posture{Device: "d1", Received: noon, Sequence: noon.UnixMilli(), Facts: map[string]sallyport.Fact{}},
	}
	in.Person = p
	for _, word := range strings.Fields(words) {
		key, value, _ := strings.Cut(word, "=")
		kind, name, _ := strings.Cut(key, ".")
		switch kind {
		case "user":
			p.User.ID, p.Session.User = sallyport.UserID(value), sallyport.UserID(value)
		case "email":
			p.Email = value
		case "groups":
			var gs []sallyport.Group
			for g := range strings.SplitSeq(value, ",") {
				id, name, _ := strings.Cut(g, "|")
				gs = append(gs, sallyport.Group{ID: id, Name: name})
			}
			p.Groups = NewGroups(gs)
		case "claim":
			p.User.Claims[name] = parseJSON(t, value)
		case "session-claim":
			p.Session.Claims[name] = parseJSON(t, value)
		case "fact":
			p.Posture.Facts[name] = readFact(t, value)
		case "approved":
			p.Device.Approved = value == "true"
		case "type":
			p.Device.Type = value
		case "expires":
			p.ExpiresIn = parseDuration(t, value)
		case "no-directory":
			p.Groups = Groups{}
		case "no-device":
			p.Session.Device, p.Device, p.Posture = "", nil, nil
		case "no-report":
			p.Posture = nil
		default:
			t.Fatalf("asker: unknown word %q", word)
		}
	}
	return in
}

func readFact(t *testing.T, s string) sallyport.Fact {
	s, source, ok := strings.Cut(s, "/")
	if !ok {
		source = sallyport.SourceOS
	}
	s, age, _ := strings.Cut(s, "@")
	f := sallyport.Fact{Value: parseJSON(t, s), At: noon, Source: source}
	if age != "" {
		f.At = noon.Add(-parseDuration(t, age))
	}
	return f
}

func parseDuration(t *testing.T, s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func parseJSON(t *testing.T, s string) any {
	var v any
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		t.Fatalf("%s: %v", s, err)
	}
	return v
}

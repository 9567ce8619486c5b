package policy

import (
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
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

// TestGolden runs testdata/GROUP/*.txtar: one idea each, grouped by criterion. A
// file has the policy, the askers (one a line, as asker reads them) and what they
// are told; or why the policy does not load. A section "site" may say hidden and
// explain_groups. A file with a section "routes" is for runRoutes.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden files (%v)", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(strings.TrimPrefix(filepath.ToSlash(file), "testdata/"), ".txtar")
		t.Run(name, func(t *testing.T) { golden(t, file) })
	}
}

func TestCase_I2_unknownWords(t *testing.T) { golden(t, "testdata/language/bad_unknown.txtar") }

func TestCase_I4_separatorsInNames(t *testing.T) { golden(t, "testdata/language/bad_names.txtar") }

func TestCase_I4_namesCompareExactly(t *testing.T) { golden(t, "testdata/groups/list_operators.txtar") }

func TestCase_I5_noImplicitConversion(t *testing.T) { golden(t, "testdata/language/bad_scalars.txtar") }

func TestCase_I7_denyBeatsAllow(t *testing.T) { golden(t, "testdata/language/deny_beats_allow.txtar") }

func TestCase_I4_namesOfAccounts(t *testing.T) {
	golden(t, "testdata/ssh_username/confusable.txtar")
	golden(t, "testdata/ssh_username/bad.txtar")
	golden(t, "testdata/ssh_ca/principal_list.txtar")
	golden(t, "testdata/ssh_username_matches_claim/fails.txtar")
}

func TestCase_I12_networks(t *testing.T) {
	golden(t, "testdata/source_ip/bad.txtar")
	golden(t, "testdata/source_ip/mapped.txtar")
	golden(t, "testdata/source_ip/everything.txtar")
}

func TestCase_I1_anchorsAndDuplicates(t *testing.T) {
	golden(t, "testdata/language/bad_yaml.txtar")
	golden(t, "testdata/language/bad_duplicates.txtar")
}

func golden(t *testing.T, file string) {
	a, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	got := ""
	if routes := section(a, "routes"); routes != "" {
		got = runRoutes(t, routes, section(a, "ask"), section(a, "forbidden"))
	} else {
		got = runGolden(t, section(a, "policy"), section(a, "ask"), section(a, "site"))
	}
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
	for _, o := range set.Observed(in, a) {
		fmt.Fprintf(&out, "  observed: %q would have made it %v\n", o.Rule, o.Would)
	}
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

// asker reads a person and a request from words:
//
//	nobody no-directory no-device no-report
//	user=u1 email=a@b groups=dba,g1|sre claim.dept=["ops"] session-claim.x=1
//	fact.firewall=true@20s/os approved=true type=tpm expires=1h
//	logged-in=2h (ago) auth=pwd,mfa record.risk/u1={"score":5}
//	now=2026-06-01T12:00:00Z peer=10.1.2.3 method=GET path=/x header.Origin=a
//	ssh=root ssh-key=BASE64 mcp=tools/call:query cert=BASE64 cert-valid no-cert
//
// Without words it is u1 with an empty directory entry and a device d1 that has
// reported nothing, at noon, asking for tcp://db.internal:5432.
func asker(t testing.TB, words string) *Input {
	t.Helper()
	a := goldenAsker{in: &Input{Now: noon}, person: &Person{
		Session: &sallyport.Session{ID: "s1", User: "u1", Login: "l1", Device: "d1", Claims: map[string]any{}},
		Login:   &sallyport.Login{ID: "l1"},
		User:    &sallyport.User{ID: "u1", Claims: map[string]any{}},
		Groups:  NewGroups(nil),
		Device:  &sallyport.Device{ID: "d1"},
		Posture: &sallyport.Posture{Device: "d1", Facts: map[string]sallyport.Fact{}},
	}}
	a.in.Person = a.person
	a.in.Request = &sallyport.Request{Session: "s1", Target: sallyport.Target{Network: "tcp", Host: "db.internal", Port: 5432}}
	all := strings.Fields(words)
	for _, word := range all { // ages count from it
		if now, ok := strings.CutPrefix(word, "now="); ok {
			a.in.Now = parseTime(t, now)
		}
	}
	a.person.Posture.Received, a.person.Posture.Sequence = a.in.Now, a.in.Now.UnixMilli()
	for _, word := range all {
		key, value, _ := strings.Cut(word, "=")
		kind, name, _ := strings.Cut(key, ".")
		if !a.ofPerson(t, kind, name, value) && !a.ofRequest(t, kind, name, value) {
			t.Fatalf("asker: unknown word %q", word)
		}
	}
	return a.in
}

type goldenAsker struct {
	in     *Input
	person *Person
}

func (a *goldenAsker) ofPerson(t testing.TB, kind, name, value string) bool {
	p := a.person
	switch kind {
	case "nobody":
		a.in.Person, a.in.Absent = nil, "session revoked"
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
		p.Posture.Facts[name] = readFact(t, value, a.in.Now)
	case "approved":
		p.Device.Approved = value == "true"
	case "type":
		p.Device.Type = value
	case "expires":
		p.ExpiresIn = parseDuration(t, value)
	case "logged-in":
		p.Login.Created = a.in.Now.Add(-parseDuration(t, value))
		p.Session.Created = p.Login.Created
	case "auth":
		p.Login.AuthMethods = strings.Split(value, ",")
		p.Session.AuthMethods = p.Login.AuthMethods
	case "no-directory":
		p.Groups = Groups{}
	case "no-device":
		p.Session.Device, p.Device, p.Posture = "", nil, nil
	case "no-report":
		p.Posture = nil
	default:
		return false
	}
	return true
}

func (a *goldenAsker) ofRequest(t testing.TB, kind, name, value string) bool {
	q := a.in.Request
	switch kind {
	case "now":
	case "record":
		all, ok := a.in.Records.(goldenRecords)
		if !ok {
			all = goldenRecords{}
		}
		all[name], _ = parseJSON(t, value).(map[string]any)
		a.in.Records = all
	case "peer":
		q.Peer = netip.AddrPortFrom(netip.MustParseAddr(value), 50000)
	case "method":
		q.Method = value
	case "path":
		q.Path = value
	case "header":
		if q.Headers == nil {
			q.Headers = map[string][]string{}
		}
		q.Headers[name] = append(q.Headers[name], value)
	case "ssh", "ssh-key":
		if q.SSH == nil {
			q.SSH = &sallyport.SSHRequest{}
		}
		if kind == "ssh" {
			q.SSH.Username = value
		} else {
			q.SSH.PublicKey = parseBase64(t, value)
		}
	case "mcp":
		method, tool, _ := strings.Cut(value, ":")
		q.MCP = &sallyport.MCPRequest{Method: method, Tool: tool}
	case "no-cert":
		q.Certificate = &sallyport.ClientCertificate{}
	case "cert", "cert-valid":
		if q.Certificate == nil {
			q.Certificate = &sallyport.ClientCertificate{Presented: true}
		}
		if kind == "cert" {
			q.Certificate.Leaf = parseBase64(t, value)
		} else {
			q.Certificate.Valid = true
		}
	default:
		return false
	}
	return true
}

// goldenRecords are external records by type/id.
type goldenRecords map[string]map[string]any

func (r goldenRecords) External(typ, id string) (map[string]any, bool) {
	fields, ok := r[typ+"/"+id]
	return fields, ok
}

func readFact(t testing.TB, s string, now time.Time) sallyport.Fact {
	s, source, ok := strings.Cut(s, "/")
	if !ok {
		source = sallyport.SourceOS
	}
	s, age, _ := strings.Cut(s, "@")
	f := sallyport.Fact{Value: parseJSON(t, s), At: now, Source: source}
	if age != "" {
		f.At = now.Add(-parseDuration(t, age))
	}
	return f
}

func parseDuration(t testing.TB, s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func parseJSON(t testing.TB, s string) any {
	var v any
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		t.Fatalf("%s: %v", s, err)
	}
	return v
}

func parseTime(t testing.TB, s string) time.Time {
	at, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func parseBase64(t testing.TB, s string) []byte {
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		t.Fatalf("%s: %v", s, err)
	}
	return b
}

// Many policies are read at a time, and each is told what it would be told alone.
func TestPoliciesAreReadSideBySide(t *testing.T) {
	files, err := filepath.Glob("testdata/*/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for _, file := range files {
		a, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text := section(a, "policy")
		texts = append(texts, text, text)
	}
	for i, r := range parseAll(texts) {
		_, alone := Parse([]byte(texts[i]))
		if got, want := fmt.Sprint(r.err), fmt.Sprint(alone); got != want {
			t.Errorf("among others %s; alone %s\n%s", got, want, texts[i])
		}
	}
}

package policy

import (
	"encoding/json"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"sallyport"

	"github.com/rogpeppe/go-internal/txtar"
	"go.yaml.in/yaml/v3"
)

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		anyone, "- {name: a, allow: {and: [{groups: {has: dba}}, {device: {disk_encrypted: {is: true, max_age: 5m, source: [os]}}}]}}",
		"deny: {nor: [{claim/a.b: 5}, {or: [{email: {in: [a@b]}}]}]}", "- &a {allow: *a}", "a: !!binary x", "? ", "\t", "{", "- - -",
	} {
		f.Add([]byte(s))
	}
	files, err := filepath.Glob("testdata/*/*.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		a, err := txtar.ParseFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add([]byte(section(a, "policy")))
	}
	askers := []*Input{asker(f, "nobody"), asker(f, `groups=dba email=a@b claim.x=1 fact.firewall=true fact.os="linux"`), asker(f, "no-device no-directory")}
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := Parse(text)
		if err != nil {
			errs, ok := err.(Errors)
			if !ok || len(errs) == 0 {
				t.Fatalf("%T %v: want Errors", err, err)
			}
			for _, e := range errs {
				if e.Line < 1 || e.Column < 1 || e.Message == "" {
					t.Errorf("fault without a place: %+v", e)
				}
			}
			return
		}
		if len(p.allow)+len(p.deny)+len(p.observed) == 0 {
			t.Fatal("a policy without rules loaded")
		}
		// For everything that loads: no panic, and both paths agree.
		set, err := Compile([]sallyport.Route{{From: "tcp://db.internal:5432", Policy: string(text)}}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, in := range askers {
			a := set.Decide(in)
			set.Reasons(in, a, true)
			set.Observed(in, a)
			a.Inputs(in)
			for _, r := range slices.Concat(p.allow, p.deny, p.observed) {
				if short, full := r.when.eval(in), r.when.full(in); short != full {
					t.Fatalf("stopping early %v, in full %v", short, full)
				}
			}
		}
	})
}

func FuzzVersions(f *testing.F) {
	f.Add("1.10", "1.9")
	f.Add("1.2.3-beta.1", "v1.2.3+x")
	f.Fuzz(func(t *testing.T, a, b string) {
		for _, order := range []func(a, b string) (int, bool){compareVersions, compareSemantic} {
			x, okX := order(a, b)
			y, okY := order(b, a)
			if okX != okY || okX && sign(x) != -sign(y) {
				t.Errorf("%q, %q: %d %v, reversed %d %v", a, b, x, okX, y, okY)
			}
		}
	})
}

// lowerASCII is case folding as e-mail addresses are compared, said another way.
func lowerASCII(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c | 0x20
		}
	}
	return string(b)
}

// FuzzTextMatcher holds every operator on texts against package strings, with
// look-alikes among the seeds: what differs in a byte is another text.
func FuzzTextMatcher(f *testing.F) {
	f.Add("alice@example.com", "ALICE@example.com")
	f.Add("admin", "аdmin")    // Cyrillic
	f.Add("kim", "\u212Aim")   // the Kelvin sign
	f.Add("straße", "STRASSE") // folds in Unicode
	f.Add("é", "e\u0301")      // composed and not
	f.Add("a", "a\u200b")      // a blank without width
	f.Add("\xff", "\xfe")      // no UTF-8
	f.Add("", "x")
	f.Fuzz(func(t *testing.T, value, operand string) {
		for _, fold := range []bool{false, true} {
			v, o := value, operand
			if fold {
				v, o = lowerASCII(v), lowerASCII(o)
			}
			for op, want := range map[compare]bool{
				isAny: v == o, isNone: v != o,
				contains: strings.Contains(v, o), startsWith: strings.HasPrefix(v, o), endsWith: strings.HasSuffix(v, o),
			} {
				m := matcher{fold: fold, tests: []test{{op: op, of: []scalar{{kind: 's', s: operand}}}}}
				if got := m.text(value); got != truth(want) {
					t.Errorf("%q %s (fold %v): got %v; want %v", value, m.words(), fold, got, want)
				}
				if got := m.value(value); got != truth(want) {
					t.Errorf("%q %s (fold %v): as a fact %v; want %v", value, m.words(), fold, got, want)
				}
				if got := m.value(5.0); got != Unknown {
					t.Errorf("5 %s: got %v; want unknown", m.words(), got)
				}
			}
		}
	})
}

// FuzzListMatcher tests claims of any shape: typed, has and exclude opposite, is
// within has.
func FuzzListMatcher(f *testing.F) {
	for _, claim := range []string{`["a","b"]`, `"5"`, `5`, `true`, `null`, `[5,"5",true,null]`, `{"a":1}`, `[["a"]]`, `[]`, `1e400`} {
		f.Add([]byte(claim), "a", 5.0, true)
	}
	f.Fuzz(func(t *testing.T, claim []byte, s string, n float64, b bool) {
		var v any
		if json.Unmarshal(claim, &v) != nil {
			return
		}
		elements, isList := v.([]any)
		if !isList {
			elements = []any{v}
		}
		for _, operand := range []struct {
			of   scalar
			same func(any) bool
		}{
			{scalar{kind: 's', s: s}, func(e any) bool { x, ok := e.(string); return ok && x == s }},
			{scalar{kind: 'n', n: n}, func(e any) bool { x, ok := e.(float64); return ok && x == n }},
			{scalar{kind: 'b', b: b}, func(e any) bool { x, ok := e.(bool); return ok && x == b }},
		} {
			in := slices.ContainsFunc(elements, operand.same)
			for op, want := range map[compare]bool{has: in, exclude: !in, hasOnly: in && len(elements) == 1} {
				if got := testClaim(&test{op: op, of: []scalar{operand.of}}, v); got != truth(want) {
					t.Errorf("%s, operator %d, %v: got %v; want %v", claim, op, operand.of, got, want)
				}
			}
		}
	})
}

// FuzzNumbers reads a number as a policy does, and compares it with a fact: what
// loads is what strconv reads, and exactly one of <, =, > holds.
func FuzzNumbers(f *testing.F) {
	for _, s := range []string{"5", "-0", "0777", "1e3", "0x1F", "1_000", ".5", "5.", "+5", "1.50", "٣", "9007199254740993", "nan", ".inf"} {
		f.Add(s, 5.0)
	}
	f.Add("0", math.NaN())
	f.Add("0", math.Inf(1))
	f.Fuzz(func(t *testing.T, text string, fact float64) {
		var n yaml.Node
		if yaml.Unmarshal([]byte(text), &n) != nil || len(n.Content) != 1 {
			return
		}
		var p parser
		s, ok := p.scalar(n.Content[0], "number")
		if !ok || s.kind != 'n' {
			return
		}
		written := strings.TrimSpace(n.Content[0].Value)
		if want, err := strconv.ParseFloat(written, 64); err != nil || want != s.n || strings.ContainsAny(written, "eExX_+") {
			t.Fatalf("%q is read as %v; strconv %v, %v", written, s.n, want, err)
		}
		is := func(op compare) Value { return (&test{op: op, of: []scalar{s}}).value(fact) }
		if math.IsNaN(fact) {
			for op := range maps.Values(orderOperators) {
				if is(op) != Unknown {
					t.Errorf("NaN %d %v: got %v; want unknown", op, s, is(op))
				}
			}
			return
		}
		holds := 0
		for _, op := range []compare{less, isAny, greater} {
			if is(op) == True {
				holds++
			}
		}
		if holds != 1 || is(lessOrEqual) != is(greater).not() || is(greaterOrEqual) != is(less).not() || is(isNone) != is(isAny).not() {
			t.Errorf("%v against %v: < %v, = %v, > %v", fact, s.n, is(less), is(isAny), is(greater))
		}
	})
}

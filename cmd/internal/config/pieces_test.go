package config

import (
	"bytes"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"sallyport/policyd/policy"
)

const entry = "from: tcp://a.internal:1, policy: {allow: {or: [{accept: true}]}}"

// sameInPieces fails the test if the pieces of a file say anything else than the
// whole; it reports whether the file was read in pieces.
func sameInPieces(t *testing.T, text string, pieces int) bool {
	t.Helper()
	d, got, ok := inPieces("x.yaml", []byte(text), pieces)
	if !ok {
		return false
	}
	whole, want := newDecoder("x.yaml"), newFile("x.yaml")
	whole.decode([]byte(text), want)
	if len(whole.problems) > 0 {
		t.Fatalf("read in pieces in spite of\n%v\n%s", whole.problems, text)
	}
	opts := cmp.Options{cmpopts.IgnoreUnexported(File{}), cmp.AllowUnexported(Policy{}), cmp.Comparer(func(a, b *policy.Policy) bool { return reflect.DeepEqual(a, b) })}
	if diff := cmp.Diff(want, got, opts); diff != "" {
		t.Fatalf("-whole +pieces:\n%s\n%s", diff, text)
	}
	if diff := cmp.Diff(whole.lines, d.lines); diff != "" {
		t.Fatalf("lines: -whole +pieces:\n%s\n%s", diff, text)
	}
	return true
}

func TestPiecesSayWhatTheWholeSays(t *testing.T) {
	for name, text := range map[string]string{
		"indented":   "domain: corp.example\nroutes:\n  - {" + entry + "}\n  - {" + entry + "}\n\n# end\nexplain_groups: true\n",
		"flush":      "domain: corp.example\nroutes:\n- {" + entry + "}\n# why\n- {" + entry + "}\ndata_dir: x\n",
		"first key":  "routes:\n  - {" + entry + "}\n  - {" + entry + "}\ndomain: x",
		"over lines": "domain: x\nroutes:\n  - from: tcp://a.internal:1\n    policy:\n      - name: x\n        allow:\n          and:\n          - accept: true\n  - from: \"tcp://b\\\n      .internal:1\"\n    policy: {allow: {or: [{accept: true}]}}\n",
		"generated":  large(50, 3),
	} {
		for n := 1; n < 5; n++ {
			if !sameInPieces(t, text, n) {
				t.Errorf("%s: not read in %d pieces", name, n)
			}
		}
	}
}

// What looks like the list of routes and is none, or not all of it, is read as a
// whole.
func TestNotEverythingIsCut(t *testing.T) {
	for name, text := range map[string]string{
		"within a scalar":          "domain: \"\nroutes:\n  - {" + entry + "}\n\"\n",
		"within a collection":      "log: {\nroutes:\n  - {" + entry + "}\n}\n",
		"entry within a scalar":    "routes:\n  - {from: \"tcp://\n  - a:1\", policy: {allow: {or: [{accept: true}]}}}\n",
		"entry within a list":      "routes:\n  - {from: a, policy: [\n  - {" + entry + "}\n]}\n",
		"twice":                    "routes:\n  - {" + entry + "}\nroutes:\n  - {" + entry + "}\n",
		"twice, quoted":            "\"routes\": []\nroutes:\n  - {" + entry + "}\n",
		"another document":         "routes:\n  - {" + entry + "}\n---\nroutes: []\n",
		"end of document":          "routes:\n  - {" + entry + "}\n...\n",
		"anchor across":            "routes:\n  - {" + entry + ", name: &x a}\n  - {" + entry + ", name: *x}\n",
		"root not in column 1":     "  domain: x\nroutes:\n  - {" + entry + "}\n",
		"fault":                    "routes:\n  - {" + entry + "}\n  - {" + entry + ", nmae: x}\n",
		"fault elsewhere":          "routes:\n  - {" + entry + "}\nexplain_group: true\n",
		"fault in a policy":        "routes:\n  - {from: x, policy: {alow: 1}}\n",
		"other indent":             "routes:\n  - {" + entry + "}\n - {" + entry + "}\n",
		"no list":                  "routes:\n  -x: 1\n",
		"other line breaks":        "routes:\r\n  - {" + entry + "}\r\n",
		"next line":                "routes:\n  - {" + entry + ", name: \"a\u0085\"}\n",
		"nothing but a name":       "routes:\n",
		"entries of entries":       "routes:\n  - - {" + entry + "}\n",
		"collection over the tail": "routes:\n  - {from: tcp://a:1, policy: {allow: {or: [{accept: true}\n]}}}\n",
	} {
		for n := 1; n < 4; n++ {
			if sameInPieces(t, text, n) {
				t.Errorf("%s: was cut", name)
			}
		}
	}
}

func FuzzPieces(f *testing.F) {
	f.Add("domain: corp.example\nroutes:\n  - {"+entry+"}\n  - {"+entry+"}\n\n# end\nexplain_groups: true\n", 2)
	f.Add("domain: \"\nroutes:\n  - {"+entry+"}\n\"\n", 3)
	f.Add("routes:\n- {from: \"tcp://\n- a:1\", policy: |\n   x\n}\n- {"+entry+"}\n", 2)
	f.Fuzz(func(t *testing.T, text string, pieces int) {
		if pieces < 1 || pieces > 64 || len(text) > 1<<16 {
			return
		}
		sameInPieces(t, text, pieces)
	})
}

// A fault far down a large file is told with its line, as in a small one.
func TestFaultsOfLargeFiles(t *testing.T) {
	text := large(3000, 1) + "  - {from: \"tcp://db7.internal:5432\", policy: {allow: {or: [{accept: true}]}}}\n"
	if len(text) < worthCutting {
		t.Fatalf("%d bytes are not enough for this test", len(text))
	}
	_, err := parse("x.yaml", []byte(text), Tool)
	want := "x.yaml:12004: routes[3000].from: tcp://db7.internal:5432 stands here and in routes[7].from; one of them would never be asked"
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v; want %s", err, want)
	}
}

// A configuration that cached would not take is refused when it is read, before
// anything is sent anywhere.
func TestTooLargeForARecord(t *testing.T) {
	var b strings.Builder
	b.WriteString("domain: corp.example\ndata_dir: data\nroutes:\n")
	for i := range 100 {
		fmt.Fprintf(&b, "  - {from: \"tcp://h%d.internal:1\", policy: {allow: {or: [{claim/x: \"%s\"}]}}}\n", i, strings.Repeat("<", 40<<10))
	}
	_, err := parse("x.yaml", []byte(b.String()), Tool)
	if err == nil || !strings.Contains(err.Error(), "x.yaml:4: routes: make a record of 2") {
		t.Errorf("got %v; want a refusal that names routes and the size", err)
	}
	if _, err := parse("x.yaml", bytes.Repeat([]byte("#\n"), 9<<20), Tool); err == nil || !strings.Contains(err.Error(), "larger than 16 MiB") {
		t.Errorf("18 MiB: got %v; want a refusal that names the limit", err)
	}
}

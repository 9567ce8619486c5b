package config

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/rogpeppe/go-internal/txtar"
)

var update = flag.Bool("update", false, "write golden files anew")

// sample has a field of every kind that a configuration may be made of.
type sample struct {
	Name    string         `yaml:"name"`
	On      bool           `yaml:"on"`
	Count   int            `yaml:"count"`
	Port    uint16         `yaml:"port"`
	Ratio   float64        `yaml:"ratio"`
	Wait    time.Duration  `yaml:"wait"`
	Subnet  netip.Prefix   `yaml:"subnet"`
	Tags    []string       `yaml:"tags"`
	Labels  map[string]int `yaml:"labels"`
	Free    any            `yaml:"free"`
	Policy  Policy         `yaml:"policy"`
	Inner   inner          `yaml:"inner"`
	Pointer *inner         `yaml:"pointer"`
	List    []inner        `yaml:"list"`
	Shared  `yaml:",inline"`
	Hidden  string `yaml:"-"`
}

type inner struct {
	Listen string `yaml:"listen"`
}

type Shared struct {
	Level string `yaml:"level"`
}

func TestDecodeEveryKind(t *testing.T) {
	var got sample
	d := newDecoder("f")
	d.decode([]byte(`
name: "0777"
on: true
count: -3
port: 443
ratio: 0.5
wait: 1m30s
subnet: 100.96.0.0/16
tags: [a, b]
labels: {x: 1}
free: {deep: [1, two]}
inner: {listen: ":1"}
pointer: {listen: ":2"}
list: [{listen: ":3"}]
level: info
`), &got)
	if len(d.problems) > 0 {
		t.Fatal(d.problems)
	}
	want := sample{
		Name: "0777", On: true, Count: -3, Port: 443, Ratio: 0.5, Wait: 90 * time.Second,
		Subnet: netip.MustParsePrefix("100.96.0.0/16"), Tags: []string{"a", "b"}, Labels: map[string]int{"x": 1},
		Free: map[string]any{"deep": []any{1, "two"}}, Inner: inner{":1"}, Pointer: &inner{":2"}, List: []inner{{":3"}},
		Shared: Shared{"info"},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(sample{}, Shared{}), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmpopts.IgnoreUnexported(Policy{})); diff != "" {
		t.Error(diff)
	}
	for key, line := range map[string]int{"name": 2, "list[0].listen": 14, "list[0].missing": 14, "nothing": 2} {
		if got := d.line(key); got != line {
			t.Errorf("line of %s: got %d, want %d", key, got, line)
		}
	}
}

// TestStrict runs testdata/strict.txtar: each file's comment lines at the top
// (starting with "#!") are exactly the problems it must give.
func TestStrict(t *testing.T) {
	path := filepath.Join("testdata", "strict.txtar")
	archive, err := txtar.ParseFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range archive.Files {
		yamlText, want, _ := strings.Cut(string(f.Data), "---- problems\n")
		d := newDecoder(f.Name)
		d.decode([]byte(strings.NewReplacer("␀", "\x00", "␉", "\t", "␦", "\xef\xbb\xbf").Replace(yamlText)), new(sample))
		got := ""
		if len(d.problems) > 0 {
			got = d.problems.sorted().Error() + "\n"
		}
		if *update {
			archive.Files[i].Data = []byte(yamlText + "---- problems\n" + got)
			continue
		}
		t.Run(f.Name, func(t *testing.T) {
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	if *update {
		if err := os.WriteFile(path, txtar.Format(archive), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDepthIsBounded(t *testing.T) {
	d := newDecoder("f")
	d.decode([]byte("free: "+strings.Repeat("[", 5000)+strings.Repeat("]", 5000)), new(sample))
	if len(d.problems) != 1 || !strings.Contains(d.problems[0].Message, "deeper") {
		t.Errorf("got %v; want one fault about depth", d.problems)
	}
}

func TestNearest(t *testing.T) {
	names := []string{"listen", "public_url", "tls", "log"}
	for typed, want := range map[string]string{"lisen": "listen", "Listen": "listen", "pubic_url": "public_url", "tsl": "tls", "xyz": "", "frobnicate": ""} {
		if got, _ := nearest(typed, names); got != want {
			t.Errorf("nearest(%q) = %q; want %q", typed, got, want)
		}
	}
}

func TestIsBad(t *testing.T) {
	d := newDecoder("f")
	d.fault(1, "authd.idp", "x")
	for key, want := range map[string]bool{"authd.idp": true, "authd.idp.issuer": true, "authd": true, "authd.idpx": false, "gateway": false} {
		if got := d.isBad(key); got != want {
			t.Errorf("isBad(%s) = %v; want %v", key, got, want)
		}
	}
}

func TestSchemaOfEveryKind(t *testing.T) {
	b, err := json.Marshal(schemaOf(reflect.TypeFor[sample]()))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`"additionalProperties":false`, `"name":{"type":"string"}`, `"count":{"type":"integer"}`,
		`"list":{"items":{"additionalProperties":false,"properties":{"listen":{"type":"string"}},"type":"object"},"type":"array"}`,
		`"level":{"type":"string"}`, `"on":{"type":"boolean"}`, `"labels":{"additionalProperties":{"type":"integer"},"type":"object"}`,
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("schema lacks %s in\n%s", want, b)
		}
	}
}

func FuzzDecode(f *testing.F) {
	archive, err := txtar.ParseFile(filepath.Join("testdata", "strict.txtar"))
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range archive.Files {
		text, _, _ := strings.Cut(string(file.Data), "---- problems\n")
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		d := newDecoder("f")
		var s sample
		d.decode(text, &s)
		for _, p := range d.problems {
			if p.Message == "" || p.Line < 0 {
				t.Errorf("a problem that says nothing: %+v", p)
			}
			if strings.Contains(fmt.Sprint(p), "\x00") {
				t.Errorf("a problem repeats a NUL: %q", p.Error())
			}
		}
	})
}

package scenario

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// suffix is what names of test files end in.
const suffix = ".policytest.yaml"

// Find returns the test files that the paths stand for, in order: a file is
// itself, a folder is every *.policytest.yaml below it.
func Find(paths []string) ([]string, error) {
	var all []string
	for _, path := range paths {
		var found []string
		err := filepath.WalkDir(path, func(name string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() && (name == path || strings.HasSuffix(name, suffix)) {
				found = append(found, name)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		if len(found) == 0 {
			return nil, fmt.Errorf("%s: no *%s below it", path, suffix)
		}
		all = append(all, found...)
	}
	return all, nil
}

// Read reads a test file. Its errors name file, line and column where there are
// any; a policy that does not load is none.
func Read(path string) (*File, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return Parse(path, content)
}

// Parse reads the content of the test file at path.
func Parse(path string, content []byte) (*File, error) {
	r := &reader{file: path, text: content, policies: map[string]*Policy{}}
	root := r.document()
	if root == nil {
		return nil, r.err()
	}
	var common Test
	var tests []*yaml.Node
	r.object(root, "a test file", fields{
		"policy":      r.policy(&common.Policy),
		"policy_file": r.policyFile(&common.Policy),
		"given":       r.given(&common.Given),
		"description": text(r, new(string)), // for people
		"tests":       func(n *yaml.Node) { r.list(n, "tests", func(n *yaml.Node) { tests = append(tests, n) }) },
	})
	f := &File{Path: path}
	for _, n := range tests {
		f.Tests = append(f.Tests, r.test(n, common))
	}
	if len(tests) == 0 && len(r.errs) == 0 {
		r.fail(root, "a test file without tests")
	}
	return f, r.err()
}

// ReadGiven reads what stands under given in a test file, which then needs no
// tests.
func ReadGiven(path string) (Given, error) {
	var g Given
	content, err := os.ReadFile(path)
	if err != nil {
		return g, err
	}
	r := &reader{file: path, text: content}
	ignore := func(*yaml.Node) {}
	if root := r.document(); root != nil {
		r.object(root, "a test file", fields{"policy": ignore, "policy_file": ignore, "description": ignore, "tests": ignore, "given": r.given(&g)})
	}
	return g, r.err()
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// document returns the one YAML document of the file, or nil after noting why
// there is none.
func (r *reader) document() *yaml.Node {
	d := yaml.NewDecoder(bytes.NewReader(r.text))
	var n, second yaml.Node
	if err := d.Decode(&n); err != nil {
		r.syntax(err)
		return nil
	}
	if err := d.Decode(&second); err == nil {
		r.fail(&second, "a second document; write one")
	} else if !errors.Is(err, io.EOF) {
		r.syntax(err)
	}
	if n.Kind != yaml.DocumentNode || len(n.Content) != 1 {
		r.fail(&n, "the file is empty")
		return nil
	}
	return n.Content[0]
}

func (r *reader) syntax(err error) {
	at := &yaml.Node{Line: 1, Column: 1}
	if errors.Is(err, io.EOF) {
		r.fail(at, "the file is empty")
		return
	}
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil && m[1] != "" {
		at.Line, _ = strconv.Atoi(m[1]) // digits by the expression
	}
	r.fail(at, "no YAML: %s", yamlLine.ReplaceAllString(err.Error(), ""))
}

// test reads one test; what it does not say of itself is common.
func (r *reader) test(n *yaml.Node, common Test) Test {
	t := Test{Line: n.Line, Column: n.Column, Policy: common.Policy}
	var own Given
	r.object(n, "a test", fields{
		"name":        text(r, &t.Name),
		"description": text(r, new(string)),
		"policy":      r.policy(&t.Policy),
		"policy_file": r.policyFile(&t.Policy),
		"given":       r.given(&own),
		"request":     r.request(&t.Request),
		"expect":      parsed(r, &t.Expect, outcome),
		"rule":        text(r, &t.Rule),
	})
	t.Given = common.Given.with(own)
	if t.Name == "" {
		t.Name = "line " + strconv.Itoa(n.Line)
	}
	if t.Expect == "" && len(r.errs) == 0 {
		r.fail(n, "a test without expect")
	}
	return t
}

func outcome(s string) (Outcome, error) {
	if !slices.Contains([]Outcome{Allow, Deny, Login, LoadError}, Outcome(s)) {
		return "", fmt.Errorf("expect is allow, deny, login or load_error, not %.40q", s)
	}
	return Outcome(s), nil
}

// with returns g and then more; records are found by id, so of two with the same
// id the one of more counts.
func (g Given) with(more Given) Given {
	return Given{
		Users:     slices.Concat(g.Users, more.Users),
		Directory: slices.Concat(g.Directory, more.Directory),
		Sessions:  slices.Concat(g.Sessions, more.Sessions),
		Devices:   slices.Concat(g.Devices, more.Devices),
		Records:   slices.Concat(g.Records, more.Records),
	}
}

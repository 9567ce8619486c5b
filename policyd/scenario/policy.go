package scenario

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"

	"sallyport/policyd/policy"
)

// policy reads a policy: a YAML value, or a text that holds YAML.
func (r *reader) policy(to **Policy) func(*yaml.Node) {
	return func(n *yaml.Node) {
		n = plain(n)
		if n.Kind == yaml.ScalarNode && !absent(n) {
			*to = r.quoted(n)
			return
		}
		own := *n
		own.Anchor = "" // it is the test file's; within a policy there are none
		*to = r.embedded(&own)
	}
}

// embedded is a policy that stands as a value in the test file.
func (r *reader) embedded(n *yaml.Node) *Policy {
	p := &Policy{File: r.file, place: samePlace}
	if _, p.Err = policy.ParseNode(n); p.Err != nil {
		return p
	}
	written, err := yaml.Marshal(n)
	var again yaml.Node
	if err == nil {
		err = yaml.Unmarshal(written, &again)
	}
	if err != nil {
		p.Err = fmt.Errorf("%d:%d: the policy cannot be written as YAML: %w", n.Line, n.Column, err)
		return p
	}
	places := map[[2]int][2]int{}
	pair(again.Content[0], n, places)
	p.text = string(written)
	p.place = func(line, column int) (int, int) {
		at := places[[2]int{line, column}]
		return at[0], at[1]
	}
	return p
}

func samePlace(line, column int) (int, int) { return line, column }

// pair notes where the nodes of a rewritten policy stood before.
func pair(now, before *yaml.Node, places map[[2]int][2]int) {
	places[[2]int{now.Line, now.Column}] = [2]int{before.Line, before.Column}
	for i := range min(len(now.Content), len(before.Content)) {
		pair(now.Content[i], before.Content[i], places)
	}
}

// quoted is a policy that stands as text in the test file. Places are exact in a
// block, and those of the text's begin in other styles.
func (r *reader) quoted(n *yaml.Node) *Policy {
	place := func(int, int) (int, int) { return n.Line, n.Column }
	if lines := strings.Split(string(r.text), "\n"); n.Style&yaml.LiteralStyle != 0 && n.Line < len(lines) {
		first := lines[n.Line]
		indent := len(first) - len(strings.TrimLeft(first, " "))
		place = func(line, column int) (int, int) { return n.Line + line, indent + column }
	}
	return parsePolicy(r.file, n.Value, place)
}

func parsePolicy(file, content string, place func(line, column int) (int, int)) *Policy {
	p := &Policy{File: file, text: content, place: place}
	_, err := policy.Parse([]byte(content))
	var faults policy.Errors
	if !errors.As(err, &faults) {
		p.Err = err
		return p
	}
	for _, e := range faults {
		e.Line, e.Column = place(e.Line, e.Column)
	}
	p.Err = faults
	return p
}

// policyFile reads a policy from the file that n names, relative to the test
// file.
func (r *reader) policyFile(to **Policy) func(*yaml.Node) {
	return func(n *yaml.Node) {
		name, ok := r.scalar(n)
		if !ok {
			return
		}
		if !filepath.IsAbs(name) {
			name = filepath.Join(filepath.Dir(r.file), name)
		}
		if p := r.policies[name]; p != nil {
			*to = p
			return
		}
		content, err := os.ReadFile(name)
		if err != nil {
			r.fail(n, "policy_file: %v", err)
			return
		}
		*to = parsePolicy(name, string(content), samePlace)
		r.policies[name] = *to
	}
}

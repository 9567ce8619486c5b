package policy

import (
	"cmp"
	"slices"
	"strconv"

	"go.yaml.in/yaml/v3"
)

// RuleChange is how one rule differs between two texts of a policy.
type RuleChange struct {
	// Rule is its name, or "#N" for the Nth entry of the policy.
	Rule string `json:"rule"`
	// Action is allow or deny.
	Action string `json:"action"`
	// Change is added, removed or changed.
	Change string `json:"change"`
}

// ruleKey is what stays the same when a rule is changed.
type ruleKey struct{ name, action string }

// CompareRules tells which rules differ between two policies that load. Layout,
// comments and the order of rules with names do not count.
func CompareRules(before, after string) []RuleChange {
	old, now := rulesOf(before), rulesOf(after)
	var out []RuleChange
	for key, texts := range old {
		switch {
		case now[key] == nil:
			out = append(out, RuleChange{key.name, key.action, "removed"})
		case !slices.Equal(texts, now[key]):
			out = append(out, RuleChange{key.name, key.action, "changed"})
		}
	}
	for key := range now {
		if old[key] == nil {
			out = append(out, RuleChange{key.name, key.action, "added"})
		}
	}
	slices.SortFunc(out, func(a, b RuleChange) int { return cmp.Or(cmp.Compare(a.Rule, b.Rule), cmp.Compare(a.Action, b.Action)) })
	return out
}

// rulesOf returns the rules of a policy as texts that are equal where the rules
// are; rules of the same name are sorted.
func rulesOf(text string) map[ruleKey][]string {
	n, fault := document([]byte(text))
	if fault != nil || len(n.Content) != 1 {
		return nil
	}
	objects := []*yaml.Node{n.Content[0]}
	if objects[0].Kind == yaml.SequenceNode {
		objects = objects[0].Content
	}
	out := map[ruleKey][]string{}
	for i, o := range objects {
		name, mode := "#"+strconv.Itoa(i+1), ""
		for k := 0; k+1 < len(o.Content); k += 2 {
			switch o.Content[k].Value {
			case "name":
				name = o.Content[k+1].Value
			case "mode":
				mode = o.Content[k+1].Value
			}
		}
		for k := 0; k+1 < len(o.Content); k += 2 {
			if action := o.Content[k].Value; action == "allow" || action == "deny" {
				key := ruleKey{name, action}
				out[key] = append(out[key], mode+" "+plainly(o.Content[k+1]))
			}
		}
	}
	for _, texts := range out {
		slices.Sort(texts)
	}
	return out
}

// plainly writes a node without layout.
func plainly(n *yaml.Node) string {
	switch n.Kind {
	case yaml.ScalarNode:
		return n.ShortTag() + strconv.Quote(n.Value)
	case yaml.MappingNode:
		out := "{"
		for _, c := range n.Content {
			out += plainly(c) + ","
		}
		return out + "}"
	}
	out := "["
	for _, c := range n.Content {
		out += plainly(c) + ","
	}
	return out + "]"
}

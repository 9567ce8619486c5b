package policy

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCompareRules(t *testing.T) {
	const old = `
- name: dba   # with a comment
  allow:
    and:
    - groups: {has: dba}
- {name: gone, allow: {or: [{user: a}]}}
- {allow: {or: [{user: b}]}, deny: {or: [{user: c}]}}
- {name: quoted, allow: {or: [{claim/n: 5}]}}
- {name: watched, mode: observe, deny: {or: [{user: d}]}}
`
	for _, tt := range []struct {
		name, text string
		want       []RuleChange
	}{
		{"same", old, nil},
		{"layout and order", `
- {"name": watched, mode: observe, deny: {or: [{user: d}]}}
- {name: dba, allow: {and: [{groups: {has: "dba"}}]}}
- {deny: {or: [{user: c}]}, allow: {or: [{user: b}]}}
- {name: gone, allow: {or: [{user: a}]}}
- {name: quoted, allow: {or: [{claim/n: 5}]}}
`, nil},
		{"all kinds", `
- {name: dba, allow: {and: [{groups: {has: sre}}]}}
- {name: new, allow: {or: [{user: a}]}}
- {allow: {or: [{user: b}]}}
- {name: quoted, allow: {or: [{claim/n: "5"}]}}
- {name: watched, deny: {or: [{user: d}]}}
`, []RuleChange{
			{"#3", "deny", "removed"},
			{"dba", "allow", "changed"},
			{"gone", "allow", "removed"},
			{"new", "allow", "added"},
			{"quoted", "allow", "changed"},
			{"watched", "deny", "changed"},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, CompareRules(old, tt.text)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

package policy

import (
	"slices"
	"time"

	"go.yaml.in/yaml/v3"
)

// groups tests the directory's groups by id and name.
type groups struct{ tests []test }

func parseGroups(p *parser, _ string, n *yaml.Node) (condition, bool) {
	tests, ok := p.listTests(n, "groups", textOf(p.nameText))
	return leafOf(&groups{tests}), ok
}

func (c *groups) eval(in *Input) Value {
	if in.Person == nil || !in.Person.Groups.known() {
		return Unknown
	}
	v := True
	for i := range c.tests {
		t := &c.tests[i]
		v = min(v, t.list(len(in.Person.Groups.names), in.Person.Groups.has(t.of[0].s)))
	}
	return v
}

func (c *groups) path() string { return "groups" }

func (c *groups) wanted(open bool) string {
	switch {
	case open:
	case c.onlyExcludes():
		return "no membership that this rule excludes"
	default:
		return "the membership that this rule asks for"
	}
	m := matcher{tests: c.tests}
	return m.words()
}

func (c *groups) onlyExcludes() bool {
	return !slices.ContainsFunc(c.tests, func(t test) bool { return t.op != exclude })
}

func (c *groups) found(in *Input) (string, time.Duration) {
	switch {
	case in.Person == nil:
		return noSession, 0
	case !in.Person.Groups.known():
		return "unknown (the directory does not know you)", 0
	case c.eval(in) == True:
		return "enough", 0
	case c.onlyExcludes():
		return "a membership that this rule excludes", 0
	}
	return "missing the membership that this rule asks for", 0
}

func (c *groups) note(in *Input, to *Inputs) {
	if in.Person == nil {
		return
	}
	if to.Groups == nil {
		to.Groups = make(map[string]bool)
	}
	for _, t := range c.tests {
		to.Groups[t.of[0].s] = in.Person.Groups.has(t.of[0].s)
	}
	to.GroupCount, to.NoDirectory = len(in.Person.Groups.names), !in.Person.Groups.known()
}

func (c *groups) recalled(from *Inputs) bool {
	return from.NoDirectory || from.groupsAreAll() || !slices.ContainsFunc(c.tests, func(t test) bool {
		_, ok := from.Groups[t.of[0].s]
		return !ok
	})
}

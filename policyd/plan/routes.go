package plan

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport"
	"sallyport/policyd/policy"
)

// FieldChange is a value that is another one.
type FieldChange struct {
	Field string `json:"field"`
	Old   string `json:"old"`
	New   string `json:"new"`
}

// RouteChange is a route that is added, removed or changed.
type RouteChange struct {
	From   string              `json:"from"`
	Change string              `json:"change"`
	Fields []FieldChange       `json:"fields,omitempty"`
	Rules  []policy.RuleChange `json:"rules,omitempty"`
}

// settings compares what all decisions depend on.
func settings(old, now *sallyport.Config) []FieldChange {
	sources := func(c *sallyport.Config) string { return strings.Join(c.PostureSources, ", ") }
	ttl := func(c *sallyport.Config) string {
		if c.PostureTTL == 0 {
			return ""
		}
		return c.PostureTTL.Round(time.Millisecond).String()
	}
	return differing([]FieldChange{
		{"explain_groups", strconv.FormatBool(old.ExplainGroups), strconv.FormatBool(now.ExplainGroups)},
		{"policyd.posture_sources", sources(old), sources(now)},
		{"policyd.posture_ttl", ttl(old), ttl(now)},
	})
}

func differing(all []FieldChange) []FieldChange {
	var out []FieldChange
	for _, f := range all {
		if f.Old != f.New {
			out = append(out, f)
		}
	}
	return out
}

// routes compares routes by their from.
func routes(old, now []sallyport.Route) []RouteChange {
	before := make(map[string]sallyport.Route, len(old))
	for _, r := range old {
		before[r.From] = r
	}
	out := []RouteChange{}
	for _, r := range now {
		was, ok := before[r.From]
		delete(before, r.From)
		if !ok {
			out = append(out, RouteChange{From: r.From, Change: "added"})
			continue
		}
		c := RouteChange{From: r.From, Change: "changed", Rules: policy.CompareRules(was.Policy, r.Policy), Fields: differing([]FieldChange{
			{"to", was.To, r.To},
			{"name", was.Name, r.Name},
			{"hidden", strconv.FormatBool(was.Hidden), strconv.FormatBool(r.Hidden)},
			{"carrier", was.Carrier, r.Carrier},
		})}
		if len(c.Rules)+len(c.Fields) > 0 {
			out = append(out, c)
		}
	}
	for from := range before {
		out = append(out, RouteChange{From: from, Change: "removed"})
	}
	slices.SortFunc(out, func(a, b RouteChange) int { return cmp.Compare(a.From, b.From) })
	return out
}

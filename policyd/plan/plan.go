// Package plan compares two configurations before the second one is put in
// force: which routes and rules change, which past decisions would have been
// others, which open connections would be cut. It reads what it is given and
// asks nobody; where configurations, logs and records come from is its caller's
// business.
//
// A decision of the past is decided again from what the audit log says was
// looked at (policy.Set.Replay). What the log does not tell is decided from the
// records as they are now, if the caller has them, and marked so.
package plan

import (
	"fmt"
	"iter"
	"time"

	"sallyport"
	"sallyport/audit"
	"sallyport/policyd/policy"
)

// Bounds of what a Plan holds, and of what making one remembers.
const (
	maxGroups = 1000    // kinds of decisions
	maxOpen   = 100_000 // connections followed in the gateway's log
)

// Site is a configuration that loads.
type Site struct {
	config *sallyport.Config
	set    *policy.Set
}

// Load compiles a configuration; the error is a fault.List.
func Load(c *sallyport.Config) (*Site, error) {
	set, err := policy.Compile(c.Routes, policy.Options{
		Sources: c.PostureSources, TTL: c.PostureTTL, Forbidden: c.Forbidden,
		ExplainGroups: true, // a plan is for those who write the policy
	})
	if err != nil {
		return nil, err
	}
	return &Site{c, set}, nil
}

// Present finds what a question is decided from, in the records as they are at
// now: *policyd.Offline.
type Present interface {
	Input(q *sallyport.Request, now time.Time) *policy.Input
}

// Question is what a plan is made from.
type Question struct {
	// Old is in force, New is the candidate. Required.
	Old, New *Site
	// Decisions is policyd's audit log, Flows the gateway's; nil: not here.
	Decisions, Flows iter.Seq2[audit.Entry, error]
	// Since is the time of the first decision that counts; zero: all. Connections
	// that are open count whenever they began.
	Since time.Time
	// Present are the records as they are at Now; nil: not known.
	Present Present
	Now     time.Time
}

// Plan is what would change.
type Plan struct {
	Settings  []FieldChange `json:"settings,omitempty"`
	Routes    []RouteChange `json:"routes"`
	Decisions Decisions     `json:"decisions"`
	Flows     Flows         `json:"flows"`
	// Limits say what could not be looked at, in words.
	Limits []string `json:"limits,omitempty"`
}

// Differs reports whether anything would change.
func (p *Plan) Differs() bool {
	return len(p.Settings) > 0 || len(p.Routes) > 0 || p.Decisions.Differ > 0 || p.Flows.Cut > 0
}

// Basis says what a verdict was computed from.
type Basis string

// The bases.
const (
	FromLog     Basis = "log"     // what was looked at then
	FromRecords Basis = "records" // the records as they are now
)

// Decisions are those of the past.
type Decisions struct {
	Read int `json:"read"`
	Same int `json:"same"`
	// Differ would be others; they stand in Groups.
	Differ int `json:"differ"`
	// Already are those that the configuration in force would decide otherwise
	// than it was done then, for example under an older policy. They are compared
	// by what it would say, and count among Same, Differ and Unknown too.
	Already int `json:"differ_already"`
	// Unknown cannot be told; they stand in Untold.
	Unknown int     `json:"cannot_be_told"`
	Groups  []Group `json:"groups,omitempty"`
	Untold  []Group `json:"untold,omitempty"`
	// Omitted are decisions of further groups, beyond those that are kept.
	Omitted int `json:"omitted,omitempty"`
}

// Kind is what decisions of one Group have in common.
type Kind struct {
	User    sallyport.UserID  `json:"user,omitempty"`
	Email   string            `json:"email,omitempty"`
	Target  string            `json:"target"`
	Was     sallyport.Verdict `json:"was"`
	WasRule string            `json:"was_rule,omitempty"`
	// Would and Rule are the candidate's; Why says it in words. Missing says
	// what the log lacks where Would cannot be told.
	Would   string `json:"would"`
	Rule    string `json:"rule,omitempty"`
	Why     string `json:"why,omitempty"`
	Missing string `json:"missing,omitempty"`
	Basis   Basis  `json:"basis"`
}

// Group is decisions that would differ in the same way.
type Group struct {
	Kind
	Count int       `json:"count"`
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
}

// Flows are the connections that are open.
type Flows struct {
	// Until is the time of the last record in the gateway's log: a gateway that
	// died since has told of no ends.
	Until time.Time `json:"until,omitzero"`
	Open  int       `json:"open"`
	Kept  int       `json:"kept"`
	Cut   int       `json:"cut"`
	// Already would not be let in by the configuration in force either.
	Already int `json:"cut_already"`
	Unknown int `json:"cannot_be_told"`
	// List has those that would be cut or cannot be told, at most a thousand.
	List []Flow `json:"list,omitempty"`
}

// Flow is one of them.
type Flow struct {
	Flow   sallyport.FlowID `json:"flow"`
	Opened time.Time        `json:"opened"`
	Kind
}

// Make makes a plan. An error comes with the plan as far as it got: a log could
// not be read to its end.
func Make(q Question) (*Plan, error) {
	p := &Plan{Settings: settings(q.Old.config, q.New.config), Routes: routes(q.Old.config.Routes, q.New.config.Routes)}
	m := maker{q: q, plan: p, groups: map[Kind]*Group{}, untold: map[Kind]*Group{}}
	flowsErr := m.openFlows()
	decisionsErr := m.decisions()
	m.flows()
	p.Decisions.Groups, p.Decisions.Untold = sorted(m.groups), sorted(m.untold)
	if decisionsErr != nil {
		return p, fmt.Errorf("policyd: %w", decisionsErr)
	}
	if flowsErr != nil {
		return p, fmt.Errorf("gateway: %w", flowsErr)
	}
	return p, nil
}

func (m *maker) limit(format string, args ...any) {
	m.plan.Limits = append(m.plan.Limits, fmt.Sprintf(format, args...))
}

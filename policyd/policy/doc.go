// Package policy is the policy language: it reads policies and routes, refuses
// what could be misread, and answers questions. It is pure: no clock, no I/O, no
// goroutines but those that Compile waits for. Where records come from, and who
// asks, is package policyd's business.
//
// # Grammar
//
//	policy    = rules | [rules, …]                    rules of one action are OR-ed
//	rules     = {name: TEXT, mode: MODE, allow: body, deny: body}  deny beats allow
//	body      = {OP: [condition, …]}                   exactly one OP
//	OP        = and (all) | or (any) | not (none) | nor (at least one fails)
//	condition = body | {CRITERION: value} | {CRITERION/SUBPATH: value}
//
// The text is YAML without anchors, tags, merge keys and second documents;
// what YAML would convert silently (yes, 0777, 1e3) is refused. Every error has
// line and column, and all of them are reported at once.
//
// # Three values
//
// A condition is true, false, or unknown: what is asked for is not there (no
// live session, no report, a fact too old or from a source that does not count).
// Unknown is stronger than false in or, weaker than true in and, and stays
// unknown under not. An unknown never allows; a deny rule that is unknown
// denies. The documentation of [Set.Decide] has the whole table.
//
// # Where to add a criterion
//
// A row in the table criteria (criterion.go) and a type that implements
// criterion. Deciding, explaining, listing, what-if and [Set.Replay] all go
// through it. [Policy.Lint] compares tests of criteria that subjectOf knows
// (normal.go); others only with themselves.
//
// # The files
//
//	reading      parse.go, node.go (scalars and keys), matcher.go, text.go (the stored form)
//	criteria     criterion.go (the table), identity.go, groups.go, claim.go, device.go,
//	             login.go, record.go, clock.go, date.go, zone.go, http.go, source.go,
//	             certificate.go, ssh.go, cel.go, celcheck.go, celvalue.go
//	routes       route.go, from.go, index.go, dialable.go
//	deciding     decide.go, condition.go, value.go, input.go
//	explaining   explain.go, remedy.go, change.go (what would help), cover.go
//	tools        inputs.go and replay.go (audited decisions), lint.go, normal.go, rules.go
package policy

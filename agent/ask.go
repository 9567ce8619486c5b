package agent

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"sallyport"
	"sallyport/agent/forward"
	"sallyport/agent/login"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

// Open opens a flow. It implements forward.Opener: a session is renewed or asked
// for, and a carrier dialled, if there is none.
func (a *Agent) Open(ctx context.Context, t sallyport.Target) (*forward.Flow, error) {
	var flow *forward.Flow
	patient := time.Now().Add(a.cfg.Patience)
	for {
		err := a.do(ctx, func(l *link) error {
			defer a.during(t.Authority() + " through gateway " + l.host)()
			var f *tunnel.Flow
			// Without early bytes it has no effect that asking twice would double.
			err := a.answered(ctx, l, func(ctx context.Context) (err error) {
				f, err = l.carrier.Open(ctx, t, nil)
				return err
			})
			if err == nil {
				flow = &forward.Flow{Flow: f, WhyCut: func(ctx context.Context, cause error) error { return l.why(ctx, t, f, cause) }}
			}
			return err
		})
		if err == nil {
			return flow, nil
		}
		if !Unreached(err) || time.Now().After(patient) || ctx.Err() != nil {
			return nil, about(t, err)
		}
		select {
		case <-ctx.Done():
			return nil, about(t, context.Cause(ctx))
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// Unreached reports whether nobody has answered yet, so that trying again may
// help: not a refusal, and not a certificate that is not to be trusted.
func Unreached(err error) bool {
	code := sallyport.CodeOf(err)
	return code == connect.ProblemGatewayDown || code == login.CodeUnreachable
}

// about names the target in a refusal that is about one.
func about(t sallyport.Target, err error) error {
	var e *sallyport.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.Outcome {
	case sallyport.OutcomeDenied, sallyport.OutcomePending, sallyport.OutcomeUpstream:
		return &TargetError{Target: t, Err: e}
	case sallyport.OutcomeUsage:
		if e.Code == connect.ProblemNotFound {
			return &TargetError{Target: t, Err: e}
		}
	}
	return err
}

// TargetError is a refusal of one target.
type TargetError struct {
	Target sallyport.Target
	Err    *sallyport.Error
}

func (e *TargetError) Error() string { return e.Target.Authority() + ": " + e.Err.Error() }

// Unwrap returns the refusal.
func (e *TargetError) Unwrap() error { return e.Err }

// reasonWait is how long the reason of a cut may come after the cut itself.
const reasonWait = time.Second

// why says why a flow ended badly.
func (l *link) why(ctx context.Context, t sallyport.Target, f *tunnel.Flow, cause error) error {
	var reset *tunnel.ResetError
	if errors.As(cause, &reset) && reset.Code == connect.CodeUpstreamReset {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, reasonWait)
	defer cancel()
	e, told := l.whyCut(ctx, f.ID)
	if !told {
		return unexplained(t, f, cause)
	}
	out := &sallyport.Error{
		Outcome: sallyport.OutcomeRevoked, Code: e.Code, After: time.Duration(e.AfterMS) * time.Millisecond,
		Decision: &sallyport.Decision{ID: e.Decision, Reasons: e.Reasons, WouldAllowIf: e.WouldAllowIf, PolicyRevision: e.PolicyRevision},
	}
	switch e.Code {
	case "upstream_reset":
		return nil
	case "drain":
		return lost(t, "the gateway is going away")
	case "policy_stale":
		return &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable, Code: e.Code,
			Message: t.Authority() + " closed: the gateway could not confirm its policy", Hint: "try again in a moment",
		}
	case connect.ProblemSessionRevoked, "session_expired":
		out.Hint = "run: agent login"
		out.Message = t.Authority() + " closed: " + either(e.Reason, strings.ReplaceAll(e.Code, "_", " "))
	default:
		out.Message = t.Authority() + " closed by policy" + after(out.After) + ": " + either(e.Reason, "it is no longer allowed")
		if e.PolicyRevision != 0 {
			out.Message += fmt.Sprintf(" (policy revision %d)", e.PolicyRevision)
		}
	}
	return out
}

// unexplained is what is known of a cut without its event: the code, on carriers
// that have codes.
func unexplained(t sallyport.Target, f *tunnel.Flow, cause error) error {
	var reset *tunnel.ResetError
	if !errors.As(cause, &reset) {
		return lost(t, "the connection to the gateway broke")
	}
	switch reset.Code {
	case connect.CodeSessionRevoked:
		return &sallyport.Error{
			Outcome: sallyport.OutcomeRevoked, Code: connect.ProblemSessionRevoked,
			Message: t.Authority() + " closed: the session is over", Hint: "run: agent login",
		}
	case connect.CodeFlowWithdrawn:
		return &sallyport.Error{
			Outcome: sallyport.OutcomeRevoked, Code: "policy",
			Message: t.Authority() + " closed by policy; the reason did not arrive", Hint: "run: agent why " + t.Authority(),
			Decision: &sallyport.Decision{ID: f.Decision},
		}
	case connect.CodePolicyStale:
		return &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable, Code: "policy_stale",
			Message: t.Authority() + " closed: the gateway could not confirm its policy", Hint: "try again in a moment",
		}
	case connect.CodeDraining:
		return lost(t, "the gateway is going away")
	}
	return nil // the service's own reset
}

func lost(t sallyport.Target, why string) error {
	return &sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: "carrier.lost", Message: t.Authority() + " closed: " + why}
}

func after(d time.Duration) string {
	if d <= 0 {
		return ""
	}
	return fmt.Sprintf(" after %.1f s", d.Seconds())
}

func either(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// Me tells who the session is and which facts policyd knows.
func (a *Agent) Me(ctx context.Context) (sallyport.Listing, error) {
	var l sallyport.Listing
	return l, a.get(ctx, connect.PathMe, nil, &l)
}

// Targets lists what the person may reach; with all also what not, with reasons.
func (a *Agent) Targets(ctx context.Context, all bool) (sallyport.Listing, error) {
	var l sallyport.Listing
	q := url.Values{}
	if all {
		q.Set("all", "1")
	}
	return l, a.get(ctx, connect.PathTargets, q, &l)
}

// Why explains what the policy says about a target now. A denial is no error.
func (a *Agent) Why(ctx context.Context, t sallyport.Target) (sallyport.Decision, error) {
	var d sallyport.Decision
	return d, a.get(ctx, connect.PathWhy, url.Values{"target": {t.String()}}, &d)
}

// Resolve turns what a person typed into a target. A word without a dot and a
// port is looked up among the targets that the person may know; everything else
// must be complete, and reaches nobody.
func (a *Agent) Resolve(ctx context.Context, word string) (sallyport.Target, error) {
	t, err := sallyport.ParseTarget(word)
	if err == nil {
		return t, nil
	}
	if !ShortName(word) {
		return t, usage("usage.target", err.Error(), "for example: db.internal:5432")
	}
	list, err := a.Targets(ctx, true)
	if err != nil {
		return t, err
	}
	found := Match(list, word)
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return t, Unknown(list, word)
	}
	names := make([]string, len(found))
	for i, t := range found {
		names[i] = t.Authority()
	}
	return t, usage("target.ambiguous", fmt.Sprintf("%q could be %s", word, strings.Join(names, " or ")), "type one of them")
}

// ShortName reports whether a word can be a target's short name: one label of a
// host name, or a name that a route has.
func ShortName(word string) bool {
	if word == "" || len(word) > 63 || word[0] == '-' {
		return false
	}
	return strings.Trim(strings.ToLower(word), "abcdefghijklmnopqrstuvwxyz0123456789-_") == ""
}

// Match returns the targets of a listing that a short name stands for: a route's
// own name goes before the first label of a host.
func Match(list sallyport.Listing, word string) []sallyport.Target {
	word = strings.ToLower(word)
	var named, labelled []sallyport.Target
	for _, l := range list.Targets {
		t, ok := single(l.From)
		if !ok {
			continue
		}
		label, _, _ := strings.Cut(t.Host, ".")
		switch {
		case strings.ToLower(l.Name) == word && !slices.Contains(named, t):
			named = append(named, t)
		case label == word && !slices.Contains(labelled, t):
			labelled = append(labelled, t)
		}
	}
	if len(named) > 0 {
		return named
	}
	return labelled
}

// single returns the target that a route stands for, if it is one: no wildcard, no
// network, no range of ports.
func single(from string) (sallyport.Target, bool) {
	_, rest, _ := strings.Cut(from, "://")
	if strings.ContainsAny(rest, "*/") {
		return sallyport.Target{}, false
	}
	t, err := sallyport.ParseTarget(from)
	return t, err == nil
}

// wordsFor returns what a person may call a route: its name, its host and the
// host's first label; and how the route is told to people. Wildcards and networks
// have no host.
func wordsFor(l sallyport.ListedTarget) (words []string, told string) {
	_, told, _ = strings.Cut(l.From, "://")
	host := told[:max(strings.LastIndexByte(told, ':'), 0)]
	if t, ok := single(l.From); ok {
		host, told = t.Host, t.Authority()
	}
	if l.Name != "" {
		words = append(words, strings.ToLower(l.Name))
	}
	if host != "" && !strings.ContainsAny(host, "*/") {
		host = strings.ToLower(host)
		label, _, _ := strings.Cut(host, ".")
		words = append(words, label, host)
	}
	return words, told
}

// Unknown is the error for a word that is no target that exists: a route of many
// targets that it stands for, or the nearest name that the person may know.
func Unknown(list sallyport.Listing, word string) error {
	for _, l := range list.Targets {
		words, told := wordsFor(l)
		if _, one := single(l.From); !one && slices.Contains(words, strings.ToLower(word)) {
			return usage("target.ambiguous", fmt.Sprintf("%q stands for %s", word, connect.Printable(told, 300)),
				"type one of these targets: HOST:PORT")
		}
	}
	hint := "run: agent ls"
	if near := nearest(list, word); near != "" {
		hint = "did you mean " + near + "?"
	}
	return usage(connect.ProblemNotFound, fmt.Sprintf("no such target: %s", connect.Printable(word, 100)), hint)
}

// nearest returns the known name with the smallest distance to word, if that is
// small for its length.
func nearest(list sallyport.Listing, word string) string {
	best, bestDistance := "", len(word)/3+2
	word = strings.ToLower(word)
	for _, l := range list.Targets {
		words, told := wordsFor(l)
		for _, name := range append(words, strings.ToLower(told)) {
			if d := Distance(word, name); d < bestDistance {
				best, bestDistance = told, d
			}
		}
	}
	return best
}

// Distance is Levenshtein's: how many letters to change, drop or add.
func Distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}

// Keep holds a carrier up until ctx ends, dialling again with growing pauses; up
// is called for each one that stands. It returns an error only where waiting does
// not help: a login is needed and nobody can be asked.
func (a *Agent) Keep(ctx context.Context, up func(Link)) error {
	pause := retryFirst
	for ctx.Err() == nil {
		err := a.do(ctx, func(l *link) error {
			link, ok := a.Link()
			if !ok {
				return nil
			}
			up(link)
			pause = retryFirst
			select {
			case <-l.carrier.Done():
			case <-l.gone:
			case <-ctx.Done():
			}
			return nil
		})
		switch {
		case ctx.Err() != nil:
			return nil
		case sallyport.CodeOf(err) == forward.CodeNoLogin, sallyport.OutcomeOf(err) == sallyport.OutcomeUsage:
			return err
		case err != nil:
			a.cfg.Say(err.Error() + "; trying again")
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, 30*time.Second)
	}
	return nil
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"sallyport"
	"sallyport/agent"
	"sallyport/proto/connect"
)

func runLs(s *shell, ctx context.Context, args []string) error {
	if s.o.kind != "" && !slices.Contains([]string{"tcp", "udp", "http", "ssh"}, s.o.kind) {
		return usage("kind", "--kind %.40q: want tcp, udp, http or ssh", s.o.kind)
	}
	query := ""
	if len(args) > 0 {
		query = args[0]
	}
	return s.online(ctx, func(ctx context.Context, a *agent.Agent) error {
		list, err := a.Targets(ctx, s.o.all)
		if err != nil {
			return err
		}
		return s.printTargets(s.filter(list.Targets, query), list)
	})
}

type listed struct {
	Schema string `json:"schema,omitempty"`
	sallyport.ListedTarget
}

func (s *shell) printTargets(targets []sallyport.ListedTarget, list sallyport.Listing) error {
	doc := struct {
		Schema         string                   `json:"schema"`
		Targets        []sallyport.ListedTarget `json:"targets"`
		PolicyRevision sallyport.Revision       `json:"policy_revision"`
	}{"agent.ls/v1", targets, list.PolicyRevision}
	items := make([]any, len(targets))
	for i, t := range targets {
		items[i] = listed{"agent.target/v1", t}
	}
	return s.print(doc, items, func(w io.Writer) {
		rows := [][]string{{"TARGET", "NAME", "RULE"}}
		for _, t := range targets {
			rows = append(rows, []string{shortForm(t.From), t.Name, ruleOrReason(t)})
		}
		if len(targets) > 0 {
			table(w, rows)
		} else {
			s.say("nothing here that you may reach; agent ls --all says why")
		}
	})
}

// shortForm drops tcp://, which people do not type.
func shortForm(from string) string { return strings.TrimPrefix(from, "tcp://") }

func ruleOrReason(t sallyport.ListedTarget) string {
	if t.Verdict == sallyport.VerdictAllow {
		return t.Rule
	}
	words := make([]string, 0, len(t.Reasons))
	for _, r := range t.Reasons {
		words = append(words, connect.Printable(r.Condition+" is "+r.Found, 200))
	}
	return refusals[t.Verdict] + ": " + strings.Join(words, ", ")
}

func (s *shell) filter(targets []sallyport.ListedTarget, query string) []sallyport.ListedTarget {
	kept := []sallyport.ListedTarget{}
	for _, t := range targets {
		if isKind(t.From, s.o.kind) && (strings.Contains(t.From, query) || strings.Contains(t.Name, query)) {
			kept = append(kept, t)
		}
	}
	return kept
}

func isKind(from, kind string) bool {
	scheme, rest, _ := strings.Cut(from, "://")
	switch kind {
	case "":
		return true
	case "http":
		return scheme == "http" || scheme == "https"
	case "ssh":
		return scheme == "tcp" && strings.HasSuffix(rest, ":22")
	}
	return scheme == kind
}

func runWhy(s *shell, ctx context.Context, args []string) error {
	if err := checkWord(args[0]); err != nil {
		return err
	}
	return s.online(ctx, func(ctx context.Context, a *agent.Agent) error {
		t, err := a.Resolve(ctx, args[0])
		if err != nil {
			return err
		}
		d, err := a.Why(ctx, t)
		if err != nil {
			return err
		}
		if d.Verdict == sallyport.VerdictNoRoute {
			return unknownTarget(ctx, a, t)
		}
		doc := struct {
			Schema string           `json:"schema"`
			Target sallyport.Target `json:"target"`
			sallyport.Decision
			Earlier sallyport.DecisionID `json:"earlier,omitempty"`
		}{"agent.why/v1", t, d, sallyport.DecisionID(s.o.decision)}
		if err := s.print(doc, nil, func(w io.Writer) { s.printWhy(w, t, d) }); err != nil {
			return err
		}
		if e := connect.Denial(d); e != nil {
			return reported{e}
		}
		return nil
	})
}

func (s *shell) printWhy(w io.Writer, t sallyport.Target, d sallyport.Decision) {
	if d.Allowed() {
		fmt.Fprintf(w, "allowed: %s\n  rule %q of route %s%s\n", t.Authority(), d.Rule, d.Route, untilClock(d))
		for _, r := range d.Reasons {
			fmt.Fprintf(w, "    %-24s %s%s\n", r.Condition, r.Found, age(r.Age))
		}
		for _, l := range connect.Observed(d) {
			fmt.Fprintln(w, "  "+l)
		}
		fmt.Fprintf(w, "  decision %s, policy revision %d\n", d.ID, d.PolicyRevision)
	} else {
		fmt.Fprintf(w, "%s: %s\n", refusals[d.Verdict], t.Authority())
		for _, l := range connect.Explain(d) {
			fmt.Fprintln(w, "  "+l)
		}
	}
	if s.o.decision != "" {
		fmt.Fprintf(w, "  this is how it is decided now; decision %s is in the site's audit log\n", connect.Printable(s.o.decision, 60))
	}
}

var refusals = map[sallyport.Verdict]string{
	sallyport.VerdictDeny: "denied", sallyport.VerdictPending: "approval pending", sallyport.VerdictLogin: "login needed",
}

func age(d time.Duration) string {
	if d <= 0 {
		return ""
	}
	return "   (checked " + left(d) + " ago)"
}

// untilClock says until when the clock alone keeps an answer.
func untilClock(d sallyport.Decision) string {
	if d.ValidFor <= 0 {
		return ""
	}
	return " until " + clock(time.Now().Add(d.ValidFor))
}

// unknownTarget is the error for a target that the policy does not know, or does
// not let this person know.
func unknownTarget(ctx context.Context, a *agent.Agent, t sallyport.Target) error {
	list, err := a.Targets(ctx, true)
	if err != nil {
		return err
	}
	return agent.Unknown(list, t.Authority())
}

// checkWord refuses at once, before anything is opened or dialled, what cannot be
// a target.
func checkWord(word string) error {
	if _, err := sallyport.ParseTarget(word); err != nil && !agent.ShortName(word) {
		return usage("target", "%v", err)
	}
	return nil
}

func runPosture(s *shell, ctx context.Context, _ []string) error {
	if _, err := s.postureFile(); err != nil {
		return err
	}
	return s.offline(func(a *agent.Agent) error {
		source, err := a.Posture()
		if err != nil {
			return err
		}
		if !s.o.watch {
			return s.printFacts(source.Facts(ctx))
		}
		var failed error
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		source.Watch(ctx, func(facts map[string]sallyport.Fact) {
			if failed = s.printFacts(facts); failed != nil {
				cancel()
			}
		})
		return failed
	})
}

func (s *shell) printFacts(facts map[string]sallyport.Fact) error {
	doc := struct {
		Schema string                    `json:"schema"`
		Facts  map[string]sallyport.Fact `json:"facts"`
	}{"agent.posture/v1", facts}
	return s.print(doc, nil, func(w io.Writer) { table(w, factRows(facts, nil)) })
}

func runPs(s *shell, _ context.Context, _ []string) error {
	return s.offline(func(a *agent.Agent) error {
		list, err := a.Processes()
		if err != nil {
			return err
		}
		locals, items := flatten(list)
		doc := struct {
			Schema string  `json:"schema"`
			Locals []local `json:"locals"`
		}{"agent.ps/v1", locals}
		return s.print(doc, items, func(w io.Writer) {
			if len(locals) == 0 {
				s.say("no local port is open; agent connect TARGET opens one")
				return
			}
			table(w, localRows(locals))
		})
	})
}

// local is a local end with its process.
type local struct {
	Schema  string `json:"schema,omitempty"`
	PID     int    `json:"pid"`
	Profile string `json:"profile"`
	Carrier string `json:"carrier,omitempty"`
	agent.Local
}

func flatten(list []agent.Process) (locals []local, items []any) {
	locals = []local{}
	for _, p := range list {
		for _, e := range p.Ends {
			l := local{PID: p.PID, Profile: p.Profile, Local: e}
			if p.Link != nil {
				l.Carrier = p.Link.Carrier
			}
			locals = append(locals, l)
			l.Schema = "agent.local/v1"
			items = append(items, l)
		}
	}
	return locals, items
}

func localRows(locals []local) [][]string {
	rows := [][]string{{"ID", "TARGET", "LOCAL", "AGE", "OPEN", "IN/OUT", "RULE", "PID"}}
	for _, l := range locals {
		rows = append(rows, []string{
			l.ID, l.Target.Authority(), l.Local.Local, left(time.Since(l.Since)),
			fmt.Sprint(len(l.Flows)), size(l.Down) + "/" + size(l.Up), l.Rule, fmt.Sprint(l.PID),
		})
	}
	return rows
}

func runStatus(s *shell, ctx context.Context, _ []string) error {
	if s.o.check != "" && s.o.check != "live" && s.o.check != "ready" {
		return usage("check", "--check %.40q: want live or ready", s.o.check)
	}
	return s.online(ctx, func(ctx context.Context, a *agent.Agent) error {
		if s.o.check == "live" {
			return checkLive(a)
		}
		for {
			st, err := s.status(ctx, a)
			if s.o.check == "ready" {
				return err
			}
			if printErr := s.printStatus(st, err); printErr != nil || !s.o.watch {
				return errors.Join(printErr, err)
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(2 * time.Second):
			}
		}
	})
}

func checkLive(a *agent.Agent) error {
	p, err := a.Profile()
	if err == nil && (p.Session == "" || time.Now().After(p.Ends)) {
		err = &sallyport.Error{Outcome: sallyport.OutcomeLogin, Code: "login.needed", Message: "not logged in", Hint: "run: agent login"}
	}
	return err
}

// status is what agent status tells.
type status struct {
	Schema  string                    `json:"schema"`
	Profile string                    `json:"profile"`
	Me      *sallyport.Identity       `json:"me,omitempty"`
	Person  string                    `json:"person,omitempty"`
	Ends    time.Time                 `json:"ends,omitzero"`
	Link    *agent.Link               `json:"gateway,omitempty"`
	Facts   map[string]sallyport.Fact `json:"facts,omitempty"`
	Ages    map[string]int64          `json:"fact_ages,omitempty"`
	Locals  []local                   `json:"locals"`
	Problem string                    `json:"problem,omitempty"`
}

// status gathers what can be known; the error says why it is not everything.
func (s *shell) status(ctx context.Context, a *agent.Agent) (status, error) {
	st := status{Schema: "agent.status/v1", Profile: s.o.profile, Locals: []local{}}
	if st.Profile == "" {
		st.Profile = "default"
	}
	p, err := a.Profile()
	if err != nil {
		return st, err
	}
	st.Person, st.Ends = p.Person(), p.Ends
	list, err := a.Processes()
	if err != nil {
		return st, err
	}
	st.Locals, _ = flatten(list)
	me, err := a.Me(ctx)
	if err != nil {
		st.Problem, st.Facts = err.Error(), a.Facts()
		if sallyport.OutcomeOf(err) == sallyport.OutcomeLogin {
			st.Ends = time.Time{} // whatever this machine believed
		}
		return st, err
	}
	st.Me, st.Facts, st.Ages = &me.Me, me.Facts, me.FactAges
	st.Ends = time.Now().Add(me.Me.ExpiresIn).UTC().Round(time.Second)
	if l, ok := a.Link(); ok {
		st.Link = &l
	}
	return st, nil
}

func (s *shell) printStatus(st status, problem error) error {
	if s.o.watch && s.o.output == formatText && s.terminal {
		fmt.Fprint(s.stdout, "\x1b[H\x1b[J")
	}
	return s.print(st, nil, func(w io.Writer) {
		if st.Person == "" {
			fmt.Fprintf(w, "not logged in  profile %s\n", st.Profile)
		} else {
			session := "session over"
			if d := time.Until(st.Ends); d > 0 {
				session = fmt.Sprintf("session %s left (renews by itself; `agent extend` to prolong)", left(d))
			}
			fmt.Fprintf(w, "%s  profile %s  %s\n", st.Person, st.Profile, session)
		}
		if st.Link != nil {
			fmt.Fprintf(w, "gateway %s  %s  rtt %s\n", st.Link.Gateway, st.Link.Carrier, st.Link.RTT.Round(100*time.Microsecond))
		} else if problem != nil && sallyport.OutcomeOf(problem) != sallyport.OutcomeLogin {
			fmt.Fprintln(w, "gateway not reached")
		}
		if len(st.Facts) > 0 {
			fmt.Fprintln(w, "posture "+factLine(st.Facts))
		}
		if len(st.Locals) > 0 {
			table(w, localRows(st.Locals))
		}
	})
}

func factLine(facts map[string]sallyport.Fact) string {
	var words []string
	for _, name := range slices.Sorted(maps.Keys(facts)) {
		words = append(words, fmt.Sprintf("%s %v", name, facts[name].Value))
	}
	return connect.Printable(strings.Join(words, " · "), 2000)
}

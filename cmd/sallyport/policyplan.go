package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/audit"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/policyd"
	"sallyport/policyd/plan"
	"sallyport/proto/control"
)

func policyPlanCommand() *cobra.Command {
	var p planner
	var output, since string
	cmd := &cobra.Command{
		Use:   "plan --config NEW [--against OLD] [--audit DIR] [--since T] [-o text|json|jsonl]",
		Short: "say what a configuration would change before it is applied",
		Long: `Compares a configuration with the one in force (or with the file OLD): routes and
rules that change, past decisions that would have been others, open connections
that would be cut. Decisions are read from policyd's audit log and connections from
the gateway's, in the site's audit directory or DIR. What a log does not tell is
decided from the records as they are now, if cached can be reached, and marked so.
Exit 0 if nothing would change, 4 if something would, 2 if NEW does not load.`,
		Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			write, ok := planWriters[output]
			if !ok {
				return run.Usage("", "-o %s: want text, json or jsonl", output)
			}
			var err error
			if p.since, err = parseSince(since, time.Now()); err != nil {
				return err
			}
			made, err := p.make(cmd.Context())
			if made == nil {
				return err
			}
			if werr := write(cmd.OutOrStdout(), made); werr != nil {
				return werr
			}
			if made.Differs() {
				return run.Differs("the configuration changes something")
			}
			return err
		},
	}
	run.ConfigFlag(cmd, &p.candidate)
	cmd.Flags().StringVar(&p.against, "against", "", "configuration `file` to compare with; else the one in force")
	cmd.Flags().StringVar(&p.audit, "audit", "", "`directory` of the audit logs, with one for each daemon; else the site's")
	cmd.Flags().StringVar(&since, "since", "", "only decisions from this `time` on: 24h, 7d, 2026-01-02 or 2026-01-02T15:04:05Z")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "`format`: text, json or jsonl")
	return cmd
}

// parseSince reads a time or how long ago it is.
func parseSince(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return now.AddDate(0, 0, -int(n)), nil
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d > 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	return time.Time{}, run.Usage("", "--since %s: want 24h, 7d, 2026-01-02 or 2026-01-02T15:04:05Z", s)
}

// planner gathers what a plan is made from.
type planner struct {
	candidate, against, audit string
	since                     time.Time
}

// make returns the plan, also with an error if a log could be read in part.
func (p *planner) make(ctx context.Context) (*plan.Plan, error) {
	f, err := config.Load(p.candidate, config.Tool)
	if err != nil {
		return nil, err
	}
	q := plan.Question{Since: p.since}
	if q.New, err = siteOf(f); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	client, unreachable := dial(f, control.KindCached)
	if unreachable == nil {
		defer client.Close()
		q.Now = time.Now()
		q.Present, unreachable = present(ctx, f, client)
	}
	if q.Old, err = p.old(ctx, client, unreachable); err != nil {
		return nil, err
	}
	if q.Decisions, q.Flows, err = p.chains(f.Layout()); err != nil {
		return nil, err
	}
	made, err := plan.Make(q)
	if unreachable != nil {
		made.Limits = append(made.Limits, fmt.Sprintf("cached cannot be reached, so nothing is decided from the records as they are now: %v", unreachable))
	}
	return made, err
}

// present are the records of cached as they are now.
func present(ctx context.Context, f *config.File, client *control.Client) (plan.Present, error) {
	people, err := policyd.ReadPeople(ctx, client.Records())
	if err != nil {
		return nil, err
	}
	o, err := policyd.NewOffline(f.Policyd, f.Record(nil, nil, time.Time{}), people)
	if err != nil {
		return nil, err // and not an interface that holds nothing
	}
	return o, nil
}

func siteOf(f *config.File) (*plan.Site, error) {
	c := f.Record(nil, nil, time.Time{})
	return plan.Load(&c)
}

// old is the configuration to compare with.
func (p *planner) old(ctx context.Context, client *control.Client, unreachable error) (*plan.Site, error) {
	const hint = "compare with a file: --against OLD"
	if p.against != "" {
		f, err := config.Load(p.against, config.Tool)
		if err != nil {
			return nil, err
		}
		return siteOf(f)
	}
	if unreachable != nil {
		return nil, run.Failure("the configuration in force cannot be read", hint, unreachable)
	}
	record, err := client.Records().Get(ctx, sallyport.KindConfig, "current")
	if err != nil {
		return nil, run.Failure("the configuration in force cannot be read", hint, err)
	}
	c, err := sallyport.Decode[sallyport.Config](record)
	if err != nil {
		return nil, err
	}
	site, err := plan.Load(&c)
	if err != nil {
		return nil, run.Failure("the configuration in force does not load", hint, err)
	}
	return site, nil
}

// chains opens the audit logs that are on this machine.
func (p *planner) chains(layout config.Layout) (decisions, flows iter.Seq2[audit.Entry, error], err error) {
	if p.audit != "" {
		if _, err := os.Stat(p.audit); err != nil {
			return nil, nil, run.Usage("", "--audit: %v", err)
		}
		layout.Audit = p.audit
	}
	chain := func(daemon string) iter.Seq2[audit.Entry, error] {
		dir := layout.AuditDir(daemon)
		if segments, err := filepath.Glob(filepath.Join(dir, "*.jsonl")); err != nil || len(segments) == 0 {
			return nil
		}
		return audit.Read(dir, 0)
	}
	return chain("policyd"), chain("gateway"), nil
}

var planWriters = map[string]func(io.Writer, *plan.Plan) error{
	"text": planText,
	"json": func(w io.Writer, p *plan.Plan) error {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		return enc.Encode(struct {
			Schema string `json:"schema"`
			*plan.Plan
		}{"sallyport.policyplan/v1", p})
	},
	"jsonl": planLines,
}

// planLines writes one object a line, of one kind each: the kind is its only key.
func planLines(w io.Writer, p *plan.Plan) error {
	var lines []any
	add := func(kind string, v any) { lines = append(lines, map[string]any{kind: v}) }
	for _, s := range p.Settings {
		add("setting", s)
	}
	for _, r := range p.Routes {
		add("route", r)
	}
	for _, g := range p.Decisions.Groups {
		add("differs", g)
	}
	for _, g := range p.Decisions.Untold {
		add("untold", g)
	}
	for _, f := range p.Flows.List {
		add("flow", f)
	}
	for _, l := range p.Limits {
		add("limit", l)
	}
	decisions, flows := p.Decisions, p.Flows
	decisions.Groups, decisions.Untold, flows.List = nil, nil, nil
	add("decisions", decisions)
	add("flows", flows)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	for _, l := range lines {
		if err := enc.Encode(l); err != nil {
			return err
		}
	}
	return nil
}

// planText prints a plan for people.
func planText(w io.Writer, p *plan.Plan) error {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	if len(p.Settings)+len(p.Routes) == 0 {
		line("routes: no change")
	} else {
		line("routes:")
	}
	for _, s := range p.Settings {
		line("  ~ %s: %s → %s", s.Field, cmp.Or(s.Old, "(default)"), cmp.Or(s.New, "(default)"))
	}
	for _, r := range p.Routes {
		line("  %s", routeText(r))
	}
	d := p.Decisions
	line("decisions: %d read: %d the same, %d would differ, %d cannot be told; %d differ already", d.Read, d.Same, d.Differ, d.Unknown, d.Already)
	for _, g := range d.Groups {
		line("  %d× %s, %s", g.Count, kindText(g.Kind), period(g.First, g.Last))
	}
	for _, g := range d.Untold {
		line("  %d× %s, %s", g.Count, kindText(g.Kind), period(g.First, g.Last))
	}
	if d.Omitted > 0 {
		line("  %d more in other groups", d.Omitted)
	}
	f := p.Flows
	if !f.Until.IsZero() {
		line("the gateway's log goes up to %s", clock(f.Until))
	}
	line("open connections: %d: %d would stay, %d would be cut, %d cannot be told; %d are not allowed now either", f.Open, f.Kept, f.Cut, f.Unknown, f.Already)
	for _, x := range f.List {
		line("  %s since %s: %s", x.Flow, clock(x.Opened), kindText(x.Kind))
	}
	for _, l := range p.Limits {
		line("note: %s", l)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func routeText(r plan.RouteChange) string {
	switch r.Change {
	case "added":
		return "+ " + r.From
	case "removed":
		return "- " + r.From
	}
	var changes []string
	for _, f := range r.Fields {
		changes = append(changes, fmt.Sprintf("%s %s → %s", f.Field, cmp.Or(f.Old, "(none)"), cmp.Or(f.New, "(none)")))
	}
	for _, c := range r.Rules {
		changes = append(changes, fmt.Sprintf("%s rule %q %s", c.Action, c.Rule, c.Change))
	}
	return "~ " + r.From + ": " + strings.Join(changes, ", ")
}

func kindText(k plan.Kind) string {
	who := cmp.Or(k.Email, string(k.User), "nobody")
	by := func(rule string) string {
		if rule == "" {
			return ""
		}
		return fmt.Sprintf(" (rule %q)", rule)
	}
	text := fmt.Sprintf("%s to %s: %s%s → %s%s", who, cmp.Or(k.Target, "a carrier"), k.Was, by(k.WasRule), k.Would, by(k.Rule))
	switch {
	case k.Missing != "":
		text += ": cannot be told from the log: " + k.Missing
	case k.Why != "":
		text += ": " + k.Why
	}
	if k.Basis == plan.FromRecords {
		text += " [by the records as they are now]"
	}
	return text
}

func clock(t time.Time) string { return t.Local().Format(time.DateTime) }

func period(first, last time.Time) string {
	if first.Equal(last) {
		return clock(first)
	}
	return clock(first) + " – " + clock(last)
}

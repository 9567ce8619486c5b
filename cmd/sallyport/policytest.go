package main

import (
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/policyd/scenario"
	"sallyport/proto/connect"
)

func policyTestCommand() *cobra.Command {
	var t policyTest
	cmd := &cobra.Command{
		Use:   "test FILE|DIR… [--config FILE] [--coverage] [-o text|json|jsonl]",
		Short: "run the tests of policies",
		Long: `Runs test files (a folder stands for every *.policytest.yaml below it). A test
that brings no policy is decided by the routes of --config. The exit code is 0
if all tests got what they expect, 4 if some did not, 2 if a file cannot be read.
--coverage lists what no test shows; it does not change the exit code.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return run.Usage("usage: "+cmd.UseLine(), "no test file")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return t.run(cmd.OutOrStdout(), args) },
	}
	cmd.Flags().StringVarP(&t.config, "config", "c", "", "configuration `file` whose routes decide tests without a policy")
	cmd.Flags().BoolVar(&t.coverage, "coverage", false, "list criteria that no test makes true, or false, and rules that decide none")
	cmd.Flags().StringVarP(&t.output, "output", "o", "text", "`format`: text, json or jsonl")
	return cmd
}

// policyTest is what `policy test` was asked for.
type policyTest struct {
	config, output string
	coverage       bool
}

func (t *policyTest) run(out io.Writer, paths []string) error {
	write, ok := testWriters[t.output]
	if !ok {
		return run.Usage("", "-o %s: want text, json or jsonl", t.output)
	}
	site, err := t.site()
	if err != nil {
		return err
	}
	files, err := readTests(paths, site)
	if err != nil {
		return run.Usage("", "%v", err)
	}
	var report testReport
	for _, f := range files {
		for _, r := range f.Run(site) {
			report.add(f.Path, r)
		}
	}
	if t.coverage {
		report.Coverage = site.Coverage.Gaps()
	}
	if err := write(out, &report); err != nil {
		return err
	}
	if report.Failed > 0 {
		return fmt.Errorf("%d of %d tests: %w", report.Failed, len(report.Tests), run.ErrDiffers)
	}
	return nil
}

func (t *policyTest) site() (scenario.Site, error) {
	s := scenario.Site{Now: time.Now()}
	if t.coverage {
		s.Coverage = &scenario.Coverage{}
	}
	if t.config == "" {
		return s, nil
	}
	f, err := config.Load(t.config, config.Tool)
	if err != nil {
		return s, err
	}
	c := f.Record(nil, nil, s.Now)
	s.Config = &c
	return s, nil
}

// readTests reads every file before the first test runs: half a result would be
// taken for a whole one.
func readTests(paths []string, site scenario.Site) ([]*scenario.File, error) {
	names, err := scenario.Find(paths)
	if err != nil {
		return nil, err
	}
	files := make([]*scenario.File, len(names))
	for i, name := range names {
		if files[i], err = scenario.Read(name); err == nil {
			err = files[i].NoPolicy(site)
		}
		if err != nil {
			return nil, err
		}
	}
	return files, nil
}

// testReport is the outcome of a run, and its JSON.
type testReport struct {
	Schema   string         `json:"schema"`
	Tests    []testOutcome  `json:"tests"`
	Passed   int            `json:"passed"`
	Failed   int            `json:"failed"`
	Coverage []scenario.Gap `json:"coverage,omitempty"`
}

type testOutcome struct {
	File     string              `json:"file"`
	Line     int                 `json:"line"`
	Name     string              `json:"name"`
	Pass     bool                `json:"pass"`
	Expect   scenario.Outcome    `json:"expect"`
	Got      scenario.Outcome    `json:"got"`
	Rule     string              `json:"rule,omitempty"` // that was expected
	Decision *sallyport.Decision `json:"decision,omitempty"`
	Error    string              `json:"error,omitempty"` // why the policy does not load

	column int
}

func (t *testReport) add(file string, r scenario.Result) {
	o := testOutcome{
		File: file, Line: r.Test.Line, column: r.Test.Column, Name: r.Test.Name, Pass: r.Passed(),
		Expect: r.Test.Expect, Got: r.Got, Rule: r.Test.Rule,
	}
	if r.Err != nil {
		o.Error = r.Err.Error()
	} else {
		o.Decision = &r.Decision
	}
	if o.Pass {
		t.Passed++
	} else {
		t.Failed++
	}
	t.Tests = append(t.Tests, o)
}

var testWriters = map[string]func(io.Writer, *testReport) error{
	"text": writeTestText,
	"json": func(w io.Writer, t *testReport) error {
		t.Schema = "sallyport.policytest/v1"
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(t)
	},
	"jsonl": func(w io.Writer, t *testReport) error {
		enc := json.NewEncoder(w)
		for _, o := range t.Tests {
			if err := enc.Encode(o); err != nil {
				return err
			}
		}
		return nil
	},
}

func writeTestText(w io.Writer, t *testReport) error {
	for _, o := range t.Tests {
		if o.Pass {
			continue
		}
		fmt.Fprintf(w, "%s:%d:%d: %s: expected %s, got %s\n", o.File, o.Line, o.column, o.Name, asked(o.Expect, o.Rule), got(o))
		if o.Decision == nil {
			fmt.Fprintf(w, "  %s\n", o.Error)
			continue
		}
		writeReasons(w, *o.Decision)
	}
	for _, g := range t.Coverage {
		fmt.Fprintln(w, g)
	}
	_, err := fmt.Fprintf(w, "%d passed, %d failed\n", t.Passed, t.Failed)
	return err
}

// writeReasons says why, indented, as `agent why` does.
func writeReasons(w io.Writer, d sallyport.Decision) {
	if !d.Allowed() {
		for _, line := range connect.Explain(d) {
			fmt.Fprintf(w, "  %s\n", line)
		}
		return
	}
	for _, r := range d.Reasons {
		if r.Rule == d.Rule {
			fmt.Fprintf(w, "    %-24s %s\n", r.Condition, r.Found)
		}
	}
}

func asked(o scenario.Outcome, rule string) string {
	if rule == "" {
		return string(o)
	}
	return fmt.Sprintf("%s by %q", o, rule)
}

func got(o testOutcome) string {
	if o.Decision == nil {
		return string(o.Got)
	}
	return asked(o.Got, o.Decision.Rule)
}

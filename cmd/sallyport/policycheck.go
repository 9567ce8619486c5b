package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/policyd/policy"
	"sallyport/proto/control"
)

func policyCheckCommand() *cobra.Command {
	var c checker
	var groups, file, output string
	cmd := &cobra.Command{
		Use:   "check FILE… [--groups FILE] [--config FILE] [-o text|json|jsonl]",
		Short: "report what is wrong or doubtful in policies",
		Long: `Reads policies, or configurations with the policies of their routes, and reports
all faults at once as file:line:column: rules that can never be true or never
matter beside others, groups that do not exist, comparisons that also hold for
somebody else. Groups are compared with a list (--groups, an id or name a line)
and with those in the directory, if cached can be reached (--config).
Exit 2 if a file does not load (error), 4 if a rule surely does not do what it
seems to (finding), 0 otherwise (warning).`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return run.Usage("usage: "+cmd.UseLine(), "no file to check")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			write, ok := findingWriters[output]
			if !ok {
				return run.Usage("", "-o %s: want text, json or jsonl", output)
			}
			c.opts.Now = time.Now()
			if err := c.groups(cmd.Context(), groups, file, cmd.ErrOrStderr()); err != nil {
				return err
			}
			for _, path := range args {
				if err := c.file(path); err != nil {
					return err
				}
			}
			if err := write(cmd.OutOrStdout(), c.found); err != nil {
				return err
			}
			return c.verdict()
		},
	}
	cmd.Flags().StringVar(&groups, "groups", "", "`file` with the groups that exist, an id or name a line")
	cmd.Flags().StringVarP(&file, "config", "c", "", "configuration `file` of a site whose directory is asked for groups")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "`format`: text, json or jsonl")
	return cmd
}

// checker collects what is found in files.
type checker struct {
	opts  policy.LintOptions
	found []foundIn
}

// foundIn is a finding and where it is.
type foundIn struct {
	File  string `json:"file"`
	Route string `json:"route,omitempty"`
	policy.Finding
}

// groups learns which groups exist.
func (c *checker) groups(ctx context.Context, list, site string, stderr io.Writer) error {
	if list != "" {
		names, err := readGroups(list)
		if err != nil {
			return err
		}
		c.opts.Groups = names
	}
	if site == "" {
		return nil
	}
	f, err := config.Load(site, config.Tool)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	names, err := directoryGroups(ctx, f)
	if err != nil {
		fmt.Fprintf(stderr, "groups are not compared with the directory: %v\n", err)
		return nil
	}
	c.opts.Groups = append(c.opts.Groups, names...)
	return nil
}

func readGroups(path string) ([]string, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, run.Usage("", "--groups: %v", err)
	}
	defer file.Close()
	names := []string{}
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		if line := strings.TrimSpace(lines.Text()); line != "" && !strings.HasPrefix(line, "#") {
			names = append(names, line)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, run.Usage("", "--groups %s: %v", path, err)
	}
	return names, nil
}

// directoryGroups returns the ids and names of the groups that somebody in the
// directory is a member of.
func directoryGroups(ctx context.Context, f *config.File) ([]string, error) {
	client, err := dial(f, control.KindCached)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	users, err := listAll[sallyport.DirectoryUser](ctx, client.Records(), sallyport.KindDirectoryUser)
	if err != nil {
		return nil, err
	}
	names := []string{}
	seen := map[string]bool{"": true}
	for _, u := range users {
		for _, g := range u.Groups {
			for _, name := range []string{g.ID, g.Name} {
				if !seen[name] {
					seen[name] = true
					names = append(names, name)
				}
			}
		}
	}
	return names, nil
}

// file checks a policy, or a configuration's routes.
func (c *checker) file(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return run.Usage("", "%v", err)
	}
	if config.IsFile(text) {
		return c.configuration(path)
	}
	p, err := policy.Parse(text)
	c.policy(path, "", p, err)
	return nil
}

func (c *checker) configuration(path string) error {
	f, err := config.Load(path, config.Checker)
	var problems config.Problems
	if errors.As(err, &problems) {
		for _, p := range problems {
			message := p.Message
			if p.Key != "" {
				message = p.Key + ": " + message
			}
			c.add(path, "", policy.Finding{Line: max(p.Line, 1), Column: max(p.Column, 1), Severity: policy.SeverityError, Code: "syntax", Message: message})
		}
		return nil
	}
	if err != nil {
		return err
	}
	for i := range f.Routes {
		c.policy(path, f.Routes[i].From, f.Known(f.Routes[i].Policy.Text), nil)
	}
	return nil
}

func (c *checker) policy(path, route string, p *policy.Policy, err error) {
	var faults policy.Errors
	if errors.As(err, &faults) {
		for _, e := range faults {
			c.add(path, route, policy.Finding{Line: e.Line, Column: e.Column, Severity: policy.SeverityError, Code: "syntax", Message: e.Message})
		}
		return
	}
	for _, f := range p.Lint(c.opts) {
		c.add(path, route, f)
	}
}

func (c *checker) add(path, route string, f policy.Finding) {
	c.found = append(c.found, foundIn{path, route, f})
}

// verdict is the error that the worst finding stands for.
func (c *checker) verdict() error {
	count := map[policy.Severity]int{}
	for _, f := range c.found {
		count[f.Severity]++
	}
	switch {
	case count[policy.SeverityError] > 0:
		return run.Usage("docs/policy.md explains the language", "errors: %d, findings: %d", count[policy.SeverityError], count[policy.SeverityFinding])
	case count[policy.SeverityFinding] > 0:
		return run.Differs("findings: %d", count[policy.SeverityFinding])
	}
	return nil
}

var findingWriters = map[string]func(io.Writer, []foundIn) error{
	"text": func(w io.Writer, found []foundIn) error {
		if len(found) == 0 {
			_, err := fmt.Fprintln(w, "ok, nothing to report")
			return err
		}
		for _, f := range found {
			if _, err := fmt.Fprintf(w, "%s:%d:%d: %s: %s (%s)\n", f.File, f.Line, f.Column, f.Severity, f.Message, f.Code); err != nil {
				return err
			}
		}
		return nil
	},
	"json": func(w io.Writer, found []foundIn) error {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		if found == nil {
			found = []foundIn{}
		}
		return enc.Encode(map[string]any{"schema": "sallyport.policycheck/v1", "findings": found})
	},
	"jsonl": func(w io.Writer, found []foundIn) error {
		enc := json.NewEncoder(w)
		for _, f := range found {
			if err := enc.Encode(f); err != nil {
				return err
			}
		}
		return nil
	},
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/agent"
	"sallyport/proto/connect"
)

// exitStatus ends with somebody else's exit code, that of ssh or of --exec's
// command, without a word of our own.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// reported is an error that has been printed already; only its code is left.
type reported struct{ error }

func (r reported) Unwrap() error { return r.error }

// report prints an error and returns its exit code.
func (s *shell) report(cmd *cobra.Command, err error) int {
	var status exitStatus
	var child *exec.ExitError
	var said reported
	switch {
	case errors.As(err, &status):
		return int(status)
	case errors.As(err, &child):
		return child.ExitCode()
	case errors.As(err, &said):
		return int(sallyport.OutcomeOf(err))
	case errors.Is(err, context.Canceled):
		return exitInterrupted // Ctrl-C before it was done
	}
	s.explain(err)
	if strings.HasPrefix(sallyport.CodeOf(err), "usage.") && cmd != nil {
		s.say("usage: %s", cmd.UseLine())
	}
	s.errorDocument(err)
	return int(sallyport.OutcomeOf(err))
}

// explain prints what failed, why, what to do and the decision, on stderr.
func (s *shell) explain(err error) {
	var e *sallyport.Error
	if !errors.As(err, &e) {
		s.say("agent: %v", err)
		return
	}
	for _, line := range explanation(err, e) {
		s.say("%s", line)
	}
	if s.o.verbose && e.Err != nil {
		s.say("  cause: %s", connect.Printable(err.Error(), 2000))
	}
}

func explanation(err error, e *sallyport.Error) []string {
	var about *agent.TargetError
	target := ""
	if errors.As(err, &about) {
		target = about.Target.Authority()
	}
	if e.Outcome == sallyport.OutcomeDenied && e.Decision != nil && len(e.Decision.Reasons) > 0 {
		lines := []string{"agent: denied: " + target}
		for _, l := range connect.Explain(*e.Decision) {
			lines = append(lines, "  "+l)
		}
		return lines
	}
	lines := []string{"agent: " + headline(err, e, target)}
	if e.Outcome == sallyport.OutcomeUpstream {
		lines = append(lines, "  why:  you are allowed; the service did not answer")
	}
	if e.Hint != "" {
		lines = append(lines, "  fix:  "+e.Hint)
	}
	if e.Decision != nil && e.Decision.ID != "" {
		d := "  decision " + string(e.Decision.ID)
		if e.Decision.PolicyRevision != 0 {
			d += fmt.Sprintf(", policy revision %d", e.Decision.PolicyRevision)
		}
		lines = append(lines, d)
	}
	return lines
}

// headline is one line: the words around the error and its message. Its cause is
// for -v.
func headline(err error, e *sallyport.Error, target string) string {
	text := strings.Replace(err.Error(), e.Error(), e.Message, 1)
	if target != "" && !strings.Contains(text, target) {
		text = target + ": " + text
	}
	return connect.Printable(text, 600)
}

// errorDocument says the same to machines that asked for JSON, on stdout.
func (s *shell) errorDocument(err error) {
	if s.o.output != formatJSON && s.o.output != formatJSONL {
		return
	}
	doc := struct {
		Schema   string              `json:"schema"`
		Exit     int                 `json:"exit"`
		Code     string              `json:"code"`
		Message  string              `json:"message"`
		Hint     string              `json:"hint,omitempty"`
		Decision *sallyport.Decision `json:"decision,omitempty"`
	}{Schema: "agent.error/v1", Exit: int(sallyport.OutcomeOf(err)), Code: "internal", Message: err.Error()}
	var e *sallyport.Error
	if errors.As(err, &e) {
		doc.Code, doc.Message, doc.Hint, doc.Decision = e.Code, headline(err, e, ""), e.Hint, e.Decision
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	json.NewEncoder(s.stdout).Encode(doc)
}

func usage(code, format string, args ...any) *sallyport.Error {
	return &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: "usage." + code, Message: fmt.Sprintf(format, args...)}
}

// worst returns the error with the highest exit code.
func worst(errs []error) error {
	var w error
	for _, err := range errs {
		if err != nil && (w == nil || sallyport.OutcomeOf(err) > sallyport.OutcomeOf(w)) {
			w = err
		}
	}
	return w
}

// self is how another program starts this one.
func self() (string, error) {
	path, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("where is the agent's program: %w", err)
	}
	return path, nil
}

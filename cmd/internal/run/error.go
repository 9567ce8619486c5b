package run

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/cmd/internal/config"
)

// Exit codes of the daemons and of sallyport (DESIGN, section 9).
const (
	ExitOK      = 0
	ExitFailed  = 1
	ExitUsage   = 2 // bad usage or configuration
	ExitDiffers = 4 // a check or test differed
)

// ErrDiffers in an error's chain makes the exit code ExitDiffers.
var ErrDiffers = errors.New("differs")

// Failure is an error with a hint for the person who reads it.
func Failure(what, hint string, err error) error {
	return &sallyport.Error{Outcome: sallyport.OutcomeInternal, Message: what, Hint: hint, Err: err}
}

// Usage is an error in what was typed or configured.
func Usage(hint, format string, args ...any) error {
	return &sallyport.Error{Outcome: sallyport.OutcomeUsage, Message: fmt.Sprintf(format, args...), Hint: hint}
}

// Differs is what a check or test says that found differences: an error whose
// exit code is ExitDiffers.
func Differs(format string, args ...any) error {
	return &difference{fmt.Sprintf(format, args...)}
}

type difference struct{ what string }

func (d *difference) Error() string { return d.what }

func (d *difference) Unwrap() error { return ErrDiffers }

// NoArgs refuses arguments; like cobra.NoArgs, as a usage error.
func NoArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return Usage("run: "+cmd.CommandPath()+" --help", "unexpected argument %q", args[0])
	}
	return nil
}

// ExactArgs asks for n arguments; like cobra.ExactArgs, as a usage error.
func ExactArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return Usage("usage: "+cmd.UseLine(), "%d arguments, want %d", len(args), n)
		}
		return nil
	}
}

// ExitCode returns the exit code that err stands for.
func ExitCode(err error) int {
	var problems config.Problems
	switch {
	case err == nil:
		return ExitOK
	case errors.Is(err, ErrDiffers):
		return ExitDiffers
	case errors.As(err, &problems), sallyport.OutcomeOf(err) == sallyport.OutcomeUsage:
		return ExitUsage
	}
	return ExitFailed
}

// Print tells a person about err: `name: what` and, if there is one, `hint: …`.
func Print(w io.Writer, name string, err error) {
	var problems config.Problems
	if errors.As(err, &problems) {
		for _, p := range problems {
			fmt.Fprintf(w, "%s: %s\n", name, p.Error())
		}
		fmt.Fprintf(w, "hint: `sallyport config schema` lists every key; docs/configuration.md explains them\n")
		return
	}
	text := err.Error()
	var told *sallyport.Error
	if errors.As(err, &told) && told.Code != "" && !strings.Contains(text, told.Code) {
		text = told.Code + ": " + text
	}
	fmt.Fprintf(w, "%s: %s\n", name, text)
	if told != nil && told.Hint != "" {
		fmt.Fprintf(w, "hint: %s\n", told.Hint)
	}
}

// Main executes a command as a whole program and ends the process.
func Main(cmd *cobra.Command) { os.Exit(Execute(cmd, os.Args[1:])) }

// Execute runs cmd with args and returns the exit code; errors are printed.
func Execute(cmd *cobra.Command, args []string) int {
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.Version = Version()
	cmd.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	cmd.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return Usage("run: "+c.CommandPath()+" --help", "%v", err)
	})
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(context.Background())
	if err != nil {
		Print(cmd.ErrOrStderr(), cmd.Name(), usage(cmd, err))
	}
	return ExitCode(usage(cmd, err))
}

// usage turns cobra's own errors, which have no type, into usage errors.
func usage(cmd *cobra.Command, err error) error {
	if err == nil {
		return nil
	}
	for _, start := range []string{"unknown command", "required flag", "if any flags in the group", "at least one of the flags"} {
		if strings.HasPrefix(err.Error(), start) {
			first, _, _ := strings.Cut(err.Error(), "\n")
			return Usage("run: "+cmd.CommandPath()+" --help", "%s", first)
		}
	}
	return err
}

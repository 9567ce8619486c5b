package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"sallyport"
	"sallyport/agent"
	"sallyport/agent/login"
	"sallyport/internal/logging"
	"sallyport/tunnel"
)

// The interface rules: stdout carries results, for machines or to be piped;
// everything that only a person reads goes to stderr. An error says what failed,
// why, what to do, and the decision behind it; its exit code is the outcome's
// number and nothing else has it. Nobody waits more than two seconds without being
// told for what.

// shell is the process's surroundings. Tests build their own.
type shell struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	env            func(string) string
	// terminal reports whether a person reads stderr.
	terminal bool
	// dialer replaces the carriers in tests.
	dialer func(context.Context, []string, tunnel.DialConfig) (tunnel.Carrier, error)

	o    options
	root *cobra.Command
	mu   sync.Mutex // guards stderr: one line at a time
}

// system returns the real surroundings.
func system() *shell {
	return &shell{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, env: os.Getenv, terminal: term.IsTerminal(int(os.Stderr.Fd()))}
}

// exitInterrupted is what Ctrl-C ends with when something is not done or lost by
// it; a Ctrl-C that ends what would go on for ever is 0.
const exitInterrupted = 130

// run executes one command line and returns the exit code.
func run(args []string, s *shell) int {
	ctx, stop := interrupts(context.Background())
	defer stop()
	root := s.commands()
	args, s.o.exec = cutExec(args)
	root.SetArgs(args)
	root.SetIn(s.stdin)
	root.SetOut(s.stdout)
	root.SetErr(s.stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	return s.report(cmd, err)
}

// interrupts returns a context that ends at the first Ctrl-C or SIGTERM; the
// second ends the process.
func interrupts(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(parent)
	c := make(chan os.Signal, 2)
	signal.Notify(c, os.Interrupt, syscall.SIGTERM)
	go func() {
		for range c {
			if ctx.Err() != nil {
				os.Exit(exitInterrupted)
			}
			cancel()
		}
	}()
	return ctx, func() {
		signal.Stop(c)
		close(c)
		cancel()
	}
}

// say prints lines for people.
func (s *shell) say(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintf(s.stderr, format+"\n", args...)
}

// config is the agent's, from the flags.
func (s *shell) config() (agent.Config, error) {
	log := logging.Discard()
	if s.o.verbose {
		var err error
		if log, err = logging.New(s.stderr, "debug", logging.FormatText); err != nil {
			return agent.Config{}, err
		}
	}
	return agent.Config{
		Profile: s.o.profile, Transport: s.o.transport, PostureFile: s.o.postureFile, KeyStore: s.o.keyStore,
		Log: log, Patience: s.o.patience, Dial: s.dialer,
		Ask: s.askWhenNeeded,
		Say: func(m string) { s.say("agent: %s", m) },
	}, nil
}

// askWhenNeeded is for logins that the person did not ask for: only somebody who
// reads the terminal gets a browser window.
func (s *shell) askWhenNeeded() (login.Options, error) {
	if !s.terminal && !s.o.noBrowser {
		return login.Options{}, errors.New("stderr is no terminal")
	}
	return s.loginOptions(), nil
}

// askNow is for "agent login" and "agent extend".
func (s *shell) askNow() (login.Options, error) {
	o := s.loginOptions()
	if !s.terminal && !s.o.noBrowser && o.Browser == nil {
		return o, &sallyport.Error{
			Outcome: sallyport.OutcomeLogin, Code: "login.nobody",
			Message: "no terminal and no desktop: nobody would see the login page",
			Hint:    "agent login --no-browser prints its address",
		}
	}
	return o, nil
}

func (s *shell) loginOptions() login.Options {
	o := login.Options{Timeout: s.o.timeout, Show: func(url, fingerprint string) {
		s.say("To log in, open this address in your browser:\n\n  %s\n\nThis device's key is %s\n", url, fingerprint)
	}}
	if !s.o.noBrowser && s.desktop() {
		o.Browser = login.OpenBrowser
	}
	return o
}

// desktop reports whether a browser could be opened; on Linux, text browsers,
// which would take the terminal, do not count.
func (s *shell) desktop() bool {
	if runtime.GOOS == "darwin" || runtime.GOOS == "windows" {
		return true
	}
	return s.env("DISPLAY") != "" || s.env("WAYLAND_DISPLAY") != "" || s.env("BROWSER") != ""
}

// offline runs f with an agent that reaches nobody by itself.
func (s *shell) offline(f func(*agent.Agent) error) error {
	cfg, err := s.config()
	if err != nil {
		return err
	}
	a, err := agent.New(cfg)
	if err != nil {
		return err
	}
	defer a.Close()
	return f(a)
}

// online runs f beside a running agent, and says what it waits for.
func (s *shell) online(ctx context.Context, f func(context.Context, *agent.Agent) error) error {
	return s.offline(func(a *agent.Agent) error {
		ctx, cancel := context.WithCancelCause(ctx)
		var tasks sync.WaitGroup
		// What f began may need the agent to end well, so the agent ends after it.
		life, end := context.WithCancel(context.WithoutCancel(ctx))
		tasks.Go(func() {
			if err := a.Run(life); err != nil {
				cancel(err)
			}
		})
		tasks.Go(func() { s.tellWaits(life, a) })
		err := f(ctx, a)
		if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(cause, context.Canceled) {
			err = cause
		}
		end()
		tasks.Wait()
		cancel(nil)
		return err
	})
}

// waiting runs f, which has an agent that does not run, and says what it waits for.
func (s *shell) waiting(ctx context.Context, a *agent.Agent, f func() error) error {
	ctx, cancel := context.WithCancel(ctx)
	var tasks sync.WaitGroup
	tasks.Go(func() { s.tellWaits(ctx, a) })
	err := f()
	cancel()
	tasks.Wait()
	return err
}

const tellAfter = 2 * time.Second

// tellWaits says once for each thing that takes long what it is.
func (s *shell) tellWaits(ctx context.Context, a *agent.Agent) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	told := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		what, since := a.WaitsFor()
		switch {
		case what == "":
			told = ""
		case since >= tellAfter && what != told:
			told = what
			s.say("agent: waiting for %s …", what)
		}
	}
}

// Package demo shows on one machine what Sallyport is for: a login through the
// browser, connections to real services, a denial that explains itself, and
// connections that end within a second when the reason for them ends. The
// daemons run in this process; the agent and the operator's tool are the built
// programs, and every claim is measured from outside, at the sockets of a client.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"sallyport/cmd/internal/run"
)

// Options says how the demonstration goes.
type Options struct {
	// Exit ends it after the story; else it stays up for trying things out.
	Exit bool
	// Sabotage switches a guard off, so that the claim about it must fail: "cut"
	// or "deny"; empty: none.
	Sabotage string
	// Out is where the story is told.
	Out io.Writer
}

// Sabotages are the guards that can be switched off.
var Sabotages = []string{"cut", "deny"}

// bound is what the story promises for every cut.
const bound = time.Second

// Run tells the story. It returns nil only if each claim held.
func Run(ctx context.Context, o Options) (err error) {
	agent, err := program("agent")
	if err != nil {
		return err
	}
	operator, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "sallyport-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	// A closed terminal ends the demonstration; to the daemons alone SIGHUP means
	// "read the configuration again".
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	s, err := newSite(ctx, dir, o.Sabotage)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()

	t := &teller{out: o.Out}
	a := &alice{site: s, agent: agent, operator: operator, home: filepath.Join(dir, "alice")}
	defer a.close()
	t.say("Sallyport, everything on this machine: four daemons, an identity provider, three services.\n")
	if err := t.tell(ctx, story(a)); err != nil {
		return failed(s, err)
	}
	t.say("\nEach claim held.")
	if o.Exit {
		return nil
	}
	if err := a.login(ctx); err != nil {
		return err
	}
	t.say("%s", a.tryNext())
	select {
	case <-ctx.Done():
	case err := <-s.done: // a daemon failed
		s.done <- err
	}
	return nil
}

// failed adds where to look.
func failed(s *site, err error) error {
	log, readErr := os.ReadFile(s.logFile)
	if readErr != nil {
		return err
	}
	return run.Failure("the demonstration failed", "the daemons' last words:\n"+lastLines(log, 12), err)
}

// program finds a built program beside this one, else in PATH.
func program(name string) (string, error) {
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", run.Failure("the demonstration runs the built "+name, "make build", err)
	}
	return path, nil
}

// claim is one thing that the story says and then shows.
type claim struct {
	says string
	show func(ctx context.Context) (shown string, err error)
}

// teller prints the story as it happens.
type teller struct{ out io.Writer }

func (t *teller) say(format string, args ...any) { fmt.Fprintf(t.out, format+"\n", args...) }

// tell shows one claim after the other and stops at the first that does not hold.
func (t *teller) tell(ctx context.Context, claims []claim) error {
	for i, c := range claims {
		fmt.Fprintf(t.out, "%2d. %s\n", i+1, c.says)
		limited, cancel := context.WithTimeout(ctx, time.Minute)
		shown, err := c.show(limited)
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			fmt.Fprintf(t.out, "    ✗ does not hold\n")
			return fmt.Errorf("claim %d, %q: %w", i+1, c.says, err)
		}
		fmt.Fprintf(t.out, "    ✔ %s\n", indent(shown))
	}
	return nil
}

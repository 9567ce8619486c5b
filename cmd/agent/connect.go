package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"sallyport"
	"sallyport/agent"
	"sallyport/agent/forward"
	"sallyport/proto/connect"
)

// Patience of connect: a local port outlives a short absence of the network; a
// program that reads our standard output wants an answer.
const (
	portPatience  = 20 * time.Second
	stdioPatience = 5 * time.Second
)

// wanted is one target with its local end, as the command line says.
type wanted struct {
	word string
	spec forward.Spec
}

// plan reads the command line of connect. It reaches nobody.
func (s *shell) plan(args []string) ([]wanted, error) {
	if _, err := forward.ParseAllow(s.o.allowUID); err != nil {
		return nil, err
	}
	var all []wanted
	for _, word := range args {
		all = append(all, wanted{word: word})
	}
	if len(s.o.listens) > len(args) {
		return nil, usage("listen", "--listen %.60q has no TARGET", s.o.listens[len(args)])
	}
	for i, text := range s.o.listens {
		spec, err := forward.ParseSpec(text)
		if err != nil {
			return nil, err
		}
		all[i].spec = spec
	}
	for _, text := range s.o.locals {
		spec, word, err := forward.ParseLocal(text)
		if err != nil {
			return nil, err
		}
		all = append(all, wanted{word, spec})
	}
	if len(all) == 0 {
		return nil, usage("args", "connect: which target?")
	}
	for i, w := range all {
		if err := checkWord(w.word); err != nil {
			return nil, err
		}
		if s.o.stdio {
			all[i].spec = forward.Spec{Network: "stdio"}
		}
		if all[i].spec.Network == "stdio" && (len(all) > 1 || s.o.exec != nil) {
			return nil, usage("stdio", "--stdio takes one TARGET and nothing else")
		}
	}
	return all, nil
}

func runConnect(s *shell, ctx context.Context, args []string) error {
	all, err := s.plan(args)
	if err != nil {
		return err
	}
	if all[0].spec.Network == "stdio" {
		return s.connectStdio(ctx, all[0].word)
	}
	s.o.patience = portPatience
	return s.online(ctx, func(ctx context.Context, a *agent.Agent) error { return s.connectPorts(ctx, a, all) })
}

func runNc(s *shell, ctx context.Context, args []string) error {
	word := net.JoinHostPort(strings.Trim(args[0], "[]"), args[1])
	if _, err := sallyport.ParseTarget(word); err != nil {
		return usage("target", "%v", err)
	}
	return s.connectStdio(ctx, word)
}

// connectStdio carries standard input and output.
func (s *shell) connectStdio(ctx context.Context, word string) error {
	s.o.patience = stdioPatience
	return s.online(ctx, func(ctx context.Context, a *agent.Agent) error {
		t, err := a.Resolve(ctx, word)
		if err != nil {
			return err
		}
		f := &forward.Forward{Target: t, Opener: a, Say: s.explain}
		out, ok := s.stdout.(io.WriteCloser)
		if !ok {
			out = nopCloser{s.stdout}
		}
		err = f.Stdio(ctx, s.stdin, out)
		s.leaveOutcome(err)
		return s.suggest(ctx, a, t, err)
	})
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// suggest replaces "no such target" with the nearest names.
func (s *shell) suggest(ctx context.Context, a *agent.Agent, t sallyport.Target, err error) error {
	if sallyport.CodeOf(err) != connect.ProblemNotFound {
		return err
	}
	return unknownTarget(ctx, a, t)
}

// open is a local end that serves.
type open struct {
	forward *forward.Forward
	bound   *forward.Bound
	since   time.Time
	rule    string // empty until the policy has said yes; guarded by ports.mu
}

// ports is the local ends of one agent connect.
type ports struct {
	*shell
	agent *agent.Agent
	wake  chan struct{} // capacity 1: agent ps shall see a change

	mu      sync.Mutex
	opens   []*open
	errs    []error
	aborted bool // ended by the person before the policy had said yes
}

// connectPorts serves all targets until none is left or the person ends it, and
// returns the error with the highest exit code.
func (s *shell) connectPorts(ctx context.Context, a *agent.Agent, all []wanted) error {
	p := &ports{shell: s, agent: a, wake: make(chan struct{}, 1)}
	serving, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(ctx, p.sayWhatIsOpen)()
	var ready, served, publishing sync.WaitGroup
	for _, w := range all {
		o, err := p.bind(ctx, w)
		if err != nil {
			p.failed(err)
			continue
		}
		ready.Add(1)
		served.Go(func() { p.failed(p.serve(serving, o, ready.Done)) })
	}
	publishing.Go(func() {
		if err := a.Publish(serving, "connect", p.wake, p.locals); err != nil {
			s.say("agent: agent ps does not show this process: %v", err)
		}
	})
	ready.Wait()
	commandErr := p.afterReady(serving, stop)
	served.Wait()
	stop()
	publishing.Wait()
	switch w := worst(p.errs); {
	case w != nil:
		return reported{w}
	case p.aborted:
		return context.Canceled
	}
	return commandErr
}

// failed tells how a target ended and keeps it for the exit code.
func (p *ports) failed(err error) {
	if err == nil {
		return
	}
	aborted := errors.Is(err, context.Canceled)
	if !aborted {
		p.explain(err)
		p.errorDocument(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.aborted = p.aborted || aborted; !aborted {
		p.errs = append(p.errs, err)
	}
}

func (p *ports) changed() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// afterReady says how to stop, or runs the command of --exec and stops after it.
func (p *ports) afterReady(ctx context.Context, stop func()) error {
	p.mu.Lock()
	var first *open
	for _, o := range p.opens {
		if first == nil && o.rule != "" {
			first = o
		}
	}
	n := len(p.opens)
	p.mu.Unlock()
	switch {
	case first == nil || ctx.Err() != nil:
	case p.o.exec != nil:
		defer stop()
		return p.runCommand(ctx, first)
	default:
		p.say("Ctrl-C to stop.  %s may use %s.", capital(first.forward.Allow.String()), thePort(n))
	}
	return nil
}

// sayWhatIsOpen is for the first Ctrl-C.
func (p *ports) sayWhatIsOpen() {
	n := 0
	for _, l := range p.locals() {
		n += len(l.Flows)
	}
	if n > 0 {
		p.say("agent: %d still open, waiting up to %s; Ctrl-C again cuts them", n, forward.Drain)
	}
}

func thePort(n int) string {
	if n == 1 {
		return "this port"
	}
	return "these ports"
}

func capital(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

// bind opens the local end of a target. A short name needs the gateway first.
func (p *ports) bind(ctx context.Context, w wanted) (*open, error) {
	allow, err := forward.ParseAllow(p.o.allowUID)
	if err != nil {
		return nil, err
	}
	t, err := p.agent.Resolve(ctx, w.word)
	if err != nil {
		return nil, err
	}
	if t.Network == sallyport.UDP {
		return nil, usage("target", "%s: UDP targets cannot be connected in this version", t.Authority())
	}
	b, err := forward.Bind(ctx, t, w.spec, allow, p.agent.Ports())
	if err != nil {
		return nil, err
	}
	if b.Note != "" {
		p.say("agent: %s", b.Note)
	}
	f := &forward.Forward{Target: t, Opener: p.agent, Allow: allow, Say: p.explain, Changed: p.changed}
	o := &open{forward: f, bound: b, since: time.Now().UTC().Round(time.Millisecond)}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.opens = append(p.opens, o)
	return o, nil
}

// serve accepts at once, so that connections are held while a login runs, and
// lets them through when the policy has said yes.
func (p *ports) serve(ctx context.Context, o *open, ready func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g := &gate{Opener: o.forward.Opener, open: make(chan struct{})}
	o.forward.Opener = g
	ended := make(chan error, 1)
	go func() { ended <- o.forward.Serve(ctx, o.bound) }()
	err := p.admit(ctx, o)
	if err == nil {
		close(g.open)
	} else {
		cancel()
	}
	ready()
	if serveErr := <-ended; err == nil {
		err = serveErr
	}
	return err
}

// gate holds back connections until it is open.
type gate struct {
	forward.Opener
	open chan struct{}
}

func (g *gate) Open(ctx context.Context, t sallyport.Target) (*forward.Flow, error) {
	select {
	case <-g.open:
		return g.Opener.Open(ctx, t)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// admit asks what the policy says of the target, and announces the local end.
func (p *ports) admit(ctx context.Context, o *open) error {
	t := o.forward.Target
	d, err := patiently(ctx, portPatience, func() (sallyport.Decision, error) { return p.agent.Why(ctx, t) })
	if err != nil {
		return err
	}
	if d.Verdict == sallyport.VerdictNoRoute {
		return unknownTarget(ctx, p.agent, t)
	}
	if e := connect.Denial(d); e != nil {
		return &agent.TargetError{Target: t, Err: e}
	}
	p.mu.Lock()
	o.rule = d.Rule
	if o.rule == "" {
		o.rule = "-"
	}
	p.mu.Unlock()
	p.changed()
	return p.announce(o, d)
}

// patiently tries again while nobody answers.
func patiently[T any](ctx context.Context, d time.Duration, f func() (T, error)) (T, error) {
	end := time.Now().Add(d)
	for {
		v, err := f()
		if !agent.Unreached(err) || time.Now().After(end) || ctx.Err() != nil {
			return v, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// localName is how people reach the local end.
func (o *open) localName() string {
	if o.bound.Addr().Network() == "unix" {
		return "unix:" + o.bound.Addr().String()
	}
	return o.bound.Addr().String()
}

func (p *ports) announce(o *open, d sallyport.Decision) error {
	t := o.forward.Target
	link, _ := p.agent.Link()
	p.say("%s → %s   (%s, %s, %s, allowed by %q%s)", t.Authority(), o.localName(),
		link.Carrier, link.Gateway, milliseconds(link.RTT), d.Rule, untilClock(d))
	if p.o.output == formatText {
		return nil
	}
	p.shell.mu.Lock()
	defer p.shell.mu.Unlock()
	return json.NewEncoder(p.stdout).Encode(struct {
		Schema   string               `json:"schema"`
		Target   sallyport.Target     `json:"target"`
		Local    string               `json:"local"`
		Carrier  string               `json:"carrier"`
		Gateway  string               `json:"gateway"`
		Rule     string               `json:"rule"`
		Decision sallyport.DecisionID `json:"decision"`
	}{"agent.connect/v1", t, o.localName(), link.Carrier, link.Gateway, d.Rule, d.ID})
}

func milliseconds(d time.Duration) string {
	if d < 10*time.Millisecond {
		return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
	}
	return fmt.Sprintf("%d ms", d.Milliseconds())
}

func (p *ports) locals() []agent.Local {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]agent.Local, 0, len(p.opens))
	for _, o := range p.opens {
		flows, totals := o.forward.Status()
		list = append(list, agent.Local{
			Target: o.forward.Target, Local: o.localName(), Since: o.since, Rule: o.rule,
			Flows: flows, Opened: totals.Flows, Up: totals.Up, Down: totals.Down,
		})
	}
	return list
}

// runCommand runs the command of --exec with the first local end's address.
func (s *shell) runCommand(ctx context.Context, o *open) error {
	addr := o.bound.Addr().String()
	host, port, err := net.SplitHostPort(addr)
	if err != nil { // a unix socket
		host, port = addr, ""
	}
	fill := strings.NewReplacer("{host}", host, "{port}", port, "{addr}", addr)
	args := make([]string, len(s.o.exec))
	for i, a := range s.o.exec {
		args[i] = fill.Replace(a)
	}
	c := exec.Command(args[0], args[1:]...)
	c.Stdin, c.Stdout, c.Stderr = s.stdin, s.stdout, s.stderr
	c.Env = append(os.Environ(), "SALLYPORT_HOST="+host, "SALLYPORT_PORT="+port, "SALLYPORT_ADDR="+addr)
	if err := c.Start(); err != nil {
		return usage("exec", "cannot run %.80q: %v", args[0], errors.Unwrap(err))
	}
	// Ctrl-C goes to the whole foreground group, so the command has it already;
	// a SIGTERM is passed on.
	stop := context.AfterFunc(ctx, func() { c.Process.Signal(terminate) })
	defer stop()
	return c.Wait()
}

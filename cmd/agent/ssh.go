package main

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"sallyport"
	"sallyport/agent"
	"sallyport/proto/connect"
)

// sshPlan is what agent ssh makes of its command line.
type sshPlan struct {
	destination string // [user@]host, as typed, for ssh's own configuration
	word        string // the host part
	port        string // empty: 22
	rest        []string
}

func planSSH(args []string) (sshPlan, error) {
	p := sshPlan{destination: args[0], rest: args[1:]}
	if strings.HasPrefix(p.destination, "-") {
		return p, usage("args", "ssh: the host comes first, ssh's own arguments after it")
	}
	p.word = p.destination[strings.LastIndexByte(p.destination, '@')+1:]
	if host, port, err := net.SplitHostPort(p.word); err == nil {
		p.destination = strings.TrimSuffix(p.destination, p.word) + host
		p.word, p.port = host, port
	}
	if port := sshPort(p.rest); port != "" {
		p.port = port
	}
	if agent.ShortName(p.word) && p.port == "" {
		return p, nil
	}
	_, err := sallyport.ParseTarget(p.authority())
	if err != nil {
		return p, usage("target", "%v", err)
	}
	return p, nil
}

func (p sshPlan) authority() string {
	port := p.port
	if port == "" {
		port = "22"
	}
	return net.JoinHostPort(p.word, port)
}

// sshPort finds -p PORT, -pPORT and -o Port=… among ssh's options.
func sshPort(args []string) string {
	const withValue = "BbcDEeFIiJLlmOoPpQRSWw" // ssh(1)
	for i := 0; i < len(args); i++ {
		a := args[i]
		if len(a) < 2 || a[0] != '-' {
			return "" // the remote command begins
		}
		at := strings.IndexAny(a[1:], withValue)
		if at < 0 {
			continue
		}
		value := a[at+2:]
		if value == "" && i+1 < len(args) {
			i++
			value = args[i]
		}
		name, port, _ := strings.Cut(strings.ReplaceAll(value, " ", "="), "=")
		switch {
		case a[at+1] == 'p':
			return value
		case a[at+1] == 'o' && strings.EqualFold(name, "Port"):
			return strings.TrimLeft(port, "=")
		}
	}
	return ""
}

func runSSH(s *shell, ctx context.Context, args []string) error {
	plan, err := planSSH(args)
	if err != nil {
		return err
	}
	program, err := exec.LookPath("ssh")
	if err != nil {
		return &sallyport.Error{
			Outcome: sallyport.OutcomeConflict, Code: "local.no_ssh", Message: "there is no ssh on this machine",
			Hint: "install OpenSSH's client",
		}
	}
	var target sallyport.Target
	err = s.online(ctx, func(ctx context.Context, a *agent.Agent) error {
		if target, err = resolveSSH(ctx, a, plan); err != nil {
			return err
		}
		return preflight(ctx, a, target)
	})
	if err != nil {
		return err
	}
	command, err := s.sshCommand(program, plan, target)
	if err != nil {
		return err
	}
	return s.runSSH(command)
}

// resolveSSH prefers a short name's SSH port over its others.
func resolveSSH(ctx context.Context, a *agent.Agent, p sshPlan) (sallyport.Target, error) {
	if t, err := sallyport.ParseTarget(p.authority()); err == nil && !agent.ShortName(p.word) {
		return t, nil
	}
	list, err := a.Targets(ctx, true)
	if err != nil {
		return sallyport.Target{}, err
	}
	found := agent.Match(list, p.word)
	port := p.port
	if port == "" {
		port = "22"
	}
	var fits []sallyport.Target
	for _, t := range found {
		if strconv.Itoa(int(t.Port)) == port {
			fits = append(fits, t)
		}
	}
	switch {
	case len(fits) == 1:
		return fits[0], nil
	case len(fits) == 0 && len(found) == 1 && p.port == "":
		return found[0], nil // the one service of that name, on a port of its own
	case len(found) == 0:
		return sallyport.Target{}, agent.Unknown(list, p.word)
	}
	names := make([]string, len(found))
	for i, t := range found {
		names[i] = t.Authority()
	}
	e := &sallyport.Error{
		Outcome: sallyport.OutcomeUsage, Code: "target.ambiguous",
		Message: p.word + " could be " + strings.Join(names, " or "), Hint: "type one of them",
	}
	return sallyport.Target{}, e
}

// preflight asks before ssh does, because ssh turns every failure of its
// ProxyCommand into exit code 255.
func preflight(ctx context.Context, a *agent.Agent, t sallyport.Target) error {
	d, err := a.Why(ctx, t)
	if err != nil {
		return err
	}
	if d.Verdict == sallyport.VerdictNoRoute {
		return unknownTarget(ctx, a, t)
	}
	if e := connect.Denial(d); e != nil {
		return &agent.TargetError{Target: t, Err: e}
	}
	return nil
}

// sshCommand is ssh with this program as ProxyCommand. The host key is looked up
// under the target's own name, however the person abbreviated it.
func (s *shell) sshCommand(program string, p sshPlan, t sallyport.Target) (*exec.Cmd, error) {
	me, err := self()
	if err != nil {
		return nil, err
	}
	proxy := []string{me, "connect", "--stdio", "--transport", s.o.transport}
	if s.o.profile != "" {
		proxy = append(proxy, "--profile", s.o.profile)
	}
	if s.o.postureFile != "" {
		proxy = append(proxy, "--posture-file", s.o.postureFile)
	}
	proxy = append(proxy, t.Authority())
	for i, word := range proxy {
		proxy[i] = quote(word)
	}
	alias := t.Host
	if t.Port != 22 {
		alias = "[" + t.Host + "]:" + strconv.Itoa(int(t.Port))
	}
	args := []string{"-o", "ProxyCommand=" + strings.Join(proxy, " "), "-o", "HostKeyAlias=" + alias, p.destination}
	c := exec.Command(program, append(args, p.rest...)...)
	c.Stdin, c.Stdout, c.Stderr = s.stdin, s.stdout, s.stderr
	return c, nil
}

// quote makes a word safe in a ProxyCommand: for the shell that runs it, and for
// ssh, which expands percent signs in it.
func quote(word string) string {
	return "'" + strings.ReplaceAll(strings.ReplaceAll(word, "'", `'\''`), "%", "%%") + "'"
}

// outcomeEnv names the file in which the ProxyCommand leaves how it ended.
const outcomeEnv = "SALLYPORT_OUTCOME_FILE"

// runSSH runs ssh and ends as it did, unless the tunnel under it was cut: then
// with that code.
func (s *shell) runSSH(c *exec.Cmd) error {
	dir, err := os.MkdirTemp("", "sallyport-ssh-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "outcome")
	c.Env = append(os.Environ(), outcomeEnv+"="+file)
	err = c.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if b, readErr := os.ReadFile(file); readErr == nil && exit.ExitCode() == 255 {
		if code, convErr := strconv.Atoi(string(b)); convErr == nil && code > 0 {
			return exitStatus(code)
		}
	}
	return exitStatus(exit.ExitCode())
}

// leaveOutcome tells the agent ssh above us, if there is one, how a flow ended.
func (s *shell) leaveOutcome(err error) {
	if file := s.env(outcomeEnv); file != "" && err != nil {
		os.WriteFile(file, []byte(strconv.Itoa(int(sallyport.OutcomeOf(err)))), 0o600)
	}
}

package demo

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// story is the whole of it, in order.
func story(a *alice) []claim {
	return []claim{
		{"Alice logs in through her browser (agent login, followed page by page)", a.logsIn},
		{"agent connect db.internal:5432 reaches a TCP service", a.reachesDatabase},
		{"agent ssh bastion.internal is a real SSH login", a.reachesBastion},
		{"A web page comes through a tunnel", a.reachesWiki},
		{"payroll.internal is denied, and the denial says why and what to do", a.isDenied},
		{"Disk encryption goes off: the open connection is cut", a.isCutByPosture},
		{"Disk encryption is on again: Alice connects, without a new login", a.returns},
		{"Alice leaves the group dba: her database connection is cut", a.isCutByGroup},
		{"The operator revokes her sessions: cut, and a login is asked for", a.isRevoked},
		{"The audit logs of all four daemons verify", a.auditVerifies},
	}
}

func (a *alice) logsIn(ctx context.Context) (string, error) {
	if err := a.login(ctx); err != nil {
		return "", err
	}
	out, err := a.run(ctx, "whoami")
	if err != nil {
		return "", err
	}
	if !strings.Contains(out.stdout, userEmail) {
		return "", fmt.Errorf("whoami does not say %s: %s", userEmail, out.all())
	}
	return firstLine(out.stdout), nil
}

func (a *alice) reachesDatabase(ctx context.Context) (string, error) {
	c, err := a.connect(ctx, "db.internal:5432")
	if err != nil {
		return "", err
	}
	defer c.close()
	start := time.Now()
	answer, err := c.ask("SELECT 6*7")
	if err != nil {
		return "", err
	}
	if answer != "42" {
		return "", fmt.Errorf("the database answered %q; want 42", answer)
	}
	return fmt.Sprintf("%s\nSELECT 6*7 → %s in %s", c.announced, answer, brief(time.Since(start))), nil
}

func (a *alice) isDenied(ctx context.Context) (string, error) {
	before := a.site.payroll.accepted.Load()
	out, err := a.run(ctx, "connect", "payroll.internal:443", "--listen", "127.0.0.1:0", "--exec", "true")
	if err == nil {
		return "", errors.New("agent connect let Alice through")
	}
	if out.exit != exitDenied {
		return "", fmt.Errorf("agent connect ended with exit code %d, want %d: %s", out.exit, exitDenied, out.all())
	}
	for _, part := range []string{`"finance"`, "device.firewall", "fix:", "decision d-"} {
		if !strings.Contains(out.stderr, part) {
			return "", fmt.Errorf("the denial does not say %s: %s", part, out.stderr)
		}
	}
	// A program that does not ask first is refused as well.
	if forced, err := a.run(ctx, "connect", "--stdio", "payroll.internal:443"); err == nil || forced.exit != exitDenied {
		return "", fmt.Errorf("agent connect --stdio ended with exit code %d, want %d: %s", forced.exit, exitDenied, forced.all())
	}
	if n := a.site.payroll.accepted.Load() - before; n != 0 {
		return "", fmt.Errorf("%d connections reached the payroll service", n)
	}
	return strings.TrimSpace(out.stderr) + "\n(exit code 4; no packet reached the service)", nil
}

func (a *alice) isCutByPosture(ctx context.Context) (string, error) {
	c, err := a.connect(ctx, "db.internal:5432")
	if err != nil {
		return "", err
	}
	defer c.close()
	took, err := c.cutBy(ctx, func() error { return a.setPosture(false) })
	if err != nil {
		return "", err
	}
	reason, err := c.endedWith(exitRevoked)
	if err != nil {
		return "", err
	}
	if !strings.Contains(reason, "disk_encrypted") {
		return "", fmt.Errorf("the agent does not say why: %s", reason)
	}
	out, err := a.run(ctx, "why", "db.internal:5432")
	if err == nil || out.exit != exitDenied {
		return "", fmt.Errorf("a new connection would be allowed: %s", out.all())
	}
	return fmt.Sprintf("last byte %s after the change on disk\n%s (exit code 10)", brief(took), reason), nil
}

func (a *alice) returns(ctx context.Context) (string, error) {
	if err := a.setPosture(true); err != nil {
		return "", err
	}
	c, err := a.connect(ctx, "db.internal:5432")
	if err != nil {
		return "", err
	}
	defer c.close()
	if answer, err := c.ask("SELECT 6*7"); err != nil || answer != "42" {
		return "", fmt.Errorf("the database answered %q, %v", answer, err)
	}
	return c.announced, nil
}

func (a *alice) isCutByGroup(ctx context.Context) (string, error) {
	c, err := a.connect(ctx, "db.internal:5432")
	if err != nil {
		return "", err
	}
	defer c.close()
	other, err := a.connect(ctx, "wiki.internal:80")
	if err != nil {
		return "", err
	}
	defer other.close()
	took, err := c.cutBy(ctx, func() error { return a.site.setGroups("sre") })
	if err != nil {
		return "", err
	}
	reason, err := c.endedWith(exitRevoked)
	if err != nil {
		return "", err
	}
	if err := other.lives(ctx); err != nil {
		return "", fmt.Errorf("the connection to the wiki, which needs no group, did not live on: %w", err)
	}
	if err := a.site.setGroups("dba", "sre"); err != nil {
		return "", err
	}
	return fmt.Sprintf("last byte %s after the configuration was saved; her connection to the wiki lives on\n%s", brief(took), reason), nil
}

func (a *alice) isRevoked(ctx context.Context) (string, error) {
	c, err := a.connectSoon(ctx, "db.internal:5432")
	if err != nil {
		return "", err
	}
	defer c.close()
	took, err := c.cutBy(ctx, func() error {
		out, err := runProgram(ctx, a.operator, nil, "sessions", "revoke", "--config", a.site.configFile, "--user", userEmail, "--reason", "demonstration")
		if err != nil {
			return fmt.Errorf("sessions revoke: %w: %s", err, out.all())
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	reason, err := c.endedWith(exitRevoked, exitLogin)
	if err != nil {
		return "", err
	}
	out, err := a.run(ctx, "connect", "db.internal:5432", "--listen", "127.0.0.1:0", "--exec", "true")
	if err == nil || out.exit != exitLogin || !strings.Contains(out.stderr, "agent login") {
		return "", fmt.Errorf("agent connect ended with exit code %d and does not ask for a login: %s", out.exit, out.all())
	}
	return fmt.Sprintf("last byte %s after `sallyport sessions revoke` was started\n%s\nnext agent connect: %s (exit code 3)", brief(took), reason, strings.TrimSpace(out.stderr)), nil
}

func (a *alice) auditVerifies(ctx context.Context) (string, error) {
	out, err := runProgram(ctx, a.operator, nil, "audit", "verify", "--config", a.site.configFile)
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out.all())
	}
	if n := strings.Count(out.stdout, " ok "); n != 4 {
		return "", fmt.Errorf("%d of 4 chains verified: %s", n, out.stdout)
	}
	return strings.TrimSpace(out.stdout), nil
}

// tryNext is what a person may do while everything is up.
func (a *alice) tryNext() string {
	return fmt.Sprintf(`
Everything stays up until Ctrl-C. Alice is logged in again. In another terminal:

    export XDG_STATE_HOME=%s PATH=%s:$PATH
    agent ls --all
    agent connect db.internal:5432            then: nc 127.0.0.1 5432, and type SELECT 6*7
    agent why payroll.internal:443
    echo 'disk_encrypted: false' > %s
    sallyport sessions ls --config %s
    sallyport audit tail -f --config %s

Routes, users and groups are in %s: change it and see.
Alice's password is %q. The daemons' log: %s`,
		a.home, dirOf(a.agent), a.site.postureFile, a.site.configFile, a.site.configFile, a.site.configFile, userPassword, a.site.logFile)
}

package integration

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyport/integration/stack"
)

// TestDemo: the demonstration holds, and fails when a guard is switched off.
func TestDemo(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		exit int
		says string
	}{
		"holds":             {nil, 0, "Each claim held."},
		"cut switched off":  {[]string{"--sabotage=cut"}, 1, "✗ does not hold"},
		"deny switched off": {[]string{"--sabotage=deny"}, 1, "✗ does not hold"},
	} {
		t.Run(name, func(t *testing.T) {
			r := stack.Run(t, stack.Command{Program: "sallyport", Args: append([]string{"demo", "--exit"}, c.args...)})
			wantExit(t, r, c.exit)
			if !strings.Contains(r.Stdout, c.says) {
				t.Errorf("does not say %q:\n%s", c.says, r.Stdout)
			}
		})
	}
}

// TestDaemonsCommandLine: each daemon that runs apart has help, refuses wrong
// words and configurations with exit 2, and what it lacks with exit 1.
func TestDaemonsCommandLine(t *testing.T) {
	dir := t.TempDir()
	config := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	base := `
domain: corp.example
data_dir: %s
gateway: {public_url: "https://gw.localhost:0", listen: "%[2]s"}
authd: {public_url: "https://auth.localhost:0", listen: "%[2]s", idp: {issuer: "https://login.corp.example", client_id: x}}
cached: {listen: "%[2]s"}
policyd: {listen: "%[2]s"}
connect: {policyd: ["127.0.0.1:1"], cached: ["127.0.0.1:1"]}
`
	bad := config("bad.yaml", "domain: corp.example\ndata_dir: d\nlisten: x\n")
	keyless := config("keyless.yaml", fmt.Sprintf(base, "keyless", "127.0.0.1:0"))
	busy := config("busy.yaml", fmt.Sprintf(base, "busy", taken.Addr()))
	if r := stack.Run(t, stack.Command{Program: "sallyport", Args: []string{"init", "--config", busy}}); r.Exit != 0 {
		t.Fatal(r.Stderr)
	}
	for _, daemon := range []string{"cached", "policyd", "authd", "gateway"} {
		for _, c := range []struct {
			args []string
			exit int
			says string
		}{
			{[]string{"--help"}, 0, daemon + " --config FILE"},
			{[]string{"--version"}, 0, daemon + " "},
			{nil, 2, `required flag(s) "config" not set`},
			{[]string{"--config", bad, "more"}, 2, `unexpected argument "more"`},
			{[]string{"--config", filepath.Join(dir, "none")}, 2, "no such file"},
			{[]string{"--config", bad}, 2, "bad.yaml:3: listen: unknown key"},
			{[]string{"--config", keyless}, 1, "sallyport init"},
			{[]string{"--config", busy}, 1, "listen: " + taken.Addr().String()},
		} {
			began := time.Now()
			r := stack.Run(t, stack.Command{Program: daemon, Args: c.args})
			if r.Exit != c.exit || !strings.Contains(r.Stdout+r.Stderr, c.says) {
				t.Errorf("%s %s: exit %d, %q; want exit %d and %q", daemon, c.args, r.Exit, r.Stdout+r.Stderr, c.exit, c.says)
			}
			if c.exit != 0 && strings.Contains(r.Stdout, "ready") {
				t.Errorf("%s %s was ready", daemon, c.args)
			}
			if took := time.Since(began); took > 2*time.Second {
				t.Errorf("%s %s took %s", daemon, c.args, took)
			}
		}
	}
}

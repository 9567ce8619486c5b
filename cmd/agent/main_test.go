//go:build unix

package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"sallyport"
	"sallyport/agent/agenttest"
	"sallyport/proto/connect"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"agent":    main,
		"xdg-open": visit,
	})
}

// visit is the person's browser: it notes what it was started with, and follows
// the login page back to the agent.
func visit() {
	note, err := os.OpenFile(os.Getenv("OPENED"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	fmt.Fprintf(note, "%q\n", os.Args[1:])
	note.Close()
	pem, err := os.ReadFile(os.Getenv("CA"))
	if err != nil {
		panic(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	if err := agenttest.Visit(&tls.Config{RootCAs: pool}, os.Args[1]); err != nil {
		panic(err)
	}
}

var update = flag.Bool("update", false, "write what the commands print into the scripts")

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup:               setup,
		UpdateScripts:       *update,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":      exits,
			"long":       long,
			"await":      await,
			"until":      until,
			"talk":       talk,
			"flows":      flows,
			"withdraw":   withdraw,
			"endsession": endSession,
			"decide":     decide,
			"quiet":      quiet,
			"take":       take,
			"schema":     schema,
			"signal":     kill,
		},
	})
}

// setup gives each script a site and a person's surroundings.
func setup(e *testscript.Env) error {
	site := &agenttest.Site{}
	if err := site.Start(); err != nil {
		return err
	}
	e.Defer(site.Close)
	e.Values["site"] = site
	ca := filepath.Join(e.WorkDir, "ca.pem")
	if err := os.WriteFile(ca, site.CA(), 0o600); err != nil {
		return err
	}
	e.Setenv("AUTHD", site.AuthdURL)
	e.Setenv("CA", ca)
	e.Setenv("HOME", e.WorkDir)
	e.Setenv("XDG_STATE_HOME", filepath.Join(e.WorkDir, "state"))
	e.Setenv("OPENED", filepath.Join(e.WorkDir, "opened"))
	for _, unset := range []string{"DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "DBUS_SESSION_BUS_ADDRESS"} {
		e.Setenv(unset, "")
	}
	e.Setenv("XDG_RUNTIME_DIR", e.WorkDir)
	return nil
}

func siteOf(ts *testscript.TestScript) *agenttest.Site { return ts.Value("site").(*agenttest.Site) }

// exits CODE PROGRAM ARG… runs a program that must end with that code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG…")
	}
	runs(ts, args[0], args[1:])
}

func runs(ts *testscript.TestScript, want string, args []string) {
	code := 0
	err := ts.Exec(args[0], args[1:]...)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if strconv.Itoa(code) != want {
		ts.Fatalf("exit code %d; want %s", code, want)
	}
}

// long CODE N PROGRAM ARG… runs a program with one more argument of N bytes.
func long(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	runs(ts, args[0], append(args[2:], strings.Repeat("a", n)))
}

// await FILE PATTERN waits until the file matches.
func await(ts *testscript.TestScript, _ bool, args []string) {
	pattern := regexp.MustCompile(args[1])
	eventually(ts, args[0]+" matches "+args[1], func() bool {
		text, _ := os.ReadFile(ts.MkAbs(args[0]))
		return pattern.Match(text)
	})
}

// until PATTERN PROGRAM ARG… runs a program until its output matches.
func until(ts *testscript.TestScript, _ bool, args []string) {
	pattern := regexp.MustCompile(args[0])
	eventually(ts, "output matches "+args[0], func() bool {
		ts.Check(ts.Exec(args[1], args[2:]...))
		return pattern.MatchString(ts.ReadFile("stdout"))
	})
}

func eventually(ts *testscript.TestScript, what string, ok func() bool) {
	for end := time.Now().Add(20 * time.Second); !ok(); <-time.After(5 * time.Millisecond) {
		if time.Now().After(end) {
			ts.Fatalf("never: %s", what)
		}
	}
}

// talk FILE TARGET WORD connects to the local end that agent connect -o jsonl
// announced in FILE for TARGET, sends WORD and wants it back with the reply.
// talk -hold leaves the connection open.
func talk(ts *testscript.TestScript, _ bool, args []string) {
	hold := args[0] == "-hold"
	if hold {
		args = args[1:]
	}
	addr := announced(ts, args[0], args[1])
	network := "tcp"
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		network, addr = "unix", path
	}
	c, err := net.Dial(network, addr)
	ts.Check(err)
	ts.Defer(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprint(c, args[2])
	got := make([]byte, len(args[2]))
	_, err = io.ReadFull(c, got)
	ts.Check(err)
	if hold {
		return
	}
	c.(interface{ CloseWrite() error }).CloseWrite()
	rest, err := io.ReadAll(c)
	ts.Check(err)
	if all := string(got) + string(rest); all != fmt.Sprintf("%s[%d bytes]", args[2], len(args[2])) {
		ts.Fatalf("got %q", all)
	}
}

func announced(ts *testscript.TestScript, file, target string) (local string) {
	eventually(ts, file+" announces "+target, func() bool {
		text, _ := os.ReadFile(ts.MkAbs(file))
		for line := range strings.Lines(string(text)) {
			var doc struct{ Schema, Target, Local string }
			if json.Unmarshal([]byte(line), &doc) == nil && doc.Schema == "agent.connect/v1" && doc.Target == "tcp://"+target {
				local = doc.Local
			}
		}
		return local != ""
	})
	return local
}

// flows N waits until N flows are open at the gateway.
func flows(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	eventually(ts, args[0]+" flows", func() bool { return siteOf(ts).Flows() == n })
}

// withdraw TARGET REASON cuts the target's flows.
func withdraw(ts *testscript.TestScript, _ bool, args []string) {
	n := siteOf(ts).Withdraw("tcp://"+args[0], connect.Event{Code: "policy", Reason: args[1], PolicyRevision: 215, Decision: "d-CUT", AfterMS: 600})
	if n == 0 {
		ts.Fatalf("no flow to %s", args[0])
	}
}

// endsession CODE ends the session of the default profile.
func endSession(ts *testscript.TestScript, _ bool, args []string) {
	var p struct{ Session sallyport.SessionID }
	text := ts.ReadFile("state/sallyport/profiles/default/profile.json")
	ts.Check(json.Unmarshal([]byte(text), &p))
	siteOf(ts).EndSession(p.Session, args[0], strings.ReplaceAll(args[0], "_", " "))
}

// decide TARGET allow|deny changes the policy.
func decide(ts *testscript.TestScript, _ bool, args []string) {
	d := agenttest.Denied
	if args[1] == "allow" {
		d = agenttest.Allow("dba")
	}
	siteOf(ts).Decide("tcp://"+args[0], d)
}

// quiet checks that the gateway was not asked for anything.
func quiet(ts *testscript.TestScript, _ bool, _ []string) {
	if h := siteOf(ts).History(); len(h) != 0 {
		ts.Fatalf("the gateway was asked for %v", h)
	}
}

// take NAME takes a port until the end and puts it into $NAME.
func take(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { l.Close() })
	ts.Setenv(args[0], strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
}

// schema NAME checks that every line, or the one document, of stdout is JSON of
// that schema.
func schema(ts *testscript.TestScript, _ bool, args []string) {
	d := json.NewDecoder(strings.NewReader(ts.ReadFile("stdout")))
	n := 0
	for ; ; n++ {
		var doc struct{ Schema string }
		err := d.Decode(&doc)
		if err == io.EOF {
			break
		}
		ts.Check(err)
		if doc.Schema != args[0] {
			ts.Fatalf("schema %q; want %q", doc.Schema, args[0])
		}
	}
	if n == 0 {
		ts.Fatalf("no document")
	}
}

// signal NAME FILE sends a signal to the process whose id stands in FILE.
func kill(ts *testscript.TestScript, _ bool, args []string) {
	pid, err := strconv.Atoi(strings.TrimSpace(ts.ReadFile(args[1])))
	ts.Check(err)
	ts.Check(syscall.Kill(pid, map[string]syscall.Signal{"INT": syscall.SIGINT, "TERM": syscall.SIGTERM, "KILL": syscall.SIGKILL}[args[0]]))
}

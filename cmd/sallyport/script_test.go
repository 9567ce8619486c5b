package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"flag"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"sallyport"
	"sallyport/audit"
	"sallyport/cmd/internal/run"
)

var update = flag.Bool("update", false, "write golden files anew")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"sallyport": main})
}

// TestScripts locks what people and scripts see: help, errors, exit codes. A
// script that says `exit N command…` wants that exit code.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "script"),
		RequireExplicitExec: true,
		UpdateScripts:       *update,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exit":       wantExit,
			"busy":       busy,
			"chain":      chain,
			"eventually": eventually,
		},
	})
}

// wantExit runs a command and wants its exit code: exit N command args….
func wantExit(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exit N command args…")
	}
	want, err := strconv.Atoi(args[0])
	if err != nil {
		ts.Fatalf("exit: %v", err)
	}
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if exit, ok := err.(interface{ ExitCode() int }); ok {
		got = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d; want %d", got, want)
	}
}

// eventually runs a command until it succeeds, for half a minute at most.
func eventually(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: eventually command args…")
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(30 * time.Second); ; <-tick.C {
		err := ts.Exec(args[0], args[1:]...)
		if err == nil {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("still: %v", err)
		}
	}
}

// busy listens on a port until the script ends and puts its number into $BUSY.
func busy(ts *testscript.TestScript, _ bool, _ []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		ts.Fatalf("busy: %v", err)
	}
	ts.Defer(func() { l.Close() })
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		ts.Fatalf("busy: %v", err)
	}
	ts.Setenv("BUSY", port)
}

// chain appends the records of FILE, JSON one a line, to a daemon's audit chain
// that no key protects: chain DIR FILE.
func chain(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: chain DIR FILE")
	}
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		ts.Fatalf("chain: %v", err)
	}
	dir := ts.MkAbs(args[0])
	log, err := audit.Open(dir, filepath.Base(dir), key, audit.Options{})
	if err != nil {
		ts.Fatalf("chain: %v", err)
	}
	for line := range strings.Lines(ts.ReadFile(args[1])) {
		var r sallyport.AuditRecord
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			ts.Fatalf("chain: %s: %v", line, err)
		}
		if err := log.Append(context.Background(), r); err != nil {
			ts.Fatalf("chain: %v", err)
		}
	}
	if err := log.Close(); err != nil {
		ts.Fatalf("chain: %v", err)
	}
}

// TestEveryCommandHasHelp: nobody has to guess what a command is for.
func TestEveryCommandHasHelp(t *testing.T) {
	for _, cmd := range root().Commands() {
		if cmd.Short == "" {
			t.Errorf("%s has no short help", cmd.CommandPath())
		}
		for _, sub := range cmd.Commands() {
			if sub.Short == "" {
				t.Errorf("%s has no short help", sub.CommandPath())
			}
		}
	}
	if run.Version() == "" {
		t.Error("no version")
	}
}

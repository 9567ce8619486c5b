package main

import (
	"flag"
	"net"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

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
			"exit": wantExit,
			"busy": busy,
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

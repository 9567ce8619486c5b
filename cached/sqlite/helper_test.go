package sqlite_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport/cached"
	"sallyport/cached/sqlite"
)

// helperEnv says, in a process that a test starts, what it is to do instead of
// testing and with which database: "write-forever /path/cached.db".
const helperEnv = "SALLYPORT_SQLITE_HELPER"

// helpers are the programs that tests trace, disturb and kill. Each tells what was
// acknowledged on standard output, and ends with its error.
var helpers = map[string]func(path string) error{
	"write-forever": writeForever,
	"trace":         writeTrace,
	"migrate":       openAndClose,
	"replace":       replaceStore,
	"open":          openStore,
	"lock":          holdLock,
	"read":          holdRead,
}

func TestMain(m *testing.M) {
	if name, path, ok := strings.Cut(os.Getenv(helperEnv), " "); ok {
		if err := helpers[name](path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// helper returns a command that runs a helper, behind what is in front of it, for a
// minute at most.
func helper(t *testing.T, name, path string, front ...string) *exec.Cmd {
	t.Helper()
	args := append(front, os.Args[0])
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.Env = append(os.Environ(), helperEnv+"="+name+" "+path)
	cmd.Stderr = os.Stderr
	return cmd
}

// openServed opens the store with a server over it that keeps house.
func openServed(path string) (store *sqlite.Store, s *cached.Server, end func() error, err error) {
	if store, err = sqlite.Open(path, sqlite.Config{}); err != nil {
		return nil, nil, nil, err
	}
	if s, err = cached.New(cached.Config{}, cached.Deps{Store: store, KEK: crashKey()}); err != nil {
		return nil, nil, nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return store, s, func() error {
		cancel()
		return errors.Join(<-done, store.Close())
	}, nil
}

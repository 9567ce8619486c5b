// Package run is what every daemon process shares: flags, signals, the logger,
// listeners, the admin listener, the ready line, reload, exit codes, and how an
// error is printed. It owns the life of a process and knows no service; mains
// wire services into a Process.
package run

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"sallyport/cmd/internal/config"
	"sallyport/internal/logging"
	"sallyport/internal/telemetry"
)

// Process is one running daemon. A start function gets it, opens everything that
// can fail, hands long-running work to Go, and returns; the process then lives
// until a signal comes or one of its parts fails.
type Process struct {
	// Name is the daemon's: gateway, authd, policyd, cached, sallyport.
	Name string
	// Config is the file as it was loaded at start.
	Config *config.File
	Log    logging.Logger

	metrics *telemetry.Registry
	ctx     context.Context
	group   *errgroup.Group
	stdout  io.Writer
	closers []func() error
	opened  []io.Closer
	watched []func(*config.File) []string // files beside the configuration
	seen    string                        // the stamp of what the process was started with

	mu       sync.Mutex
	reloads  []func(*config.File) error
	refusals []func(context.Context, error)
	stale    error // the reason why the last change of the file was not taken
}

// Start wires a daemon; see Process.
type Start func(p *Process) error

// Daemon returns the command of a daemon: `name --config FILE`.
func Daemon(name, short string, start Start) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   name + " --config FILE",
		Short: short,
		Args:  NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return Serve(cmd.Context(), name, file, cmd.OutOrStdout(), cmd.ErrOrStderr(), start)
		},
	}
	ConfigFlag(cmd, &file)
	return cmd
}

// ConfigFlag adds the required flag --config to cmd.
func ConfigFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVarP(file, "config", "c", "", "configuration `file` (docs/configuration.md)")
	if err := cmd.MarkFlagRequired("config"); err != nil {
		panic(err) // the flag was added one line above
	}
}

// Serve loads the configuration, starts the daemon and returns when it is over:
// nil after SIGINT or SIGTERM or the end of ctx.
func Serve(ctx context.Context, name, file string, stdout, stderr io.Writer, start Start) error {
	loaded := stamps([]string{file}) // before it is read: a change meanwhile is then noticed
	cfg, err := config.Load(file, name)
	if err != nil {
		return err
	}
	log, err := logging.New(stderr, cfg.Log.Level, cfg.Log.Format)
	if err != nil {
		return err
	}
	if err := CheckClock(time.Now(), BuildTime()); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once

	p := &Process{Name: name, Config: cfg, Log: log.Named(name), stdout: stdout, metrics: telemetry.NewRegistry(), seen: loaded}
	p.group, p.ctx = errgroup.WithContext(ctx)
	err = start(p)
	if err == nil {
		p.Go("reload", p.watch(file))
		err = p.group.Wait()
	} else {
		err = p.abandon(ctx, err)
	}
	return errors.Join(ignoreEnd(err), p.close())
}

// abandon ends what a failed start had begun, and returns why it failed: a part that
// ended before it says more than what the start met for lack of that part. Who was
// told to end meanwhile, by the end of told, has not failed.
func (p *Process) abandon(told context.Context, cause error) error {
	p.group.Go(func() error { return context.Canceled })
	<-p.ctx.Done()
	for _, c := range p.opened {
		c.Close() // the start's own error is the one to tell
	}
	part := p.group.Wait()
	switch {
	case told.Err() != nil:
		return nil
	case !errors.Is(part, context.Canceled):
		return part
	}
	return cause
}

func ignoreEnd(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// Context ends when the process is told to end, or when a part of it failed.
func (p *Process) Context() context.Context { return p.ctx }

// Metrics is what the admin listener shows under /metrics.
func (p *Process) Metrics() *telemetry.Registry { return p.metrics }

// Go runs f until the process ends. An error of f ends the process; so does f
// returning nil early, because every part of a daemon is needed.
func (p *Process) Go(what string, f func(context.Context) error) {
	p.group.Go(func() error {
		err := f(p.ctx)
		switch {
		case p.ctx.Err() != nil:
			return context.Canceled
		case err == nil:
			return fmt.Errorf("%s ended by itself", what)
		}
		return fmt.Errorf("%s: %w", what, err)
	})
}

// AtEnd has f called after everything that Go runs has returned, the last one
// first.
func (p *Process) AtEnd(f func() error) { p.closers = append(p.closers, f) }

func (p *Process) close() error {
	var errs []error
	for _, f := range slices.Backward(p.closers) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// Listen opens a TCP listener. Its error starts with "listen".
func (p *Process) Listen(addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, listenError(addr, err)
	}
	p.opened = append(p.opened, l)
	return l, nil
}

// ListenBoth opens a TCP listener and a UDP socket on the same port, also when
// addr asks for port 0.
func (p *Process) ListenBoth(addr string) (net.Listener, net.PacketConn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, nil, listenError(addr, err)
	}
	for try := 0; ; try++ {
		tcp, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, nil, listenError(addr, err)
		}
		_, got, _ := net.SplitHostPort(tcp.Addr().String())
		udp, err := net.ListenPacket("udp", net.JoinHostPort(host, got))
		if err == nil {
			p.opened = append(p.opened, tcp, udp)
			return tcp, udp, nil
		}
		tcp.Close() // nothing was accepted on it
		// A free TCP port may be taken for UDP; with port 0 another one will do.
		if port != "0" || try == 20 {
			return nil, nil, listenError(addr, err)
		}
	}
}

// ListenUnix opens a unix socket that only this user and root can reach. A
// stale socket file that nobody listens on is replaced, anything else is not.
func (p *Process) ListenUnix(path string) (net.Listener, error) {
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode().Type() != os.ModeSocket {
			return nil, listenError(path, errors.New("there is a file that is no socket"))
		}
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return nil, listenError(path, errors.New("another process listens there"))
		}
		if err := os.Remove(path); err != nil {
			return nil, listenError(path, err)
		}
	}
	old := syscall.Umask(0o177)
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, listenError(path, err)
	}
	p.opened = append(p.opened, l)
	return l, nil
}

func listenError(addr string, err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		err = op.Err
	}
	hint := ""
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		hint = "another process has this address: find it with `ss -lptn` or choose another"
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		hint = "ports below 1024 need root or CAP_NET_BIND_SERVICE"
	}
	return Failure("listen: "+addr, hint, err)
}

// Ready prints the ready line: the word and one JSON document with the real
// addresses.
func (p *Process) Ready(info any) error {
	b, err := json.Marshal(info)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(p.stdout, "ready %s\n", b)
	return err
}

package forward

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net"
	"os"
	"syscall"

	"sallyport"
)

// Memory remembers which local port a target had last.
type Memory interface {
	Port(target string) uint16
	Remember(target string, port uint16)
}

// Where ports are taken from when the target's own one is not to be had:
// deterministic for a target, below the range of ephemeral ports.
const (
	stableFirst = 20000
	stableCount = 10000
	stableTries = 64
)

// Bound is a local end that is open.
type Bound struct {
	net.Listener
	// Note says in words why it is not the target's own port; empty otherwise.
	Note string
}

// Bind opens the local end of a target. A port that the person named is the one
// or an error that says who has it (OutcomeConflict). Otherwise: the target's own
// port, if it is free and may be used; else the port that this target had last
// time; else one computed from its name, which is remembered.
func Bind(ctx context.Context, target sallyport.Target, s Spec, allow Allow, memory Memory) (*Bound, error) {
	if !s.loopback() && !allow.Any {
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeUsage, Code: "usage.listen",
			Message: s.Host + " can be reached from other machines", Hint: "listen on 127.0.0.1, or say --allow-uid any if you mean it",
		}
	}
	if !allow.Any && !canTell(s.Network) {
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeUsage, Code: "usage.allow_uid",
			Message: "this system does not tell which user connects to a local port",
			Hint:    "if every user of this machine may use it: --allow-uid any",
		}
	}
	switch s.Network {
	case "unix":
		return bindUnix(ctx, s.Path)
	case "tcp":
		l, err := listenTCP(ctx, s.Host, s.Port)
		if err != nil {
			return nil, conflict(s.Host, s.Port, err)
		}
		return &Bound{Listener: l}, nil
	}
	return bindStable(ctx, target, memory)
}

func listenTCP(ctx context.Context, host string, port uint16) (net.Listener, error) {
	var lc net.ListenConfig
	return lc.Listen(ctx, "tcp", net.JoinHostPort(host, fmt.Sprint(port)))
}

const localhost = "127.0.0.1"

func bindStable(ctx context.Context, target sallyport.Target, memory Memory) (*Bound, error) {
	l, err := listenTCP(ctx, localhost, target.Port)
	if err == nil {
		return &Bound{Listener: l}, nil
	}
	why := conflict(localhost, target.Port, err).Message
	first := memory.Port(target.String())
	sum := fnv.New32a()
	sum.Write([]byte(target.String()))
	for i := range uint32(stableTries) {
		port := uint16(stableFirst + (sum.Sum32()+i)%stableCount)
		if first != 0 { // the remembered one goes before all others
			port, first = first, 0
		}
		l, err := listenTCP(ctx, localhost, port)
		if err != nil {
			continue
		}
		memory.Remember(target.String(), port)
		return &Bound{Listener: l, Note: fmt.Sprintf("%s; using %d", why, port)}, nil
	}
	return nil, conflict(localhost, target.Port, err)
}

// conflict says who has the port, or why it may not be used, and what to type.
func conflict(host string, port uint16, err error) *sallyport.Error {
	e := &sallyport.Error{Outcome: sallyport.OutcomeConflict, Code: "local.port", Err: err}
	switch {
	case errors.Is(err, fs.ErrPermission):
		e.Code, e.Err = "local.privileged", nil
		e.Message = fmt.Sprintf("port %d needs a right that you do not have", port)
		e.Hint = fmt.Sprintf("take a port from 1024 up: -L %d:TARGET", highPort(port))
	case inUse(err):
		e.Code, e.Err = "local.port_taken", nil
		e.Message = fmt.Sprintf("port %d is taken", port)
		if who := holder(host, port); who != "" {
			e.Message += " by " + who
		}
		e.Hint = fmt.Sprintf("take another port: -L %d:TARGET", highPort(port))
	default:
		e.Message = fmt.Sprintf("cannot listen on %s: %s", net.JoinHostPort(host, fmt.Sprint(port)), cause(err))
	}
	return e
}

// highPort is the port that people think of: 15432 for 5432.
func highPort(port uint16) uint16 {
	if port < 10000 {
		return 10000 + port
	}
	return port%40000 + 20000
}

// bindUnix makes a socket of mode 0600. What is already at the path is removed
// only if it is a socket of ours that nobody serves any more.
func bindUnix(ctx context.Context, path string) (*Bound, error) {
	taken := func(what string) error {
		return &sallyport.Error{
			Outcome: sallyport.OutcomeConflict, Code: "local.socket", Message: path + " " + what,
			Hint: "take another path, or remove it yourself",
		}
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&fs.ModeSocket == 0 {
			return nil, taken("is there already and is no socket")
		}
		if !ownedByUs(info) {
			return nil, taken("is a socket of another user")
		}
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return nil, taken("is served by another process")
		} else if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, taken("is there already")
		}
		os.Remove(path)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeConflict, Code: "local.socket",
			Message: "cannot make the socket " + path + ": " + cause(err), Err: err,
		}
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeConflict, Code: "local.socket",
			Message: "cannot close the socket " + path + " to other users", Err: err,
		}
	}
	return &Bound{Listener: l}, nil // closing it removes the path, first of all
}

// cause is the system's own word for what went wrong.
func cause(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return err.Error()
}

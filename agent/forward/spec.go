package forward

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"sallyport"
)

// Spec says where a target is to be reached on this machine.
type Spec struct {
	// Network is "tcp", "unix", "stdio", or empty: choose a TCP port by the rules
	// of Bind.
	Network string
	// Host is a literal loopback address, or another one if AllowUID is any.
	Host string
	// Port 0 asks for any free port.
	Port uint16
	// Path is that of the unix socket.
	Path string
}

// String returns the spec as ParseSpec reads it.
func (s Spec) String() string {
	switch s.Network {
	case "tcp":
		return net.JoinHostPort(s.Host, strconv.Itoa(int(s.Port)))
	case "unix":
		return "unix:" + s.Path
	case "stdio":
		return "-"
	}
	return "auto"
}

func usage(format string, args ...any) *sallyport.Error {
	return &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: "usage.listen", Message: fmt.Sprintf(format, args...)}
}

// maxSocketPath is what sockaddr_un holds on the smallest of our systems, less
// its zero byte.
const maxSocketPath = 103

// ParseSpec reads the value of --listen: ADDR:PORT, :PORT, PORT, unix:PATH or -.
func ParseSpec(s string) (Spec, error) {
	if s == "-" {
		return Spec{Network: "stdio"}, nil
	}
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		full, err := filepath.Abs(path) // other programs start elsewhere
		if path == "" || err != nil || strings.ContainsRune(path, 0) || len(full) > maxSocketPath {
			return Spec{}, usage("listen address %.120q: want unix:PATH with a path of 1 to %d bytes", s, maxSocketPath)
		}
		return Spec{Network: "unix", Path: full}, nil
	}
	host, port := "", s
	if strings.Contains(s, ":") {
		var err error
		if host, port, err = net.SplitHostPort(s); err != nil {
			return Spec{}, usage("listen address %.80q: want ADDR:PORT, unix:PATH or -", s)
		}
	}
	n, err := parsePort(port)
	if err != nil {
		return Spec{}, usage("listen address %.80q: %v", s, err)
	}
	if host, err = literal(host); err != nil {
		return Spec{}, usage("listen address %.80q: %v", s, err)
	}
	return Spec{Network: "tcp", Host: host, Port: n}, nil
}

// ParseLocal reads the value of -L: [ADDR:]PORT:TARGET. The target is returned as
// it was written.
func ParseLocal(s string) (Spec, string, error) {
	bad := usage("-L %.80q: want [ADDR:]PORT:TARGET, for example 15432:db.internal:5432", s)
	host, rest := "", s
	if first, after, ok := strings.Cut(s, ":"); !ok {
		return Spec{}, "", bad
	} else if strings.HasPrefix(s, "[") {
		end := strings.Index(s, "]:")
		if end < 0 {
			return Spec{}, "", bad
		}
		host, rest = s[1:end], s[end+2:]
	} else if _, err := parsePort(first); err != nil {
		host, rest = first, after
		if host == "" {
			return Spec{}, "", bad
		}
	}
	port, target, ok := strings.Cut(rest, ":")
	if !ok || target == "" {
		return Spec{}, "", bad
	}
	n, err := parsePort(port)
	if err != nil {
		return Spec{}, "", usage("-L %.80q: %v", s, err)
	}
	if host, err = literal(host); err != nil {
		return Spec{}, "", usage("-L %.80q: %v", s, err)
	}
	return Spec{Network: "tcp", Host: host, Port: n}, target, nil
}

// literal wants an address and no name, because a name may mean another machine
// tomorrow. Empty and "localhost" are 127.0.0.1.
func literal(host string) (string, error) {
	if host == "" || host == "localhost" {
		return "127.0.0.1", nil
	}
	a, err := netip.ParseAddr(host)
	if err != nil || a.Zone() != "" {
		return "", fmt.Errorf("%.60q is no IP address", host)
	}
	return a.String(), nil
}

// parsePort reads a decimal port from 0 to 65535, ASCII digits only.
func parsePort(s string) (uint16, error) {
	if s == "" || len(s) > 5 || strings.Trim(s, "0123456789") != "" || len(s) > 1 && s[0] == '0' {
		return 0, fmt.Errorf("port %.20q is not a number from 0 to 65535", s)
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("port %.20q is not a number from 0 to 65535", s)
	}
	return uint16(n), nil
}

// loopback reports whether only this machine can reach the spec.
func (s Spec) loopback() bool {
	if s.Network != "tcp" {
		return true
	}
	a, err := netip.ParseAddr(s.Host)
	return err == nil && a.Unmap().IsLoopback()
}

// Allow says which users of this machine may use a local end. The zero Allow is
// the user who runs the agent.
type Allow struct {
	Any  bool
	UIDs []uint32
}

// ParseAllow reads self, any, or a list of user ids.
func ParseAllow(s string) (Allow, error) {
	switch s {
	case "", "self":
		return Allow{}, nil
	case "any":
		return Allow{Any: true}, nil
	}
	var a Allow
	for word := range strings.SplitSeq(s, ",") {
		if word == "self" {
			word = strconv.Itoa(os.Getuid())
		}
		n, err := strconv.ParseUint(word, 10, 32)
		if err != nil {
			return Allow{}, &sallyport.Error{
				Outcome: sallyport.OutcomeUsage, Code: "usage.allow_uid",
				Message: fmt.Sprintf("--allow-uid %.80q: want self, any, or user ids with commas between", s),
			}
		}
		a.UIDs = append(a.UIDs, uint32(n))
	}
	return a, nil
}

func (a Allow) permits(uid uint32) bool {
	if a.Any {
		return true
	}
	if len(a.UIDs) == 0 {
		return int64(uid) == int64(os.Getuid())
	}
	return slices.Contains(a.UIDs, uid)
}

// String says who may use the local end, for people.
func (a Allow) String() string {
	if a.Any {
		return "every user of this machine"
	}
	uids := a.UIDs
	if len(uids) == 0 {
		uids = []uint32{uint32(os.Getuid())}
	}
	names := make([]string, len(uids))
	for i, uid := range uids {
		names[i] = userName(uid)
	}
	return "only " + strings.Join(names, ", ")
}

// userName is "uid 1000 (alice)".
func userName(uid uint32) string {
	s := "uid " + strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10)); err == nil {
		s += " (" + u.Username + ")"
	}
	return s
}

package forward

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func canTell(string) bool { return true }

func ownedByUs(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

func inUse(err error) bool { return errors.Is(err, syscall.EADDRINUSE) }

// peerUID returns who stands at the other end of a local connection: by
// SO_PEERCRED on a unix socket, and by asking the kernel for the peer's own socket
// (sock_diag(7)) on a loopback one.
func peerUID(c net.Conn) (uint32, error) {
	if u, ok := c.(*net.UnixConn); ok {
		return peerCred(u)
	}
	local, err1 := netip.ParseAddrPort(c.LocalAddr().String())
	remote, err2 := netip.ParseAddrPort(c.RemoteAddr().String())
	if err := errors.Join(err1, err2); err != nil {
		return 0, err
	}
	return socketOwner(remote, local)
}

func peerCred(c *net.UnixConn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return cred.Uid, nil
}

// Sizes and offsets of linux/inet_diag.h.
const (
	diagRequestLen = 56 // struct inet_diag_req_v2
	diagAnswerLen  = 72 // struct inet_diag_msg
	diagStateAt    = 1
	diagUIDAt      = 64
	diagInodeAt    = 68

	tcpEstablished = 1
	tcpFinWait1    = 4
	tcpFinWait2    = 5
	tcpCloseWait   = 8
)

// socketOwner returns the owner of the TCP socket with that local and remote end.
func socketOwner(local, remote netip.AddrPort) (uint32, error) {
	answer, err := sockDiag(local, remote)
	if err != nil {
		return 0, fmt.Errorf("sock_diag: %w", err)
	}
	switch answer[diagStateAt] {
	case tcpEstablished, tcpFinWait1, tcpFinWait2, tcpCloseWait:
	default:
		return 0, errors.New("sock_diag: the connection is gone")
	}
	// A socket that no process holds any more has inode 0, and the kernel then
	// says uid 0: that is nobody, not root.
	if binary.NativeEndian.Uint32(answer[diagInodeAt:]) == 0 {
		return 0, errors.New("sock_diag: the connection has no owner any more")
	}
	return binary.NativeEndian.Uint32(answer[diagUIDAt:]), nil
}

// sockDiag asks for one socket and returns its inet_diag_msg.
func sockDiag(local, remote netip.AddrPort) ([]byte, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		return nil, err
	}
	if err := unix.Sendto(fd, diagRequest(local, remote), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		return nil, err
	}
	messages, err := syscall.ParseNetlinkMessage(buf[:n])
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		switch {
		case m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4:
			return nil, syscall.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))
		case m.Header.Type == unix.SOCK_DIAG_BY_FAMILY && len(m.Data) >= diagAnswerLen:
			return m.Data, nil
		}
	}
	return nil, errors.New("no answer")
}

func diagRequest(local, remote netip.AddrPort) []byte {
	b := make([]byte, unix.NLMSG_HDRLEN+diagRequestLen)
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST)
	r := b[unix.NLMSG_HDRLEN:]
	src, dst := local.Addr().Unmap(), remote.Addr().Unmap()
	r[0] = unix.AF_INET
	if src.Is6() {
		r[0] = unix.AF_INET6
	}
	r[1] = unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(r[4:], ^uint32(0)) // any state
	binary.BigEndian.PutUint16(r[8:], local.Port())
	binary.BigEndian.PutUint16(r[10:], remote.Port())
	copy(r[12:28], src.AsSlice())
	copy(r[28:44], dst.AsSlice())
	binary.NativeEndian.PutUint64(r[48:], ^uint64(0)) // no cookie
	return b
}

// holder says which process listens on the port, as far as this user may see.
func holder(host string, port uint16) string {
	inode, uid, ok := listeningSocket(port)
	if !ok {
		return ""
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	want := "socket:[" + inode + "]"
	for _, l := range links {
		if target, err := os.Readlink(l); err != nil || target != want {
			continue
		}
		pid := strings.Split(l, "/")[2]
		name, _ := os.ReadFile("/proc/" + pid + "/comm")
		return fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(name)), pid)
	}
	return "a process of " + userName(uid)
}

// listeningSocket looks the port up in /proc/net/tcp (proc(5)).
func listeningSocket(port uint16) (inode string, uid uint32, ok bool) {
	const listen = "0A"
	suffix := fmt.Sprintf(":%04X", port)
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, _ := os.ReadFile(table)
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) > 9 && strings.HasSuffix(f[1], suffix) && f[3] == listen {
				n, _ := strconv.ParseUint(f[7], 10, 32)
				return f[9], uint32(n), true
			}
		}
	}
	return "", 0, false
}

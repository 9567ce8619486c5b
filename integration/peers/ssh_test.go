package peers

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport/integration/stack"
)

// bastion is Debian's sshd with a configuration of its own.
type bastion struct {
	dir, port, login string
	sshd             *stack.Process
}

func newBastion(b *testing.B) *bastion {
	me, err := user.Current()
	if err != nil {
		b.Fatal(err)
	}
	h := &bastion{dir: b.TempDir(), login: me.Username}
	for _, key := range []string{"host", "client"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", h.path(key)).CombinedOutput(); err != nil {
			b.Fatalf("ssh-keygen: %v\n%s", err, out)
		}
	}
	if os.Geteuid() == 0 {
		// sshd's privilege separation directory, which its service makes at boot.
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			b.Fatal(err)
		}
	}
	h.port = freePort(b)
	conf := strings.Join([]string{
		"ListenAddress 127.0.0.1", "Port " + h.port, "HostKey " + h.path("host"), "AuthorizedKeysFile " + h.path("client.pub"),
		"StrictModes no", "UsePAM no", "PasswordAuthentication no", "KbdInteractiveAuthentication no",
		"PermitRootLogin prohibit-password", "PidFile none", "LogLevel ERROR", "",
	}, "\n")
	if err := os.WriteFile(h.path("sshd_config"), []byte(conf), 0o600); err != nil {
		b.Fatal(err)
	}
	h.sshd = start(b, "/usr/sbin/sshd", "-D", "-e", "-f", h.path("sshd_config"))
	awaitPort(b, h.port, h.sshd)
	return h
}

func (h *bastion) path(name string) string { return filepath.Join(h.dir, name) }

// forward opens ssh -L with the cipher that is quickest on this kind of machine.
func (h *bastion) forward(b *testing.B, service string) tunnel {
	port := freePort(b)
	p := start(b, "ssh", "-F", "none", "-N", "-p", h.port, "-i", h.path("client"), "-c", "aes128-gcm@openssh.com",
		"-L", "127.0.0.1:"+port+":"+service,
		"-o", "IdentitiesOnly=yes", "-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR",
		"-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", h.login+"@127.0.0.1")
	awaitPort(b, port, p)
	return tunnel{
		addr: "127.0.0.1:" + port,
		pids: []int{p.Pid, h.sshd.Pid},
		close: func() {
			p.Signal(syscall.SIGTERM)
			p.Wait(20 * time.Second)
		},
	}
}

// start starts a foreign program with as many descriptors as this process may
// have: a thousand connections need more than the usual limit.
func start(b *testing.B, program string, args ...string) *stack.Process {
	script := `ulimit -n "$(ulimit -Hn)" && exec "$0" "$@"`
	return stack.StartProcess(b, stack.Command{Program: "/bin/sh", Args: append([]string{"-c", script, program}, args...)})
}

// freePort is a port that nobody else asks for now: sshd and ssh cannot be given
// a listener.
func freePort(b *testing.B) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	return port
}

func awaitPort(b *testing.B, port string, p *stack.Process) {
	stack.Eventually(b, 15*time.Second, func() error {
		c, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err != nil {
			return fmt.Errorf("%w: %s", err, p.Stderr())
		}
		return c.Close()
	})
}

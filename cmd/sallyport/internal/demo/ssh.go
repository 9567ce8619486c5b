package demo

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// bastion is a host to log in to: Debian's sshd if it is here and lets this user
// in, else a small server of our own.
type bastion struct {
	addr, kind, login   string
	keyFile, knownHosts string

	sshd     *exec.Cmd
	embedded *service
}

func newBastion(dir string) (*bastion, error) {
	me, err := user.Current()
	if err != nil {
		return nil, err
	}
	b := &bastion{login: me.Username, keyFile: filepath.Join(dir, "id_ed25519"), knownHosts: filepath.Join(dir, "known_hosts")}
	client, err := newKey(b.keyFile)
	if err != nil {
		return nil, err
	}
	hostKeyFile := filepath.Join(dir, "host_ed25519")
	host, err := newKey(hostKeyFile)
	if err != nil {
		return nil, err
	}
	known := "bastion.internal " + string(ssh.MarshalAuthorizedKey(host.PublicKey()))
	if err := os.WriteFile(b.knownHosts, []byte(known), 0o600); err != nil {
		return nil, err
	}
	if b.startDebian(dir, hostKeyFile, client) == nil {
		b.kind = "OpenSSH's sshd"
		return b, nil
	}
	b.close()
	b.kind = "an embedded SSH server, because this machine has no sshd that lets " + b.login + " in"
	return b, b.startEmbedded(host, client.PublicKey())
}

// newKey makes a key pair and writes the private half in OpenSSH's format.
func newKey(path string) (ssh.Signer, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(private, "sallyport demonstration")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		return nil, err
	}
	return ssh.NewSignerFromKey(private)
}

// startDebian runs sshd with a configuration of its own, and tries it.
func (b *bastion) startDebian(dir, hostKeyFile string, client ssh.Signer) error {
	const program = "/usr/sbin/sshd"
	if _, err := os.Stat(program); err != nil {
		return err
	}
	if os.Geteuid() == 0 {
		// sshd's privilege separation directory, which its service makes at boot.
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			return err
		}
	}
	authorized := filepath.Join(dir, "authorized_keys")
	if err := os.WriteFile(authorized, ssh.MarshalAuthorizedKey(client.PublicKey()), 0o600); err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	b.addr = l.Addr().String()
	l.Close() // sshd cannot be given a listener; nobody else asks for this port now
	_, port, err := net.SplitHostPort(b.addr)
	if err != nil {
		return err
	}
	conf := filepath.Join(dir, "sshd_config")
	text := strings.Join([]string{
		"ListenAddress 127.0.0.1", "Port " + port, "HostKey " + hostKeyFile, "AuthorizedKeysFile " + authorized,
		"StrictModes no", "UsePAM no", "PasswordAuthentication no", "KbdInteractiveAuthentication no",
		"PermitRootLogin prohibit-password", "PidFile none", "LogLevel ERROR", "",
	}, "\n")
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return err
	}
	b.sshd = exec.Command(program, "-D", "-e", "-f", conf)
	if err := b.sshd.Start(); err != nil {
		b.sshd = nil
		return err
	}
	return b.tryLogin(client)
}

// tryLogin logs in directly, to know whether this sshd lets this user in at all.
func (b *bastion) tryLogin(key ssh.Signer) error {
	conf := &ssh.ClientConfig{
		User: b.login, Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, Timeout: 2 * time.Second,
		HostKeyCallback: ssh.InsecureIgnoreHostKey(), // our own child on loopback, and only a rehearsal
	}
	var last error
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); <-time.After(20 * time.Millisecond) {
		c, err := ssh.Dial("tcp", b.addr, conf)
		if err == nil {
			return c.Close()
		}
		if last = err; strings.Contains(err.Error(), "unable to authenticate") {
			return err
		}
	}
	return last
}

func (b *bastion) close() {
	if b.sshd != nil {
		_ = b.sshd.Process.Kill()
		_ = b.sshd.Wait() // killed, and that is what it says
		b.sshd = nil
	}
	if b.embedded != nil {
		b.embedded.close()
	}
}

// startEmbedded serves one command a session for one key.
func (b *bastion) startEmbedded(host ssh.Signer, allowed ssh.PublicKey) error {
	conf := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		if !bytes.Equal(key.Marshal(), allowed.Marshal()) {
			return nil, errors.New("unknown key")
		}
		return &ssh.Permissions{}, nil
	}}
	conf.AddHostKey(host)
	s, err := serve(func(ctx context.Context, c net.Conn) {
		conn, channels, requests, err := ssh.NewServerConn(c, conf)
		if err != nil {
			return
		}
		defer conn.Close()
		go ssh.DiscardRequests(requests)
		for ch := range channels {
			session(ctx, ch)
		}
	})
	if err != nil {
		return err
	}
	b.embedded, b.addr = s, s.addr
	return nil
}

func session(ctx context.Context, ch ssh.NewChannel) {
	if ch.ChannelType() != "session" {
		_ = ch.Reject(ssh.UnknownChannelType, "only sessions")
		return
	}
	channel, requests, err := ch.Accept()
	if err != nil {
		return
	}
	defer channel.Close()
	for r := range requests {
		var command struct{ Line string }
		if r.Type != "exec" || ssh.Unmarshal(r.Payload, &command) != nil {
			_ = r.Reply(false, nil)
			continue
		}
		_ = r.Reply(true, nil)
		cmd := exec.CommandContext(ctx, "/bin/sh", "-c", command.Line)
		cmd.Stdout, cmd.Stderr = channel, channel.Stderr()
		var status struct{ Code uint32 }
		if err := cmd.Run(); err != nil {
			status.Code = 1
		}
		_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(status))
		return
	}
}

// reachesBastion logs in with the system's ssh through agent ssh.
func (a *alice) reachesBastion(ctx context.Context) (string, error) {
	b := a.site.bastion
	if _, err := exec.LookPath("ssh"); err != nil {
		return "", errors.New("this machine has no ssh: install openssh-client")
	}
	out, err := a.run(ctx, "ssh", b.login+"@bastion.internal", "-F", "none", "-i", b.keyFile,
		"-o", "IdentitiesOnly=yes", "-o", "UserKnownHostsFile="+b.knownHosts, "-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes",
		`echo "logged in as $(id -un), $(echo $((6*7)))"`)
	if err != nil {
		return "", fmt.Errorf("agent ssh: %w: %s", err, out.all())
	}
	want := "logged in as " + b.login + ", 42"
	if strings.TrimSpace(out.stdout) != want {
		return "", fmt.Errorf("the remote shell said %q; want %q", out.stdout, want)
	}
	return fmt.Sprintf("agent ssh %s@bastion.internal → %q (%s)", b.login, want, b.kind), nil
}

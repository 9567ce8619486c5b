// Package postgrestest runs private PostgreSQL clusters from the programs that
// Debian installs: a temporary directory, 127.0.0.1, a password, fsync on. A
// cluster can be stopped, killed, and followed by a standby that takes over.
package postgrestest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// User owns every cluster.
const User = "sallyport"

// within is how long anything may take; it is long because the machine may be
// busy.
const within = time.Minute

// Cluster is a PostgreSQL of our own.
type Cluster struct {
	dir      string // of everything
	bin      string // of PostgreSQL's programs
	owner    *syscall.Credential
	password string
	port     string

	server    *exec.Cmd
	done      chan struct{} // closed when server has ended
	databases *atomic.Int64 // made so far, standbys included
	primary   *Cluster      // if this is a standby
	standbys  []*Cluster
}

// Start starts a cluster that lives until the test ends.
func Start(t testing.TB) *Cluster {
	t.Helper()
	c, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// New starts a cluster that lives until it is closed: in TestMain, for all tests
// of a package.
func New() (*Cluster, error) {
	c, err := layOut()
	if err != nil {
		return nil, fmt.Errorf("postgrestest: %w", err)
	}
	if err := c.initialise(); err != nil {
		return nil, errors.Join(fmt.Errorf("postgrestest: %w", err), c.Close())
	}
	return c, nil
}

// layOut makes the directory of a cluster.
func layOut() (*Cluster, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(found) == 0 {
		return nil, errors.New("no PostgreSQL here: install the Debian package postgresql (tools/needs.sh does)")
	}
	c := &Cluster{bin: newest(found), password: rand.Text() + rand.Text(), databases: new(atomic.Int64)}
	if c.owner, err = owner(); err != nil {
		return nil, err
	}
	if c.dir, err = os.MkdirTemp("", "sallyport-pg-"); err != nil { // not t.TempDir, which only its owner may enter
		return nil, err
	}
	return c, errors.Join(os.WriteFile(c.PasswordFile(), []byte(c.password+"\n"), 0o600), c.own(c.dir))
}

// newest returns the directory of the highest version.
func newest(programs []string) (bin string) {
	best := -1
	for _, p := range programs {
		dir := filepath.Dir(p)
		if v, err := strconv.Atoi(filepath.Base(filepath.Dir(dir))); err == nil && v > best {
			best, bin = v, dir
		}
	}
	return bin
}

// owner is who runs PostgreSQL, which refuses to run as root; nil: ourselves.
func owner() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	var errs []error
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		uid, _ := strconv.ParseUint(u.Uid, 10, 32)
		gid, _ := strconv.ParseUint(u.Gid, 10, 32)
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
	}
	return nil, errors.Join(errs...)
}

func (c *Cluster) own(path string) error {
	if c.owner == nil {
		return nil
	}
	return os.Chown(path, int(c.owner.Uid), int(c.owner.Gid))
}

func (c *Cluster) initialise() error {
	password := filepath.Join(c.dir, "initdb-password")
	if err := errors.Join(os.WriteFile(password, []byte(c.password), 0o600), c.own(password)); err != nil {
		return err
	}
	if err := c.run("initdb", "-D", c.data(), "-U", User, "-A", "scram-sha-256", "--pwfile", password, "-E", "UTF8", "--no-locale", "--no-sync"); err != nil {
		return err
	}
	return c.Start()
}

func (c *Cluster) data() string { return filepath.Join(c.dir, "data") }

// PasswordFile holds the password of User; it may be cached.store_password_file.
func (c *Cluster) PasswordFile() string { return filepath.Join(c.dir, "password") }

// Password is what PasswordFile holds.
func (c *Cluster) Password() string { return c.password }

// Addr is where the cluster listens.
func (c *Cluster) Addr() string { return net.JoinHostPort("127.0.0.1", c.port) }

// Socket is the directory of its unix socket.
func (c *Cluster) Socket() string { return c.dir }

// Database makes an empty database and returns its name.
func (c *Cluster) Database(t testing.TB) string {
	t.Helper()
	name := fmt.Sprint("test", c.databases.Add(1))
	c.Exec(t, "postgres", "CREATE DATABASE "+name)
	return name
}

// URL names a database without a password, as cached.store does. Several hosts
// are tried in their order.
func (c *Cluster) URL(database string, others ...*Cluster) string {
	hosts := c.Addr()
	for _, o := range others {
		hosts += "," + o.Addr()
	}
	return fmt.Sprintf("postgres://%s@%s/%s?sslmode=disable", User, hosts, database)
}

// Connect returns a connection of the test's own.
func (c *Cluster) Connect(ctx context.Context, database string) (*pgx.Conn, error) {
	u, err := url.Parse(c.URL(database))
	if err != nil {
		return nil, err
	}
	u.User = url.UserPassword(User, c.password)
	return pgx.Connect(ctx, u.String())
}

// Exec carries out statements in a database.
func (c *Cluster) Exec(t testing.TB, database string, statements ...string) {
	t.Helper()
	if err := c.exec(database, statements...); err != nil {
		t.Fatal(err)
	}
}

func (c *Cluster) exec(database string, statements ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	conn, err := c.Connect(ctx, database)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for _, text := range statements {
		if _, err := conn.Exec(ctx, text); err != nil {
			return fmt.Errorf("%s: %w", text, err)
		}
	}
	return nil
}

// Query returns the one value that a statement finds, as text.
func (c *Cluster) Query(t testing.TB, database, text string) string {
	t.Helper()
	value, err := c.query(database, text)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

func (c *Cluster) query(database, text string) (value string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	conn, err := c.Connect(ctx, database)
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	err = conn.QueryRow(ctx, "SELECT ("+text+")::text").Scan(&value)
	return value, err
}

// KillConnections ends everybody else's sessions in a database.
func (c *Cluster) KillConnections(t testing.TB, database string) {
	t.Helper()
	c.Exec(t, "postgres", fmt.Sprintf(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '%s' AND pid <> pg_backend_pid()`, database))
}

// Start starts the server, on the port that it had before.
func (c *Cluster) Start() error {
	var err error
	for range 3 { // PostgreSQL takes no port 0; somebody else may take ours first
		if c.port == "" {
			if c.port, err = freePort(); err != nil {
				return err
			}
		}
		if err = c.launch(); err == nil {
			return nil
		}
		if c.server != nil {
			c.Stop(syscall.SIGQUIT)
		}
		c.port = ""
	}
	return err
}

// freePort is one that nobody listened at a moment ago.
func freePort() (string, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}

// launch starts the server and waits until it answers.
func (c *Cluster) launch() error {
	log, err := os.OpenFile(filepath.Join(c.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	c.server = c.command("postgres", "-D", c.data(), "-h", "127.0.0.1", "-p", c.port, "-k", c.dir,
		"-c", "fsync=on", "-c", "shared_buffers=32MB", "-c", "dynamic_shared_memory_type=mmap", "-c", "max_wal_size=256MB")
	c.server.Stdout, c.server.Stderr = log, log
	// Should the test die, so does the server, as if the power went.
	c.server.SysProcAttr.Pdeathsig = syscall.SIGQUIT
	if err := c.server.Start(); err != nil {
		return err
	}
	c.done = make(chan struct{})
	go func() {
		defer close(c.done)
		_ = c.server.Wait()
	}()
	return c.wait("SELECT 1", "1")
}

// wait asks until the answer is the one that is wanted.
func (c *Cluster) wait(text, want string) (err error) {
	deadline := time.After(within)
	for {
		got := ""
		if got, err = c.query("postgres", text); err == nil && got == want {
			return nil
		}
		select {
		case <-c.done:
			return fmt.Errorf("postgres has ended: %s", c.log())
		case <-deadline:
			return fmt.Errorf("%s: got %q, %v; want %q: %s", text, got, err, want, c.log())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// log is what the server said last.
func (c *Cluster) log() string {
	text, _ := os.ReadFile(filepath.Join(c.dir, "log"))
	return string(text[max(0, len(text)-2_000):])
}

// Stop ends the server: SIGINT disconnects everybody, SIGQUIT is a crash. It
// returns once the server is gone.
func (c *Cluster) Stop(sig syscall.Signal) error {
	if c.server == nil {
		return nil
	}
	if err := c.server.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-c.done:
		c.server = nil
		return nil
	case <-time.After(within):
		return fmt.Errorf("postgres does not end: %s", c.log())
	}
}

// Signal has the server's first process stand still (SIGSTOP) or go on (SIGCONT),
// with everything it started.
func (c *Cluster) Signal(sig syscall.Signal) error {
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", c.server.Process.Pid))
	if err != nil {
		return err
	}
	for _, text := range append(strings.Fields(string(children)), strconv.Itoa(c.server.Process.Pid)) {
		pid, err := strconv.Atoi(text)
		if err != nil {
			return err
		}
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
	}
	return nil
}

// Close ends the server and its standbys, and removes what they kept.
func (c *Cluster) Close() error {
	var errs []error
	for _, s := range c.standbys {
		errs = append(errs, s.Close())
	}
	errs = append(errs, c.Stop(syscall.SIGQUIT))
	return errors.Join(append(errs, os.RemoveAll(c.dir))...)
}

// NewStandby starts a copy that follows by streaming replication. A synchronous
// one acknowledges every commit before it counts.
func (c *Cluster) NewStandby(t testing.TB, synchronous bool) *Cluster {
	t.Helper()
	s, err := c.newStandby(synchronous)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (c *Cluster) newStandby(synchronous bool) (*Cluster, error) {
	s, err := layOut()
	if err != nil {
		return nil, err
	}
	s.primary, s.password, s.databases = c, c.password, c.databases
	c.standbys = append(c.standbys, s)
	source := fmt.Sprintf("host=127.0.0.1 port=%s user=%s password=%s application_name=standby", c.port, User, c.password)
	if err := s.run("pg_basebackup", "-D", s.data(), "-R", "-X", "stream", "-c", "fast", "--no-sync", "-d", source); err != nil {
		return nil, err
	}
	if err := errors.Join(os.WriteFile(s.PasswordFile(), []byte(s.password+"\n"), 0o600), s.Start()); err != nil {
		return nil, err
	}
	if !synchronous {
		return s, c.wait("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "1")
	}
	if err := c.exec("postgres", "ALTER SYSTEM SET synchronous_standby_names = 'standby'", "SELECT pg_reload_conf()"); err != nil {
		return nil, err
	}
	return s, c.wait("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'", "1")
}

// Promote makes a standby the primary. It waits for no standby of its own.
func (c *Cluster) Promote() error {
	if err := c.exec("postgres", "SELECT pg_promote(true, 60)"); err != nil {
		return err
	}
	return c.wait("SELECT pg_is_in_recovery()", "false")
}

func (c *Cluster) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(c.bin, program), args...)
	cmd.Dir = c.dir
	cmd.Env = []string{"LC_ALL=C.UTF-8", "TZ=UTC", "PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: c.owner}
	return cmd
}

func (c *Cluster) run(program string, args ...string) error {
	if out, err := c.command(program, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", program, err, out)
	}
	return nil
}

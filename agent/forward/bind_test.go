//go:build unix

package forward_test

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"sallyport"
	"sallyport/agent/forward"
)

type memory struct{ ports map[string]uint16 }

func (m *memory) Port(target string) uint16 { return m.ports[target] }

func (m *memory) Remember(target string, port uint16) {
	if m.ports == nil {
		m.ports = map[string]uint16{}
	}
	m.ports[target] = port
}

func portOf(a net.Addr) uint16 { return uint16(a.(*net.TCPAddr).Port) }

// busy takes a free port and keeps it.
func busy(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return portOf(l.Addr())
}

func at(port uint16) sallyport.Target {
	return sallyport.Target{Network: sallyport.TCP, Host: "db.internal", Port: port}
}

func TestBindTakesTheOwnPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := portOf(l.Addr())
	l.Close()
	m := &memory{}
	b, err := forward.Bind(t.Context(), at(port), forward.Spec{}, forward.Allow{}, m)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if portOf(b.Addr()) != port || b.Note != "" || len(m.ports) != 0 {
		t.Errorf("got %v, note %q, remembered %v; want the own port", b.Addr(), b.Note, m.ports)
	}
}

func TestBindTakesAStablePort(t *testing.T) {
	target := at(busy(t))
	m := &memory{}
	b, err := forward.Bind(t.Context(), target, forward.Spec{}, forward.Allow{}, m)
	if err != nil {
		t.Fatal(err)
	}
	stable := portOf(b.Addr())
	if m.ports[target.String()] != stable || stable < 20000 || stable >= 30000 {
		t.Errorf("got %d, remembered %v", stable, m.ports)
	}
	if !strings.Contains(b.Note, strconv.Itoa(os.Getpid())) {
		t.Errorf("note %q; want who has the port", b.Note)
	}
	// Five processes of one person: each gets a port, none by chance.
	second, err := forward.Bind(t.Context(), target, forward.Spec{}, forward.Allow{}, &memory{})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if got := portOf(second.Addr()); got == stable || got < 20000 || got >= 30000 {
		t.Errorf("the second got %d beside %d", got, stable)
	}
	b.Close()
	for range 3 {
		again, err := forward.Bind(t.Context(), target, forward.Spec{}, forward.Allow{}, m)
		if err != nil {
			t.Fatal(err)
		}
		if got := portOf(again.Addr()); got != stable {
			t.Errorf("got %d; want %d again", got, stable)
		}
		again.Close()
	}
	m.ports[target.String()] = busy(t)
	again, err := forward.Bind(t.Context(), target, forward.Spec{}, forward.Allow{}, m)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

// Case Q2: a port that the person named is that port or an error that says who
// has it, and only this machine gets in without being asked.
func TestCase_Q2_Conflicts(t *testing.T) {
	port := busy(t)
	_, err := forward.Bind(t.Context(), db, forward.Spec{Network: "tcp", Host: "127.0.0.1", Port: port}, forward.Allow{}, &memory{})
	if sallyport.OutcomeOf(err) != sallyport.OutcomeConflict || sallyport.CodeOf(err) != "local.port_taken" || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) {
		t.Errorf("busy: got %v; want 9 and our pid", err)
	}
	for _, host := range []string{"0.0.0.0", "::", "192.0.2.1"} {
		_, err := forward.Bind(t.Context(), db, forward.Spec{Network: "tcp", Host: host, Port: 0}, forward.Allow{}, &memory{})
		if sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
			t.Errorf("%s: got %v; want usage without --allow-uid any", host, err)
		}
	}
	b, err := forward.Bind(t.Context(), db, forward.Spec{Network: "tcp", Host: "0.0.0.0", Port: 0}, forward.Allow{Any: true}, &memory{})
	if err != nil {
		t.Fatalf("0.0.0.0 with any: %v", err)
	}
	b.Close()
}

// Case R8: what lies at a socket's path is replaced only if it is our own stale
// socket.
func TestCase_R8_SocketPaths(t *testing.T) {
	dir := t.TempDir()
	spec := func(name string) forward.Spec {
		return forward.Spec{Network: "unix", Path: filepath.Join(dir, name)}
	}
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "stale")})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	live, err := net.Listen("unix", filepath.Join(dir, "live"))
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	victim := filepath.Join(dir, "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"fresh", "stale"} {
		b, err := forward.Bind(t.Context(), db, spec(name), forward.Allow{}, &memory{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if info, err := os.Lstat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v; want 0600", name, info.Mode(), err)
		}
		b.Close()
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			t.Errorf("%s is left behind", name)
		}
	}
	for _, name := range []string{"live", "victim", "link"} {
		b, err := forward.Bind(t.Context(), db, spec(name), forward.Allow{}, &memory{})
		if err == nil {
			b.Close()
		}
		if sallyport.OutcomeOf(err) != sallyport.OutcomeConflict {
			t.Errorf("%s: got %v; want a conflict", name, err)
		}
	}
	if text, _ := os.ReadFile(victim); string(text) != "precious" {
		t.Errorf("the victim holds %q", text)
	}
}

func TestParseSpec(t *testing.T) {
	for in, want := range map[string]string{
		"5433": "127.0.0.1:5433", ":5433": "127.0.0.1:5433", ":0": "127.0.0.1:0", "localhost:5433": "127.0.0.1:5433",
		"127.0.0.2:5433": "127.0.0.2:5433", "[::1]:5433": "[::1]:5433", "0.0.0.0:80": "0.0.0.0:80", "unix:/run/x": "unix:/run/x", "-": "-",
	} {
		if s, err := forward.ParseSpec(in); err != nil || s.String() != want {
			t.Errorf("%q: got %v, %v; want %s", in, s, err, want)
		}
	}
	for _, in := range []string{
		"", "x", "127.0.0.1", "host.example:80", "127.0.0.1:", "127.0.0.1:65536", ":-1", ":+80", ":080", "１２", ":１２",
		"[::1", "::1:80", "[fe80::1%eth0]:80", "unix:", "unix:" + strings.Repeat("x", 200), "127.0.0.1:80:90", strings.Repeat("9", 65536),
	} {
		if s, err := forward.ParseSpec(in); sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
			t.Errorf("%.40q: got %v, %v; want usage", in, s, err)
		}
	}
}

func TestParseLocal(t *testing.T) {
	for in, want := range map[string][2]string{
		"15432:db.internal:5432":           {"127.0.0.1:15432", "db.internal:5432"},
		"0:db.internal:5432":               {"127.0.0.1:0", "db.internal:5432"},
		"15432:db":                         {"127.0.0.1:15432", "db"},
		"127.0.0.2:15432:db.internal:5432": {"127.0.0.2:15432", "db.internal:5432"},
		"localhost:15432:db":               {"127.0.0.1:15432", "db"},
		"[::1]:15432:db.internal:5432":     {"[::1]:15432", "db.internal:5432"},
		"15432:[2001:db8::1]:5432":         {"127.0.0.1:15432", "[2001:db8::1]:5432"},
	} {
		s, target, err := forward.ParseLocal(in)
		if err != nil || s.String() != want[0] || target != want[1] {
			t.Errorf("%q: got %v, %q, %v; want %v", in, s, target, err, want)
		}
	}
	for _, in := range []string{"", ":", "db", "15432", "15432:", ":15432:db", "x:y:z", "[::1]", "[::1]15432:db", "127.0.0.1:x:db", "65536:db:1", "host:1:db"} {
		if s, target, err := forward.ParseLocal(in); sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
			t.Errorf("%q: got %v, %q, %v; want usage", in, s, target, err)
		}
	}
}

func FuzzParseLocal(f *testing.F) {
	for _, s := range []string{"15432:db.internal:5432", "[::1]:1:x", "a:b:c", ":"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		spec, target, err := forward.ParseLocal(s)
		if err == nil && (target == "" || spec.Network != "tcp" || net.ParseIP(spec.Host) == nil) {
			t.Errorf("%q: got %+v, %q", s, spec, target)
		}
		forward.ParseSpec(s)
	})
}

func TestParseAllow(t *testing.T) {
	for _, in := range []string{"me", "-1", "1,,2", "4294967296", "1;2", "any,1"} {
		if a, err := forward.ParseAllow(in); sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
			t.Errorf("%q: got %v, %v; want usage", in, a, err)
		}
	}
	if a, err := forward.ParseAllow("self,4242"); err != nil || len(a.UIDs) != 2 || int(a.UIDs[0]) != os.Getuid() {
		t.Errorf("got %v, %v", a, err)
	}
}

func BenchmarkPeerCheck(b *testing.B) {
	e := &forward.Forward{}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for b.Loop() {
		if err := e.CheckPeer(s); err != nil {
			b.Fatal(err)
		}
	}
}

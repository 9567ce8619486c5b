package peers

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport/integration/stack"
)

var (
	rounds   = flag.Int("rounds", 3, "how often each peer's turn comes")
	only     = flag.String("peers", "direct,ssh,h3,lane", "whose turn comes, in this order")
	jsonFile = flag.String("json", "", "append every measurement to this file, a line each")
	mode     = flag.String("mode", string(stack.Apart), "how the daemons run: apart or together")
	idle     = flag.Int("idle", 1000, "how many idle connections to hold")
)

// target is what all tunnels lead to, by the name that the routes have for it.
const target = "bench.internal:9000"

// BenchmarkPeers prints one table. Every turn has a fresh tunnel, and one more for
// the memory of idle connections, which is told from the growth of the processes.
func BenchmarkPeers(b *testing.B) {
	l := newLab(b)
	before := loadAverage()
	var all []turn
	for round := 1; round <= *rounds; round++ {
		for name := range strings.SplitSeq(*only, ",") {
			open := l.peers[name]
			if open == nil {
				b.Fatalf("no peer %q", name)
			}
			all = append(all, l.turn(b, name, round, open))
		}
	}
	fmt.Printf("\nLoad average %s before and %s after.\n%s\n", before, loadAverage(), table(all))
}

// turn is what one peer's turn in one round gave.
type turn struct {
	Peer  string             `json:"peer"`
	Round int                `json:"round"`
	When  time.Time          `json:"when"`
	M     map[string]float64 `json:"m"`
	Err   []string           `json:"err,omitempty"`
}

// tunnel is a way to the service, and the processes that are on it.
type tunnel struct {
	addr  string
	pids  []int
	close func()
}

// lab holds what all peers share.
type lab struct {
	load    string // the load tool
	service string
	stack   *stack.Stack
	alice   *stack.Agent
	bastion *bastion
	peers   map[string]func(b *testing.B) tunnel
}

func newLab(b *testing.B) *lab {
	l := &lab{load: buildLoad(b)}
	l.service = stack.StartProcess(b, stack.Command{Program: l.load, Args: []string{"server", "-addr", "127.0.0.1:0"}}).Line(10 * time.Second)
	l.stack = stack.Start(b, stack.Mode(*mode), stack.Config{
		LogLevel: "info",
		Gateway:  map[string]any{"limits": map[string]any{"lanes": 16384}}, // one person holds all of the idle connections
		Users:    []stack.User{{ID: "alice", Email: "alice@test.example", Groups: []string{"dev"}}},
		Routes:   []stack.Route{{From: "tcp://" + target, To: "tcp://" + l.service, Policy: stack.Allow("dev", stack.Group("dev"), stack.Fact("disk_encrypted", true))}},
	})
	l.alice = l.stack.NewAgent(b, "alice")
	l.alice.Login()
	l.bastion = newBastion(b)
	l.peers = map[string]func(b *testing.B) tunnel{
		"direct": func(*testing.B) tunnel { return tunnel{addr: l.service, close: func() {}} },
		"ssh":    func(b *testing.B) tunnel { return l.bastion.forward(b, l.service) },
		"h3":     func(b *testing.B) tunnel { return l.connect(b, "quic") },
		"lane":   func(b *testing.B) tunnel { return l.connect(b, "tls") },
	}
	return l
}

func buildLoad(b *testing.B) string {
	root, err := stack.Root()
	if err != nil {
		b.Fatal(err)
	}
	program := filepath.Join(b.TempDir(), "peerbench")
	if out, err := exec.Command("go", "build", "-C", filepath.Join(root, "tools", "peerbench"), "-o", program, ".").CombinedOutput(); err != nil {
		b.Fatalf("go build: %v\n%s", err, out)
	}
	return program
}

// connect opens a tunnel of ours from a fresh agent to a fresh gateway: what an
// earlier turn has left in their heaps would hide what this one takes. policyd,
// which decides on each connection, counts as the third process where it is one.
func (l *lab) connect(b *testing.B, transport string) tunnel {
	l.stack.Restart("gateway", syscall.SIGTERM)
	tun := l.alice.Connect(target, "--transport", transport)
	return tunnel{
		addr: tun.Local,
		pids: []int{tun.Pid, l.stack.Daemon("gateway").Pid, l.stack.Daemon("policyd").Pid},
		close: func() {
			tun.Signal(syscall.SIGTERM)
			tun.Wait(20 * time.Second)
		},
	}
}

// turn measures the peer once.
func (l *lab) turn(b *testing.B, peer string, round int, open func(*testing.B) tunnel) turn {
	t := turn{Peer: peer, Round: round, When: time.Now(), M: map[string]float64{}}
	loads := [][]string{{"run"}}
	if peer != "direct" {
		loads = append(loads, []string{"idle", "-counts", strconv.Itoa(*idle)})
	}
	for _, args := range loads {
		tun := open(b)
		part := l.run(b, tun, args)
		tun.close()
		for k, v := range part.M {
			t.M[k] = v
		}
		t.Err = append(t.Err, part.Err...)
	}
	for _, e := range t.Err {
		b.Logf("%s, round %d: %s", peer, round, e)
	}
	if *jsonFile != "" {
		appendLine(b, *jsonFile, t)
	}
	return t
}

// run runs the load tool over the tunnel.
func (l *lab) run(b *testing.B, tun tunnel, args []string) turn {
	pids := make([]string, len(tun.pids))
	for i, p := range tun.pids {
		pids[i] = strconv.Itoa(p)
	}
	cmd := exec.Command(l.load, append(args, "-addr", tun.addr, "-pids", strings.Join(pids, ","))...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		b.Fatalf("peerbench %s: %v\n%s", args[0], err, &stderr)
	}
	var part turn
	if err := json.Unmarshal(out, &part); err != nil {
		b.Fatalf("peerbench %s: %v\n%s", args[0], err, out)
	}
	return part
}

func appendLine(b *testing.B, path string, t turn) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		b.Fatal(err)
	}
	if err := json.NewEncoder(f).Encode(t); err != nil {
		b.Error(err)
	}
	if err := f.Close(); err != nil {
		b.Error(err)
	}
}

// loadAverage is how busy the machine was in the last minute (proc(5)).
func loadAverage() string {
	text, _ := os.ReadFile("/proc/loadavg")
	first, _, _ := strings.Cut(string(text), " ")
	return first
}

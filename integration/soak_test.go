package integration

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport/integration/stack"
)

var duration = flag.Duration("duration", 20*time.Second, "how long TestSoak restarts daemons")

// soakFlows are open while daemons are restarted.
const soakFlows = 200

// TestSoak_RollingRestarts (M11) restarts all daemons in random order, again and
// again, under 200 open connections and a load of new ones, of somebody who is
// allowed and of somebody who is not. Nobody is let in who may not be and no
// session is lost. Open connections end with their gateway and with nothing else;
// a new one may fail only while the gateway or policyd is away, of which there is
// one each: how many do is told, and bounded where there are two.
func TestSoak_RollingRestarts(t *testing.T) {
	w := newWorld(t, stack.Apart)
	alice, bob := w.loggedIn(t, "alice"), w.loggedIn(t, "bob")
	sessions := w.sessions()
	s := &soak{world: w, attempts: map[string]int{}, failures: map[string]int{}}
	for _, transport := range []string{"quic", "tls"} {
		s.tunnels = append(s.tunnels, alice.Connect("db.internal:5432", "--transport", transport))
	}
	s.open(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var load sync.WaitGroup
	for i := range 4 {
		load.Go(func() { s.load(ctx, t, s.tunnels[i%2]) })
	}
	for end := time.Now().Add(*duration); time.Now().Before(end); {
		for _, i := range rand.Perm(len(soakDaemons)) {
			name := soakDaemons[i]
			s.restart(t, name)
			if name == "gateway" {
				s.open(t)
			} else if err := s.echoAll(); err != nil {
				t.Errorf("after a restart of %s an open connection is gone: %v", name, err)
				s.open(t)
			}
			wantExit(t, bob.Run("connect", "--stdio", "payroll.internal:443"), stack.ExitDenied)
		}
	}
	stop()
	load.Wait()
	if n := w.payroll.Accepted(); n != 0 {
		t.Errorf("%d connections reached a service that nobody may use", n)
	}
	if now := w.sessions(); !slices.Equal(now, sessions) {
		t.Errorf("sessions before %q and after %q", sessions, now)
	}
	wantExit(t, alice.Run("status", "--check", "ready"), 0)
	s.tell(t)
}

var soakDaemons = []string{"cached", "policyd", "authd", "gateway"}

// soak is the load of TestSoak and what became of it.
type soak struct {
	*world
	tunnels []*stack.Tunnel
	flows   []net.Conn

	mu                 sync.Mutex
	absences           []absence      // one after the other
	attempts, failures map[string]int // of new connections, by who was away
}

// absence is a restart of a daemon.
type absence struct {
	name string
	to   time.Time // zero: until now
}

// sessions are the ids of all live sessions.
func (w *world) sessions() []string {
	var ids []string
	for line := range strings.Lines(w.Operator("sessions", "ls", "--config", w.File).Stdout) {
		ids = append(ids, strings.Fields(line)[0])
	}
	slices.Sort(ids)
	return ids
}

// open replaces the open connections by new ones.
func (s *soak) open(t *testing.T) {
	t.Helper()
	for _, c := range s.flows {
		c.Close()
	}
	s.flows = nil
	for i := range soakFlows {
		c, err := net.Dial("tcp", s.tunnels[i%2].Local)
		if err != nil {
			t.Fatal(err)
		}
		s.flows = append(s.flows, c)
	}
	t.Cleanup(func() {
		for _, c := range s.flows {
			c.Close()
		}
	})
	if err := s.echoAll(); err != nil {
		t.Fatal(err)
	}
}

// echoAll sends a line through every open connection.
func (s *soak) echoAll() error {
	var all errgroup.Group
	all.SetLimit(50)
	for i, c := range s.flows {
		all.Go(func() error { return stack.Echo(c, fmt.Sprintf("flow %d", i)) })
	}
	return all.Wait()
}

// load opens one connection after the other until ctx ends.
func (s *soak) load(ctx context.Context, t *testing.T, tun *stack.Tunnel) {
	pace := time.NewTicker(10 * time.Millisecond)
	defer pace.Stop()
	for ctx.Err() == nil {
		began, said := time.Now(), len(tun.Stderr())
		err := dialEcho(tun, "load")
		away := s.awaySince(began)
		s.count(away, err)
		if err != nil && !indispensable(away) {
			t.Errorf("a new connection failed after %v with %q away: %v; the agent has said:\n%s", time.Since(began), away, err, saidSince(tun, said))
		}
		<-pace.C
	}
}

// saidSince is what the agent of a tunnel said after so many bytes; why a flow was cut
// it says a moment later.
func saidSince(tun *stack.Tunnel, n int) string {
	<-time.After(3 * time.Second)
	return tun.Carrier + ": " + tun.Stderr()[n:]
}

// awaySince returns the daemon that has been away at any time since then; of several
// one that new connections cannot do without.
func (s *soak) awaySince(then time.Time) (name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.absences {
		if (a.to.IsZero() || a.to.After(then)) && !indispensable(name) {
			name = a.name
		}
	}
	return name
}

// indispensable reports whether no connection is let in without the daemon.
func indispensable(name string) bool { return name == "policyd" || name == "gateway" }

func (s *soak) count(away string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.attempts[away]++
	if err != nil {
		s.failures[away]++
	}
}

// restart restarts the daemon, and returns when new connections work again.
func (s *soak) restart(t *testing.T, name string) {
	t.Helper()
	s.note(func() { s.absences = append(s.absences, absence{name: name}) })
	s.Restart(name, syscall.SIGTERM)
	for _, tun := range s.tunnels {
		stack.Eventually(t, 20*time.Second, func() error {
			err := dialEcho(tun, "up again")
			if errors.Is(err, syscall.ECONNREFUSED) {
				t.Fatalf("the port is closed: %v", err)
			}
			return err
		})
	}
	s.note(func() { s.absences[len(s.absences)-1].to = time.Now() })
}

func (s *soak) note(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

func (s *soak) tell(t *testing.T) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	attempts, failures := 0, 0
	for _, name := range slices.Sorted(maps.Keys(s.attempts)) {
		attempts, failures = attempts+s.attempts[name], failures+s.failures[name]
		t.Logf("%-8s away: %d new connections, %d failed", name, s.attempts[name], s.failures[name])
	}
	t.Logf("%d restarts under %d flows: %d new connections, %.2f %% failed", len(s.absences), soakFlows, attempts, 100*float64(failures)/float64(attempts))
}

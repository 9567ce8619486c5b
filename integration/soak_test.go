package integration

import (
	"flag"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sallyport/integration/stack"
)

var duration = flag.Duration("duration", 20*time.Second, "how long TestSoak restarts daemons")

// TestSoak_RollingRestarts (M11) restarts one daemon after the other, in random
// order, under connections of somebody who is allowed and of somebody who is not.
func TestSoak_RollingRestarts(t *testing.T) {
	w := newWorld(t, stack.Apart)
	alice, bob := w.loggedIn(t, "alice"), w.loggedIn(t, "bob")
	tun := alice.Connect("db.internal:5432")
	allowed := w.payroll.Accepted()
	var opened, failed atomic.Int64
	stop := make(chan struct{})
	var load sync.WaitGroup
	for range 4 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				c, err := net.Dial("tcp", tun.Local)
				if err == nil {
					err = stack.Echo(c, "load")
					c.Close()
				}
				if opened.Add(1); err != nil {
					failed.Add(1)
				}
			}
		})
	}
	restarts := 0
	for end := time.Now().Add(*duration); time.Now().Before(end); restarts++ {
		name := []string{"cached", "policyd", "authd", "gateway"}[rand.IntN(4)]
		w.Restart(name, syscall.SIGTERM)
		stack.Eventually(t, 20*time.Second, func() error {
			c, err := net.Dial("tcp", tun.Local)
			if err != nil {
				return err
			}
			defer c.Close()
			return stack.Echo(c, "up again")
		})
		if r := bob.Run("connect", "--stdio", "payroll.internal:443"); r.Exit == 0 {
			t.Errorf("bob was let in after a restart of %s", name)
		}
	}
	close(stop)
	load.Wait()
	if n := w.payroll.Accepted() - allowed; n != 0 {
		t.Errorf("%d connections reached a service that nobody may use", n)
	}
	if r := alice.Run("status", "--check", "ready"); r.Exit != 0 {
		t.Errorf("alice's session is gone: %+v", r)
	}
	t.Logf("%d restarts, %d connections, %d of them failed while a daemon was away", restarts, opened.Load(), failed.Load())
}

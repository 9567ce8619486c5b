package integration

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"sallyport/integration/stack"
)

// TestCase_I13_WindowsCutAndAdmitOnTime: a live connection ends within a second
// of the end of the window that let it in, and the person is told which one; a
// target whose window has not begun is refused before and reached after.
func TestCase_I13_WindowsCutAndAdmitOnTime(t *testing.T) {
	t.Parallel()
	w := newWorld(t, stack.Together)
	a := w.loggedIn(t, "alice")
	shuts := time.Now().Add(7 * time.Second)
	opens := shuts.Add(500 * time.Millisecond)
	w.Change(func(c *stack.Config) {
		c.Routes = append(c.Routes,
			stack.Route{From: "tcp://shuts.internal:1", To: "tcp://" + w.echo.Addr, Policy: stack.Allow("office-hours", stack.Anyone(), until(shuts))},
			stack.Route{From: "tcp://opens.internal:1", To: "tcp://" + w.payroll.Addr, Policy: stack.Allow("launch", stack.Anyone(), map[string]any{
				"date": map[string]any{"after": opens.UTC().Format(time.RFC3339Nano)},
			})})
	})
	var tunnels []*stack.Tunnel
	var conns []net.Conn
	for _, transport := range []string{"quic", "tls"} {
		var tun *stack.Tunnel
		stack.Eventually(t, 5*time.Second, func() (err error) { // the route is new
			tun, err = a.TryConnect("shuts.internal:1", "--transport", transport)
			return err
		})
		c := tun.Dial(t)
		if err := stack.Echo(c, "within"); err != nil {
			t.Fatal(err)
		}
		tunnels, conns = append(tunnels, tun), append(conns, c)
	}
	r := a.Run("connect", "--stdio", "opens.internal:1")
	if !time.Now().Before(shuts) {
		t.Fatalf("the machine was too slow to try anything before %v", shuts)
	}
	wantExit(t, r, stack.ExitDenied)
	if !strings.Contains(r.Stderr, "not after "+opens.UTC().Format(time.DateOnly)) {
		t.Errorf("the refusal does not name the date:\n%s", r.Stderr)
	}
	for i, c := range conns {
		late := stack.CutWithin(t, c, 10*time.Second).Sub(shuts)
		t.Logf("%s: cut %v after the end of the window", tunnels[i].Carrier, late)
		if late < 0 || late > time.Second {
			t.Errorf("%s: cut %v after the end of the window; want within a second", tunnels[i].Carrier, late)
		}
		if code := tunnels[i].Wait(10 * time.Second); code != stack.ExitRevoked {
			t.Errorf("exit code %d; want %d", code, stack.ExitRevoked)
		}
		if text := tunnels[i].Stderr(); !strings.Contains(text, "time_of_day is ") || !strings.Contains(text, ", not between 01:00 and ") {
			t.Errorf("the agent does not name the window:\n%s", text)
		}
	}
	<-time.After(time.Until(opens))
	if err := stack.Echo(a.Connect("opens.internal:1").Dial(t), "begun"); err != nil {
		t.Error(err)
	}
	if n := w.payroll.Accepted(); n != 1 {
		t.Errorf("%d connections reached the service that opens late; want one", n)
	}
}

// until is a time_of_day that ends at t, in a zone in which it is about noon.
func until(t time.Time) map[string]any {
	zone := "Etc/GMT"
	west := t.UTC().Hour() - 12
	if west != 0 {
		zone += fmt.Sprintf("%+d", west) // POSIX counts westwards
	}
	before := t.UTC().Add(-time.Duration(west) * time.Hour).Format("15:04:05.999999999")
	return map[string]any{"time_of_day": map[string]any{"timezone": zone, "after": "1 AM", "before": before}}
}

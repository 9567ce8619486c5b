package agent_test

import (
	"fmt"
	"io"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"sallyport"
	"sallyport/agent"
	"sallyport/agent/agenttest"
)

// detour is a way to the site's gateway that can be cut off, as by a broken
// network or a gateway that stands still: nothing passes, and nothing is closed.
type detour struct {
	l    net.Listener
	to   string
	wg   sync.WaitGroup
	mu   sync.Mutex
	cond *sync.Cond
	cut  bool
	ends []net.Conn
}

func newDetour(t *testing.T) *detour {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &detour{l: l}
	d.cond = sync.NewCond(&d.mu)
	t.Cleanup(d.close)
	return d
}

func (d *detour) url() string {
	return fmt.Sprintf("https://gw.localhost:%d", d.l.Addr().(*net.TCPAddr).Port)
}

func (d *detour) run(t *testing.T, gateway string) {
	u, err := url.Parse(gateway)
	if err != nil {
		t.Fatal(err)
	}
	d.to = "127.0.0.1:" + u.Port()
	d.wg.Go(func() {
		for {
			in, err := d.l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", d.to)
			if err != nil {
				in.Close()
				continue
			}
			d.mu.Lock()
			d.ends = append(d.ends, in, out)
			d.mu.Unlock()
			d.wg.Go(func() { d.pass(out, in) })
			d.wg.Go(func() { d.pass(in, out) })
		}
	})
}

func (d *detour) pass(to io.WriteCloser, from io.Reader) {
	defer to.Close()
	b := make([]byte, 4096)
	for {
		n, err := from.Read(b)
		d.mu.Lock()
		for d.cut {
			d.cond.Wait()
		}
		d.mu.Unlock()
		if _, werr := to.Write(b[:n]); err != nil || werr != nil {
			return
		}
	}
}

func (d *detour) setCut(cut bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cut = cut
	d.cond.Broadcast()
}

func (d *detour) close() {
	d.setCut(false)
	d.l.Close()
	d.mu.Lock()
	for _, c := range d.ends {
		c.Close()
	}
	d.mu.Unlock()
	d.wg.Wait()
}

// twoWays is a person at a site with two gateways: one at the end of a detour,
// which logins list first, and the site's own.
func twoWays(t *testing.T) (*detour, *agenttest.Site, *agent.Agent) {
	d := newDetour(t)
	site := &agenttest.Site{Gateways: []sallyport.GatewayInfo{{Name: "first", URL: d.url()}}}
	if err := site.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(site.Close)
	d.run(t, site.GatewayURL)
	p := newPerson(t, site)
	p.login()
	return d, site, p.run()
}

const failover = 3 * time.Second

// TestFrozenGatewayCostsNoTimeout: a gateway that accepts and says nothing costs its
// head start.
func TestFrozenGatewayCostsNoTimeout(t *testing.T) {
	d, site, a := twoWays(t)
	d.setCut(true)
	began := time.Now()
	f, err := a.Open(within(t), db)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if took := time.Since(began); took > failover {
		t.Errorf("took %v; want at most %v", took, failover)
	}
	if l, ok := a.Link(); !ok || l.URL != site.GatewayURL {
		t.Errorf("gateway in use: %+v, %t; want %s", l, ok, site.GatewayURL)
	}
}

// TestCase_M8_NewFlowsLeaveASilentGateway: a gateway that falls silent under an agent
// is left for the other one within three seconds, and the flow that it had goes
// on when it comes back.
func TestCase_M8_NewFlowsLeaveASilentGateway(t *testing.T) {
	d, site, a := twoWays(t)
	old, err := a.Open(within(t), db)
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	if l, _ := a.Link(); l.URL != d.url() {
		t.Fatalf("the first gateway in use is %s; want the first of the list, %s", l.URL, d.url())
	}
	d.setCut(true)
	for range 2 {
		began := time.Now()
		f, err := a.Open(within(t), db)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if took := time.Since(began); took > failover {
			t.Errorf("took %v; want at most %v", took, failover)
		}
		if l, _ := a.Link(); l.URL != site.GatewayURL {
			t.Errorf("gateway in use: %s; want %s", l.URL, site.GatewayURL)
		}
	}
	d.setCut(false)
	echoes(t, old)
}

// TestRefusedGatewayIsLeft: a gateway that has gone, where a port refuses, is left at
// once although its carrier is not dead.
func TestRefusedGatewayIsLeft(t *testing.T) {
	d, site, a := twoWays(t)
	f, err := a.Open(within(t), db)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	d.close()
	began := time.Now()
	if f, err = a.Open(within(t), db); err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if took := time.Since(began); took > failover {
		t.Errorf("took %v; want at most %v", took, failover)
	}
	if l, _ := a.Link(); l.URL != site.GatewayURL {
		t.Errorf("gateway in use: %s; want %s", l.URL, site.GatewayURL)
	}
}

func echoes(t *testing.T, c io.ReadWriter) {
	t.Helper()
	if _, err := io.WriteString(c, "still here"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len("still here"))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "still here" {
		t.Fatalf("got %q, %v", b, err)
	}
}

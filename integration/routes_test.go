package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sallyport/integration/stack"
)

// TestCase_G7_G9_RoutesOfNetworksAndRanges: what people reach through routes of
// many targets, and what no such route leads to.
func TestCase_G7_G9_RoutesOfNetworksAndRanges(t *testing.T) {
	var reply int // the port of a service on loopback
	w := newWorldWith(t, stack.Together, func(c *stack.Config) {
		for _, r := range c.Routes {
			if r.From == "tcp://reply.internal:7" {
				_, port, _ := strings.Cut(strings.TrimPrefix(r.To, "tcp://"), ":")
				reply, _ = strconv.Atoi(port)
			}
		}
		ports := fmt.Sprintf("%d-%d", reply-1, reply)
		anyone := stack.Allow("all", stack.Anyone())
		c.Routes = append(c.Routes,
			stack.Route{From: "tcp://10.20.0.0/16:22", To: fmt.Sprintf("tcp://127.0.0.1:%d", reply), Name: "lab", Policy: anyone},
			stack.Route{From: "tcp://10.20.30.0/24:22", Policy: stack.Allow("none", stack.Group("nobody"))},
			stack.Route{From: "tcp://10.21.0.0/16:22", To: fmt.Sprintf("tcp://127.0.0.1:%d", reply), Policy: stack.Allow("none", stack.Group("nobody")), Hidden: true},
			stack.Route{From: "tcp://range.internal:" + ports, To: "tcp://127.0.0.1:" + ports, Name: "range", Policy: anyone},
			stack.Route{From: fmt.Sprintf("tcp://127.0.0.0/8:%d", reply), Policy: anyone},
			stack.Route{From: "tcp://169.254.0.0/16:80", Policy: anyone},
		)
		if a, ok := outward(t); ok {
			c.Routes = append(c.Routes, stack.Route{From: "tcp://" + netip.PrefixFrom(a, 31).Masked().String() + ":9000-65535", Policy: anyone})
		}
	})
	bob := w.loggedIn(t, "bob")
	for _, c := range []struct {
		target string
		exit   int
		says   string
	}{
		{"10.20.1.1:22", 0, ""},
		{"[::ffff:10.20.1.1]:22", 0, ""},
		{"10.20.30.1:22", stack.ExitDenied, ""},
		{"10.21.0.1:22", stack.ExitUsage, "no such target"},
		{"10.22.0.1:22", stack.ExitUsage, "no such target"},
		{"10.20.1.1:23", stack.ExitUsage, "no such target"},
		{fmt.Sprintf("range.internal:%d", reply), 0, ""},
		{fmt.Sprintf("range.internal:%d", reply+1), stack.ExitUsage, "no such target"},
		{fmt.Sprintf("127.0.0.1:%d", reply), stack.ExitDenied, "never dials"},
		{"169.254.169.254:80", stack.ExitDenied, "never dials"},
		{"range", stack.ExitUsage, `"range" stands for range.internal:`},
		{"lab", stack.ExitUsage, `"lab" stands for 10.20.0.0/16:22`},
	} {
		before := w.reply.Accepted()
		r := bob.Run("connect", "--stdio", c.target)
		if r.Exit != c.exit || !strings.Contains(r.Stderr, c.says) {
			t.Errorf("%s: exit %d; want %d and %q\n%s", c.target, r.Exit, c.exit, c.says, r.Stderr)
		}
		if got := w.reply.Accepted() - before; (got == 1) != (c.exit == 0) {
			t.Errorf("%s: %d connections reached the service", c.target, got)
		}
	}
	if a, ok := outward(t); ok {
		outwardIsReached(t, bob, a)
	}
	r := bob.Run("ls")
	for _, want := range []string{"10.20.0.0/16:22", "range.internal:"} {
		if !strings.Contains(r.Stdout, want) {
			t.Errorf("agent ls does not show %s:\n%s", want, r.Stdout)
		}
	}
	for _, hidden := range []string{"10.20.30.0/24", "10.21.0.0/16"} {
		if strings.Contains(r.Stdout, hidden) {
			t.Errorf("agent ls shows %s to somebody who may not:\n%s", hidden, r.Stdout)
		}
	}
}

// outward is an address of this machine that is not loopback, if it has one.
func outward(t *testing.T) (netip.Addr, bool) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && p.Addr().IsGlobalUnicast() {
			return p.Addr(), true
		}
	}
	return netip.Addr{}, false
}

// outwardIsReached asks for an address and a port of which a route names the
// network and the range only, and which therefore are dialled as they are.
func outwardIsReached(t *testing.T, bob *stack.Agent, a netip.Addr) {
	l, err := net.Listen("tcp4", netip.AddrPortFrom(a, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			fmt.Fprintln(c, "reached")
			c.Close()
		}
	}()
	if r := bob.Run("connect", "--stdio", l.Addr().String()); r.Exit != 0 || !strings.Contains(r.Stdout, "reached") {
		t.Errorf("%s: exit %d, %q; want the service's word\n%s", l.Addr(), r.Exit, r.Stdout, r.Stderr)
	}
}

// TestCase_I15_LargeConfigurationIsTakenOver: 10,000 routes of 10 rules each, from
// the file to what people may reach, in both modes.
func TestCase_I15_LargeConfigurationIsTakenOver(t *testing.T) {
	for _, mode := range stack.Modes {
		t.Run(string(mode), func(t *testing.T) {
			w := newWorld(t, mode)
			bob := w.loggedIn(t, "bob")
			file := w.File // which the one process follows; the daemons need not read it
			if mode == stack.Apart {
				file = filepath.Join(w.Dir, "large.yaml")
			}
			writeLarge(t, w.File, file, w.reply.Addr)
			start := time.Now()
			if mode == stack.Apart {
				r := w.Operator("apply", "--config", file)
				if !strings.Contains(r.Stdout, "10001 routes") {
					t.Errorf("apply says %q; want 10001 routes", r.Stdout)
				}
			}
			stack.Eventually(t, 2*time.Minute, func() error {
				if r := bob.Run("connect", "--stdio", "large.internal:7"); r.Exit != 0 {
					return fmt.Errorf("exit %d: %s", r.Exit, r.Stderr)
				}
				return nil
			})
			t.Logf("taken over after %v", time.Since(start))
			if r := bob.Run("connect", "--stdio", "db9999.internal:5432"); r.Exit != stack.ExitDenied {
				t.Errorf("exit %d; want a denial by the last of many routes\n%s", r.Exit, r.Stderr)
			}
		})
	}
}

// writeLarge writes a configuration to file: from, with 10,000 routes instead of
// its own, and one that leads to reply.
func writeLarge(t *testing.T, from, file, reply string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]json.RawMessage
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	delete(doc, "routes")
	var b strings.Builder
	for _, key := range slices.Sorted(maps.Keys(doc)) {
		fmt.Fprintf(&b, "%s: %s\n", key, strings.ReplaceAll(string(doc[key]), "\n", " "))
	}
	b.WriteString("routes:\n")
	for i := range 10_000 {
		fmt.Fprintf(&b, "  - from: tcp://db%d.internal:5432\n    policy:\n", i)
		for j := range 10 {
			fmt.Fprintf(&b, "      - name: r%d\n        allow: {and: [{groups: {has: team-%d-%d}}, {device: {disk_encrypted: true}}]}\n", j, i, j)
		}
	}
	fmt.Fprintf(&b, "  - {from: \"tcp://large.internal:7\", to: \"tcp://%s\", policy: {allow: {or: [{authenticated_user: true}]}}}\n", reply)
	if err := os.WriteFile(file+".new", []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

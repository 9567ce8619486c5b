package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport"
	"sallyport/integration/stack"
	"sallyport/internal/logging"
	"sallyport/proto/control"
)

// TestCase_I10_Reload: a changed policy takes effect on live connections within a
// second, one that does not load leaves the old one in force and is told everywhere,
// and an earlier one can be brought back. In both modes.
func TestCase_I10_Reload(t *testing.T) {
	for _, mode := range stack.Modes {
		t.Run(string(mode), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, mode)
			for _, c := range []struct {
				name string
				run  func(*testing.T, *world)
			}{
				{"effect", testReloadEffect},
				{"broken file", testBrokenFile},
				{"broken record", testBrokenRecord},
				{"rollback", testRollback},
				{"devices", testDeviceApproval},
				{"records", testExternalRecords},
			} {
				t.Run(c.name, func(t *testing.T) { c.run(t, w) })
			}
		})
	}
}

// policyOf replaces the policy of db.
func policyOf(policy any) func(*stack.Config) {
	return func(c *stack.Config) {
		c.Routes = append([]stack.Route(nil), c.Routes...)
		c.Routes[0].Policy = policy
	}
}

var dbaPolicy = stack.Allow("dba", stack.Group("dba"), stack.Fact("disk_encrypted", true))

// cutAfter wants the connection to end within the bound after change has returned,
// and tells when it did.
func cutAfter(t *testing.T, what string, c net.Conn, change func()) {
	t.Helper()
	change()
	start := time.Now()
	took := stack.CutWithin(t, c, 10*time.Second).Sub(start)
	t.Logf("%s: cut after %s", what, took.Round(time.Millisecond))
	if took > bound {
		t.Errorf("%s: cut after %s; want less than %s", what, took, bound)
	}
}

// admittedAfter wants db to be reachable within the bound after change has returned.
func admittedAfter(t *testing.T, what string, a *stack.Agent, change func()) {
	t.Helper()
	change()
	start := time.Now()
	stack.Eventually(t, 10*time.Second, func() error {
		if r := a.Run("why", "db.internal:5432"); r.Exit != 0 {
			return fmt.Errorf("still denied: %s", r.Stdout+r.Stderr)
		}
		return nil
	})
	took := time.Since(start)
	t.Logf("%s: admitted after %s, a new program started for each question", what, took.Round(time.Millisecond))
	if took > bound {
		t.Errorf("%s: admitted after %s; want less than %s", what, took, bound)
	}
	if err := stack.Echo(a.Connect("db.internal:5432").Dial(t), "in"); err != nil {
		t.Error(err)
	}
}

func testReloadEffect(t *testing.T, w *world) {
	a := w.loggedIn(t, "alice")
	_, c := openConn(t, a)
	cutAfter(t, "changed policy", c, func() { w.Change(policyOf(stack.Allow("others", stack.Group("others")))) })
	admittedAfter(t, "changed policy", a, func() { w.Change(policyOf(dbaPolicy)) })
}

// replaceFile puts text in the place of the configuration file in one step.
func replaceFile(t *testing.T, w *world, text []byte) {
	t.Helper()
	if err := os.WriteFile(w.File+".next", text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(w.File+".next", w.File); err != nil {
		t.Fatal(err)
	}
}

// admin asks policyd's admin listener.
func admin(t *testing.T, w *world, path string) (status int, body string) {
	t.Helper()
	client := http.Client{Timeout: 2 * time.Second}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://" + w.Ready("policyd").Admin + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// stale waits until policyd is not ready, for the reason why, and checks that the
// figure, the log and the audit log say so too and that the old policy decides.
func stale(t *testing.T, w *world, a *stack.Agent, live net.Conn, why string) {
	t.Helper()
	stack.Eventually(t, 5*time.Second, func() error {
		if status, body := admin(t, w, "/readyz"); status != http.StatusServiceUnavailable || !strings.Contains(body, "policy.stale") || !strings.Contains(body, why) {
			return fmt.Errorf("readyz: %d %s; want policy.stale and %q", status, body, why)
		}
		return nil
	})
	if _, body := admin(t, w, "/metrics"); !strings.Contains(body, "\nsallyport_policyd_policy_stale 1\n") {
		t.Errorf("%s: the figure does not say it", why)
	}
	if log := w.Daemon("policyd").Stderr(); !strings.Contains(log, why) {
		t.Errorf("the log does not say %q", why)
	}
	if err := stack.Echo(live, "live"); err != nil {
		t.Errorf("%s: a live connection: %v", why, err)
	}
	if err := stack.Echo(a.Connect("db.internal:5432").Dial(t), "new"); err != nil {
		t.Errorf("%s: a new connection: %v", why, err)
	}
	wantExit(t, a.Run("connect", "--stdio", "payroll.internal:443"), stack.ExitDenied)
}

func testBrokenFile(t *testing.T, w *world) {
	a := w.loggedIn(t, "alice")
	_, live := openConn(t, a)
	good, err := os.ReadFile(w.File)
	if err != nil {
		t.Fatal(err)
	}
	bad := strings.Replace(string(good), `"allow"`, `"alow"`, 1)
	line := strconv.Itoa(1 + strings.Count(bad[:strings.Index(bad, `"alow"`)], "\n"))
	for _, c := range []struct {
		name, why string
		do        func()
	}{
		{"broken policy", "sallyport.yaml:" + line + ": routes[0].policy", func() { replaceFile(t, w, []byte(bad)) }},
		{"empty file", "sallyport.yaml", func() { replaceFile(t, w, nil) }},
		{"half a file", "sallyport.yaml:", func() { replaceFile(t, w, good[:len(good)/2]) }},
		{"removed file", "no such file", func() {
			if err := os.Remove(w.File); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.do()
			stale(t, w, a, live, c.why)
			r := stack.Run(t, stack.Command{Program: "sallyport", Args: []string{"apply", "--config", w.File}})
			if wantExit(t, r, stack.ExitUsage); !strings.Contains(r.Stderr, c.why) {
				t.Errorf("apply says\n%s; want %q", r.Stderr, c.why)
			}
			replaceFile(t, w, good)
			w.WaitReady("policyd")
			if tail := w.Operator("audit", "tail", "--config", w.File, "--daemon", "policyd", "-n", "2000", "-o", "jsonl").Stdout; !strings.Contains(tail, `"policy.broken"`) || !strings.Contains(tail, c.why) {
				t.Errorf("no policy.broken with %q in the audit log", c.why)
			}
			if err := stack.Echo(live, "after"); err != nil {
				t.Errorf("after the repair: %v", err)
			}
		})
	}
	cutAfter(t, "changed policy after the repair", live, func() { w.Change(policyOf(stack.Allow("others", stack.Group("others")))) })
	w.Change(policyOf(dbaPolicy))
}

// operator is a client of cached over its socket.
func operator(t *testing.T, w *world) *control.Records {
	t.Helper()
	client, err := control.Dial([]string{"unix:" + w.Ready("cached").Cached.Socket}, nil, logging.Discard())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client.Records()
}

// A record that no tool of ours would write, as a newer one might.
func testBrokenRecord(t *testing.T, w *world) {
	a := w.loggedIn(t, "alice")
	admittedAfter(t, "before", a, func() {})
	_, live := openConn(t, a)
	records := operator(t, w)
	had, err := records.Get(t.Context(), sallyport.KindConfig, "current")
	if err != nil {
		t.Fatal(err)
	}
	c, err := sallyport.Decode[sallyport.Config](had)
	if err != nil {
		t.Fatal(err)
	}
	c.Routes[0].Policy = "- name: dba\n  alow: {or: [{accept: true}]}"
	if _, err := records.Apply(t.Context(), []sallyport.Op{sallyport.Put(sallyport.KindConfig, "current", c)}); err != nil {
		t.Fatal(err)
	}
	stale(t, w, a, live, `routes[0].policy of tcp://db.internal:5432: 2:3: unknown key`)
	if _, err := records.Apply(t.Context(), []sallyport.Op{{Kind: sallyport.KindConfig, ID: "current", Payload: had.Payload}}); err != nil {
		t.Fatal(err)
	}
	w.WaitReady("policyd")
	if err := stack.Echo(live, "after"); err != nil {
		t.Errorf("after the repair: %v", err)
	}
}

var rolledBack = regexp.MustCompile(`^rolled back to revision (\d+): 4 routes, policy revision \d+\n.*sallyport.yaml still says otherwise`)

func testRollback(t *testing.T, w *world) {
	a := w.loggedIn(t, "alice")
	_, c := openConn(t, a)
	cutAfter(t, "changed", c, func() { w.Change(policyOf(stack.Allow("others", stack.Group("others")))) })
	admittedAfter(t, "changed", a, func() { w.Change(policyOf(dbaPolicy)) })
	_, c = openConn(t, a)
	var said string
	cutAfter(t, "rollback", c, func() { said = w.Operator("config", "rollback", "--config", w.File).Stdout })
	m := rolledBack.FindStringSubmatch(said)
	if m == nil {
		t.Fatalf("rollback says %q", said)
	}
	var doc struct {
		History []struct {
			Revision   int  `json:"revision"`
			InForce    bool `json:"in_force"`
			By, Source string
			RollbackTo int `json:"rollback_to"`
		}
	}
	if err := json.Unmarshal([]byte(w.Operator("config", "history", "--config", w.File, "-o", "json").Stdout), &doc); err != nil {
		t.Fatal(err)
	}
	if h := doc.History; len(h) < 3 || !h[0].InForce || h[1].InForce || strconv.Itoa(h[0].RollbackTo) != m[1] || h[2].Revision != h[0].RollbackTo || h[1].By == "" || h[1].Source == "" {
		t.Errorf("history: %+v", doc.History)
	}
	if text := w.Operator("config", "history", "--config", w.File).Stdout; !strings.Contains(text, "in force") || !strings.Contains(text, "(rollback)") {
		t.Errorf("history says\n%s", text)
	}
	if shown := w.Operator("config", "show", "--config", w.File).Stdout; !strings.Contains(shown, "others") || strings.Contains(shown, "dba") {
		t.Errorf("in force is\n%s", shown)
	}
	r := stack.Run(t, stack.Command{Program: "sallyport", Args: []string{"config", "rollback", "999999", "--config", w.File}})
	if wantExit(t, r, stack.ExitUsage); !strings.Contains(r.Stderr, "revision 999999: this revision is not kept") {
		t.Errorf("says %s", r.Stderr)
	}
	admittedAfter(t, "rolled forward", a, func() {
		w.Operator("config", "rollback", strconv.Itoa(doc.History[1].Revision), "--config", w.File)
	})
	if tail := w.Operator("audit", "tail", "--config", w.File, "--daemon", "cached", "-n", "2000", "-o", "jsonl").Stdout; !strings.Contains(tail, "rollback to revision "+m[1]+", by ") {
		t.Error("the audit log does not tell a rollback apart")
	}
}

func testDeviceApproval(t *testing.T, w *world) {
	a := w.loggedIn(t, "alice")
	w.Change(policyOf(stack.Allow("approved", stack.Fact("approved", true))))
	stack.Eventually(t, 5*time.Second, func() error {
		if r := a.Run("why", "db.internal:5432"); r.Exit != stack.ExitDenied {
			return fmt.Errorf("exit %d; want a denial\n%s%s", r.Exit, r.Stdout, r.Stderr)
		}
		return nil
	})
	list := w.Operator("devices", "ls", "--config", w.File).Stdout
	device := ""
	for line := range strings.Lines(list) {
		if strings.Contains(line, "alice@test.example") {
			device = strings.Fields(line)[0]
		}
	}
	if device == "" || !strings.Contains(list, "not approved") {
		t.Fatalf("devices:\n%s", list)
	}
	admittedAfter(t, "approval", a, func() { w.Operator("devices", "approve", device, "--config", w.File) })
	_, c := openConn(t, a)
	cutAfter(t, "disapproval", c, func() { w.Operator("devices", "disapprove", device, "--config", w.File) })
	testReinstatement(t, w, device)
	r := stack.Run(t, stack.Command{Program: "sallyport", Args: []string{"devices", "approve", "none", "--config", w.File}})
	if wantExit(t, r, stack.ExitUsage); !strings.Contains(r.Stderr, "hint: list them with: sallyport devices ls") {
		t.Errorf("says %s", r.Stderr)
	}
}

// testReinstatement revokes the device, which then cannot log in nor be approved,
// and reinstates it.
func testReinstatement(t *testing.T, w *world, device string) {
	t.Helper()
	a := w.loggedIn(t, "alice")
	w.Operator("sessions", "revoke", "--config", w.File, "--device", device)
	r := stack.Run(t, stack.Command{Program: "sallyport", Args: []string{"devices", "approve", device, "--config", w.File}})
	if wantExit(t, r, stack.ExitUsage); !strings.Contains(r.Stderr, "hint: let it log in again first: sallyport devices reinstate") {
		t.Errorf("says %s", r.Stderr)
	}
	p, address := a.StartLogin()
	page, err := a.Browser().Follow(t.Context(), address, map[string]string{"username": "alice", "password": stack.Password, "answer": "allow"})
	if err != nil || !strings.Contains(page.Text, "an administrator can reinstate it") {
		t.Errorf("a revoked device: %v, the browser says %q", err, page.Text)
	}
	p.Signal(syscall.SIGTERM)
	p.Wait(10 * time.Second)
	if out := w.Operator("devices", "reinstate", device, "--config", w.File).Stdout; !strings.Contains(out, "is not revoked") {
		t.Errorf("reinstate says %s", out)
	}
	a.Login() // and it is asked whether the key is its user's
	admittedAfter(t, "approval after reinstatement", a, func() { w.Operator("devices", "approve", device, "--config", w.File) })
}

func testExternalRecords(t *testing.T, w *world) {
	a := w.loggedIn(t, "alice")
	risk := map[string]any{"record": map[string]any{"type": "risk", "field": "score", "<": 50}}
	w.Change(policyOf(stack.Allow("calm", risk)))
	put := func(score int) {
		t.Helper()
		r := stack.Run(t, stack.Command{
			Program: "sallyport", Args: []string{"records", "put", "risk", "alice", "-", "--config", w.File, "--expires", "1h"},
			Stdin: fmt.Sprintf(`{"score": %d}`, score),
		})
		wantExit(t, r, 0)
	}
	admittedAfter(t, "a record", a, func() { put(5) })
	_, c := openConn(t, a)
	cutAfter(t, "a changed record", c, func() { put(51) })
	if list := w.Operator("records", "ls", "--type", "risk", "--config", w.File).Stdout; !strings.Contains(list, `{"score":51}`) || !strings.Contains(list, "59m") && !strings.Contains(list, "1h") {
		t.Errorf("records:\n%s", list)
	}
	admittedAfter(t, "a better record", a, func() { put(6) })
	_, c = openConn(t, a)
	cutAfter(t, "a removed record", c, func() { w.Operator("records", "rm", "risk", "alice", "--config", w.File) })
	r := stack.Run(t, stack.Command{Program: "sallyport", Args: []string{"records", "rm", "risk", "alice", "--config", w.File}})
	if wantExit(t, r, stack.ExitUsage); !strings.Contains(r.Stderr, `there is no record "risk/alice"`) {
		t.Errorf("says %s", r.Stderr)
	}
}

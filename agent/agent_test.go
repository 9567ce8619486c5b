package agent_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"sallyport"
	"sallyport/agent"
	"sallyport/agent/agenttest"
	"sallyport/agent/forward"
	"sallyport/agent/login"
	"sallyport/proto/connect"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var db = sallyport.Target{Network: sallyport.TCP, Host: "db.internal", Port: 5432}

// person is somebody at a site, with a state directory.
type person struct {
	t     *testing.T
	site  *agenttest.Site
	cfg   agent.Config
	asked atomic.Int32
	said  chan string
}

func newPerson(t *testing.T, site *agenttest.Site) *person {
	p := &person{t: t, site: site, said: make(chan string, 100)}
	p.cfg = agent.Config{
		StateDir: filepath.Join(t.TempDir(), "state"), Transport: "tls", KeyStore: "file",
		Say: func(m string) { p.said <- m },
	}
	return p
}

// browser visits whatever login page is shown.
func (p *person) browser() login.Options {
	return login.Options{Show: func(string, string) {}, Timeout: 10 * time.Second, Browser: func(url string) error {
		p.asked.Add(1)
		return agenttest.Visit(p.site.ClientTLS(), url)
	}}
}

func (p *person) new() *agent.Agent {
	p.t.Helper()
	a, err := agent.New(p.cfg)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { a.Close() })
	return a
}

func (p *person) login() agent.Profile {
	p.t.Helper()
	profile, err := p.new().Login(p.t.Context(), agent.LoginRequest{Authd: p.site.AuthdURL, CA: p.site.CA(), Options: p.browser()})
	if err != nil {
		p.t.Fatal(err)
	}
	return profile
}

// run starts an agent that runs until the test ends.
func (p *person) run() *agent.Agent {
	p.t.Helper()
	a := p.new()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := a.Run(ctx); err != nil {
			p.t.Errorf("run: %v", err)
		}
	})
	p.t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	return a
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	end := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
		<-time.After(5 * time.Millisecond)
	}
}

func TestLoginThenFlow(t *testing.T) {
	site := agenttest.New(t)
	p := newPerson(t, site)
	profile := p.login()
	if profile.Person() != "alice@corp.example" || profile.Session == "" {
		t.Errorf("got profile %+v", profile)
	}
	a := p.run()
	f, err := a.Open(within(t), db)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.WriteString(f, "hello"); err != nil {
		t.Fatal(err)
	}
	if err := f.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(f)
	if err != nil || string(got) != "hello[5 bytes]" {
		t.Errorf("got %q, %v; want the echo and the reply after the half-close", got, err)
	}
	if f.Rule != "dba" || f.ID == "" {
		t.Errorf("got rule %q, flow %q", f.Rule, f.ID)
	}
	if h := site.History(); len(h) < 2 || h[0] != "posture" || h[1] != "connect db.internal:5432" {
		t.Errorf("gateway saw %v; want the posture before the first CONNECT", h)
	}
	if logins, renewals := site.Counts(); logins != 1 || renewals != 1 {
		t.Errorf("%d logins, %d renewals; want one of each: no certificate is kept on disk", logins, renewals)
	}
}

// An authd that knows no gateways at the moment, because the configuration was
// deleted, does not make an agent forget its own.
func TestRenewalWithoutGateways(t *testing.T) {
	site := agenttest.New(t)
	site.NamesNoGateways = true
	p := newPerson(t, site)
	p.login()
	f, err := p.run().Open(within(t), db)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, renewals := site.Counts(); renewals == 0 {
		t.Error("nothing was renewed")
	}
}

func TestProfileHoldsNoSecret(t *testing.T) {
	p := newPerson(t, agenttest.New(t))
	p.login()
	text, err := os.ReadFile(filepath.Join(p.cfg.StateDir, "profiles", "default", "profile.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"PRIVATE KEY", "token", "secret", "cookie"} {
		if strings.Contains(string(text), bad) {
			t.Errorf("the profile holds a %s", bad)
		}
	}
	err = filepath.WalkDir(p.cfg.StateDir, func(path string, d os.DirEntry, err error) error {
		info, _ := d.Info()
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestNotLoggedIn(t *testing.T) {
	p := newPerson(t, agenttest.New(t))
	_, err := p.run().Open(within(t), db)
	if sallyport.OutcomeOf(err) != sallyport.OutcomeLogin || sallyport.CodeOf(err) != forward.CodeNoLogin {
		t.Errorf("got %v; want login needed", err)
	}
}

// The certificate is over, the session is not: a laptop that slept.
func TestExpiredCertificateRenewsWithoutBrowser(t *testing.T) {
	site := &agenttest.Site{CertificateLife: time.Second} // counts as expired at once
	if err := site.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(site.Close)
	p := newPerson(t, site)
	p.login()
	a := p.run()
	if _, err := a.Me(within(t)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the certificate expires", func() bool { return time.Now().After(a.Session().Certificate.Leaf.NotAfter) })
	site.DropCarriers()
	eventually(t, "the carrier is gone", func() bool { _, ok := a.Link(); return !ok })
	f, err := a.Open(within(t), db)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if logins, renewals := site.Counts(); logins != 1 || renewals < 2 {
		t.Errorf("%d logins, %d renewals; want a renewal and no login", logins, renewals)
	}
}

// The session is over: many flows that are opened meanwhile wait for one login.
func TestEndedSessionAsksOnce(t *testing.T) {
	site := agenttest.New(t)
	p := newPerson(t, site)
	old := p.login()
	p.cfg.Ask = func() (login.Options, error) { return p.browser(), nil }
	a := p.run()
	if _, err := a.Me(within(t)); err != nil {
		t.Fatal(err)
	}
	site.EndSession(old.Session, "session_expired", "the session has ended")
	eventually(t, "the agent hears of it", func() bool { _, ok := a.Link(); return !ok })
	p.asked.Store(0)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			f, err := a.Open(within(t), db)
			if err != nil {
				t.Error(err)
				return
			}
			f.Close()
		})
	}
	wg.Wait()
	if n := p.asked.Load(); n != 1 {
		t.Errorf("the person was asked %d times; want 1", n)
	}
	now, err := a.Profile()
	if err != nil || now.Session == old.Session || now.Session == "" {
		t.Errorf("session %q after %q, %v", now.Session, old.Session, err)
	}
}

func TestRefusedLoginIsNotAskedAgainAtOnce(t *testing.T) {
	site := agenttest.New(t)
	p := newPerson(t, site)
	old := p.login()
	p.cfg.Ask = func() (login.Options, error) { return p.browser(), nil }
	a := p.run()
	site.EndSession(old.Session, "session_revoked", "revoked")
	site.RefuseLogins("login.denied")
	p.asked.Store(0)
	for range 3 {
		_, err := a.Open(within(t), db)
		if sallyport.OutcomeOf(err) != sallyport.OutcomeLogin || sallyport.CodeOf(err) != "login.denied" {
			t.Fatalf("got %v; want login.denied", err)
		}
	}
	if n := p.asked.Load(); n != 1 {
		t.Errorf("asked %d times; want once", n)
	}
}

// Another process has logged in since: its session is taken, nobody is asked.
func TestLoginOfAnotherProcessIsTaken(t *testing.T) {
	site := agenttest.New(t)
	p := newPerson(t, site)
	old := p.login()
	a := p.run()
	if _, err := a.Me(within(t)); err != nil {
		t.Fatal(err)
	}
	site.EndSession(old.Session, "session_expired", "the session has ended")
	eventually(t, "the agent hears of it", func() bool { _, ok := a.Link(); return !ok })
	p.login()
	if _, err := a.Me(within(t)); err != nil {
		t.Errorf("got %v; want the other process's session", err)
	}
}

func TestAuthdDownIsUnavailable(t *testing.T) {
	site := agenttest.New(t)
	p := newPerson(t, site)
	p.login()
	site.AuthdDown(true)
	_, err := p.run().Open(within(t), db)
	if sallyport.OutcomeOf(err) != sallyport.OutcomeUnavailable {
		t.Errorf("got %v; want unavailable: the session may well live", err)
	}
}

func TestWithdrawnFlowSaysWhy(t *testing.T) {
	site := agenttest.New(t)
	p := newPerson(t, site)
	p.login()
	a := p.run()
	f, err := a.Open(within(t), db)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	site.Withdraw("tcp://db.internal:5432", connect.Event{
		Code: "policy", Reason: `group "dba" removed`, PolicyRevision: 215,
		Decision: "d-1", AfterMS: 600,
	})
	_, readErr := f.Read(make([]byte, 1))
	if readErr == nil || readErr == io.EOF {
		t.Fatalf("read gave %v; a cut is not an end", readErr)
	}
	err = f.WhyCut(within(t), readErr)
	want := `db.internal:5432 closed by policy after 0.6 s: group "dba" removed (policy revision 215)`
	if sallyport.OutcomeOf(err) != sallyport.OutcomeRevoked || err.Error() != want {
		t.Errorf("got %v; want %s", err, want)
	}
}

func TestRefusals(t *testing.T) {
	site := agenttest.New(t)
	p := newPerson(t, site)
	p.login()
	a := p.run()
	for target, want := range map[string]sallyport.Outcome{
		"payroll.internal:443": sallyport.OutcomeDenied, "nowhere.internal:1": sallyport.OutcomeUsage,
	} {
		parsed, err := sallyport.ParseTarget(target)
		if err != nil {
			t.Fatal(err)
		}
		_, err = a.Open(within(t), parsed)
		var about *agent.TargetError
		if sallyport.OutcomeOf(err) != want || !errors.As(err, &about) {
			t.Errorf("%s: got %v; want outcome %d about the target", target, err, want)
		}
	}
}

func TestLostCarrierIsReplaced(t *testing.T) {
	site := agenttest.New(t)
	p := newPerson(t, site)
	p.login()
	a := p.run()
	for range 3 {
		f, err := a.Open(within(t), db)
		if err != nil {
			t.Fatal(err)
		}
		site.DropCarriers()
		_, err = f.Read(make([]byte, 1))
		if err = f.WhyCut(within(t), err); sallyport.OutcomeOf(err) == sallyport.OutcomeRevoked {
			t.Errorf("a lost connection counts as revoked: %v", err)
		}
		f.Close()
	}
}

func TestPostureFileIsTold(t *testing.T) {
	site := agenttest.New(t)
	p := newPerson(t, site)
	p.login()
	file := filepath.Join(t.TempDir(), "facts")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("disk_encrypted: true\n")
	p.cfg.PostureFile = file
	a := p.run()
	if _, err := a.Me(within(t)); err != nil {
		t.Fatal(err)
	}
	if f := site.Facts()[sallyport.FactDiskEncrypted]; f.Value != true || f.Source != sallyport.SourceFile {
		t.Errorf("got %+v; want true from the file", f)
	}
	began := time.Now()
	write("disk_encrypted: false\n")
	eventually(t, "the gateway hears of the change", func() bool { return site.Facts()[sallyport.FactDiskEncrypted].Value == false })
	if took := time.Since(began); took > time.Second {
		t.Errorf("it took %v; want well below a second", took)
	}
}

func TestResolve(t *testing.T) {
	site := agenttest.New(t)
	p := newPerson(t, site)
	p.login()
	a := p.run()
	for word, want := range map[string]string{
		"db": "db.internal:5432", "DB": "db.internal:5432", "db.internal:5432": "db.internal:5432",
		"postgres://db.internal/app": "db.internal:5432", "payroll": "payroll.internal:443",
	} {
		if got, err := a.Resolve(within(t), word); err != nil || got.Authority() != want {
			t.Errorf("%s: got %v, %v; want %s", word, got, err, want)
		}
	}
	for word, want := range map[string]string{
		"web": "web.internal:22 or web.internal:8080", "dbb": "did you mean db.internal:5432?", "zzzzzzzzz": "agent ls",
	} {
		_, err := a.Resolve(within(t), word)
		var e *sallyport.Error
		if !errors.As(err, &e) || e.Outcome != sallyport.OutcomeUsage || !strings.Contains(e.Message+" "+e.Hint, want) {
			t.Errorf("%s: got %v; want %s", word, err, want)
		}
	}
}

func TestLogoutAndExtend(t *testing.T) {
	site := agenttest.New(t)
	p := newPerson(t, site)
	first := p.login()
	longer, err := p.new().Extend(within(t), p.browser())
	if err != nil || longer.Session != first.Session {
		t.Errorf("extend: session %q, %v; want %q", longer.Session, err, first.Session)
	}
	a := p.new()
	if was, err := a.Logout(within(t)); err != nil || was.Session != first.Session {
		t.Errorf("logout: %+v, %v", was, err)
	}
	if was, err := a.Logout(within(t)); err != nil || was.Session != "" {
		t.Errorf("second logout: %+v, %v; want nothing", was, err)
	}
	now, err := a.Profile()
	if err != nil || now.Session != "" || now.Authd != site.AuthdURL || now.CA == "" {
		t.Errorf("profile after logout: %+v, %v; want authd and CA kept", now, err)
	}
}

func TestProcesses(t *testing.T) {
	site := agenttest.New(t)
	p := newPerson(t, site)
	a := p.new()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- a.Publish(ctx, "connect", nil, func() []agent.Local { return []agent.Local{{Target: db, Local: "127.0.0.1:5432"}} })
	}()
	other := p.new()
	var list []agent.Process
	eventually(t, "the process is listed", func() bool {
		var err error
		if list, err = other.Processes(); err != nil {
			t.Fatal(err)
		}
		return len(list) == 1
	})
	if list[0].PID != os.Getpid() || list[0].Ends[0].ID != "f1" || list[0].Ends[0].Target != db {
		t.Errorf("got %+v", list[0])
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if list, err := other.Processes(); err != nil || len(list) != 0 {
		t.Errorf("got %v, %v after the end; want none", list, err)
	}
	// What a killed process leaves has nobody holding its lock.
	run := filepath.Join(p.cfg.StateDir, "run")
	for _, name := range []string{"1-dead.json", "1-dead.lock"} {
		if err := os.WriteFile(filepath.Join(run, name), []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if list, err := other.Processes(); err != nil || len(list) != 0 {
		t.Errorf("got %v, %v; want the dead one swept", list, err)
	}
	left, _ := os.ReadDir(run)
	if len(left) != 0 {
		t.Errorf("left in run/: %v", left)
	}
}

func TestConfigRefuses(t *testing.T) {
	for name, cfg := range map[string]agent.Config{
		"profile up":   {Profile: "../other"},
		"profile dot":  {Profile: ".hidden"},
		"transport":    {Transport: "carrier-pigeon"},
		"wireguard":    {Transport: "wireguard"},
		"key store":    {KeyStore: "drawer"},
		"posture file": {PostureFile: filepath.Join(t.TempDir(), "missing")},
	} {
		cfg.StateDir = filepath.Join(t.TempDir(), "s")
		a, err := agent.New(cfg)
		if err == nil {
			err = a.Run(t.Context())
			a.Close()
		}
		if sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
			t.Errorf("%s: got %v; want usage", name, err)
		}
	}
}

func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"db", "db", 0}, {"db", "dbb", 1}, {"kitten", "sitting", 3}, {"", "abc", 3}} {
		if got := agent.Distance(tt.a, tt.b); got != tt.want {
			t.Errorf("%q %q: got %d; want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

func TestPortsAreRemembered(t *testing.T) {
	p := newPerson(t, agenttest.New(t))
	a := p.new()
	if got := a.Ports().Port("tcp://db.internal:5432"); got != 0 {
		t.Errorf("got %d; want none", got)
	}
	a.Ports().Remember("tcp://db.internal:5432", 25432)
	if got := p.new().Ports().Port("tcp://db.internal:5432"); got != 25432 {
		t.Errorf("got %d; want 25432", got)
	}
}

func TestMatchPrefersRouteNames(t *testing.T) {
	list := sallyport.Listing{Targets: []sallyport.ListedTarget{
		{From: "tcp://db.internal:5432"}, {From: "tcp://other.internal:5432", Name: "db"}, {From: "tcp://*.svc.internal:22"},
	}}
	got := agent.Match(list, "db")
	if len(got) != 1 || got[0].Host != "other.internal" {
		t.Errorf("got %v; want the route that is named db", got)
	}
}

func TestRoutesOfManyTargetsAreNoShortNames(t *testing.T) {
	list := sallyport.Listing{Targets: []sallyport.ListedTarget{
		{From: "tcp://db.internal:5000-5010"},
		{From: "ssh://10.0.0.0/8", Name: "lab"},
		{From: "tcp://*.svc.internal:22", Name: "services"},
		{From: "tcp://[2001:db8::/32]:22"},
		{From: "tcp://build.internal:22"},
	}}
	for word, want := range map[string]string{
		"db":               `"db" stands for db.internal:5000-5010`,
		"DB":               `"DB" stands for db.internal:5000-5010`,
		"lab":              `"lab" stands for 10.0.0.0/8`,
		"services":         `"services" stands for *.svc.internal:22`,
		"10":               "no such target: 10",
		"dbb":              "no such target: dbb\ndid you mean db.internal:5000-5010?",
		"db.intrnal:5003":  "no such target: db.intrnal:5003\ndid you mean db.internal:5000-5010?",
		"service":          "no such target: service\ndid you mean *.svc.internal:22?",
		"biuld":            "no such target: biuld\ndid you mean build.internal:22?",
		"something.else:1": "no such target: something.else:1\nrun: agent ls",
	} {
		if found := agent.Match(list, word); len(found) != 0 {
			t.Errorf("%s: got %v; want nothing that can be dialled", word, found)
		}
		var e *sallyport.Error
		if !errors.As(agent.Unknown(list, word), &e) {
			t.Fatalf("%s: no error that is told", word)
		}
		got := e.Message
		if strings.HasPrefix(want, "no such") && strings.Contains(want, "\n") {
			got += "\n" + e.Hint
		}
		if got != want {
			t.Errorf("%s: got %q; want %q", word, got, want)
		}
	}
}

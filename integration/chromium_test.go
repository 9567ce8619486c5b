package integration

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/cdproto/target"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/remote"

	"sallyport/integration/stack"
)

// TestChromium: agent login opens the person's own browser, by $BROWSER, and a
// real one takes every page, cookie, redirect and content security policy on the
// way. Screenshots of the pages are in the test's artifact directory (go test
// -artifacts).
func TestChromium(t *testing.T) {
	echo := stack.EchoServer(t)
	s := stack.Start(t, stack.Together, stack.Config{
		Users:  []stack.User{{ID: "alice", Email: "alice@test.example"}},
		Routes: []stack.Route{{From: "tcp://db.internal:5432", To: "tcp://" + echo.Addr, Policy: stack.Allow("all", stack.Anyone())}},
	})
	a := s.NewAgent(t, "alice")
	home := trustingHome(t, s)

	t.Run("BROWSER is no shell script", func(t *testing.T) { testBrowserWords(t, s, a) })
	const end = `body:not(:has(form)) h1` // a page that asks for nothing more
	t.Run("no", func(t *testing.T) {
		login, tab := openLogin(t, s, a, home)
		tab.show("login", `input[name=password]`)
		tab.logIn("wrong", `[role=alert]`)
		tab.show("wrong password", `[role=alert]`)
		tab.logIn(stack.Password, `button[value=allow]`)
		tab.click(`button[value=deny]`, end)
		tab.show("denied", `h1`)
		if code := login.Wait(20 * time.Second); code != stack.ExitLogin {
			t.Errorf("exit code %d; want %d\n%s", code, stack.ExitLogin, login.Stderr())
		}
	})
	t.Run("yes", func(t *testing.T) {
		login, tab := openLogin(t, s, a, home)
		tab.logIn(stack.Password, `button[value=allow]`)
		tab.show("consent", `button[value=allow]`)
		if print := tab.text(`code`); !strings.HasPrefix(print, "SHA256:") || !strings.Contains(login.Stderr(), print) {
			t.Errorf("the page asks to compare the fingerprint %q; the terminal says\n%s", print, login.Stderr())
		}
		tab.click(`button[value=allow]`, end)
		tab.show("back at the agent", `h1`)
		if code := login.Wait(20 * time.Second); code != 0 {
			t.Fatalf("exit code %d; want 0\n%s", code, login.Stderr())
		}
		if where := tab.text(`h1`); where != "You are back at the agent" {
			t.Errorf("the browser ends at %q", where)
		}
		// The policy lets the page's own style in.
		if round, err := chromedp.Run(tab.ctx, chromedp.Evaluate[string](`getComputedStyle(document.querySelector("main")).borderRadius`)); err != nil || round == "0px" {
			t.Errorf("the last page has no style: %q, %v", round, err)
		}
		if err := stack.Echo(a.Connect("db.internal:5432").Dial(t), "hello"); err != nil {
			t.Error(err)
		}
	})
	t.Run("a known key is not asked about", func(t *testing.T) {
		login, tab := openLogin(t, s, a, home)
		tab.logIn(stack.Password, end)
		if code := login.Wait(20 * time.Second); code != 0 {
			t.Fatalf("exit code %d; want 0\n%s", code, login.Stderr())
		}
	})
}

// testBrowserWords is case Q3 with the desktop's own xdg-open: what stands in
// $BROWSER is never read by a shell.
func testBrowserWords(t *testing.T, s *stack.Stack, a *stack.Agent) {
	need(t, "xdg-open", "xdg-utils")
	dir := t.TempDir()
	made := filepath.Join(dir, "made")
	c := a.Command("login", s.AuthdURL(), "--ca", s.CAFile(), "--key-store", "file", "--timeout", "2s")
	c.Env = append(c.Env, fmt.Sprintf("BROWSER=no-such-browser; touch %[1]s; x & $(touch %[1]s) `touch %[1]s`", made))
	r := stack.Run(t, c)
	wantExit(t, r, stack.ExitLogin)
	wantWords(t, r.Stderr, "/authorize?", "nobody finished the login within 2s")
	if _, err := os.Stat(made); err == nil {
		t.Error("a shell has read $BROWSER")
	}
}

// trustingHome is a home directory whose NSS database, which Chromium reads,
// trusts the deployment's CA.
func trustingHome(t *testing.T, s *stack.Stack) string {
	t.Helper()
	home := t.TempDir()
	db := filepath.Join(home, ".pki", "nssdb")
	if err := os.MkdirAll(db, 0o700); err != nil {
		t.Fatal(err)
	}
	certutil := need(t, "certutil", "libnss3-tools")
	for _, args := range [][]string{
		{"-N", "--empty-password"},
		{"-A", "-n", "sallyport", "-t", "C,,", "-i", s.CAFile()},
	} {
		r := stack.Run(t, stack.Command{Program: certutil, Args: append([]string{"-d", "sql:" + db}, args...)})
		if r.Exit != 0 {
			t.Fatalf("certutil %s: %s", args, r.Stderr)
		}
	}
	return home
}

// openLogin runs agent login with Chromium as $BROWSER and returns the tab that
// it opened.
func openLogin(t *testing.T, s *stack.Stack, a *stack.Agent, home string) (*stack.Process, *tab) {
	t.Helper()
	need(t, "xdg-open", "xdg-utils")
	dir := t.TempDir()
	browser := filepath.Join(dir, "browser")
	script := fmt.Sprintf(`#!/bin/sh
echo $$ > %[1]s/pid
exec %[2]s --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --window-size=900,800 \
  --user-data-dir=%[1]s/profile --remote-debugging-port=0 "$@" > %[1]s/log 2>&1
`, dir, need(t, "chromium", "chromium"))
	if err := os.WriteFile(browser, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	c := a.Command("login", s.AuthdURL(), "--ca", s.CAFile(), "--key-store", "file", "--posture-file", a.Posture)
	c.Env = append(c.Env, "BROWSER="+browser, "HOME="+home)
	login := stack.StartProcess(t, c)
	t.Cleanup(func() { endBrowser(t, dir) })

	// Chromium writes the port that it got and the path of its debugger.
	var port, path string
	stack.Eventually(t, 30*time.Second, func() error {
		text, err := os.ReadFile(filepath.Join(dir, "profile", "DevToolsActivePort"))
		if err != nil {
			log, _ := os.ReadFile(filepath.Join(dir, "log"))
			return fmt.Errorf("no browser opened: %w\n%s\n%s", err, login.Stderr(), log)
		}
		port, path, _ = strings.Cut(strings.TrimSpace(string(text)), "\n")
		if path == "" {
			return fmt.Errorf("half of DevToolsActivePort: %q", text)
		}
		return nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	ctx, cancel = remote.NewAllocator(ctx, "ws://127.0.0.1:"+port+path)
	t.Cleanup(cancel)
	return login, attach(t, ctx)
}

// endBrowser ends the process whose id the script noted, and waits for its end.
func endBrowser(t *testing.T, dir string) {
	text, err := os.ReadFile(filepath.Join(dir, "pid"))
	if err != nil {
		return // it never began
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Error(err)
		return
	}
	_ = syscall.Kill(pid, syscall.SIGTERM) // it may have ended
	stack.Eventually(t, 10*time.Second, func() error {
		if err := syscall.Kill(pid, 0); err == nil {
			return fmt.Errorf("chromium, process %d, runs on", pid)
		}
		return nil
	})
	// Its children write into the profile for a moment longer.
	stack.Eventually(t, 10*time.Second, func() error { return os.RemoveAll(filepath.Join(dir, "profile")) })
}

// tab is the page that a person sees.
type tab struct {
	t       *testing.T
	browser context.Context
	id      target.ID
	ctx     context.Context // of the debugger's session with the tab
	leave   func()          // ends it
}

// attach finds the tab that the browser opened with the login page, once it is there:
// every step on the way takes the last page's script context away.
func attach(t *testing.T, allocated context.Context) *tab {
	t.Helper()
	browser, cancel := chromedp.NewContext(allocated)
	t.Cleanup(cancel)
	b := &tab{t: t, browser: browser}
	stack.Eventually(t, 30*time.Second, func() error {
		all, err := chromedp.Targets(browser)
		for _, page := range all {
			if at, err := url.Parse(page.URL); page.Type == "page" && err == nil && at.Hostname() == "auth.localhost" && at.Path == "/idp/login" {
				b.id = page.TargetID
				return nil
			}
		}
		return errors.Join(errors.New("no tab with the login page"), err)
	})
	b.attach()
	t.Cleanup(func() { b.leave() })
	stack.Eventually(t, 20*time.Second, func() error {
		state, err := chromedp.Run(b.ctx, chromedp.Evaluate[string](`document.readyState`))
		if err == nil && state != "complete" {
			err = fmt.Errorf("the login page is %s", state)
		}
		return err
	})
	return b
}

// attach begins a session of the debugger with the tab, which lasts as long as the
// context of its first command.
func (b *tab) attach() {
	b.t.Helper()
	b.ctx, b.leave = chromedp.NewContext(b.browser, chromedp.WithTargetID(b.id), chromedp.WithDetachOnCancel())
	if _, err := chromedp.Run(b.ctx, chromedp.Location()); err != nil {
		b.t.Fatalf("no session with the browser's tab: %v", err)
	}
}

// do carries out steps. A session of the debugger that hears of a page while it asks
// for it never learns its document, and waits for good; nothing has been sent by then,
// so that the step may begin again in a new session.
func (b *tab) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	for i, step := range steps {
		var err error
		for range 3 {
			ctx, cancel := context.WithTimeout(b.ctx, 15*time.Second)
			err = chromedp.Do(ctx, step)
			cancel()
			if !errors.Is(err, context.DeadlineExceeded) {
				break
			}
			b.t.Logf("step %d waited in vain at %s", i+1, b.where())
			b.leave()
			b.attach()
		}
		if err != nil {
			b.t.Fatalf("in the browser, at %s, step %d: %v", b.where(), i+1, err)
		}
	}
}

func (b *tab) where() string {
	where, _ := chromedp.Run(b.ctx, chromedp.Location())
	where, _, _ = strings.Cut(where, "?")
	return where
}

// logIn types the user's name and a password and waits for what comes then.
func (b *tab) logIn(password, then string) {
	b.t.Helper()
	b.do(
		chromedp.WaitVisible(chromedp.CSS(`input[name=password]`)),
		chromedp.Clear(chromedp.CSS(`input[name=username]`)),
		chromedp.SendKeys(chromedp.CSS(`input[name=username]`), "alice"),
		chromedp.SendKeys(chromedp.CSS(`input[name=password]`), password),
		chromedp.Click(chromedp.CSS(`button.primary`)),
		chromedp.WaitVisible(chromedp.CSS(then)),
	)
}

func (b *tab) click(what, then string) {
	b.t.Helper()
	b.do(chromedp.Click(chromedp.CSS(what)), chromedp.WaitNotPresent(chromedp.CSS(what)), chromedp.WaitVisible(chromedp.CSS(then)))
}

// show takes a screenshot once what is there to see.
func (b *tab) show(name, what string) {
	b.t.Helper()
	b.do(chromedp.WaitVisible(chromedp.CSS(what)))
	png, err := chromedp.Run(b.ctx, chromedp.CaptureScreenshot())
	if err == nil {
		err = os.WriteFile(filepath.Join(b.t.ArtifactDir(), name+".png"), png, 0o600)
	}
	if err != nil {
		b.t.Errorf("screenshot %q: %v", name, err)
	}
}

func (b *tab) text(what string) string {
	b.t.Helper()
	text, err := chromedp.Run(b.ctx, chromedp.Text(chromedp.CSS(what)))
	if err != nil {
		b.t.Fatal(err)
	}
	return text
}

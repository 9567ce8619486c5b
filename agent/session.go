package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"sallyport"
	"sallyport/agent/forward"
	"sallyport/agent/keys"
	"sallyport/agent/login"
)

const (
	// clockTick is how often the wall clock is compared with what is due. Timers
	// stand still while a laptop sleeps; the wall clock does not.
	clockTick = 5 * time.Second
	// retryFirst and retryMost bound the pause between renewals that fail.
	retryFirst = time.Second
	retryMost  = 5 * time.Minute
	// askAgain is how long a person who refused a login is left in peace, while
	// programs go on connecting.
	askAgain = 10 * time.Second
)

// liveSession returns a session with a certificate that is valid now. With force
// it gets a new certificate whatever the clock says: the gateway did not like the
// old one.
func (a *Agent) liveSession(ctx context.Context, force bool) (*login.Session, error) {
	if err := a.started(ctx); err != nil {
		return nil, err
	}
	if s := a.Session(); s != nil && !force && !s.Expired(time.Now()) {
		return s, nil
	}
	return a.renew(ctx, true)
}

// renew gets a certificate, and, if ask is set and the session is over, a new
// session. Everybody who needs one meanwhile waits for the same work.
func (a *Agent) renew(ctx context.Context, ask bool) (*login.Session, error) {
	s, err := share(a, ctx, &a.renewing, a.renewOnce)
	if err == nil || !ask || sallyport.OutcomeOf(err) != sallyport.OutcomeLogin || ctx.Err() != nil {
		return s, err
	}
	return share(a, ctx, &a.renewing, func(life context.Context) (*login.Session, error) {
		return a.askLogin(life, err)
	})
}

// renewOnce asks authd for a certificate of the profile's session.
func (a *Agent) renewOnce(ctx context.Context) (*login.Session, error) {
	p, err := a.Profile()
	if err != nil {
		return nil, err
	}
	if p.Session == "" {
		return nil, notLoggedIn(p)
	}
	client, err := a.client(ctx, p, false)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	defer a.during("the login service " + p.Authd)()
	s, err := client.Renew(ctx, p.Session, p.Gateways)
	if err != nil {
		return nil, err
	}
	return s, a.keep(p, s)
}

// keep puts a session into use and onto disk.
func (a *Agent) keep(p Profile, s *login.Session) error {
	a.mu.Lock()
	a.session, a.refused = s, nil
	a.mu.Unlock()
	return p.granted(s).save(a.dir)
}

func (a *Agent) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.session = nil
}

// client returns a client of the profile's authd.
func (a *Agent) client(ctx context.Context, p Profile, createKey bool) (*login.Client, error) {
	key, err := a.deviceKey(ctx, createKey)
	if errors.Is(err, keys.ErrNone) {
		return nil, notLoggedIn(p)
	}
	if err != nil {
		return nil, err
	}
	base, err := login.ParseURL(p.Authd)
	if err != nil {
		return nil, err
	}
	return login.NewClient(base, p.CA, key)
}

func notLoggedIn(p Profile) error {
	hint := "run: agent login"
	if p.Authd == "" {
		hint = "run: agent login https://…, with the address that your administrator gave you"
	}
	return &sallyport.Error{Outcome: sallyport.OutcomeLogin, Code: forward.CodeNoLogin, Message: "not logged in", Hint: hint}
}

// askLogin asks the person, one at a time on this machine. cause is why a login
// is needed.
func (a *Agent) askLogin(ctx context.Context, cause error) (*login.Session, error) {
	p, err := a.Profile()
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	refused, until := a.refused, a.until
	a.mu.Unlock()
	if refused != nil && time.Now().Before(until) {
		return nil, refused
	}
	o, err := a.howToAsk(p, cause)
	if err != nil {
		return nil, err
	}
	unlock, err := a.lockLogin(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if now, err := a.Profile(); err == nil && now.Session != p.Session && now.Session != "" {
		return a.renewOnce(ctx) // another process was faster
	}
	s, err := a.login(ctx, p, o)
	if sallyport.OutcomeOf(err) == sallyport.OutcomeLogin {
		a.mu.Lock()
		a.refused, a.until = err, time.Now().Add(askAgain)
		a.mu.Unlock()
	}
	return s, err
}

// howToAsk returns an error of code CodeNoLogin where nobody can be asked, or
// where it is not known whom to ask.
func (a *Agent) howToAsk(p Profile, cause error) (login.Options, error) {
	if a.cfg.Ask == nil || p.Authd == "" {
		return login.Options{}, needed(p, cause)
	}
	o, err := a.cfg.Ask()
	if err != nil {
		return o, needed(p, cause)
	}
	return o, nil
}

func needed(p Profile, cause error) error {
	var e *sallyport.Error
	if !errors.As(cause, &e) || e.Code == forward.CodeNoLogin {
		return notLoggedIn(p)
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeLogin, Code: forward.CodeNoLogin,
		Message: "login needed: " + e.Message, Hint: "run: agent login", Err: e.Err,
	}
}

func (a *Agent) lockLogin(ctx context.Context) (unlock func(), err error) {
	defer a.during("a login that another agent of yours has asked for")()
	return a.dir.Lock(ctx, "login.lock")
}

// login runs the browser's flow and keeps its session.
func (a *Agent) login(ctx context.Context, p Profile, o login.Options) (*login.Session, error) {
	client, err := a.client(ctx, p, true)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	defer a.during("you to log in in the browser")()
	s, err := client.Login(ctx, o)
	if err != nil {
		return nil, err
	}
	if o.Extend != "" && s.Session != o.Extend {
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable, Code: "authd.bad_answer",
			Message: "the login service made another session instead of prolonging this one",
		}
	}
	return s, a.keep(p, s)
}

// LoginRequest is what "agent login" was told.
type LoginRequest struct {
	// Authd is the login service's URL; empty: that of the profile.
	Authd string
	// CA is a PEM bundle that signs its certificate; nil: that of the profile if
	// the URL is the same, else the system's roots.
	CA []byte
	// PostureFile is kept with the profile; nil: as it was.
	PostureFile *string
	Options     login.Options
}

// Login asks the person now. It needs no Run.
func (a *Agent) Login(ctx context.Context, r LoginRequest) (Profile, error) {
	p, err := a.Profile()
	if err != nil {
		return p, err
	}
	if p, err = r.apply(p); err != nil {
		return p, err
	}
	unlock, err := a.lockLogin(ctx)
	if err != nil {
		return p, err
	}
	defer unlock()
	s, err := a.login(ctx, p, r.Options)
	if err != nil {
		return p, err
	}
	return p.granted(s), nil
}

func (r LoginRequest) apply(p Profile) (Profile, error) {
	if r.Authd == "" && p.Authd == "" {
		return p, usage("usage.login", "which login service?", "agent login https://auth.corp.example")
	}
	if r.Authd != "" {
		base, err := login.ParseURL(r.Authd)
		if err != nil {
			return p, err
		}
		if base.String() != p.Authd {
			p = Profile{Authd: base.String(), PostureFile: p.PostureFile}
		}
	}
	if r.CA != nil {
		p.CA = string(r.CA)
	}
	if r.PostureFile != nil {
		p.PostureFile = *r.PostureFile
	}
	return p, nil
}

// Extend logs in again ahead of time: same session, same user, later end. Nothing
// that is open is dropped. It needs no Run.
func (a *Agent) Extend(ctx context.Context, o login.Options) (Profile, error) {
	p, err := a.Profile()
	if err != nil {
		return p, err
	}
	if p.Session == "" {
		return p, notLoggedIn(p)
	}
	o.Extend = p.Session
	return a.Login(ctx, LoginRequest{Options: o})
}

// Logout ends the profile's session at authd and forgets it. Not being logged in
// is no error. It needs no Run.
func (a *Agent) Logout(ctx context.Context) (was Profile, err error) {
	p, err := a.Profile()
	if err != nil || p.Session == "" {
		return p, err
	}
	client, err := a.client(ctx, p, false)
	if err != nil {
		return p, err
	}
	defer client.Close()
	defer a.during("the login service " + p.Authd)()
	if err := client.Logout(ctx, p.Session); err != nil {
		return p, fmt.Errorf("still logged in: %w", err)
	}
	a.forget()
	return p, p.loggedOut().save(a.dir)
}

// renewLoop renews at half-life, and tries again with growing pauses while authd
// is away: the session does not end with the certificate.
func (a *Agent) renewLoop(ctx context.Context) {
	tick := time.NewTicker(clockTick)
	defer tick.Stop()
	var notBefore time.Time
	pause := retryFirst
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// Round drops the monotonic reading, which sleeps with the machine.
		now := time.Now().Round(0)
		s := a.Session()
		if s == nil || now.Before(s.RenewAt()) || now.Before(notBefore) {
			continue
		}
		_, err := a.renew(ctx, false)
		switch {
		case err == nil:
			pause = retryFirst
		case sallyport.OutcomeOf(err) == sallyport.OutcomeLogin:
			a.forget()
			a.cfg.Say("the session is over; the next connection asks for a login")
		default:
			a.cfg.Log.Warn("certificate not renewed, trying again", "error", err, "pause", pause)
			notBefore = now.Add(pause/2 + rand.N(pause))
			pause = min(2*pause, retryMost)
		}
	}
}

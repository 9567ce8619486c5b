package agent

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"sallyport"
	"sallyport/agent/keys"
	"sallyport/agent/login"
	"sallyport/agent/posture"
	"sallyport/agent/state"
)

// Agent is one person's agent in one process.
type Agent struct {
	cfg   Config
	state *state.Dir // all profiles
	dir   *state.Dir // this one

	running chan struct{} // closed when Run has started
	life    context.Context
	tasks   sync.WaitGroup // goroutines of Run

	keyOnce sync.Mutex // one makes or reads the key
	key     *keys.Key

	mu       sync.Mutex
	phases   []*phase
	ended    bool           // Run is over: no new tasks
	session  *login.Session // nil: none in this process yet
	renewing *call[*login.Session]
	refused  error     // of the last login that a person did not finish
	until    time.Time // nobody is asked again before
	link     *link     // nil: no carrier
	dialling *call[*link]
	// URLs of the gateway that the newest link goes to, and of the one that was
	// given up last.
	goodGateway, badGateway string

	owed       chan struct{} // capacity 1: a posture report is due
	factsKnown chan struct{} // closed after the first collection
	factsOnce  sync.Once
	facts      map[string]sallyport.Fact // guarded by mu
	reading    int                       // counts readings of facts; guarded by mu
	reporter   *posture.Reporter         // guarded by mu
}

// New opens the profile's directory. It reads no key and reaches nobody.
func New(cfg Config) (*Agent, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	root, err := state.Open(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	profiles, err := root.Sub("profiles")
	if err != nil {
		return nil, err
	}
	defer profiles.Close()
	dir, err := profiles.Sub(cfg.Profile)
	if err != nil {
		return nil, err
	}
	return &Agent{cfg: cfg, state: root, dir: dir, running: make(chan struct{}), owed: make(chan struct{}, 1), factsKnown: make(chan struct{})}, nil
}

// Close releases the directories.
func (a *Agent) Close() error { return errors.Join(a.dir.Close(), a.state.Close()) }

// Profile reads the profile from disk: another process may have changed it.
func (a *Agent) Profile() (Profile, error) { return loadProfile(a.dir) }

// Profiles returns the names of all profiles.
func (a *Agent) Profiles() ([]string, error) {
	profiles, err := a.state.Sub("profiles")
	if err != nil {
		return nil, err
	}
	defer profiles.Close()
	return profiles.Names()
}

// Run keeps the session renewed, the posture reported and the carrier's events
// read until ctx ends; it returns nil then. What opens flows or asks the gateway
// waits until Run has started. Call it once.
func (a *Agent) Run(ctx context.Context) error {
	source, err := a.postureSource()
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	a.life = ctx
	close(a.running)
	a.tasks.Go(func() { a.renewLoop(ctx) })
	a.tasks.Go(func() { source.Watch(ctx, a.learn) })
	a.tasks.Go(func() { a.reportLoop(ctx) })
	<-ctx.Done()
	a.mu.Lock()
	l := a.link
	a.link, a.ended = nil, true
	a.mu.Unlock()
	if l != nil {
		l.carrier.Close()
	}
	a.tasks.Wait()
	return nil
}

// started waits for Run.
func (a *Agent) started(ctx context.Context) error {
	select {
	case <-a.running:
		return a.life.Err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// deviceKey reads the device key; a person without one has to log in, which makes
// it.
func (a *Agent) deviceKey(ctx context.Context, create bool) (*keys.Key, error) {
	a.keyOnce.Lock()
	defer a.keyOnce.Unlock()
	if a.key != nil {
		return a.key, nil
	}
	defer a.during("the keyring")()
	o := keys.Options{Where: a.cfg.KeyStore}
	read := keys.Load
	if create {
		read = keys.LoadOrCreate
	}
	k, err := read(ctx, a.dir, o)
	if err == nil {
		a.key = k
	}
	return k, err
}

// DeviceKey describes the device key; keys.ErrNone if there is none yet.
func (a *Agent) DeviceKey(ctx context.Context) (*keys.Key, error) { return a.deviceKey(ctx, false) }

// postureSource reads facts of this machine and of the posture file, if one is
// named here or was at the login.
func (a *Agent) postureSource() (*posture.Source, error) {
	file := a.cfg.PostureFile
	if file == "" {
		p, err := a.Profile()
		if err != nil {
			return nil, err
		}
		file = p.PostureFile
	}
	protection := ""
	if k, err := a.deviceKey(context.Background(), false); err == nil {
		protection = k.Protection
	}
	return posture.Open(posture.ThisMachine(Version, protection), file)
}

// Posture opens what the agent would report, for showing it.
func (a *Agent) Posture() (*posture.Source, error) { return a.postureSource() }

// learn takes newly read facts.
func (a *Agent) learn(facts map[string]sallyport.Fact) {
	a.mu.Lock()
	a.facts = facts
	a.reading++
	a.mu.Unlock()
	a.factsOnce.Do(func() { close(a.factsKnown) })
	a.owePosture()
}

// Facts returns what was read last.
func (a *Agent) Facts() map[string]sallyport.Fact {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.facts)
}

// Session returns the session of this process, nil before there is one.
func (a *Agent) Session() *login.Session {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.session
}

// phase is something that the agent waits for.
type phase struct {
	what  string
	since time.Time
}

// during says that the agent waits for what, until the returned func is called.
func (a *Agent) during(what string) (done func()) {
	p := &phase{what, time.Now()}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.phases = append(a.phases, p)
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.phases = slices.DeleteFunc(a.phases, func(q *phase) bool { return q == p })
	}
}

// WaitsFor says what the agent waits for, the newest if for several things, and
// for how long already; empty if nothing.
func (a *Agent) WaitsFor() (what string, since time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.phases) == 0 {
		return "", 0
	}
	p := a.phases[len(a.phases)-1]
	return p.what, time.Since(p.since)
}

// call is one piece of work that several goroutines wait for.
type call[T any] struct {
	done  chan struct{}
	value T
	err   error
}

// share joins the call in *slot or starts one; *slot is guarded by a.mu. The work
// runs for the agent's life, not for that of whoever asked first.
func share[T any](a *Agent, ctx context.Context, slot **call[T], work func(context.Context) (T, error)) (T, error) {
	a.mu.Lock()
	c := *slot
	if c == nil && a.ended {
		a.mu.Unlock()
		var none T
		return none, context.Canceled
	}
	if c == nil {
		c = &call[T]{done: make(chan struct{})}
		*slot = c
		a.tasks.Go(func() {
			c.value, c.err = work(a.life)
			a.mu.Lock()
			*slot = nil
			a.mu.Unlock()
			close(c.done)
		})
	}
	a.mu.Unlock()
	select {
	case <-c.done:
		return c.value, c.err
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
}

// Ports returns the memory of local ports.
func (a *Agent) Ports() *Ports { return &Ports{dir: a.dir} }

// Ports remembers local ports in the profile. It implements forward.Memory.
type Ports struct{ dir *state.Dir }

const portsFile = "ports.json"

// Port returns the port that the target had last; 0 if none.
func (p *Ports) Port(target string) uint16 {
	var ports map[string]uint16
	p.dir.ReadJSON(portsFile, &ports)
	return ports[target]
}

// Remember notes the port. That it may fail costs a person one other port.
func (p *Ports) Remember(target string, port uint16) {
	ports := map[string]uint16{}
	p.dir.ReadJSON(portsFile, &ports)
	if ports[target] != port {
		ports[target] = port
		p.dir.WriteJSON(portsFile, ports)
	}
}

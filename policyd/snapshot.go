package policyd

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport"
	"sallyport/internal/fault"
	"sallyport/policyd/policy"
)

// kinds are the records that decisions need.
var kinds = []sallyport.Kind{
	sallyport.KindLogin, sallyport.KindSession, sallyport.KindUser, sallyport.KindDirectoryUser,
	sallyport.KindDevice, sallyport.KindPosture, sallyport.KindRecord, sallyport.KindConfig, sallyport.KindTrust,
}

// held is a record's payload as the snapshot keeps it. It never changes.
type held[T any] struct {
	id       string
	value    T
	revision sallyport.Revision
	expires  instant // of the record; 0: never
}

func hold[T any](r *sallyport.Record, value T) *held[T] {
	return &held[T]{r.ID, value, r.Revision, instantOf(r.Expires)}
}

func (h *held[T]) key() string { return h.id }

// expired reports whether the record reads as missing at now.
func (h *held[T]) expired(now time.Time) bool { return h.expires.passed(now) }

// directory is a DirectoryUser with its groups made ready for questions.
type directory struct {
	sallyport.DirectoryUser
	set   policy.Groups
	names []string // for people
}

// rules is a configuration that loaded.
type rules struct {
	set       *policy.Set
	config    *sallyport.Config
	revision  sallyport.Revision
	ttl       time.Duration // of posture
	renewal   time.Duration // after which an unchanged report is written again
	forbidden []string
}

// snapshot is everything that decisions are made from, at one revision. It is
// immutable.
type snapshot struct {
	epoch    sallyport.Epoch
	revision sallyport.Revision
	common   *common

	logins    table[*held[login]]
	sessions  table[*held[session]]
	users     table[*held[user]]
	directory table[*held[directory]]
	devices   table[*held[sallyport.Device]]
	postures  table[*held[sallyport.Posture]]
	externals table[*held[sallyport.External]]

	rules  *rules           // nil: none ever loaded
	broken error            // why the newest configuration did not load, or is missing
	trust  *sallyport.Trust // nil: none yet
}

// draft is the next snapshot under construction.
type snapshotDraft struct {
	cfg Config
	snapshot

	logins    draft[*held[login]]
	sessions  draft[*held[session]]
	users     draft[*held[user]]
	directory draft[*held[directory]]
	devices   draft[*held[sallyport.Device]]
	postures  draft[*held[sallyport.Posture]]
	externals draft[*held[sallyport.External]]

	known   func(text string) *policy.Policy // Deps.Known
	now     time.Time
	silent  bool // nobody asks for changes: the whole is compared with what was before
	changes []sallyport.SubjectChange
	faults  []error // records that could not be read
}

func (s *snapshot) edit(cfg Config, now time.Time) *snapshotDraft {
	d := &snapshotDraft{
		cfg: cfg, snapshot: *s, now: now,
		logins: s.logins.edit(), sessions: s.sessions.edit(), users: s.users.edit(),
		directory: s.directory.edit(), devices: s.devices.edit(), postures: s.postures.edit(), externals: s.externals.edit(),
	}
	if d.common == nil {
		d.common = new(common)
	}
	return d
}

func (d *snapshotDraft) finish() *snapshot {
	s := d.snapshot
	s.logins, s.sessions, s.users = d.logins.table, d.sessions.table, d.users.table
	s.directory, s.devices, s.postures = d.directory.table, d.devices.table, d.postures.table
	s.externals = d.externals.table
	return &s
}

// apply takes one record in and notes what changed, in words.
func (d *snapshotDraft) apply(r sallyport.Record) {
	value, err := d.decode(&r)
	d.put(&r, value, err)
}

// applyAll is apply for many records; they are decoded side by side, which takes
// longer than to put them where they belong.
func (d *snapshotDraft) applyAll(records []sallyport.Record) {
	type decoded struct {
		value any
		err   error
	}
	all := make([]decoded, len(records))
	var workers sync.WaitGroup
	share := (len(records) + runtime.GOMAXPROCS(0) - 1) / runtime.GOMAXPROCS(0)
	for first := 0; first < len(records); first += share {
		workers.Go(func() {
			for i := first; i < min(first+share, len(records)); i++ {
				all[i].value, all[i].err = d.decode(&records[i])
			}
		})
	}
	workers.Wait()
	for i := range records {
		d.put(&records[i], all[i].value, all[i].err)
	}
}

// decode reads a record's payload as its table keeps it: a *held of the table's
// type; nil for one that was deleted or that no table keeps. Several may be decoded
// at once.
func (d *snapshotDraft) decode(r *sallyport.Record) (any, error) {
	if r.Deleted {
		return nil, nil
	}
	switch r.Kind {
	case sallyport.KindLogin:
		return d.common.login(r)
	case sallyport.KindSession:
		return d.common.session(r)
	case sallyport.KindUser:
		return d.common.user(r)
	case sallyport.KindDirectoryUser:
		return decodeDirectory(r)
	case sallyport.KindDevice:
		return whole[sallyport.Device](r)
	case sallyport.KindPosture:
		return whole[sallyport.Posture](r)
	case sallyport.KindRecord:
		return whole[sallyport.External](r)
	}
	return nil, nil
}

// put is apply for a record that is decoded.
func (d *snapshotDraft) put(r *sallyport.Record, value any, err error) {
	if err != nil {
		d.faults = append(d.faults, err)
		value = nil
	}
	if why := d.place(r, value); why != "" {
		if subject, ok := sallyport.SubjectOf(r.Kind, r.ID); ok {
			d.changes = append(d.changes, sallyport.SubjectChange{Subject: subject, Revision: r.Revision, Why: why})
		}
	}
}

// place puts a decoded record where it belongs and says what that changes.
func (d *snapshotDraft) place(r *sallyport.Record, value any) (why string) {
	switch r.Kind {
	case sallyport.KindLogin:
		return take(&d.logins, r.ID, value, d.silent, d.loginWords)
	case sallyport.KindSession:
		return take(&d.sessions, r.ID, value, d.silent, d.sessionWords)
	case sallyport.KindUser:
		return take(&d.users, r.ID, value, d.silent, userWords)
	case sallyport.KindDirectoryUser:
		return take(&d.directory, r.ID, value, d.silent, directoryWords)
	case sallyport.KindDevice:
		return take(&d.devices, r.ID, value, d.silent, deviceWords)
	case sallyport.KindPosture:
		return take(&d.postures, r.ID, value, d.silent, postureWords)
	case sallyport.KindRecord:
		return take(&d.externals, r.ID, value, d.silent, externalWords)
	case sallyport.KindConfig:
		return d.applyConfig(*r)
	case sallyport.KindTrust:
		d.applyTrust(*r)
	}
	return ""
}

// take puts a *held[T] into its table, nil taking out what stands there, and returns
// what words says of the change; empty: nothing that a decision could depend on. So
// a payload that cannot be read counts as deleted.
func take[T any](t *draft[*held[T]], id string, value any, silent bool, words func(old, new *held[T]) string) (why string) {
	h, _ := value.(*held[T])
	if !silent {
		old, _ := t.get(id)
		why = words(old, h)
	}
	if h == nil {
		t.delete(id)
	} else {
		t.set(h)
	}
	return why
}

// whole decodes a record whose table keeps everything of it.
func whole[T any](r *sallyport.Record) (*held[T], error) {
	v, err := sallyport.Decode[T](*r)
	if err != nil {
		return nil, err
	}
	return hold(r, v), nil
}

func decodeDirectory(r *sallyport.Record) (*held[directory], error) {
	u, err := sallyport.Decode[sallyport.DirectoryUser](*r)
	if err != nil {
		return nil, err
	}
	d := directory{DirectoryUser: u, set: policy.NewGroups(u.Groups)}
	for _, g := range u.Groups {
		d.names = append(d.names, groupName(g))
	}
	return hold(r, d), nil
}

func groupName(g sallyport.Group) string {
	if g.Name != "" {
		return g.Name
	}
	return g.ID
}

// applyConfig compiles a configuration. One that does not load leaves the old
// one in force; so does its deletion: no policy must never mean another one.
func (d *snapshotDraft) applyConfig(r sallyport.Record) string {
	if r.ID != "current" {
		return ""
	}
	if r.Deleted {
		d.broken = fmt.Errorf("the configuration was deleted at revision %d", r.Revision)
		return ""
	}
	c, err := sallyport.Decode[sallyport.Config](r)
	if err == nil {
		var next *rules
		if next, err = compile(d.cfg, &c, r.Revision, d.reuse()); err == nil {
			d.rules, d.broken = next, nil
			return "policy changed"
		}
	}
	d.broken = fmt.Errorf("the configuration of revision %d%s does not load: %w", r.Revision, origin(&c), located(err, c.Routes))
	return ""
}

// origin is where a configuration came from, for whoever has to repair it.
func origin(c *sallyport.Config) string {
	switch {
	case c.RollbackTo != 0:
		return fmt.Sprintf(" (a rollback to %d)", c.RollbackTo)
	case c.Source != "":
		return fmt.Sprintf(" (from %.200s)", c.Source)
	}
	return ""
}

// located puts the route's own words beside its number: people look for the name,
// and the record knows no lines of the file that it came from.
func located(err error, routes []sallyport.Route) error {
	var faults fault.List
	if !errors.As(err, &faults) {
		return err
	}
	named := slices.Clone(faults)
	for i, f := range named {
		var n int
		if _, err := fmt.Sscanf(f.Key, "routes[%d]", &n); err == nil && n < len(routes) && !strings.HasSuffix(f.Key, ".from") {
			named[i].Key = fmt.Sprintf("%s of %.100s", f.Key, routes[n].From)
		}
	}
	return named
}

// reuse finds policies that need not be read again: those in force, and what else
// this process has read.
func (d *snapshotDraft) reuse() func(text string) *policy.Policy {
	old := d.rules
	if old == nil {
		return d.known
	}
	return func(text string) *policy.Policy {
		if p := old.set.Known(text); p != nil || d.known == nil {
			return p
		}
		return d.known(text)
	}
}

// compile makes a configuration ready; known finds policies that need not be read.
func compile(cfg Config, c *sallyport.Config, rev sallyport.Revision, known func(text string) *policy.Policy) (*rules, error) {
	opts := policy.Options{
		Sources: c.PostureSources, TTL: c.PostureTTL, Forbidden: c.Forbidden, ExplainGroups: c.ExplainGroups,
		Known: known,
	}
	if len(opts.Sources) == 0 {
		opts.Sources = cfg.PostureSources
	}
	if opts.TTL == 0 {
		opts.TTL = cfg.PostureTTL
	}
	set, err := policy.Compile(c.Routes, opts)
	if err != nil {
		return nil, err
	}
	return &rules{
		set: set, config: c, revision: rev, ttl: opts.TTL,
		renewal: set.ShortestAge() / 3, forbidden: c.Forbidden,
	}, nil
}

func (d *snapshotDraft) applyTrust(r sallyport.Record) {
	if r.ID != "current" || r.Deleted {
		return // gateways go on with the last bundle: its certificates still need live sessions
	}
	t, err := sallyport.Decode[sallyport.Trust](r)
	if err != nil {
		d.faults = append(d.faults, err)
		return
	}
	d.trust = &t
}

// person is who asks, with the memory for what a snapshot keeps in another form. It
// may be used again for the next question.
type person struct {
	policy.Person
	session sallyport.Session
	login   sallyport.Login
}

// person fills p with the live session id and what stands behind it. Otherwise
// absent says, for people, why there is none. Whatever is missing, expired,
// disabled, names somebody else or itself otherwise, ends the session.
func (s *snapshot) person(id sallyport.SessionID, revoked *overrides, now time.Time, p *person) (absent string) {
	session, ok := s.sessions.get(string(id))
	switch {
	case id == "":
		return "no session"
	case !ok:
		return "session revoked"
	case session.expired(now), !now.Before(session.value.expires.time()):
		return "session expired"
	}
	login, ok := s.logins.get(string(session.value.login))
	switch {
	case !ok, login.value.user != session.value.user:
		return "login revoked"
	case login.expired(now), !now.Before(login.value.expires.time()):
		return "login expired"
	}
	userID := session.value.user.Value()
	user, ok := s.users.get(string(userID))
	switch {
	case !ok, user.expired(now), user.value.ID != userID:
		return "user removed"
	case user.value.Disabled:
		return "user disabled"
	}
	session.value.write(&p.session, session.id)
	login.value.write(&p.login, login.id)
	p.Person = policy.Person{Session: &p.session, Login: &p.login, User: &user.value.User, Email: user.value.Email}
	if absent := s.device(&p.Person, now); absent != "" {
		return absent
	}
	if why := revoked.end(&p.Person); why != "" {
		return why
	}
	if dir, ok := s.directory.get(string(user.value.ID)); ok && !dir.expired(now) {
		p.Groups = dir.value.set
		if dir.value.Email != "" {
			p.Email = dir.value.Email
		}
	}
	p.ExpiresIn = earliest(session.value.expires, login.value.expires, session.expires, login.expires).until(now)
	return ""
}

// device fills in the device of p's session, if it has one.
func (s *snapshot) device(p *policy.Person, now time.Time) (absent string) {
	id := p.Session.Device
	if id == "" {
		return ""
	}
	device, ok := s.devices.get(string(id))
	switch {
	case !ok, device.expired(now), device.value.ID != id:
		return "device removed"
	case device.value.Revoked:
		return "device revoked"
	}
	p.Device = &device.value
	if posture, ok := s.postures.get(string(id)); ok && !posture.expired(now) && posture.value.Device == id {
		p.Posture = &posture.value
	}
	return ""
}

// external returns the live external record of a type and id.
func (s *snapshot) external(typ, id string, now time.Time) (*held[sallyport.External], bool) {
	r, ok := s.externals.get(sallyport.ExternalID(typ, id))
	if !ok || r.expired(now) || r.value.Type != typ || r.value.ID != id {
		return nil, false
	}
	return r, true
}

// identity is p as people may see it.
func (s *snapshot) identity(p *policy.Person) sallyport.Identity {
	id := sallyport.Identity{
		Session: p.Session.ID, Login: p.Session.Login, User: p.User.ID,
		Email: p.Email, Name: p.User.Name, Device: p.Session.Device, ExpiresIn: p.ExpiresIn,
	}
	if dir, ok := s.directory.get(string(p.User.ID)); ok {
		id.Groups = dir.value.names
	}
	return id
}

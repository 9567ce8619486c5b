package authd

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"maps"
	"net"
	"slices"
	"time"

	"sallyport"
	"sallyport/internal/oidcrp"
	"sallyport/proto/proof"
)

type ctx = context.Context

// get reads a record's payload and the record itself.
func get[T any](ctx ctx, records sallyport.Records, kind sallyport.Kind, id string) (T, sallyport.Record, error) {
	rec, err := records.Get(ctx, kind, id)
	if err != nil {
		var none T
		return none, rec, err
	}
	v, err := sallyport.Decode[T](rec)
	return v, rec, err
}

// find is get for records that may be missing; the condition says what it found,
// for the op that replaces it.
func find[T any](ctx ctx, records sallyport.Records, kind sallyport.Kind, id string) (v T, payload []byte, as sallyport.Condition, err error) {
	v, rec, err := get[T](ctx, records, kind, id)
	if errors.Is(err, sallyport.ErrNotFound) {
		return v, nil, sallyport.Condition{Absent: true}, nil
	}
	return v, rec.Payload, sallyport.Condition{Revision: rec.Revision}, err
}

// changed appends op unless it would write what stands there already: each write
// wakes every gateway.
func changed(batch []sallyport.Op, op sallyport.Op, stored []byte) []sallyport.Op {
	if bytes.Equal(op.Payload, stored) {
		return batch
	}
	return append(batch, op)
}

// admit refuses people who may not log in here whatever the identity provider
// says, and returns what is known of the others.
func (s *Server) admit(ctx ctx, person oidcrp.Identity) (stored []byte, as sallyport.Condition, err error) {
	user, stored, as, err := find[sallyport.User](ctx, s.deps.Records, sallyport.KindUser, person.Subject)
	switch {
	case err != nil:
		return nil, as, err
	case user.Issuer != "" && user.Issuer != person.Issuer:
		// Another provider's users may have the same ids and be other people.
		return nil, as, refusal("login.issuer_changed", "your account belongs to another identity provider; an administrator must remove it first", nil)
	case user.Disabled:
		return nil, as, refusal("login.user_disabled", "your account is disabled", nil)
	}
	return stored, as, nil
}

func errDeviceRevoked() error {
	return refusal("login.device_revoked", "this device was revoked; an administrator can reinstate it", nil)
}

// opening is a login about to be written.
type opening struct {
	agent         agentRequest
	person        oidcrp.Identity
	key           proof.Key
	keyProtection string
	address       string
}

// composed is the batch of a login and what it makes.
type composed struct {
	batch   []sallyport.Op
	session sallyport.Session
	user    sallyport.User
	groups  []string
}

// compose reads what stands and builds the batch that makes the login: user,
// groups, device, login, session. Each op requires what was read, so that of two
// concurrent changes one is composed again.
func (s *Server) compose(ctx ctx, o opening) (composed, error) {
	groups, err := s.groupsOf(o.person)
	if err != nil {
		return composed{}, err
	}
	stored, as, err := s.admit(ctx, o.person)
	if err != nil {
		return composed{}, err
	}
	user := userOf(o.person)
	op := sallyport.Put(sallyport.KindUser, string(user.ID), user)
	op.If = as
	batch := changed(nil, op, stored)
	if batch, err = s.composeGroups(ctx, batch, user, groups); err != nil {
		return composed{}, err
	}
	if batch, err = s.composeDevice(ctx, batch, o); err != nil {
		return composed{}, err
	}
	made, err := s.composeSession(ctx, o, user)
	if err != nil {
		return composed{}, err
	}
	made.batch, made.groups = append(batch, made.batch...), groups
	return made, nil
}

func userOf(p oidcrp.Identity) sallyport.User {
	return sallyport.User{
		ID: sallyport.UserID(p.Subject), Issuer: p.Issuer,
		Email: p.Email, EmailVerified: p.EmailVerified, Name: p.Name, Claims: p.Claims,
	}
}

// groupsOf are the groups of the ID token. The embedded provider is asked again:
// its configuration may have changed since it made the token.
func (s *Server) groupsOf(p oidcrp.Identity) ([]string, error) {
	if s.idp == nil {
		return p.Groups, nil
	}
	u, ok := s.idp.User(p.Subject)
	if !ok {
		return nil, errUserUnknown()
	}
	return u.Groups, nil
}

func directoryUser(id sallyport.UserID, email string, groups []string) sallyport.DirectoryUser {
	d := sallyport.DirectoryUser{User: id, Email: email}
	for _, g := range groups {
		d.Groups = append(d.Groups, sallyport.Group{ID: g})
	}
	return d
}

func (s *Server) composeGroups(ctx ctx, batch []sallyport.Op, user sallyport.User, groups []string) ([]sallyport.Op, error) {
	_, stored, as, err := find[sallyport.DirectoryUser](ctx, s.deps.Records, sallyport.KindDirectoryUser, string(user.ID))
	if err != nil {
		return nil, err
	}
	op := sallyport.Put(sallyport.KindDirectoryUser, string(user.ID), directoryUser(user.ID, user.Email, groups))
	op.If = as
	return changed(batch, op, stored), nil
}

// composeDevice notes that the user confirmed the key, and how it is kept now.
func (s *Server) composeDevice(ctx ctx, batch []sallyport.Op, o opening) ([]sallyport.Op, error) {
	der, err := x509.MarshalPKIXPublicKey(o.key.Public)
	if err != nil {
		return nil, err
	}
	device, stored, as, err := find[sallyport.Device](ctx, s.deps.Records, sallyport.KindDevice, string(o.key.ID))
	if err != nil {
		return nil, err
	}
	if device.Revoked {
		return nil, errDeviceRevoked()
	}
	device.ID, device.PublicKey = o.key.ID, der
	if o.agent.DeviceName != "" {
		device.Name = o.agent.DeviceName
	}
	device.Type = o.keyProtection
	user := sallyport.UserID(o.person.Subject)
	if _, ok := device.Users[user]; !ok {
		device.Users = maps.Clone(device.Users)
		if device.Users == nil {
			device.Users = make(map[sallyport.UserID]time.Time)
		}
		device.Users[user] = s.now().UTC()
	}
	op := sallyport.Put(sallyport.KindDevice, string(device.ID), device)
	op.If = as
	return changed(batch, op, stored), nil
}

// composeSession makes a login with one session, or prolongs one.
func (s *Server) composeSession(ctx ctx, o opening, user sallyport.User) (composed, error) {
	now := s.now().UTC()
	if o.agent.Extend != "" {
		return s.prolong(ctx, o, user, now)
	}
	l := sallyport.Login{
		ID: sallyport.LoginID(sallyport.NewID("l")), User: user.ID, Issuer: user.Issuer,
		Created: now, Expires: now.Add(s.session.Load().lifetime()), AuthMethods: o.person.AuthMethods,
	}
	session := sallyport.Session{
		ID: sallyport.SessionID(sallyport.NewID("s")), Login: l.ID, User: user.ID, Device: o.key.ID,
		Kind: sallyport.AgentSession, Created: now, Expires: s.sessionEnd(l, now),
		Claims: o.person.Claims, AuthMethods: l.AuthMethods, Address: o.address,
	}
	absent := sallyport.Condition{Absent: true}
	batch, err := s.withToken(ctx, o, &l)
	if err != nil {
		return composed{}, err
	}
	batch = append(batch, putLogin(l, absent), putSession(session, absent))
	return composed{batch: batch, session: session, user: user}, nil
}

// prolong gives a live session a later end, if the same person logged in again on
// the same device.
func (s *Server) prolong(ctx ctx, o opening, user sallyport.User, now time.Time) (composed, error) {
	live, err := s.liveSession(ctx, o.agent.Extend)
	if err != nil {
		return composed{}, err
	}
	session, l := live.session, live.login
	if session.User != user.ID || session.Device != o.key.ID {
		return composed{}, refusal("login.extend_mismatch", "the session belongs to another person or device", nil)
	}
	if end := now.Add(s.session.Load().lifetime()); end.After(l.Expires) {
		l.Expires = end
	}
	l.Authenticated, l.AuthMethods = now, o.person.AuthMethods
	session.Expires, session.AuthMethods = s.sessionEnd(l, now), l.AuthMethods
	session.Claims, session.Address = o.person.Claims, o.address
	batch, err := s.withToken(ctx, o, &l)
	if err != nil {
		return composed{}, err
	}
	batch = append(batch, putLogin(l, live.loginAs), putSession(session, live.sessionAs))
	return composed{batch: batch, session: session, user: user}, nil
}

// withToken begins a batch with the token that the identity provider gave for the
// login, if it did.
func (s *Server) withToken(ctx ctx, o opening, l *sallyport.Login) ([]sallyport.Op, error) {
	if o.person.RefreshToken == "" {
		return nil, nil
	}
	op, err := s.vault.token(ctx, l, o.person.RefreshToken)
	return []sallyport.Op{op}, err
}

// sessionEnd is the login's end, or sooner with an idle limit.
func (s *Server) sessionEnd(l sallyport.Login, now time.Time) time.Time {
	if idle := s.session.Load().Idle; idle > 0 && now.Add(idle).Before(l.Expires) {
		return now.Add(idle)
	}
	return l.Expires
}

func putLogin(l sallyport.Login, as sallyport.Condition) sallyport.Op {
	op := sallyport.Put(sallyport.KindLogin, string(l.ID), l)
	op.Expires, op.If = l.Expires, as
	return op
}

func putSession(s sallyport.Session, as sallyport.Condition) sallyport.Op {
	op := sallyport.Put(sallyport.KindSession, string(s.ID), s)
	op.Expires, op.If = s.Expires, as
	return op
}

// liveSession is a session whose login, user and device live too.
type liveSession struct {
	session   sallyport.Session
	sessionAs sallyport.Condition
	login     sallyport.Login
	loginAs   sallyport.Condition
	user      sallyport.User
	device    sallyport.Device
}

// liveSession reads a session and everything it stands on. Anything missing,
// expired, disabled or revoked means that it is over.
func (s *Server) liveSession(ctx ctx, id sallyport.SessionID) (live liveSession, err error) {
	var rec sallyport.Record
	if live.session, rec, err = get[sallyport.Session](ctx, s.deps.Records, sallyport.KindSession, string(id)); err != nil {
		return live, sessionOver(err)
	}
	live.sessionAs.Revision = rec.Revision
	if live.login, rec, err = get[sallyport.Login](ctx, s.deps.Records, sallyport.KindLogin, string(live.session.Login)); err != nil {
		return live, sessionOver(err)
	}
	live.loginAs.Revision = rec.Revision
	if live.user, _, err = get[sallyport.User](ctx, s.deps.Records, sallyport.KindUser, string(live.session.User)); err != nil {
		return live, sessionOver(err)
	}
	if live.device, _, err = get[sallyport.Device](ctx, s.deps.Records, sallyport.KindDevice, string(live.session.Device)); err != nil {
		return live, sessionOver(err)
	}
	now := s.now()
	if live.user.Disabled || live.device.Revoked || !live.session.Expires.After(now) || !live.login.Expires.After(now) {
		return live, sessionOver(sallyport.ErrNotFound)
	}
	return live, nil
}

// caughtUp looks whether the embedded provider's users changed while a login of
// one was being written: whoever took the change over may not have seen it yet.
func (s *Server) caughtUp(ctx ctx, made composed) error {
	if s.idp == nil {
		return nil
	}
	u, known := s.idp.User(string(made.user.ID))
	if known && slices.Equal(u.Groups, made.groups) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reloadTimeout)
	defer cancel()
	if err := s.syncDirectory(ctx); err != nil {
		return err
	}
	if !known {
		return errUserUnknown()
	}
	return nil
}

func errUserUnknown() error {
	return refusal("login.user_unknown", "your account was removed", nil)
}

// syncBatch is how many changes of the directory are written at once.
const syncBatch = 5_000

// syncDirectory makes the records say of every user what the embedded provider's
// configuration says, at once: groups, and that those who are no longer in it are
// disabled and have no login. Flows that lose their reason by this end within the
// second.
func (s *Server) syncDirectory(ctx ctx) (err error) {
	for range maxAttempts {
		var changes []sallyport.Op
		if changes, err = s.directoryChanges(ctx); err != nil {
			return err
		}
		for batch := range slices.Chunk(changes, syncBatch) {
			if _, err = s.deps.Records.Apply(ctx, batch); err != nil {
				break
			}
		}
		if !errors.Is(err, sallyport.ErrConflict) {
			return err
		}
	}
	return err
}

func (s *Server) directoryChanges(ctx ctx) ([]sallyport.Op, error) {
	now, err := s.people(ctx)
	if err != nil {
		return nil, err
	}
	var batch []sallyport.Op
	for _, u := range s.idp.Users() {
		id := sallyport.UserID(u.ID)
		rec := now.groups[u.ID]
		op := sallyport.Put(sallyport.KindDirectoryUser, u.ID, directoryUser(id, u.Email, u.Groups))
		op.If = sallyport.Condition{Revision: rec.Revision, Absent: rec.Revision == 0}
		batch = changed(batch, op, rec.Payload)
	}
	for _, id := range slices.Sorted(maps.Keys(now.users)) {
		rec := now.users[id]
		user, err := sallyport.Decode[sallyport.User](rec)
		if err != nil {
			return nil, err
		}
		_, configured := s.idp.User(id)
		if user.Issuer != s.issuer {
			continue
		}
		if user.Disabled == configured {
			user.Disabled = !configured
			op := sallyport.Put(sallyport.KindUser, id, user)
			op.If.Revision = rec.Revision
			batch = append(batch, op)
		}
		if configured {
			continue
		}
		// Disabled ends the sessions; this keeps them ended when the user comes back.
		for _, login := range now.logins[user.ID] {
			batch = append(batch, sallyport.Op{Kind: sallyport.KindLogin, ID: login, Delete: true})
		}
	}
	return batch, nil
}

// people are the records of all users, of what the directory says of them, and
// the ids of their logins, by user id.
type people struct {
	users, groups map[string]sallyport.Record
	logins        map[sallyport.UserID][]string
}

func (s *Server) people(ctx ctx) (people, error) {
	p := people{make(map[string]sallyport.Record), make(map[string]sallyport.Record), make(map[sallyport.UserID][]string)}
	errEnd := errors.New("snapshot is complete")
	q := sallyport.WatchRequest{Kinds: []sallyport.Kind{sallyport.KindUser, sallyport.KindDirectoryUser, sallyport.KindLogin}}
	err := s.deps.Records.Watch(ctx, q, func(e sallyport.WatchEvent) error {
		for _, rec := range e.Records {
			switch rec.Kind {
			case sallyport.KindUser:
				p.users[rec.ID] = rec
			case sallyport.KindDirectoryUser:
				p.groups[rec.ID] = rec
			case sallyport.KindLogin:
				// One that cannot be read is none to policyd either.
				if login, err := sallyport.Decode[sallyport.Login](rec); err == nil {
					p.logins[login.User] = append(p.logins[login.User], rec.ID)
				}
			}
		}
		if e.Type == sallyport.WatchEnd {
			return errEnd
		}
		return nil
	})
	if !errors.Is(err, errEnd) {
		return people{}, err
	}
	return p, nil
}

func parsePKIX(der []byte) (crypto.PublicKey, error) { return x509.ParsePKIXPublicKey(der) }

func hostOf(remoteAddr string) string {
	host, _, err := net.SplitHostPort(remoteAddr)
	if err != nil {
		return remoteAddr
	}
	return host
}

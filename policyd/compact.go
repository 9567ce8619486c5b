package policyd

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"runtime"
	"sync"
	"time"
	"unique"
	"weak"

	"sallyport"
)

// Sessions and logins are by far the most records, and the only ones that grow with
// every login. Decoded as they are, a session and its login take 2.2 KB, most of it
// in maps, times and texts that a thousand others have, too. So a snapshot keeps of
// them what decisions and explanations look at, and in as few pieces as possible,
// because the garbage collector visits every piece in every cycle:
//
//   - times are numbers;
//   - an id of a user or device is kept once for all records that name it;
//   - claims and authentication methods are kept once for all records that have
//     the same: they say who somebody is, and that does not change between logins;
//   - a session's id and its login's lie behind each other.
//
// What a question is about is written out as the vocabulary's types before it is
// asked, into memory of the question's own. See docs/adr/0019.

// session is a sallyport.Session without its address, which no decision looks at.
type session struct {
	login            sallyport.LoginID
	user             unique.Handle[sallyport.UserID]
	device           unique.Handle[sallyport.DeviceID]
	claims           *claims
	methods          *methods
	kind             unique.Handle[sallyport.SessionKind]
	created, expires instant
}

// login is a sallyport.Login without its issuer, which no decision looks at.
type login struct {
	user                            unique.Handle[sallyport.UserID]
	methods                         *methods
	created, expires, authenticated instant
}

// user is a sallyport.User whose claims are those of the user's sessions.
type user struct {
	sallyport.User
	claims *claims // keeps them shared
}

// claims and methods belong to many records and are never changed; nil: none.
type (
	claims  map[string]any
	methods []string
)

// write writes s, whose record has the id, out to to.
func (s *session) write(to *sallyport.Session, id string) {
	*to = sallyport.Session{
		ID: sallyport.SessionID(id), Login: s.login, User: s.user.Value(), Device: s.device.Value(), Kind: s.kind.Value(),
		Created: s.created.time(), Expires: s.expires.time(), Claims: valueOf(s.claims), AuthMethods: valueOf(s.methods),
	}
}

// write writes l, whose record has the id, out to to.
func (l *login) write(to *sallyport.Login, id string) {
	*to = sallyport.Login{
		ID: sallyport.LoginID(id), User: l.user.Value(), AuthMethods: valueOf(l.methods),
		Created: l.created.time(), Expires: l.expires.time(), Authenticated: l.authenticated.time(),
	}
}

func valueOf[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// common is what records have in common. It is safe for concurrent use.
type common struct {
	claims  shared[claims]
	methods shared[methods]
}

func (c *common) session(r *sallyport.Record) (*held[session], error) {
	var p sessionPayload
	if !readSession(r.Payload, &p) {
		p = sessionPayload{}
		if err := unmarshal(r, &p); err != nil {
			return nil, err
		}
	}
	if err := named(r, string(p.ID)); err != nil {
		return nil, err
	}
	claims, err := c.claims.of(p.Claims)
	if err != nil {
		return nil, unreadable(r, err)
	}
	methods, err := c.methods.of(p.AuthMethods)
	if err != nil {
		return nil, unreadable(r, err)
	}
	ids := r.ID + string(p.Login)
	h := hold(r, session{
		login: sallyport.LoginID(ids[len(r.ID):]), user: unique.Make(p.User), device: unique.Make(p.Device),
		claims: claims, methods: methods, kind: unique.Make(p.Kind), created: instantOf(p.Created), expires: instantOf(p.Expires),
	})
	h.id = ids[:len(r.ID)]
	return h, nil
}

func (c *common) login(r *sallyport.Record) (*held[login], error) {
	var p loginPayload
	if !readLogin(r.Payload, &p) {
		p = loginPayload{}
		if err := unmarshal(r, &p); err != nil {
			return nil, err
		}
	}
	if err := named(r, string(p.ID)); err != nil {
		return nil, err
	}
	methods, err := c.methods.of(p.AuthMethods)
	if err != nil {
		return nil, unreadable(r, err)
	}
	return hold(r, login{
		user: unique.Make(p.User), methods: methods,
		created: instantOf(p.Created), expires: instantOf(p.Expires), authenticated: instantOf(p.Authenticated),
	}), nil
}

func (c *common) user(r *sallyport.Record) (*held[user], error) {
	var p struct {
		sallyport.User
		Claims json.RawMessage `json:"claims"`
	}
	if err := unmarshal(r, &p); err != nil {
		return nil, err
	}
	claims, err := c.claims.of(p.Claims)
	if err != nil {
		return nil, unreadable(r, err)
	}
	p.User.Claims = valueOf(claims)
	return hold(r, user{p.User, claims}), nil
}

func unmarshal(r *sallyport.Record, v any) error {
	if err := json.Unmarshal(r.Payload, v); err != nil {
		return unreadable(r, err)
	}
	return nil
}

// named refuses a payload that names another record than its own: it was made for
// that one.
func named(r *sallyport.Record, id string) error {
	if id != r.ID {
		return unreadable(r, fmt.Errorf("it is that of %.80q", id))
	}
	return nil
}

func unreadable(r *sallyport.Record, err error) error {
	return fmt.Errorf("%s %s: payload: %w", r.Kind, r.ID, err)
}

// shared keeps JSON values that many records have, each once and for as long as a
// record has it. The zero shared is empty.
type shared[T any] struct {
	mu     sync.Mutex // guards values
	values map[string]weak.Pointer[T]
}

// of returns the value with the JSON text; nil for none and for null.
func (s *shared[T]) of(text []byte) (*T, error) {
	if len(text) == 0 || bytes.Equal(text, []byte("null")) {
		return nil, nil
	}
	s.mu.Lock()
	known := s.values[string(text)].Value()
	s.mu.Unlock()
	if known != nil {
		return known, nil
	}
	v := new(T)
	if err := json.Unmarshal(text, v); err != nil {
		return nil, err
	}
	return s.add(string(text), v), nil
}

// add returns what stands under the text: v, unless somebody was faster.
func (s *shared[T]) add(text string, v *T) *T {
	s.mu.Lock()
	defer s.mu.Unlock()
	if known := s.values[text].Value(); known != nil {
		return known
	}
	if s.values == nil {
		s.values = make(map[string]weak.Pointer[T])
	}
	s.values[text] = weak.Make(v)
	runtime.AddCleanup(v, s.forget, text)
	return v
}

// forget drops a text whose value is gone, unless it has come back.
func (s *shared[T]) forget(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.values[text].Value() == nil {
		delete(s.values, text)
	}
}

// instant is a point in time in nanoseconds since 1970. As in cached, 0 is the zero
// time.
type instant int64

// The span of instants. What lies outside is taken for its end: in either direction
// it means the same for everybody alive.
var (
	firstInstant = time.Unix(0, math.MinInt64)
	lastInstant  = time.Unix(0, math.MaxInt64)
)

func instantOf(t time.Time) instant {
	switch {
	case t.IsZero():
		return 0
	case t.Before(firstInstant):
		return math.MinInt64
	case t.After(lastInstant):
		return math.MaxInt64
	}
	return instant(t.UnixNano())
}

func (i instant) time() time.Time {
	if i == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(i)).UTC()
}

// passed reports whether there is such a time and it is over at now.
func (i instant) passed(now time.Time) bool { return i != 0 && now.UnixNano() >= int64(i) }

// until is how long it is from now to i.
func (i instant) until(now time.Time) time.Duration { return i.time().Sub(now) }

// earliest returns the earliest instant that is not zero.
func earliest(is ...instant) instant {
	var out instant
	for _, i := range is {
		if i != 0 && (out == 0 || i < out) {
			out = i
		}
	}
	return out
}

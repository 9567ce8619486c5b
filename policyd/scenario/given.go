package scenario

import (
	"slices"
	"time"

	"go.yaml.in/yaml/v3"

	"sallyport"
)

func (r *reader) given(to *Given) func(*yaml.Node) {
	return func(n *yaml.Node) {
		if n = plain(n); absent(n) {
			return
		}
		each := func(what string, read func(*yaml.Node)) func(*yaml.Node) {
			return func(n *yaml.Node) { r.list(n, what, read) }
		}
		r.object(n, "given", fields{
			"users":     each("users", func(n *yaml.Node) { to.Users = append(to.Users, r.user(n)) }),
			"directory": each("directory", func(n *yaml.Node) { to.Directory = append(to.Directory, r.entry(n)) }),
			"sessions":  each("sessions", func(n *yaml.Node) { to.Sessions = append(to.Sessions, r.session(n)) }),
			"devices":   each("devices", func(n *yaml.Node) { to.Devices = append(to.Devices, r.device(n)) }),
			"records":   each("records", func(n *yaml.Node) { to.Records = append(to.Records, r.record(n)) }),
		})
	}
}

func (r *reader) user(n *yaml.Node) (u sallyport.User) {
	r.object(n, "a user", fields{
		"id": text(r, &u.ID), "email": text(r, &u.Email), "name": text(r, &u.Name),
		"claims": r.values(&u.Claims), "disabled": parsed(r, &u.Disabled, truth),
	})
	return u
}

func (r *reader) entry(n *yaml.Node) (d sallyport.DirectoryUser) {
	r.object(n, "a directory entry", fields{
		"user": text(r, &d.User), "email": text(r, &d.Email),
		"groups": func(n *yaml.Node) {
			r.list(n, "groups", func(n *yaml.Node) { d.Groups = append(d.Groups, r.group(n)) })
		},
	})
	return d
}

// group reads {id, name}, or an id alone.
func (r *reader) group(n *yaml.Node) (g sallyport.Group) {
	if n.Kind == yaml.ScalarNode {
		return sallyport.Group{ID: n.Value}
	}
	r.object(n, "a group", fields{"id": text(r, &g.ID), "name": text(r, &g.Name)})
	return g
}

func (r *reader) session(n *yaml.Node) (s sallyport.Session) {
	r.object(n, "a session", fields{
		"id": text(r, &s.ID), "user": text(r, &s.User), "device": text(r, &s.Device), "claims": r.values(&s.Claims),
		"created": parsed(r, &s.Created, moment), "expires": parsed(r, &s.Expires, moment),
	})
	return s
}

func (r *reader) device(n *yaml.Node) (d Device) {
	var user sallyport.UserID
	r.object(n, "a device", fields{
		"id": text(r, &d.ID), "user": text(r, &user), "name": text(r, &d.Name), "type": text(r, &d.Type),
		"approved": parsed(r, &d.Approved, truth), "revoked": parsed(r, &d.Revoked, truth), "facts": r.facts(&d.Facts),
	})
	if user != "" {
		d.Users = map[sallyport.UserID]time.Time{user: {}}
	}
	return d
}

// facts reads NAME: {value, at, source}, or NAME: VALUE.
func (r *reader) facts(to *map[string]sallyport.Fact) func(*yaml.Node) {
	return func(n *yaml.Node) {
		n = plain(n)
		if absent(n) {
			return
		}
		if n.Kind != yaml.MappingNode {
			r.fail(n, "facts must be an object")
			return
		}
		*to = map[string]sallyport.Fact{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			(*to)[n.Content[i].Value] = r.fact(plain(n.Content[i+1]))
		}
	}
}

func (r *reader) fact(n *yaml.Node) sallyport.Fact {
	f := sallyport.Fact{Source: sallyport.SourceOS}
	if n.Kind == yaml.ScalarNode {
		f.Value = r.value(n)
		return f
	}
	r.object(n, "a fact", fields{
		"value": func(n *yaml.Node) { f.Value = r.value(n) },
		"at":    parsed(r, &f.At, moment), "source": text(r, &f.Source),
	})
	return f
}

func (r *reader) record(n *yaml.Node) (e sallyport.External) {
	r.object(n, "a record", fields{"type": text(r, &e.Type), "id": text(r, &e.ID), "fields": r.values(&e.Fields)})
	return e
}

// never is when a session without expires ends.
var never = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

// Latest is the latest moment that g names beside ends; zero if there is none.
func (g Given) Latest() time.Time {
	var latest time.Time
	later := func(t time.Time) {
		if t.After(latest) {
			latest = t
		}
	}
	for _, s := range g.Sessions {
		later(s.Created)
	}
	for _, d := range g.Devices {
		for _, f := range d.Facts {
			later(f.At)
		}
	}
	return latest
}

// At are the records that cached would hold at now.
func (g Given) At(now time.Time) []sallyport.Record {
	var b batch
	users, devices := map[sallyport.UserID]bool{}, map[sallyport.DeviceID]bool{}
	for _, u := range g.Users {
		users[u.ID] = true
		b.put(sallyport.KindUser, string(u.ID), u)
	}
	for _, d := range g.Directory {
		b.put(sallyport.KindDirectoryUser, string(d.User), d)
	}
	for _, d := range g.Devices {
		devices[d.ID] = true
		b.device(d, now)
	}
	for _, s := range g.Sessions {
		if !users[s.User] {
			b.put(sallyport.KindUser, string(s.User), sallyport.User{ID: s.User})
		}
		if !devices[s.Device] {
			s.Device = ""
		}
		b.session(s)
	}
	for _, e := range g.Records {
		b.put(sallyport.KindRecord, sallyport.ExternalID(e.Type, e.ID), e)
	}
	return b.records
}

type batch struct{ records []sallyport.Record }

func (b *batch) put(kind sallyport.Kind, id string, v any) {
	op := sallyport.Put(kind, id, v)
	b.records = append(b.records, sallyport.Record{Kind: kind, ID: id, Version: op.Version, Payload: op.Payload, Revision: 1})
}

// device puts the device and, if it ever reported, a report that arrives now.
func (b *batch) device(d Device, now time.Time) {
	b.put(sallyport.KindDevice, string(d.ID), d.Device)
	if d.Facts == nil { // a test may take away what the file's device reported
		b.records = append(b.records, sallyport.Record{Kind: sallyport.KindPosture, ID: string(d.ID), Revision: 1, Deleted: true})
		return
	}
	b.put(sallyport.KindPosture, string(d.ID), sallyport.Posture{Device: d.ID, Sequence: now.UnixMilli(), Received: now, Facts: d.Facts})
}

// session puts the session with a login of its own.
func (b *batch) session(s sallyport.Session) {
	if s.Expires.IsZero() {
		s.Expires = never
	}
	s.Login = sallyport.LoginID("login-" + s.ID)
	s.AuthMethods = slices.Concat(texts(s.Claims["amr"]), texts(s.Claims["acr"]))
	b.put(sallyport.KindLogin, string(s.Login), sallyport.Login{
		ID: s.Login, User: s.User, Created: s.Created, Expires: s.Expires, AuthMethods: s.AuthMethods,
	})
	b.put(sallyport.KindSession, string(s.ID), s)
}

// texts are the texts of a claim: a list, or one.
func texts(claim any) []string {
	list, ok := claim.([]any)
	if !ok {
		list = []any{claim}
	}
	var out []string
	for _, v := range list {
		if s, ok := v.(string); ok {
			out = append(out, s)
		}
	}
	return out
}

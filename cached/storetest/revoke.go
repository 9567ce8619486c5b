package storetest

import (
	"testing"
	"time"

	"sallyport"
)

var revokeCases = []recordsCase{
	{"a session", revokeSession},
	{"a login and its sessions", revokeLogin},
	{"a user and all logins", revokeUser},
	{"a device and what came from it", revokeDevice},
	{"a device whose record is odd", revokeOddDevice},
	{"several at once, in one batch", revokeSeveral},
	{"nobody", revokeNobody},
	{"what cannot be revoked", revokeRefused},
	{"a login after the revocation lives", revokeThenLogin},
}

func login(id, user string) sallyport.Op {
	return sallyport.Put(sallyport.KindLogin, id, sallyport.Login{ID: sallyport.LoginID(id), User: sallyport.UserID(user)})
}

func session(id, login, user, device string) sallyport.Op {
	return ending(sallyport.Put(sallyport.KindSession, id, sallyport.Session{
		ID: sallyport.SessionID(id), Login: sallyport.LoginID(login), User: sallyport.UserID(user),
		Device: sallyport.DeviceID(device), Kind: sallyport.AgentSession,
	}), time.Now().Add(time.Hour))
}

// populate: alice is logged in twice on laptop (l1 with two sessions and a
// browser, l2 with one on phone), bob once on laptop.
func (c *client) populate() {
	c.apply(
		user("alice"), user("bob"),
		sallyport.Put(sallyport.KindDevice, "laptop", map[string]any{"id": "laptop", "name": "x", "from_a_newer_version": 1}),
		sallyport.Put(sallyport.KindDevice, "phone", sallyport.Device{ID: "phone"}),
		login("l1", "alice"), login("l2", "alice"), login("l3", "bob"),
		session("s1", "l1", "alice", "laptop"), session("s2", "l1", "alice", "laptop"), session("s3", "l1", "alice", ""),
		session("s4", "l2", "alice", "phone"), session("s5", "l3", "bob", "laptop"),
		ending(session("past", "l1", "alice", "laptop"), time.Now().Add(-time.Minute)),
	)
}

func (c *client) revoke(want int, subjects ...sallyport.Subject) sallyport.Revoked {
	c.t.Helper()
	got, err := c.Revoke(c.t.Context(), sallyport.Revocation{Subjects: subjects, Reason: "lost", By: "test"})
	if err != nil {
		c.t.Fatal(err)
	}
	if got.Sessions != want || !got.Durable || got.Revision == 0 {
		c.t.Errorf("got %+v; want %d sessions, durable", got, want)
	}
	return got
}

func (c *client) live(sessions, logins []string) {
	c.t.Helper()
	same(c.t, c.list(sallyport.KindSession), sessions)
	same(c.t, c.list(sallyport.KindLogin), logins)
	same(c.t, c.list(sallyport.KindUser), []string{"alice", "bob"})
	same(c.t, c.list(sallyport.KindDevice), []string{"laptop", "phone"})
}

func (c *client) device(id string) sallyport.Device {
	c.t.Helper()
	r, err := c.Get(c.t.Context(), sallyport.KindDevice, id)
	if err != nil {
		c.t.Fatal(err)
	}
	d, err := sallyport.Decode[sallyport.Device](r)
	if err != nil {
		c.t.Fatal(err)
	}
	return d
}

func revokeSession(t *testing.T, c *client) {
	c.populate()
	c.revoke(1, sallyport.Subject{Kind: sallyport.SubjectSession, ID: "s1"})
	c.live([]string{"s2", "s3", "s4", "s5"}, []string{"l1", "l2", "l3"})
}

func revokeLogin(t *testing.T, c *client) {
	c.populate()
	c.revoke(3, sallyport.Subject{Kind: sallyport.SubjectLogin, ID: "l1"})
	c.live([]string{"s4", "s5"}, []string{"l2", "l3"})
}

func revokeUser(t *testing.T, c *client) {
	c.populate()
	c.revoke(4, sallyport.Subject{Kind: sallyport.SubjectUser, ID: "alice"})
	c.live([]string{"s5"}, []string{"l3"})
}

func revokeDevice(t *testing.T, c *client) {
	c.populate()
	c.revoke(4, sallyport.Subject{Kind: sallyport.SubjectDevice, ID: "laptop"})
	c.live([]string{"s4"}, []string{"l2"})
	if d := c.device("laptop"); !d.Revoked || d.Name != "x" {
		t.Errorf("got %+v; want the laptop revoked and otherwise as it was", d)
	}
	if d := c.device("phone"); d.Revoked {
		t.Error("the phone is revoked, too")
	}
	r, err := c.Get(t.Context(), sallyport.KindDevice, "laptop")
	if err != nil {
		t.Fatal(err)
	}
	if fields, err := sallyport.Decode[map[string]any](r); err != nil || fields["from_a_newer_version"] != 1.0 {
		t.Errorf("got %s, %v; want fields of newer versions kept", r.Payload, err)
	}
	c.revoke(0, sallyport.Subject{Kind: sallyport.SubjectDevice, ID: "laptop"})
}

func revokeOddDevice(t *testing.T, c *client) {
	for _, payload := range []string{"null", "3", ""} {
		c.apply(
			sallyport.Op{Kind: sallyport.KindDevice, ID: "odd", Payload: []byte(payload)},
			session("s", "l", "alice", "odd"))
		c.revoke(1, sallyport.Subject{Kind: sallyport.SubjectDevice, ID: "odd"})
		if c.has(sallyport.KindDevice, "odd") || c.has(sallyport.KindSession, "s") {
			t.Errorf("payload %q: the device or its session is still there", payload)
		}
	}
}

func revokeSeveral(t *testing.T, c *client) {
	c.populate()
	w := c.watch(sallyport.WatchRequest{Kinds: []sallyport.Kind{sallyport.KindSession, sallyport.KindLogin}})
	w.snapshot()
	got := c.revoke(4,
		sallyport.Subject{Kind: sallyport.SubjectLogin, ID: "l1"},
		sallyport.Subject{Kind: sallyport.SubjectSession, ID: "s1"},
		sallyport.Subject{Kind: sallyport.SubjectUser, ID: "bob"})
	c.live([]string{"s4"}, []string{"l2"})
	ev := w.until(func(ev sallyport.WatchEvent) bool {
		return ev.Type == sallyport.WatchChange && ev.Revision == got.Revision
	})
	for _, id := range []string{"l1", "l3", "s1", "s2", "s3", "s5"} {
		found := false
		for _, r := range ev.Records {
			found = found || r.ID == id && r.Deleted
		}
		if !found {
			t.Errorf("%s is not among the deleted of the batch: %v", id, names(ev.Records))
		}
	}
}

func revokeNobody(t *testing.T, c *client) {
	c.populate()
	for _, kind := range []sallyport.SubjectKind{sallyport.SubjectSession, sallyport.SubjectLogin, sallyport.SubjectUser, sallyport.SubjectDevice} {
		c.revoke(0, sallyport.Subject{Kind: kind, ID: "nobody"})
	}
	c.live([]string{"s1", "s2", "s3", "s4", "s5"}, []string{"l1", "l2", "l3"})
}

func revokeRefused(t *testing.T, c *client) {
	c.populate()
	for _, subjects := range [][]sallyport.Subject{
		nil,
		{{Kind: sallyport.SubjectPolicy}},
		{{Kind: sallyport.SubjectRecord, ID: "x"}},
		{{Kind: "", ID: "alice"}},
		{{Kind: sallyport.SubjectUser}},
		{{Kind: sallyport.SubjectUser, ID: "alice"}, {Kind: sallyport.SubjectPolicy}},
	} {
		if got, err := c.Revoke(t.Context(), sallyport.Revocation{Subjects: subjects}); err == nil {
			t.Errorf("%v: got %+v; want it refused", subjects, got)
		}
	}
	c.live([]string{"s1", "s2", "s3", "s4", "s5"}, []string{"l1", "l2", "l3"})
}

func revokeThenLogin(t *testing.T, c *client) {
	c.populate()
	c.revoke(4, sallyport.Subject{Kind: sallyport.SubjectUser, ID: "alice"})
	c.apply(login("l9", "alice"), session("s9", "l9", "alice", "laptop"))
	c.live([]string{"s5", "s9"}, []string{"l3", "l9"})
	c.revoke(1, sallyport.Subject{Kind: sallyport.SubjectUser, ID: "alice"})
}

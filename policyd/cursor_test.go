package policyd

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached/storetest"

	"github.com/google/go-cmp/cmp"
)

// What the cursor reads is what encoding/json reads, or nothing.
func FuzzCursor(f *testing.F) {
	p := storetest.Population{Sessions: 10, Now: time.Date(2026, 3, 1, 12, 0, 0, 5, time.UTC)}
	f.Add(p.SessionOp(3).Payload)
	f.Add(p.LoginOp(3).Payload)
	for _, text := range []string{
		`{}`, `{"id":"s"}`, `{"id":"s",}`, `{"id":"s"}}`, `{,"id":"s"}`, `{"id":"s","id":"t"}`, `{"id":"\u0073"}`, `{"id":null}`,
		`{"ID":"s"}`, `{"id":"s","claims":{"a":[1,{"b":"}"}]}}`, `{"id":"s","claims":null}`, `{"id":"s","claims":[}`, `{"id":"s","claims":{"a":"\"}"}}`,
		`{"id":"s","auth_methods":["x",]}`, `{"id":"s","auth_methods":["x"]}`, `{"id":"s","auth_methods":1}`, `{"id":"s","created":"yesterday"}`,
		`{"id":"ü"}`, "{\"id\":\"\xff\"}", `{"id":"s"`, `{"id":"s","login":"l","later":{"a":1}}`, `{"id":`, `{"id":"s","claims":`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		var quickly, plainly sessionPayload
		if readSession(payload, &quickly) {
			compare(t, payload, &quickly, &plainly, quickly.Claims, quickly.AuthMethods)
		}
		var quickLogin, plainLogin loginPayload
		if readLogin(payload, &quickLogin) {
			compare(t, payload, &quickLogin, &plainLogin, quickLogin.AuthMethods)
		}
	})
}

func compare[T any](t *testing.T, payload []byte, quickly, plainly *T, nested ...json.RawMessage) {
	t.Helper()
	for _, n := range nested {
		if n != nil && !json.Valid(n) {
			return // whoever reads it says so
		}
	}
	if err := json.Unmarshal(payload, plainly); err != nil {
		t.Fatalf("%s: read, but it is no JSON: %v", payload, err)
	}
	clearUnread(quickly)
	clearUnread(plainly)
	if diff := cmp.Diff(plainly, quickly); diff != "" {
		t.Fatalf("%s: (-encoding/json +cursor)\n%s", payload, diff)
	}
}

// clearUnread empties what the snapshot does not keep.
func clearUnread(p any) {
	switch p := p.(type) {
	case *sessionPayload:
		p.Address = ""
	case *loginPayload:
		p.Issuer, p.TokenVersion = "", 0
	}
}

// A field that the vocabulary gains must be read here, too, or left out on purpose:
// a payload with all fields is read without encoding/json.
func TestCursorKnowsEveryField(t *testing.T) {
	now := time.Now().UTC()
	s := sallyport.Session{
		ID: "s", Login: "l", User: "u", Device: "d", Kind: sallyport.AgentSession, Created: now, Expires: now,
		Claims: map[string]any{"a": "b"}, AuthMethods: []string{"pwd"}, Address: "192.0.2.1",
	}
	l := sallyport.Login{ID: "l", User: "u", Issuer: "i", Created: now, Expires: now, Authenticated: now, AuthMethods: []string{"pwd"}, TokenVersion: 7}
	for _, v := range []any{s, l} {
		for i := range reflect.TypeOf(v).NumField() {
			if reflect.ValueOf(v).Field(i).IsZero() {
				t.Errorf("%T: the test leaves field %d empty", v, i)
			}
		}
	}
	if payload := sallyport.Put(sallyport.KindSession, "s", s).Payload; !readSession(payload, new(sessionPayload)) {
		t.Errorf("not read: %s", payload)
	}
	if payload := sallyport.Put(sallyport.KindLogin, "l", l).Payload; !readLogin(payload, new(loginPayload)) {
		t.Errorf("not read: %s", payload)
	}
}

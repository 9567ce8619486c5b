package authd

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/memory"
	"sallyport/internal/keyring"
	"sallyport/internal/logging"
)

// twoAuthds are two servers over the same records, with as much of them as tends
// keys, at a time that the test sets.
type twoAuthds struct {
	t       *testing.T
	records *cached.Server
	kek     keyring.KEK
	at      time.Time
	a, b    *Server
}

func newTwoAuthds(t *testing.T) *twoAuthds {
	w := &twoAuthds{t: t, kek: keyring.NewKEK(), at: time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)}
	var err error
	w.records, err = cached.New(cached.Config{}, cached.Deps{Store: memory.New(), KEK: keyring.NewKEK(), Now: w.now})
	if err != nil {
		t.Fatal(err)
	}
	w.a, w.b = w.server(), w.server()
	return w
}

func (w *twoAuthds) now() time.Time { return w.at }

func (w *twoAuthds) server() *Server {
	w.t.Helper()
	v, err := newVault(w.records, w.kek, w.now)
	if err != nil {
		w.t.Fatal(err)
	}
	return &Server{deps: Deps{Records: w.records}, log: logging.Discard(), now: w.now, vault: v}
}

// tend lets a server look at the ring once, as keepKeys does.
func (w *twoAuthds) tend(s *Server) {
	w.t.Helper()
	k, err := s.vault.refresh(w.t.Context())
	if err == nil {
		err = s.tendKeys(w.t.Context(), k)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// store stores a token of the identity provider for the login.
func (w *twoAuthds) store(s *Server, l *sallyport.Login, token string) {
	w.t.Helper()
	op, err := s.vault.token(w.t.Context(), l, token)
	if err != nil {
		w.t.Fatal(err)
	}
	w.apply(op, putLogin(*l, sallyport.Condition{}))
}

func (w *twoAuthds) apply(ops ...sallyport.Op) {
	w.t.Helper()
	if _, err := w.records.Apply(w.t.Context(), ops); err != nil {
		w.t.Fatal(err)
	}
}

func (w *twoAuthds) sealed(id sallyport.LoginID) sallyport.Record {
	w.t.Helper()
	rec, err := w.records.Get(w.t.Context(), sallyport.KindIDPToken, string(id))
	if err != nil {
		w.t.Fatal(err)
	}
	return rec
}

// token opens what is stored for the login, as its record vouches for it.
func (w *twoAuthds) token(s *Server, id sallyport.LoginID) (string, error) {
	w.t.Helper()
	l, _, err := get[sallyport.Login](w.t.Context(), w.records, sallyport.KindLogin, string(id))
	if err != nil {
		w.t.Fatal(err)
	}
	plain, err := s.vault.open(w.t.Context(), tokenOf(l), w.sealed(id).Payload)
	return string(plain), err
}

func (w *twoAuthds) wants(s *Server, id sallyport.LoginID, want string) {
	w.t.Helper()
	if got, err := w.token(s, id); err != nil || got != want {
		w.t.Errorf("token of %s: got %q, %v; want %q", id, got, err, want)
	}
}

func TestCase_L8_TokensOpenInTheirPlaceOnly(t *testing.T) {
	w := newTwoAuthds(t)
	end := w.at.Add(time.Hour)
	one, two := sallyport.Login{ID: "one", Expires: end}, sallyport.Login{ID: "two", Expires: end}
	w.store(w.a, &one, "older token of one")
	older := w.sealed("one").Payload
	w.store(w.a, &one, "token of one")
	w.store(w.a, &two, "token of two")
	w.wants(w.a, "one", "token of one")
	w.wants(w.b, "two", "token of two")

	good := w.sealed("one").Payload
	for name, box := range map[string][]byte{
		"of another login":        w.sealed("two").Payload,
		"as it was before":        older,
		"empty":                   nil,
		"cut":                     good[:len(good)-1],
		"cut in its nonce":        good[:sealBoxAt-1],
		"of another format":       append([]byte{2}, good[1:]...),
		"under a key of nobody's": append([]byte{1, 9, 9, 9, 9}, good[5:]...),
	} {
		w.apply(sallyport.Op{Kind: sallyport.KindIDPToken, ID: "one", Expires: end, Payload: box})
		if got, err := w.token(w.a, "one"); !errors.Is(err, errSealed) {
			t.Errorf("%s: got %q, %v; want that it does not open", name, got, err)
		}
	}
	// The same bytes as another kind of record.
	if _, err := w.a.vault.open(t.Context(), codeOf("one"), good); !errors.Is(err, errSealed) {
		t.Errorf("as a code: got %v", err)
	}
}

func TestCase_O3_SealKeyIsRotatedByTwoAuthds(t *testing.T) {
	w := newTwoAuthds(t)
	end := w.at.Add(24 * time.Hour)
	logins := make([]sallyport.Login, 450) // more than two writes
	for i := range logins {
		logins[i] = sallyport.Login{ID: sallyport.LoginID(sallyport.NewID("l")), Expires: end}
		w.store(w.a, &logins[i], "token")
	}
	w.tend(w.b)
	old := w.a.vault.current.Load().active.id
	nonce := mustNonce(t, w.b.vault)

	rec, err := w.records.Get(t.Context(), sallyport.KindKeyring, ringID)
	if err != nil {
		t.Fatal(err)
	}
	asked, err := keyring.Ask(rec.Payload, ringPurpose, w.at)
	if err != nil {
		t.Fatal(err)
	}
	w.at = w.at.Add(time.Second)
	w.apply(sallyport.Op{Kind: sallyport.KindKeyring, ID: ringID, Payload: asked, If: sallyport.Condition{Revision: rec.Revision}})
	w.tend(w.a)
	w.tend(w.b)
	if a, b := w.a.vault.current.Load(), w.b.vault.current.Load(); a.active.id == old || b.active.id != a.active.id || len(b.byID) != 2 {
		t.Fatalf("got active keys %v and %v of %d; want one new one of 2", a.active.id, b.active.id, len(b.byID))
	}
	if _, err := w.a.vault.useNonce(t.Context(), nonce); err != nil {
		t.Errorf("a nonce by the old key: %v", err)
	}

	w.at = w.at.Add(ringSettled)
	w.tend(w.b)
	for i := range logins {
		w.wants(w.a, logins[i].ID, "token")
		if id, _ := keyOfSealed(w.sealed(logins[i].ID).Payload); id == old {
			t.Fatalf("token %d is still sealed by the old key", i)
		}
	}
	if n := len(w.b.vault.current.Load().byID); n != 2 {
		t.Errorf("got %d keys while codes of the old one live; want 2", n)
	}
	w.at = w.at.Add(ringRetired)
	w.tend(w.a)
	w.tend(w.b)
	if n := len(w.b.vault.current.Load().byID); n != 1 {
		t.Errorf("got %d keys; want the new one alone", n)
	}
	w.wants(w.b, logins[0].ID, "token")
}

// TestNewKeyIsKnownAtOnce: what one authd made by a key that the other has not
// noticed yet is good there.
func TestNewKeyIsKnownAtOnce(t *testing.T) {
	w := newTwoAuthds(t)
	w.tend(w.a)
	w.tend(w.b)
	k := w.a.vault.current.Load()
	if err := w.a.vault.change(t.Context(), k, k.ring.Rotate(w.at)); err != nil {
		t.Fatal(err)
	}
	longAgo := *w.b.vault.current.Load()
	longAgo.read = longAgo.read.Add(-2 * ringAsk)
	w.b.vault.current.Store(&longAgo)
	if _, err := w.b.vault.useNonce(t.Context(), mustNonce(t, w.a.vault)); err != nil {
		t.Errorf("nonce: %v", err)
	}
	l := sallyport.Login{ID: "l", Expires: w.at.Add(time.Hour)}
	w.store(w.a, &l, "token")
	w.b.vault.current.Store(&longAgo)
	w.wants(w.b, "l", "token")
}

func TestCase_O3_SealKEKIsReplaced(t *testing.T) {
	w := newTwoAuthds(t)
	l := sallyport.Login{ID: "l", Expires: w.at.Add(time.Hour)}
	w.store(w.a, &l, "token")
	w.tend(w.b)
	before := w.sealed("l").Payload
	if err := w.a.SetKEK(keyring.NewKEK()); sallyport.CodeOf(err) != codeWrongKey {
		t.Errorf("a foreign key: got %v; want %s", err, codeWrongKey)
	}
	next := w.kek.Rotated()
	if err := w.a.SetKEK(next); err != nil {
		t.Fatal(err)
	}
	w.tend(w.a)
	w.kek = next.Newest()
	w.wants(w.server(), "l", "token")
	if !bytes.Equal(before, w.sealed("l").Payload) {
		t.Error("a new key-encryption key sealed the token anew")
	}
	// Who was not given the new one yet goes on with what it knows, and leaves the
	// wrapping as it is.
	w.tend(w.b)
	w.wants(w.b, "l", "token")
	w.tend(w.a)
	if k := w.a.vault.current.Load(); k.foreign || k.stale {
		t.Error("the ring was wrapped by the old key again")
	}
}

// TestCase_O3_WrongSealKEKEndsAuthd, and writes nothing.
func TestCase_O3_WrongSealKEKEndsAuthd(t *testing.T) {
	w := newTwoAuthds(t)
	w.tend(w.a)
	before, err := w.records.Get(t.Context(), sallyport.KindKeyring, ringID)
	if err != nil {
		t.Fatal(err)
	}
	w.kek = keyring.NewKEK()
	err = w.server().keepKeys(t.Context())
	if sallyport.CodeOf(err) != codeWrongKey || sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
		t.Errorf("got %v; want %s, a usage error", err, codeWrongKey)
	}
	after, err := w.records.Get(t.Context(), sallyport.KindKeyring, ringID)
	if err != nil || after.Revision != before.Revision {
		t.Errorf("the ring was written: revision %d after %d, %v", after.Revision, before.Revision, err)
	}
}

func FuzzOpenSealed(f *testing.F) {
	keys, err := newVaultKeys(keyring.New(ringPurpose, time.Now()))
	if err != nil {
		f.Fatal(err)
	}
	at := binding{sallyport.KindIDPToken, "l", 3}
	good := keys.seal(at, []byte("token"))
	f.Add(good)
	f.Add(good[:sealBoxAt])
	f.Fuzz(func(t *testing.T, box []byte) {
		plain, err := keys.open(at, box)
		if err == nil && (!bytes.Equal(box, good) || string(plain) != "token") {
			t.Fatalf("opened a forgery as %q", plain)
		}
	})
}

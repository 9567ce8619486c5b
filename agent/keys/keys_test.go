//go:build unix

package keys_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"sallyport"
	"sallyport/agent/keys"
	"sallyport/agent/state"
	"sallyport/proto/proof"
)

// ring is a keyring in memory.
type ring struct {
	mu      sync.Mutex
	secrets map[string]string
	err     error
	forgets bool
}

func (r *ring) Get(name string) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return "", r.err
	}
	s, ok := r.secrets[name]
	if !ok {
		return "", fs.ErrNotExist
	}
	return s, nil
}

func (r *ring) Set(name, secret string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil && !r.forgets {
		if r.secrets == nil {
			r.secrets = map[string]string{}
		}
		r.secrets[name] = secret
	}
	return r.err
}

func newDir(t *testing.T) *state.Dir {
	t.Helper()
	d, err := state.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func create(t *testing.T, d *state.Dir, o keys.Options) *keys.Key {
	t.Helper()
	k, err := keys.LoadOrCreate(t.Context(), d, o)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestKeySurvives(t *testing.T) {
	for name, o := range map[string]keys.Options{
		keys.Keyring: {Ring: &ring{}},
		keys.File:    {Where: keys.File},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDir(t)
			if _, err := keys.Load(t.Context(), d, o); !errors.Is(err, keys.ErrNone) {
				t.Fatalf("before: %v; want none", err)
			}
			first := create(t, d, o)
			if first.Protection != name || len(first.ID) != 52 {
				t.Errorf("got %s, device %s", first.Protection, first.ID)
			}
			again, err := keys.Load(t.Context(), d, o)
			if err != nil || again.ID != first.ID || again.Protection != name {
				t.Errorf("got %v, %v; want the same key", again, err)
			}
			jws, err := proof.Sign(again, proof.TypeLogin, proof.Login{Nonce: "n"})
			if err != nil {
				t.Fatal(err)
			}
			var p proof.Login
			if k, err := proof.Verify(jws, proof.TypeLogin, &p); err != nil || k.ID != first.ID {
				t.Errorf("its signature: %v, %v", k, err)
			}
		})
	}
}

func TestFileOnlyWithoutKeyring(t *testing.T) {
	d := newDir(t)
	if k := create(t, d, keys.Options{Ring: &ring{err: errors.New("no bus")}}); k.Protection != keys.File {
		t.Errorf("got %s; want file", k.Protection)
	}
	d = newDir(t)
	if k := create(t, d, keys.Options{Ring: &ring{forgets: true}}); k.Protection != keys.File {
		t.Errorf("a keyring that forgets: got %s; want file", k.Protection)
	}
	if _, err := keys.LoadOrCreate(t.Context(), newDir(t), keys.Options{Where: keys.Keyring, Ring: &ring{err: errors.New("no bus")}}); err == nil {
		t.Error("the person asked for the keyring and got something else")
	}
}

func TestKeyringHoldsTheOnlyCopy(t *testing.T) {
	d := newDir(t)
	create(t, d, keys.Options{Ring: &ring{}})
	names, err := d.Names()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if text, _ := os.ReadFile(filepath.Join(d.Path(), n)); strings.Contains(string(text), "PRIVATE") || n == "key.pem" {
			t.Errorf("%s holds the key too", n)
		}
	}
}

func TestOneKeyForManyProcesses(t *testing.T) {
	d := newDir(t)
	ids := make(chan sallyport.DeviceID, 8)
	var wg sync.WaitGroup
	for range cap(ids) {
		wg.Go(func() {
			k, err := keys.LoadOrCreate(context.Background(), d, keys.Options{Where: keys.File})
			if err != nil {
				t.Error(err)
				return
			}
			ids <- k.ID
		})
	}
	wg.Wait()
	close(ids)
	first := <-ids
	for id := range ids {
		if id != first {
			t.Errorf("two keys: %s and %s", first, id)
		}
	}
}

// Case E13: a key store that cannot be used ends in an error, never in another
// key store or another key.
func TestCase_E13_NoSilentFallback(t *testing.T) {
	type spoiled struct {
		make  keys.Options
		spoil func(t *testing.T, d *state.Dir, r *ring)
		hint  string
	}
	cases := map[string]spoiled{
		"keyring locked":  {keys.Options{}, func(_ *testing.T, _ *state.Dir, r *ring) { r.err = errors.New("locked") }, "unlock"},
		"entry gone":      {keys.Options{}, func(_ *testing.T, _ *state.Dir, r *ring) { clear(r.secrets) }, "unlock"},
		"entry of others": {keys.Options{}, func(_ *testing.T, _ *state.Dir, r *ring) { swap(r) }, "unlock"},
		"file readable":   {keys.Options{Where: keys.File}, chmod(0o644), "chmod 600 "},
		"file writable":   {keys.Options{Where: keys.File}, chmod(0o620), "chmod 600 "},
		"file gone":       {keys.Options{Where: keys.File}, remove, "start over"},
		"file a link":     {keys.Options{Where: keys.File}, relink, "rm "},
		"file garbage":    {keys.Options{Where: keys.File}, garbage, "start over"},
	}
	if os.Geteuid() == 0 { // only root can give a file away
		cases["file foreign"] = spoiled{keys.Options{Where: keys.File}, chown, "chown "}
	}
	for name, tt := range cases {
		t.Run(name, func(t *testing.T) {
			d, r := newDir(t), &ring{}
			tt.make.Ring = r
			create(t, d, tt.make)
			tt.spoil(t, d, r)
			k, err := keys.LoadOrCreate(t.Context(), d, tt.make)
			var e *sallyport.Error
			if !errors.As(err, &e) {
				t.Fatalf("got %v, %v; want an error", k, err)
			}
			if e.Outcome != sallyport.OutcomeUsage || e.Code != "keystore.unavailable" || !strings.Contains(e.Hint, tt.hint) {
				t.Errorf("got %d %s, hint %q; want 2 keystore.unavailable and %q", e.Outcome, e.Code, e.Hint, tt.hint)
			}
		})
	}
}

func swap(r *ring) {
	other := &ring{}
	d, err := os.MkdirTemp("", "keys")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(d)
	dir, err := state.Open(filepath.Join(d, "s"))
	if err != nil {
		panic(err)
	}
	defer dir.Close()
	if _, err := keys.LoadOrCreate(context.Background(), dir, keys.Options{Ring: other}); err != nil {
		panic(err)
	}
	for name := range r.secrets {
		for _, secret := range other.secrets {
			r.secrets[name] = secret
		}
	}
}

func keyFile(d *state.Dir) string { return filepath.Join(d.Path(), "key.pem") }

func chmod(mode os.FileMode) func(*testing.T, *state.Dir, *ring) {
	return func(t *testing.T, d *state.Dir, _ *ring) {
		if err := os.Chmod(keyFile(d), mode); err != nil {
			t.Fatal(err)
		}
	}
}

func remove(t *testing.T, d *state.Dir, _ *ring) {
	if err := os.Remove(keyFile(d)); err != nil {
		t.Fatal(err)
	}
}

func relink(t *testing.T, d *state.Dir, _ *ring) {
	moved := filepath.Join(t.TempDir(), "moved.pem")
	if err := os.Rename(keyFile(d), moved); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(moved, keyFile(d)); err != nil {
		t.Fatal(err)
	}
}

func garbage(t *testing.T, d *state.Dir, _ *ring) {
	if err := os.WriteFile(keyFile(d), []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func chown(t *testing.T, d *state.Dir, _ *ring) {
	if err := os.Chown(keyFile(d), 12345, 12345); err != nil {
		t.Fatal(err)
	}
}

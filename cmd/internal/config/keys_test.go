package config

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sallyport"
	"sallyport/internal/keyring"
	"sallyport/internal/tpmseal/tpmtest"
)

func idsOf(t *testing.T, l Layout, name string) string {
	t.Helper()
	kek, err := l.KEK(name)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(kek.IDs())
}

func TestCase_O3_WhereKeysComeFrom(t *testing.T) {
	tpm := tpmtest.Start(t)
	for _, keys := range []Keys{{}, {Source: FromFile}, {Source: FromTPM, TPMDevice: tpm}} {
		l := Layout{Dir: filepath.Join(t.TempDir(), "data"), Keys: keys}
		if err := l.EnsureKeys(); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{RecordsKey, SealKey} {
			first := idsOf(t, l, name)
			if err := l.EnsureKeys(); err != nil || idsOf(t, l, name) != first {
				t.Errorf("%+v: %s was made again, %v", keys, name, err)
			}
			id, err := l.RotateKEK(name)
			if want := "[" + id.String() + " " + first[1:]; err != nil || idsOf(t, l, name) != want {
				t.Errorf("%+v: got %s, %v; want %s", keys, idsOf(t, l, name), err, want)
			}
			if err := l.RetireKEK(name); err != nil || idsOf(t, l, name) != "["+id.String()+"]" {
				t.Errorf("%+v: got %s, %v; want %s alone", keys, idsOf(t, l, name), err, id)
			}
			fi, err := os.Stat(l.KEKFile(name))
			if err != nil || fi.Mode().Perm()&0o077 != 0 {
				t.Errorf("%+v: mode %v, %v", keys, fi.Mode(), err)
			}
		}
	}
}

func TestCase_O3_AKeyInATPMStaysThere(t *testing.T) {
	l := Layout{Dir: filepath.Join(t.TempDir(), "data"), Keys: Keys{Source: FromTPM, TPMDevice: tpmtest.Start(t)}}
	if err := l.EnsureKeys(); err != nil {
		t.Fatal(err)
	}
	kek, err := l.KEK(RecordsKey)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(l.KEKFile(RecordsKey))
	if err != nil || bytes.Contains(b, kek.Pack()) || bytes.Contains(b, bytes.TrimSpace(kek.Text())) {
		t.Errorf("the file holds the key, %v", err)
	}
	l.Keys.TPMDevice = tpmtest.Start(t)
	if _, err := l.KEK(RecordsKey); sallyport.CodeOf(err) != "keys.unusable" || sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
		t.Errorf("another TPM: got %v; want keys.unusable", err)
	}
}

func TestCase_O3_AKeyFromSystemd(t *testing.T) {
	l := Layout{Dir: filepath.Join(t.TempDir(), "data"), Keys: Keys{Source: FromCredential}}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	if _, err := l.KEK(RecordsKey); sallyport.CodeOf(err) != "keys.missing" || sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
		t.Errorf("no credentials: got %v; want keys.missing", err)
	}
	dir := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	if _, err := l.KEK(SealKey); sallyport.CodeOf(err) != "keys.missing" {
		t.Errorf("no such credential: got %v; want keys.missing", err)
	}
	kek := keyring.NewKEK()
	// Readable by a group, as systemd's access list looks.
	if err := os.WriteFile(filepath.Join(dir, "sallyport.seal"), kek.Text(), 0o440); err != nil {
		t.Fatal(err)
	}
	if got := idsOf(t, l, SealKey); got != fmt.Sprint(kek.IDs()) {
		t.Errorf("got %s; want %v", got, kek.IDs())
	}
	if err := l.EnsureKeys(); err != nil {
		t.Fatal(err)
	}
	if exists(l.secret(SealKey)) {
		t.Error("a key was made that nobody uses")
	}
	if _, err := l.RotateKEK(SealKey); sallyport.CodeOf(err) != "keys.credential" {
		t.Errorf("rotation: got %v; want to be told how", err)
	}
}

func TestCase_J2_KeysThatAreNone(t *testing.T) {
	l := Layout{Dir: filepath.Join(t.TempDir(), "data")}
	if err := l.EnsureKeys(); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"changeme", strings.Repeat("changeme", 4), strings.Repeat("0", 64)} {
		if err := os.WriteFile(l.KEKFile(RecordsKey), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := l.KEK(RecordsKey); sallyport.CodeOf(err) != "keys.unusable" || sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
			t.Errorf("%s: got %v; want keys.unusable", text, err)
		}
	}
	if err := os.Chmod(l.KEKFile(SealKey), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := l.KEK(SealKey); sallyport.OutcomeOf(err) != sallyport.OutcomeUsage {
		t.Errorf("readable by all: got %v; want a usage error", err)
	}
}

package keyring_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"sallyport/internal/keyring"
)

var now = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

func seal(t testing.TB, r keyring.Ring, kek keyring.KEK) []byte {
	t.Helper()
	doc, err := r.Seal(kek)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

func TestCase_O3_ANewKEKWrapsTheSameKeys(t *testing.T) {
	old := keyring.NewKEK()
	ring := keyring.New("test", now).Rotate(now)
	doc := seal(t, ring, old)
	next := old.Rotated()
	got, stale, err := keyring.Open(doc, "test", next)
	if err != nil || !stale {
		t.Fatalf("stale %v, %v; want what an older key wraps", stale, err)
	}
	again := seal(t, got, next)
	got, stale, err = keyring.Open(again, "test", next.Newest())
	if err != nil || stale {
		t.Fatalf("stale %v, %v", stale, err)
	}
	for i, k := range ring.Keys() {
		if g := got.Keys()[i]; g.ID != k.ID || !bytes.Equal(g.Secret.Derive("x"), k.Secret.Derive("x")) {
			t.Errorf("key %d is another one", i)
		}
	}
	if _, _, err := keyring.Open(again, "test", old); !errors.Is(err, keyring.ErrWrongKEK) {
		t.Errorf("got %v; want ErrWrongKEK", err)
	}
}

// TestRingIsBound: what is changed in a document does not open.
func TestRingIsBound(t *testing.T) {
	kek := keyring.NewKEK()
	doc := seal(t, keyring.New("test", now).Rotate(now.Add(time.Hour)), kek)
	if _, _, err := keyring.Open(doc, "other", kek); err == nil {
		t.Error("opened for another purpose")
	}
	for name, edit := range map[string]func(d map[string]any, keys []map[string]any){
		"purpose":   func(d map[string]any, _ []map[string]any) { d["purpose"] = "other" },
		"version":   func(d map[string]any, _ []map[string]any) { d["version"] = 2 },
		"no keys":   func(d map[string]any, _ []map[string]any) { d["keys"] = nil },
		"id":        func(_ map[string]any, k []map[string]any) { k[0]["id"] = "01020304" },
		"ids":       func(_ map[string]any, k []map[string]any) { k[0]["id"], k[1]["id"] = k[1]["id"], k[0]["id"] },
		"created":   func(_ map[string]any, k []map[string]any) { k[1]["created"] = now.Add(time.Minute) },
		"one twice": func(_ map[string]any, k []map[string]any) { k[1] = k[0] },
		"cut":       func(_ map[string]any, k []map[string]any) { k[0]["wrapped"] = k[0]["wrapped"].(string)[:8] },
	} {
		var d map[string]any
		if err := json.Unmarshal(doc, &d); err != nil {
			t.Fatal(err)
		}
		keys := []map[string]any{d["keys"].([]any)[0].(map[string]any), d["keys"].([]any)[1].(map[string]any)}
		d["keys"] = keys
		edit(d, keys)
		bad, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		purpose := "test"
		if name == "purpose" {
			purpose = "other"
		}
		if _, _, err := keyring.Open(bad, purpose, kek); err == nil {
			t.Errorf("%s changed, and the ring opens", name)
		}
	}
}

// TestActiveKeyIsTheYoungest, however the document lists them.
func TestActiveKeyIsTheYoungest(t *testing.T) {
	kek := keyring.NewKEK()
	ring := keyring.New("test", now).Rotate(now.Add(-time.Hour)) // the clock went back
	var d struct {
		Version int               `json:"version"`
		Purpose string            `json:"purpose"`
		KEK     string            `json:"kek"`
		Keys    []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(seal(t, ring, kek), &d); err != nil {
		t.Fatal(err)
	}
	d.Keys[0], d.Keys[1] = d.Keys[1], d.Keys[0]
	doc, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := keyring.Open(doc, "test", kek)
	if err != nil || got.Active().ID != ring.Active().ID {
		t.Errorf("got %v, %v; want %v", got.Active().ID, err, ring.Active().ID)
	}
}

func TestCase_J2_WhatIsNoKey(t *testing.T) {
	good := strings.TrimSpace(string(keyring.NewKEK().Text()))
	for name, text := range map[string]string{
		"empty":           "",
		"changeme":        "changeme",
		"32 letters":      "changemechangemechangemechangeme",
		"one byte":        strings.Repeat("\x07", 32),
		"zeros in hex":    strings.Repeat("00", 32),
		"letters in hex":  fmt.Sprintf("%x", "this-is-an-example-key-32-bytes!"),
		"short":           good[:62],
		"long":            good + "00",
		"one key twice":   good + "\n" + good,
		"too many":        string(keyring.NewKEK().Text()) + string(keyring.NewKEK().Text()) + string(keyring.NewKEK().Text()) + good,
		"not hexadecimal": "x" + good[1:],
	} {
		if _, err := keyring.ParseKEK([]byte(text)); err == nil {
			t.Errorf("%s: taken for a key", name)
		}
	}
	for _, text := range []string{good, good + "\n", "\n " + good + "\r\n" + string(keyring.NewKEK().Text())} {
		if _, err := keyring.ParseKEK([]byte(text)); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestSecretsArePrintedByNobody(t *testing.T) {
	kek := keyring.NewKEK()
	ring := keyring.New("test", now)
	raw := kek.Pack()
	holder := struct {
		a keyring.KEK
		B keyring.Ring
		C keyring.Key
	}{kek, ring, ring.Active()}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q", "%d"} {
		for _, v := range []any{kek, ring, ring.Active(), ring.Active().Secret, holder, &holder} {
			out := fmt.Sprintf(verb, v)
			if strings.Contains(out, fmt.Sprintf("%x", raw[:4])) || strings.Contains(out, strings.Trim(fmt.Sprint(raw[:4]), "[]")) {
				t.Errorf("%s of %T prints the key: %s", verb, v, out)
			}
		}
	}
	if b, err := json.Marshal(ring.Active()); err == nil {
		t.Errorf("a key was written as JSON: %s", b)
	}
}

func TestPacked(t *testing.T) {
	kek := keyring.NewKEK().Rotated()
	got, err := keyring.UnpackKEK(kek.Pack())
	if err != nil || fmt.Sprint(got.IDs()) != fmt.Sprint(kek.IDs()) {
		t.Errorf("got %v, %v", got.IDs(), err)
	}
	if _, err := keyring.UnpackKEK(kek.Pack()[:33]); err == nil {
		t.Error("a part of a key was taken")
	}
}

func FuzzOpen(f *testing.F) {
	kek := keyring.NewKEK()
	ring := keyring.New("test", now)
	f.Add(seal(f, ring, kek))
	f.Add([]byte(`{"version":1,"purpose":"test","keys":[{}]}`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		got, _, err := keyring.Open(doc, "test", kek)
		if err == nil && got.Active().ID != ring.Active().ID {
			t.Fatal("a ring of foreign keys opened")
		}
		_, _ = keyring.Describe(doc, "test")
	})
}

func FuzzParseKEK(f *testing.F) {
	f.Add(keyring.NewKEK().Text())
	f.Fuzz(func(t *testing.T, data []byte) {
		kek, err := keyring.ParseKEK(data)
		if err != nil {
			return
		}
		again, err := keyring.ParseKEK(kek.Text())
		if err != nil || fmt.Sprint(again.IDs()) != fmt.Sprint(kek.IDs()) {
			t.Fatalf("its text reads as %v, %v", again.IDs(), err)
		}
	})
}

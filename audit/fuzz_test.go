package audit

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// FuzzChain puts any bytes in the place of a segment: nothing may panic, nothing
// but the lines that were written may verify, and what verifies can be read.
func FuzzChain(f *testing.F) {
	var text []byte
	prev := genesis
	for i := range uint64(3) {
		text, prev, _ = appendLine(text, place{sequence: i + 1, prev: prev}, "record", []byte(`{"type":"x","time":"2026-11-23T00:00:00Z"}`))
	}
	h := Head{Name: "gateway", Sequence: 3, Hash: prev}
	h.sign(testKey)
	f.Add(text)
	f.Add(text[:len(text)-5])
	f.Add(text[100:])
	f.Add(append([]byte("torn"), text...))
	f.Add(bytes.Repeat([]byte("\n"), 10))
	f.Fuzz(func(t *testing.T, segment []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, segmentName(1)), segment, 0o600); err != nil {
			t.Fatal(err)
		}
		report, err := Verify(dir, testKey.Public().(ed25519.PublicKey), h)
		var fault *Fault
		if !errors.As(err, &fault) {
			t.Fatalf("got %v; want a fault: there is no head.json", err)
		}
		if report.Last >= 3 && !bytes.HasPrefix(segment, text[:len(text)-1]) {
			t.Errorf("a signed chain of %d lines is not the one that was written", report.Last)
		}
		for _, err := range Read(dir, 0) {
			if err != nil && !errors.As(err, &fault) {
				t.Errorf("read: %v", err)
			}
		}
	})
}

// FuzzLine: what passes for a line has a place, a content and its own hash.
func FuzzLine(f *testing.F) {
	text, _, _ := appendLine(nil, place{sequence: 1, prev: genesis, torn: 3}, "record", []byte(`{"type":"x","time":"2026-11-23T00:00:00Z"}`))
	f.Add(text[:len(text)-1])
	f.Fuzz(func(t *testing.T, text []byte) {
		l, hash, err := parseLine(text)
		if err != nil {
			return
		}
		if hash != hashOf(text[:len(text)-suffixSize]) || l.Sequence == 0 || (l.Record == nil) == (l.Head == nil) {
			t.Errorf("got %+v with hash %s", l, hash)
		}
	})
}

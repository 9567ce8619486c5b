package audit

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport"
)

var testKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))

func testPub() ed25519.PublicKey { return testKey.Public().(ed25519.PublicKey) }

// quiet writes heads only at Open and Close, so that tests know every line.
var quiet = Options{HeadEvery: time.Hour}

func openLog(t testing.TB, dir string, opts Options) *Log {
	t.Helper()
	l, err := Open(dir, "gateway", testKey, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func record(i int) sallyport.AuditRecord {
	return sallyport.AuditRecord{
		Type: sallyport.AuditFlowOpen, Time: time.Unix(1_800_000_000, int64(i)).UTC(),
		Flow: sallyport.FlowID(fmt.Sprint("f-", i)), Target: "tcp://db.internal:5432",
	}
}

func appendN(t testing.TB, l *Log, from, n int) {
	t.Helper()
	for i := range n {
		if err := l.Append(t.Context(), record(from+i)); err != nil {
			t.Fatal(err)
		}
	}
}

// written returns a directory with n records, closed: n lines and a head behind
// them.
func written(t testing.TB, n int, opts Options) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "audit")
	l := openLog(t, dir, opts)
	appendN(t, l, 1, n)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

func verify(t testing.TB, dir string) Report {
	t.Helper()
	r, err := Verify(dir, testPub())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func readAll(t testing.TB, dir string, from uint64) (list []Entry) {
	t.Helper()
	for e, err := range Read(dir, from) {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, e)
	}
	return list
}

func TestChainIsReadAsItWasWritten(t *testing.T) {
	dir := written(t, 5, quiet)
	want := Report{Name: "gateway", Records: 5, Last: 6, Signed: 5}
	if d := cmp.Diff(want, verify(t, dir)); d != "" {
		t.Error(d)
	}
	got := readAll(t, dir, 0)
	if len(got) != 5 {
		t.Fatalf("got %d records; want 5", len(got))
	}
	for i, e := range got {
		if d := cmp.Diff(record(i+1), e.Record); d != "" || e.Sequence != uint64(i+1) {
			t.Errorf("sequence %d: %s", e.Sequence, d)
		}
	}
	if got := readAll(t, dir, 4); len(got) != 2 || got[0].Sequence != 4 {
		t.Errorf("got %v; want 4 and 5", got)
	}
}

func TestChainGoesOn(t *testing.T) {
	dir := written(t, 3, quiet) // lines 1 to 3, head 4
	l := openLog(t, dir, quiet)
	if h := l.Head(); h.Sequence != 4 || !h.Genuine(testPub()) || h.Name != "gateway" {
		t.Errorf("got head %+v; want a genuine one at 4", h)
	}
	appendN(t, l, 4, 2)
	if r := verify(t, dir); r.Records != 5 || r.Last != 6 || r.Signed != 4 {
		t.Errorf("got %+v; want 5 records to 6, signed to 4", r)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if r := verify(t, dir); r.Last != 7 || r.Signed != 6 {
		t.Errorf("got %+v; want 7 lines, signed to 6", r)
	}
	if err := l.Append(t.Context(), record(0)); err == nil {
		t.Error("a closed log takes records")
	}
}

func TestSegmentsRotate(t *testing.T) {
	opts := quiet
	opts.SegmentBytes = 1000
	dir := written(t, 40, opts)
	starts, err := segments(dir)
	if err != nil || len(starts) < 10 {
		t.Fatalf("got %d segments, %v; want many", len(starts), err)
	}
	if r := verify(t, dir); r.Records != 40 {
		t.Errorf("got %+v; want 40 records", r)
	}
	for from := range uint64(41) {
		if got := readAll(t, dir, from); len(got) != 41-max(1, int(from)) {
			t.Errorf("from %d: got %d records", from, len(got))
		}
	}
	l := openLog(t, dir, opts)
	appendN(t, l, 41, 10)
	if r := verify(t, dir); r.Records != 50 {
		t.Errorf("got %+v; want 50 records", r)
	}
	for _, f := range append(slices.Collect(fileNames(t, dir)), ".") {
		info, err := os.Stat(filepath.Join(dir, f))
		if err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: got mode %v, %v; want nobody else to read it", f, info.Mode(), err)
		}
	}
}

func fileNames(t *testing.T, dir string) func(func(string) bool) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return func(yield func(string) bool) {
		for _, e := range entries {
			if !yield(e.Name()) {
				return
			}
		}
	}
}

// lines of the only segment, without newlines.
func lines(t *testing.T, dir string) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, segmentName(1)))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

func setLines(t *testing.T, dir string, list []string) {
	t.Helper()
	writeFile(t, dir, segmentName(1), strings.Join(list, "\n")+"\n")
}

func writeFile(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// rechain gives the lines from index i on the hashes that fit, as somebody would
// who has no key.
func rechain(t *testing.T, list []string, i int) {
	t.Helper()
	prev := genesis
	for k, text := range list {
		var l struct {
			Sequence uint64          `json:"seq"`
			Prev     string          `json:"prev"`
			UpMS     int64           `json:"up_ms"`
			Record   json.RawMessage `json:"record"`
			Head     json.RawMessage `json:"head"`
			Hash     string          `json:"hash"`
		}
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatal(err)
		}
		if k >= i {
			field, content := "record", l.Record
			if content == nil {
				field, content = "head", l.Head
			}
			out, hash, err := appendLine(nil, place{uint64(k + 1), prev, time.Duration(l.UpMS) * time.Millisecond, 0}, field, content)
			if err != nil {
				t.Fatal(err)
			}
			list[k], l.Hash = strings.TrimSuffix(string(out), "\n"), hash
		}
		prev = l.Hash
	}
}

func TestCase_P2_VerifyNamesTheFirstBadSequence(t *testing.T) {
	otherKey := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	for _, c := range []struct {
		name   string
		tamper func(t *testing.T, dir string)
		want   uint64
		until  uint64
	}{
		{"a byte altered", func(t *testing.T, dir string) {
			l := lines(t, dir)
			l[3] = strings.Replace(l[3], "f-4", "f-9", 1)
			setLines(t, dir, l)
		}, 4, 0},
		{"a record altered and hashed anew", func(t *testing.T, dir string) {
			l := lines(t, dir)
			body := strings.Replace(l[3][:len(l[3])-suffixSize], "f-4", "f-9", 1)
			l[3] = body + suffixHead + hashOf([]byte(body)) + `"}`
			setLines(t, dir, l)
		}, 5, 0},
		{"a line removed", func(t *testing.T, dir string) { setLines(t, dir, slices.Delete(lines(t, dir), 5, 6)) }, 6, 0},
		{"the first line removed", func(t *testing.T, dir string) { setLines(t, dir, lines(t, dir)[1:]) }, 1, 0},
		{"two lines exchanged", func(t *testing.T, dir string) {
			l := lines(t, dir)
			l[2], l[3] = l[3], l[2]
			setLines(t, dir, l)
		}, 3, 0},
		{"a line doubled", func(t *testing.T, dir string) { l := lines(t, dir); setLines(t, dir, slices.Insert(l, 4, l[4])) }, 6, 0},
		{"an empty line", func(t *testing.T, dir string) { setLines(t, dir, slices.Insert(lines(t, dir), 4, "")) }, 5, 0},
		{"the end cut off", func(t *testing.T, dir string) { setLines(t, dir, lines(t, dir)[:7]) }, 8, 0},
		{"the end cut off within a line", func(t *testing.T, dir string) {
			l := strings.Join(lines(t, dir)[:8], "\n")
			writeFile(t, dir, segmentName(1), l[:len(l)-3])
		}, 8, 0},
		{"everything gone but the head", func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, segmentName(1))); err != nil {
				t.Fatal(err)
			}
		}, 1, 0},
		{"the head gone", func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, headFile)); err != nil {
				t.Fatal(err)
			}
		}, 12, 0},
		{"the rest written anew", func(t *testing.T, dir string) {
			l := lines(t, dir)
			l[3] = strings.Replace(l[3], "f-4", "f-9", 1)
			rechain(t, l, 3)
			setLines(t, dir, l)
		}, 1, 10},
		{"the head of another key", func(t *testing.T, dir string) {
			h, err := readHead(dir)
			if err != nil {
				t.Fatal(err)
			}
			h.Sequence = 5
			h.sign(otherKey)
			text, _ := json.Marshal(h)
			writeFile(t, dir, headFile, string(text))
		}, 1, 5},
		{"the head is no JSON", func(t *testing.T, dir string) { writeFile(t, dir, headFile, "{") }, 1, 0},
		{"a line that claims torn bytes", func(t *testing.T, dir string) {
			l := lines(t, dir)
			l[10] = strings.Replace(l[10], `"up_ms"`, `"torn":5,"up_ms"`, 1)
			body := l[10][:len(l[10])-suffixSize]
			l[10] = body + suffixHead + hashOf([]byte(body)) + `"}`
			setLines(t, dir, l)
		}, 11, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := written(t, 10, quiet) // 10 records and the head in line 11
			c.tamper(t, dir)
			_, err := Verify(dir, testPub())
			var fault *Fault
			if !errors.As(err, &fault) || fault.Sequence != c.want || fault.Until != c.until {
				t.Errorf("got %v; want a fault at %d until %d", err, c.want, c.until)
			}
		})
	}
}

func TestCase_P2_AnOlderHeadDoesNotHideACutTail(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	var kept []Head
	l := openLog(t, dir, Options{HeadEvery: time.Hour, Keep: func(_ context.Context, h Head) error {
		kept = append(kept, h)
		return nil
	}})
	appendN(t, l, 1, 5)
	if err := l.advanceHead(t.Context()); err != nil {
		t.Fatal(err)
	}
	old, err := os.ReadFile(filepath.Join(dir, headFile))
	if err != nil {
		t.Fatal(err)
	}
	appendN(t, l, 6, 5)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	setLines(t, dir, lines(t, dir)[:6])
	writeFile(t, dir, headFile, string(old))
	if r, err := Verify(dir, testPub()); err != nil || r.Last != 6 {
		t.Errorf("got %+v, %v; want no fault without the kept head", r, err)
	}
	if len(kept) != 2 {
		t.Fatalf("got %d kept heads; want 2", len(kept))
	}
	_, err = Verify(dir, testPub(), kept[1])
	var fault *Fault
	if !errors.As(err, &fault) || fault.Sequence != 7 {
		t.Errorf("got %v; want a fault at 7", err)
	}
}

func TestVerifyWithTheWrongKey(t *testing.T) {
	dir := written(t, 3, quiet)
	other := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)).Public().(ed25519.PublicKey)
	for _, pub := range []ed25519.PublicKey{other, nil} {
		if _, err := Verify(dir, pub); err == nil {
			t.Errorf("key %x verifies", pub)
		}
	}
}

func TestVerifyWithoutChain(t *testing.T) {
	if _, err := Verify(t.TempDir(), testPub()); !errors.Is(err, ErrNoChain) {
		t.Errorf("got %v; want ErrNoChain", err)
	}
}

// A daemon can die within a write at any byte of the last line.
func TestCase_P1_CutLastLineIsMarkedAndFollowed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := openLog(t, dir, quiet)
	appendN(t, l, 1, 4)
	whole := slices.Concat(lines(t, dir)) // head.json is still that of Open
	head, err := os.ReadFile(filepath.Join(dir, headFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	start := strings.Join(whole[:3], "\n") + "\n"
	for cut := 0; cut < len(whole[3]); cut += 7 {
		writeFile(t, dir, segmentName(1), start+whole[3][:cut])
		writeFile(t, dir, headFile, string(head))
		r := verify(t, dir)
		if r.Records != 3 || r.Truncated != int64(cut) {
			t.Fatalf("cut at %d: got %+v; want 3 records and the cut", cut, r)
		}
		continueLog(t, dir)
		r = verify(t, dir)
		wantTorn := []uint64{4}
		if cut == 0 {
			wantTorn = nil
		}
		if d := cmp.Diff(wantTorn, r.Torn); d != "" || r.Records != 5 || r.Truncated != 0 {
			t.Fatalf("cut at %d: got %+v; want 5 records, torn at 4", cut, r)
		}
		if got := readAll(t, dir, 0); len(got) != 5 {
			t.Fatalf("cut at %d: read %d records; want 5", cut, len(got))
		}
	}
	// Whole but for its newline: it counts.
	writeFile(t, dir, segmentName(1), start+whole[3])
	writeFile(t, dir, headFile, string(head))
	continueLog(t, dir)
	if r := verify(t, dir); r.Records != 6 || r.Torn != nil {
		t.Errorf("got %+v; want 6 records, nothing torn", r)
	}
}

func continueLog(t *testing.T, dir string) {
	t.Helper()
	l := openLog(t, dir, quiet)
	appendN(t, l, 5, 2)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestOpenAfterDyingBetweenTwoSegments(t *testing.T) {
	opts := quiet
	opts.SegmentBytes = 600
	for _, left := range []string{"", `{"seq":`} {
		dir := written(t, 10, opts)
		writeFile(t, dir, segmentName(12), left)
		if r := verify(t, dir); r.Last != 11 {
			t.Errorf("got %+v; want 11 lines", r)
		}
		l := openLog(t, dir, opts)
		appendN(t, l, 11, 3)
		if r := verify(t, dir); r.Records != 13 {
			t.Errorf("left %q: got %+v; want 13 records", left, r)
		}
	}
}

func TestOpenRefusesABrokenEnd(t *testing.T) {
	for name, tamper := range map[string]func(dir string){
		"altered": func(dir string) {
			l := lines(t, dir)
			l[1] = strings.Replace(l[1], "f-2", "f-3", 1)
			setLines(t, dir, l)
		},
		"cut":      func(dir string) { setLines(t, dir, lines(t, dir)[:2]) },
		"no head":  func(dir string) { os.Remove(filepath.Join(dir, headFile)) },
		"no lines": func(dir string) { os.Remove(filepath.Join(dir, segmentName(1))) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := written(t, 4, quiet)
			tamper(dir)
			_, err := Open(dir, "gateway", testKey, quiet)
			if sallyport.CodeOf(err) != "audit.broken" {
				t.Errorf("got %v; want audit.broken", err)
			}
		})
	}
}

func TestOpenTwice(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	openLog(t, dir, quiet)
	if _, err := Open(dir, "gateway", testKey, quiet); sallyport.CodeOf(err) != "audit.in_use" {
		t.Errorf("got %v; want audit.in_use", err)
	}
}

func TestAppendFailsAloud(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := openLog(t, dir, quiet)
	appendN(t, l, 1, 1)
	big := sallyport.AuditRecord{Type: "x", Target: strings.Repeat("x", maxLine)}
	if err := l.Append(t.Context(), big); err == nil {
		t.Error("a record of a megabyte is taken")
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	l.mu.Lock()
	real := l.f
	l.f = full
	l.mu.Unlock()
	if err := l.Append(t.Context(), record(2)); err == nil {
		t.Error("a full disk takes a record")
	}
	l.mu.Lock()
	l.f = real
	l.mu.Unlock()
	appendN(t, l, 3, 1) // there is room again
	if r := verify(t, dir); r.Records != 2 || r.Last != 2 {
		t.Errorf("got %+v; want the two records that were acknowledged", r)
	}
}

func TestNoAppendAfterAFailedFlush(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l, err := Open(dir, "gateway", testKey, Options{HeadEvery: time.Hour, FlushEvery: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	appendN(t, l, 1, 1)
	r, w, err := os.Pipe() // fsync of a pipe fails
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	l.mu.Lock()
	real := l.f
	l.f = w
	l.mu.Unlock()
	defer real.Close()
	if err := l.flush(); err == nil {
		t.Fatal("flushing a pipe works")
	}
	if err := l.Append(t.Context(), record(2)); err == nil {
		t.Error("a record is taken after a failed flush")
	}
	if err := l.Close(); err == nil {
		t.Error("close says nothing of the failed flush")
	}
}

func TestConcurrentAppends(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := openLog(t, dir, Options{SegmentBytes: 20_000, FlushEvery: time.Millisecond, HeadEvery: 3 * time.Millisecond})
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() { appendN(t, l, 1000*g, 200) })
	}
	wg.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r := verify(t, dir)
	if r.Records != 1600 || r.Signed != r.Last-1 {
		t.Errorf("got %+v; want 1600 records, all signed", r)
	}
	last := map[int]int{}
	for _, e := range readAll(t, dir, 0) {
		var i int
		fmt.Sscanf(string(e.Record.Flow), "f-%d", &i)
		if last[i/1000] > i {
			t.Fatalf("record %d comes after %d of the same writer", i, last[i/1000])
		}
		last[i/1000] = i
	}
}

func TestHeadsAreSignedWhileRecordsCome(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	kept := make(chan Head, 16)
	l := openLog(t, dir, Options{HeadEvery: time.Millisecond, Keep: func(_ context.Context, h Head) error {
		kept <- h
		return errors.New("not today")
	}})
	appendN(t, l, 1, 1)
	h := <-kept
	if h.Sequence != 1 || !h.Genuine(testPub()) {
		t.Errorf("got %+v; want a genuine head at 1", h)
	}
	if got := l.Head(); got.Sequence != 1 {
		t.Errorf("got %+v; want the head at 1", got)
	}
	appendN(t, l, 2, 1) // line 3: line 2 is the head
	if h = <-kept; h.Sequence != 3 {
		t.Errorf("got head at %d; want 3, and none without a record", h.Sequence)
	}
}

func TestDetailIsCut(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := openLog(t, dir, quiet)
	if err := l.Append(t.Context(), sallyport.AuditRecord{Type: "x", Detail: strings.Repeat("ä", 300)}); err != nil {
		t.Fatal(err)
	}
	e := readAll(t, dir, 0)[0]
	if e.Record.Detail != strings.Repeat("ä", 200) || e.Record.Time.IsZero() {
		t.Errorf("got %d bytes at %v; want 200 characters and a time", len(e.Record.Detail), e.Record.Time)
	}
}

func TestTailFollowsAcrossSegments(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	opts := quiet
	opts.SegmentBytes = 700
	l := openLog(t, dir, opts)
	appendN(t, l, 1, 3)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []uint64
	for e, err := range Tail(ctx, dir, 2) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e.Sequence)
		switch e.Sequence {
		case 3:
			appendN(t, l, 4, 10)
		case 13:
			cancel()
		}
	}
	if want := []uint64{2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}; !slices.Equal(got, want) {
		t.Errorf("got %v; want %v", got, want)
	}
}

func TestReadStopsAtDamage(t *testing.T) {
	dir := written(t, 6, quiet)
	l := lines(t, dir)
	l[3] = "garbage"
	setLines(t, dir, l)
	n := 0
	var last error
	for _, err := range Read(dir, 0) {
		if last = err; err == nil {
			n++
		}
	}
	var fault *Fault
	if n != 3 || !errors.As(last, &fault) || fault.Sequence != 4 {
		t.Errorf("got %d records, then %v; want 3, then a fault at 4", n, last)
	}
}

func BenchmarkAppend(b *testing.B) {
	l := openLog(b, filepath.Join(b.TempDir(), "audit"), Options{})
	r := record(1)
	b.ReportAllocs()
	for b.Loop() {
		if err := l.Append(b.Context(), r); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	dir := written(b, 10_000, quiet)
	for b.Loop() {
		if _, err := Verify(dir, testPub()); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/10_000, "µs/record")
}

package audit

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
)

var kills = flag.Int("kills", 10, "how often TestCase_P1 kills the writing process")

// crashDir is set in the process that TestCase_P1 kills.
const crashDir = "SALLYPORT_AUDIT_CRASH_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		fmt.Fprintln(os.Stderr, writeForever(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// writeForever appends from four goroutines and tells each acknowledged record
// on standard output.
func writeForever(dir string) error {
	l, err := Open(dir, "gateway", testKey, Options{SegmentBytes: 64 << 10})
	if err != nil {
		return err
	}
	errs := make(chan error)
	var mu sync.Mutex
	for w := range 4 {
		go func() {
			for i := 0; ; i++ {
				r := record(i)
				r.Detail = fmt.Sprintf("%d/%d/%d", os.Getpid(), w, i)
				if err := l.Append(context.Background(), r); err != nil {
					errs <- err
					return
				}
				mu.Lock()
				_, err := fmt.Println(r.Detail)
				mu.Unlock()
				if err != nil {
					errs <- err
					return
				}
			}
		}()
	}
	return <-errs
}

func TestCase_P1_NoAcknowledgedRecordIsLostWhenKilled(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	acked := map[string]bool{}
	for range *kills {
		killWriter(t, dir, acked)
		if r := verify(t, dir); int(r.Records) < len(acked) {
			t.Fatalf("got %+v; want at least %d records", r, len(acked))
		}
	}
	for e, err := range Read(dir, 0) {
		if err != nil {
			t.Fatal(err)
		}
		delete(acked, e.Record.Detail)
	}
	if len(acked) > 0 {
		t.Errorf("%d acknowledged records are lost", len(acked))
	}
}

// killWriter lets a process write until it has acknowledged a random number of
// records, kills it, and adds everything it acknowledged.
func killWriter(t *testing.T, dir string, acked map[string]bool) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashDir+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	left := 1 + rand.IntN(2000)
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		acked[lines.Text()] = true
		if left--; left == 0 {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait() // killed
	if left > 0 {
		t.Fatal("the writer ended by itself, " + strconv.Itoa(left) + " records short")
	}
}

package config

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
	"sallyport/cached/sqlite"
	"sallyport/internal/keyring"
	"sallyport/internal/logging"
	"sallyport/internal/telemetry"
	"sallyport/policyd"
	"sallyport/policyd/policy"
)

// large is a site of n routes with as many rules each; no two policies are alike.
func large(n, rules int) string {
	var b strings.Builder
	b.WriteString("domain: corp.example\ndata_dir: data\nroutes:\n")
	for i := range n {
		fmt.Fprintf(&b, "  - from: tcp://db%d.internal:5432\n    policy:\n", i)
		for j := range rules {
			fmt.Fprintf(&b, "      - name: r%d\n        allow: {and: [{groups: {has: team-%d-%d}}, {device: {disk_encrypted: true}}]}\n", j, i, j)
		}
	}
	return b.String()
}

func BenchmarkLoad(b *testing.B) {
	for _, size := range []struct{ routes, rules int }{{1_000, 10}, {10_000, 10}} {
		b.Run(fmt.Sprintf("routes=%d/rules=%d", size.routes, size.rules), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "sallyport.yaml")
			text := large(size.routes, size.rules)
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(len(text)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Load(path, Tool); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkApply is from the file to the first decision, by way of a database: in
// the process that read the file, and apart from it.
func BenchmarkApply(b *testing.B) {
	b.Run("together", func(b *testing.B) { applyLarge(b, true) })
	b.Run("apart", func(b *testing.B) { applyLarge(b, false) })
}

func applyLarge(b *testing.B, together bool) {
	path := filepath.Join(b.TempDir(), "sallyport.yaml")
	if err := os.WriteFile(path, []byte(large(10_000, 10)), 0o600); err != nil {
		b.Fatal(err)
	}
	var load, write, decide time.Duration
	before := cpuTime(b)
	for b.Loop() {
		var file *File
		records, decides := deployment(b, func(text string) *policy.Policy {
			if !together {
				return nil
			}
			return file.Known(text)
		})
		start := time.Now()
		f, err := Load(path, Tool)
		if err != nil {
			b.Fatal(err)
		}
		file = f
		loaded := time.Now()
		if _, _, err := Apply(b.Context(), records, f.Record(nil, nil, time.Now())); err != nil {
			b.Fatal(err)
		}
		written := time.Now()
		for decides() != nil {
			<-time.After(time.Millisecond)
		}
		load, write, decide = load+loaded.Sub(start), write+written.Sub(loaded), decide+time.Since(written)
	}
	n := float64(b.N)
	b.ReportMetric((cpuTime(b)-before).Seconds()/n, "cpu-s")
	b.ReportMetric(load.Seconds()/n, "load-s")
	b.ReportMetric(write.Seconds()/n, "write-s")
	b.ReportMetric(decide.Seconds()/n, "take-s")
}

// cpuTime is what this process has spent on every processor, which a busy machine
// distorts less than the clock.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// deployment is a cached and a policyd in this process. decides returns an error
// as long as policyd has no policy.
func deployment(b *testing.B, known func(string) *policy.Policy) (records Store, decides func() error) {
	store, err := sqlite.Open(filepath.Join(b.TempDir(), "cached.db"), sqlite.Config{})
	if err != nil {
		b.Fatal(err)
	}
	c, err := cached.New(cached.Config{}, cached.Deps{Store: store, KEK: keyring.NewKEK()})
	if err != nil {
		b.Fatal(err)
	}
	p, err := policyd.New(policyd.Config{}, policyd.Deps{
		Records: c, Audit: unwritten{}, Log: logging.Discard(), Metrics: telemetry.NewRegistry(), Known: known,
	})
	if err != nil {
		b.Fatal(err)
	}
	for _, run := range []func(context.Context) error{c.Run, p.Run} {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- run(ctx) }()
		b.Cleanup(func() { cancel(); <-done })
	}
	return c, func() error {
		_, err := p.Authorize(context.Background(), []sallyport.Request{{Target: sallyport.Target{Network: "tcp", Host: "db7.internal", Port: 5432}}})
		return err
	}
}

// unwritten is an audit log that nobody reads.
type unwritten struct{}

func (unwritten) Append(context.Context, sallyport.AuditRecord) error { return nil }

package storetest

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"

	"sallyport"
	"sallyport/cached"
)

var sessions = flag.Int("sessions", 10_000, "how many sessions the benchmarks of scale have")

// Sessions is the flag -sessions: how many of them benchmarks of scale are about.
func Sessions() int { return *sessions }

// Engine is what [Bench] measures.
type Engine struct {
	// Store is empty, and closed by whoever opened it. Required.
	Store cached.Store
	// Size returns how many bytes the store takes on disk; nil: nobody can tell.
	Size func() (int64, error)
	// Bars are what is expected of the engine; a benchmark that takes more than
	// twice as long fails, because the machine may be busy. Zero ones do not count.
	Bars Bars
}

// Bars are the times that an engine should not exceed at any number of sessions.
type Bars struct {
	Get      time.Duration // the median
	GetP99   time.Duration
	PutCPU   time.Duration // of this process, for one of 64 that write at once
	Revoke   time.Duration // the median
	Snapshot time.Duration // for a million sessions and all that they hang on
}

// SQLiteBars and PostgresBars are those of PERFORMANCE.md and SECURITY-CASES.md L16.
// A get from PostgreSQL is a question to another process.
var (
	SQLiteBars = Bars{
		Get: 25 * time.Microsecond, GetP99: time.Millisecond, PutCPU: 100 * time.Microsecond,
		Revoke: 50 * time.Millisecond, Snapshot: 10 * time.Second,
	}
	PostgresBars = Bars{
		Get: 250 * time.Microsecond, GetP99: time.Millisecond, PutCPU: 100 * time.Microsecond,
		Revoke: 50 * time.Millisecond, Snapshot: 10 * time.Second,
	}
)

// Bench measures an engine under a cached.Server with [Sessions] sessions, which are
// written once.
func Bench(b *testing.B, open func(*testing.B) Engine) {
	e := open(b)
	p := Population{Sessions: Sessions(), Now: time.Now()}
	s := Serve(b, e.Store)
	began := time.Now()
	records := Fill(b, s, p)
	b.Logf("%d records of %d sessions written in %.1f s", records, p.Sessions, time.Since(began).Seconds())
	bench := &bench{e, p, s}
	b.Run("Get", bench.get)
	b.Run("Put", bench.put)
	b.Run("Revoke", bench.revoke)
	b.Run("Snapshot", bench.snapshot)
	if e.Size != nil {
		b.Run("Size", bench.size)
	}
}

// Fill writes the population and returns how many records it has.
func Fill(tb testing.TB, records sallyport.Records, p Population) (n int) {
	tb.Helper()
	const most = 1_000
	var batch []sallyport.Op
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		_, err := records.Apply(tb.Context(), batch)
		n += len(batch)
		batch = batch[:0]
		return err
	}
	for _, kind := range Kinds {
		err := p.Kind(kind, func(op sallyport.Op) error {
			if batch = append(batch, op); len(batch) < most {
				return nil
			}
			return flush()
		})
		if err := errors.Join(err, flush()); err != nil {
			tb.Fatalf("write a %s: %v", kind, err)
		}
	}
	return n
}

// bench is a filled store.
type bench struct {
	Engine
	Population
	server *cached.Server
}

func (e *bench) get(b *testing.B) {
	var took Latencies
	b.ReportAllocs()
	for b.Loop() {
		id := string(e.Session(rand.IntN(e.Sessions)))
		began := time.Now()
		if _, err := e.server.Get(b.Context(), sallyport.KindSession, id); err != nil {
			b.Fatal(err)
		}
		took.Add(began)
	}
	took.Report(b)
	Within(b, "the median get", took.Quantile(.50), e.Bars.Get)
	Within(b, "the 99th percentile of gets", took.Quantile(.99), e.Bars.GetP99)
}

// put is 64 callers that each write one session and wait until it is durable.
func (e *bench) put(b *testing.B) {
	const callers = 64
	b.SetParallelism(callers)
	b.ReportAllocs()
	before := CPU(b)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			op := e.SessionOp(rand.IntN(e.Sessions))
			if _, err := e.server.Apply(b.Context(), []sallyport.Op{op}); err != nil {
				b.Error(err)
				return
			}
		}
	})
	cpu := (CPU(b) - before) / time.Duration(b.N)
	b.ReportMetric(microseconds(cpu), "cpu-µs/op")
	if b.N > 10*callers { // fewer share no group
		Within(b, "the CPU time of a put", cpu, e.Bars.PutCPU)
	}
}

// revoke ends one session after the other and, so that they do not run out, puts
// each back.
func (e *bench) revoke(b *testing.B) {
	var took Latencies
	for b.Loop() {
		i := rand.IntN(e.Sessions)
		began := time.Now()
		out, err := e.server.Revoke(b.Context(), sallyport.Revocation{
			Subjects: []sallyport.Subject{{Kind: sallyport.SubjectSession, ID: string(e.Session(i))}}, By: "bench",
		})
		if err != nil || !out.Durable {
			b.Fatalf("got %+v, %v", out, err)
		}
		took.Add(began)
		b.StopTimer()
		if _, err := e.server.Apply(b.Context(), []sallyport.Op{e.LoginOp(i), e.SessionOp(i)}); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	took.Report(b)
	Within(b, "the median revocation", took.Quantile(.50), e.Bars.Revoke)
}

// snapshot is what policyd waits for at its start, without the way there.
func (e *bench) snapshot(b *testing.B) {
	errEnough := errors.New("enough")
	records := 0
	before := CPU(b)
	for b.Loop() {
		err := e.server.Watch(b.Context(), sallyport.WatchRequest{}, func(ev sallyport.WatchEvent) error {
			if ev.Type == sallyport.WatchEnd {
				records = ev.Count
				return errEnough
			}
			return nil
		})
		if !errors.Is(err, errEnough) {
			b.Fatal(err)
		}
	}
	cpu := CPU(b) - before
	each := b.Elapsed() / time.Duration(b.N)
	b.ReportMetric(each.Seconds(), "s/snapshot")
	b.ReportMetric(microseconds(cpu)/float64(b.N)/float64(records), "cpu-µs/record")
	WithinForMillion(b, "a snapshot", e.Sessions, min(each, cpu/time.Duration(b.N)), e.Bars.Snapshot)
}

func (e *bench) size(b *testing.B) {
	for b.Loop() {
	}
	n, err := e.Size()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(n)/float64(e.Sessions), "disk-B/session")
}

// WithinForMillion is Within for a figure of so many sessions that grows with them.
func WithinForMillion(b *testing.B, what string, sessions int, got, bar time.Duration) {
	b.Helper()
	if sessions >= 100_000 { // below, the start counts more than the rest
		Within(b, what+" of a million sessions", got*1_000_000/time.Duration(sessions), bar)
	}
}

// Within fails the benchmark if a figure is more than twice what it may be.
func Within(b *testing.B, what string, got, bar time.Duration) {
	b.Helper()
	if bar > 0 && got > 2*bar {
		b.Errorf("%s takes %v; want %v", what, got, bar)
	}
}

// Latencies are how long calls took.
type Latencies struct{ all []time.Duration }

// Add notes a call that began then and has just ended.
func (l *Latencies) Add(began time.Time) { l.all = append(l.all, time.Since(began)) }

// Quantile returns the latency that the part q of the calls did not exceed.
func (l *Latencies) Quantile(q float64) time.Duration {
	if len(l.all) == 0 {
		return 0
	}
	slices.Sort(l.all)
	return l.all[int(float64(len(l.all)-1)*q)]
}

// Report adds median and 99th percentile to the benchmark's figures.
func (l *Latencies) Report(b *testing.B) {
	b.ReportMetric(microseconds(l.Quantile(.50)), "p50-µs")
	b.ReportMetric(microseconds(l.Quantile(.99)), "p99-µs")
}

func microseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

// CPU is what this process has used so far.
func CPU(tb testing.TB) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		tb.Fatal(fmt.Errorf("getrusage: %w", err))
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

package peers

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// row is one line of the table. A figure is taken from one turn and those of
// direct and ssh in the same round; what is shown is the median over the rounds.
type row struct {
	name   string
	format string
	of     func(own, direct, ssh map[string]float64) float64
	h3     bar
	lane   bar
}

// bar is what a figure has to reach; the zero bar is none.
type bar struct {
	limit  float64
	atMost bool
}

func atMost(limit float64) bar  { return bar{limit, true} }
func atLeast(limit float64) bar { return bar{limit, false} }

func (b bar) String() string {
	switch {
	case b == bar{}:
		return ""
	case b.atMost:
		return fmt.Sprintf("≤ %g", b.limit)
	}
	return fmt.Sprintf("≥ %g", b.limit)
}

func (b bar) missed(v float64) bool {
	return b != bar{} && (b.atMost && v > b.limit || !b.atMost && v < b.limit)
}

type figures = map[string]float64

func own(key string) func(own, _, _ figures) float64 {
	return func(own, _, _ figures) float64 { return own[key] }
}

func scaled(key string, by float64) func(own, _, _ figures) float64 {
	return func(own, _, _ figures) float64 { return own[key] * by }
}

func toDirect(key string) func(own, direct, _ figures) float64 {
	return func(own, direct, _ figures) float64 { return own[key] / direct[key] }
}

func toSSH(key string) func(own, _, ssh figures) float64 {
	return func(own, _, ssh figures) float64 { return own[key] / ssh[key] }
}

// rows are the table's lines; each bar stands beside its own kind of figure.
func rows() []row {
	var all []row
	add := func(name, format string, of func(own, direct, ssh figures) float64, bars ...bar) {
		r := row{name: name, format: format, of: of}
		if len(bars) == 2 {
			r.h3, r.lane = bars[0], bars[1]
		}
		all = append(all, r)
	}
	for _, streams := range []string{"1", "8"} {
		for _, way := range []string{"up", "down"} {
			label := fmt.Sprintf("%s, %s stream", way, streams)
			if streams != "1" {
				label += "s"
			}
			key := way + streams
			add("CPU s/GB "+label, "%.1f", own(key+"_cpu_s_per_gb"), atMost(10), atMost(3.4))
			add("MB/s "+label, "%.0f", own(key+"_mbs"))
			if streams == "1" {
				add("… ÷ direct", "%.2f", toDirect(key+"_mbs"), atLeast(0.08), atLeast(0.20))
			} else {
				add("… ÷ direct", "%.2f", toDirect(key+"_mbs"))
			}
		}
	}
	add("1 B round trip p50 µs", "%.0f", own("lat1_p50"))
	add("… ÷ ssh", "%.2f", toSSH("lat1_p50"), atMost(1.2), atMost(1.0))
	add("1 B round trip p99 µs", "%.0f", own("lat1_p99"))
	add("1 KiB round trip p50 µs", "%.0f", own("lat1024_p50"))
	add("1 KiB round trip p99 µs", "%.0f", own("lat1024_p99"), atMost(3000), atMost(3000))
	add("connect → first byte p50 µs", "%.0f", own("conn1_p50"))
	add("… ÷ direct", "%.1f", toDirect("conn1_p50"), atMost(3.5), atMost(3.0))
	add("connect → first byte p99 µs", "%.0f", own("conn1_p99"))
	add("connections/s, 64 workers", "%.0f", own("conn64_ps"))
	add("… ÷ direct", "%.3f", toDirect("conn64_ps"), atLeast(0.27), atLeast(0.08))
	add("… failed", "%.0f", own("conn64_fails"))
	add("CPU µs a connection", "%.0f", own("conn64_cpu_us"))
	add("KiB per idle connection", "%.0f", scaled(fmt.Sprintf("bytes_per_conn_%d", *idle), 1./1024), atMost(28), atMost(64))
	add("MiB resident after the load", "%.0f", scaled("rss_kb_after", 1./1024), atMost(80), atMost(80))
	return all
}

// table is the Markdown table of all turns. A figure that misses its bar is bold.
func table(all []turn) string {
	byPeer := map[string]map[int]figures{}
	var peers []string
	for _, t := range all {
		if byPeer[t.Peer] == nil {
			byPeer[t.Peer] = map[int]figures{}
			peers = append(peers, t.Peer)
		}
		byPeer[t.Peer][t.Round] = t.M
	}
	var s strings.Builder
	fmt.Fprintf(&s, "%s, %d cores, %s to %s, medians of %d rounds, agent + gateway + policyd summed\n\n",
		runtime.Version(), runtime.NumCPU(), all[0].When.Format(time.DateTime), time.Now().Format(time.TimeOnly), *rounds)
	fmt.Fprintf(&s, "| figure | %s | bar h3 | bar lane |\n|---|%s---|---|\n", strings.Join(peers, " | "), strings.Repeat("---:|", len(peers)))
	for _, r := range rows() {
		cells := []string{r.name}
		for _, p := range peers {
			cells = append(cells, r.cell(p, byPeer))
		}
		fmt.Fprintf(&s, "| %s | %s | %s |\n", strings.Join(cells, " | "), r.h3, r.lane)
	}
	return s.String()
}

func (r row) cell(peer string, byPeer map[string]map[int]figures) string {
	var values []float64
	for round, m := range byPeer[peer] {
		v := r.of(m, byPeer["direct"][round], byPeer["ssh"][round])
		if v == v && v > 0 && v < 1e18 { // neither missing nor divided by a missing one
			values = append(values, v)
		}
	}
	if len(values) == 0 {
		return "–"
	}
	v := median(values)
	text := fmt.Sprintf(r.format, v)
	if b := map[string]bar{"h3": r.h3, "lane": r.lane}[peer]; b.missed(v) {
		text = "**" + text + "**"
	}
	return text
}

func median(v []float64) float64 {
	slices.Sort(v)
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

func TestTable(t *testing.T) {
	got := table([]turn{
		{Peer: "direct", Round: 1, M: figures{"up1_mbs": 1000}},
		{Peer: "lane", Round: 1, M: figures{"up1_mbs": 100, "up1_cpu_s_per_gb": 3}},
		{Peer: "direct", Round: 2, M: figures{"up1_mbs": 2000}},
		{Peer: "lane", Round: 2, M: figures{"up1_mbs": 600, "up1_cpu_s_per_gb": 4}},
		{Peer: "direct", Round: 3, M: figures{"up1_mbs": 1000}},
		{Peer: "lane", Round: 3, M: figures{"up1_mbs": 500, "up1_cpu_s_per_gb": 5}},
	})
	for _, want := range []string{
		"| figure | direct | lane | bar h3 | bar lane |",
		"| CPU s/GB up, 1 stream | – | **4.0** | ≤ 10 | ≤ 3.4 |",
		"| MB/s up, 1 stream | 1000 | 500 |  |  |",
		"| … ÷ direct | 1.00 | 0.30 | ≥ 0.08 | ≥ 0.2 |",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no line %q in\n%s", want, got)
		}
	}
}

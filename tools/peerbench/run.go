package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// settle is the pause after a load, so that its end is not the next one's start.
const settle = 200 * time.Millisecond

func runVerb(args []string) error {
	c := newCommon("run")
	tests := c.fs.String("tests", "bulk1,bulk8,lat,conn", "what to measure, in this order: bulkN, latN, lat (1 and 1024), connN, conn (1 and 64), hol")
	bulk := c.fs.Duration("bulk", 1500*time.Millisecond, "how long each bulk load is measured")
	lat := c.fs.Duration("lat", 1200*time.Millisecond, "how long each ping-pong runs")
	conn := c.fs.Duration("conn", 1500*time.Millisecond, "how long each storm of connections runs")
	c.fs.DurationVar(&c.client.ramp, "ramp", 300*time.Millisecond, "how long a bulk load runs before it is measured")
	tunnel, r, err := c.parse(args)
	if err != nil {
		return err
	}
	m := &measurement{client: &c.client, tunnel: tunnel, r: r}
	first, err := c.client.open()
	if err != nil {
		return fmt.Errorf("no way through: %w", err)
	}
	first.Close()
	r.M["rss_kb_before"] = tunnel.rss()
	for test := range strings.SplitSeq(*tests, ",") {
		name := strings.TrimRight(test, "0123456789")
		n, _ := strconv.Atoi(test[len(name):])
		switch name {
		case "bulk":
			m.bulk(n, *bulk)
		case "lat":
			for _, size := range orDefault(n, 1, 1024) {
				m.pingPong(size, *lat)
			}
		case "conn":
			for _, workers := range orDefault(n, 1, 64) {
				m.storm(workers, *conn)
			}
		case "hol":
			m.besideDownload(*lat)
		default:
			return fmt.Errorf("unknown test %q", test)
		}
	}
	r.M["rss_kb_after"] = tunnel.rss()
	return r.print()
}

func orDefault(n int, other ...int) []int {
	if n > 0 {
		return []int{n}
	}
	return other
}

// measurement fills in a report, load by load.
type measurement struct {
	client *client
	tunnel processes
	r      *report
}

// bulk measures both directions.
func (m *measurement) bulk(streams int, window time.Duration) {
	for _, mode := range []byte{modeUp, modeDown} {
		key := map[byte]string{modeUp: "up", modeDown: "down"}[mode] + strconv.Itoa(streams)
		used := make(chan float64) // CPU seconds a second, in the window in which the bytes count
		go func() {
			time.Sleep(m.client.ramp)
			before, start := m.tunnel.cpu(), time.Now()
			time.Sleep(window - 20*time.Millisecond)
			used <- (m.tunnel.cpu() - before) / time.Since(start).Seconds()
		}()
		rate, err := m.client.bulk(mode, streams, window)
		perSecond := <-used
		m.r.fail(key, err)
		m.r.M[key+"_mbs"] = rate
		if rate > 0 {
			m.r.M[key+"_cpu_s_per_gb"] = perSecond / (rate / 1e3)
		}
		time.Sleep(settle)
	}
}

func (m *measurement) pingPong(size int, window time.Duration) {
	key := "lat" + strconv.Itoa(size)
	before := m.tunnel.cpu()
	trips, err := m.client.pingPong(size, window)
	m.perUnit(key, before, len(trips))
	m.r.fail(key, err)
	m.quantiles(key, trips)
	m.r.M[key+"_p999"] = quantile(trips, .999)
	m.r.M[key+"_n"] = float64(len(trips))
}

func (m *measurement) storm(workers int, window time.Duration) {
	key := "conn" + strconv.Itoa(workers)
	before := m.tunnel.cpu()
	opens, rate, failed := m.client.storm(workers, window)
	m.perUnit(key, before, len(opens))
	m.quantiles(key, opens)
	m.r.M[key+"_ps"] = rate
	m.r.M[key+"_fails"] = float64(failed)
	time.Sleep(settle)
}

// besideDownload is the latency of a single byte while another connection
// downloads as fast as it can.
func (m *measurement) besideDownload(window time.Duration) {
	done := make(chan error, 1)
	go func() {
		_, err := m.client.download(window + 500*time.Millisecond)
		done <- err
	}()
	time.Sleep(m.client.ramp + 100*time.Millisecond)
	trips, err := m.client.pingPong(1, window)
	m.r.fail("hol", err)
	m.r.fail("hol download", <-done)
	m.quantiles("hol", trips)
}

// perUnit notes the CPU of n units of work.
func (m *measurement) perUnit(key string, before float64, n int) {
	if n > 0 {
		m.r.M[key+"_cpu_us"] = (m.tunnel.cpu() - before) * 1e6 / float64(n)
	}
}

func (m *measurement) quantiles(key string, sorted []float64) {
	m.r.M[key+"_p50"] = quantile(sorted, .5)
	m.r.M[key+"_p99"] = quantile(sorted, .99)
}

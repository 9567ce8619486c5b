// Package telemetry is what a daemon tells about itself: metrics in a registry
// of its own (Prometheus), and the admin listener that shows them beside health,
// readiness and profiles. Which figures there are is the business of whoever
// counts; names start with sallyport_<daemon>_ and end with their unit.
package telemetry

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// Registry holds a process's metrics. A nil *Registry gives metrics that count
// nothing, so that a library works without one.
type Registry struct{ reg *prometheus.Registry }

// NewRegistry returns a registry with the figures of the Go runtime and of the
// process (memory, descriptors, CPU seconds).
func NewRegistry() *Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return &Registry{reg}
}

// Counter only grows. A nil *Counter counts nothing.
type Counter struct{ vec *prometheus.CounterVec }

// Counter makes a counter; labels name what it is split by. It panics if the
// name is taken or no metric name, as the constructors below do: names are
// constants of the program.
func (r *Registry) Counter(name, help string, labels ...string) *Counter {
	if r == nil {
		return nil
	}
	vec := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	r.reg.MustRegister(vec)
	if len(labels) == 0 {
		vec.WithLabelValues() // shown from the start, as 0
	}
	return &Counter{vec}
}

// Inc adds one. Values are those of the labels, in their order; few different
// ones, never ids of people or flows.
func (c *Counter) Inc(values ...string) { c.Add(1, values...) }

// Add adds n, which must not be below zero.
func (c *Counter) Add(n float64, values ...string) {
	if c != nil {
		c.vec.WithLabelValues(values...).Add(n)
	}
}

// Gauge goes up and down. A nil *Gauge shows nothing.
type Gauge struct{ vec *prometheus.GaugeVec }

// Gauge makes a gauge.
func (r *Registry) Gauge(name, help string, labels ...string) *Gauge {
	if r == nil {
		return nil
	}
	vec := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	r.reg.MustRegister(vec)
	if len(labels) == 0 {
		vec.WithLabelValues()
	}
	return &Gauge{vec}
}

// Set sets the gauge to v.
func (g *Gauge) Set(v float64, values ...string) {
	if g != nil {
		g.vec.WithLabelValues(values...).Set(v)
	}
}

// Add adds n, which may be below zero.
func (g *Gauge) Add(n float64, values ...string) {
	if g != nil {
		g.vec.WithLabelValues(values...).Add(n)
	}
}

// GaugeFunc makes a gauge whose value is read when somebody looks. f must be
// safe for concurrent use and quick.
func (r *Registry) GaugeFunc(name, help string, f func() float64) {
	if r != nil {
		r.reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
	}
}

// Seconds are bucket bounds for durations, 100 µs to 30 s.
var Seconds = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 30}

// Histogram sorts observations into buckets. A nil *Histogram takes none.
type Histogram struct{ vec *prometheus.HistogramVec }

// Histogram makes a histogram; buckets are upper bounds, rising.
func (r *Registry) Histogram(name, help string, buckets []float64, labels ...string) *Histogram {
	if r == nil {
		return nil
	}
	vec := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
	r.reg.MustRegister(vec)
	return &Histogram{vec}
}

// Observe adds one observation.
func (h *Histogram) Observe(v float64, values ...string) {
	if h != nil {
		h.vec.WithLabelValues(values...).Observe(v)
	}
}

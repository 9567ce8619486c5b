package gateway

import (
	"time"

	"sallyport/internal/telemetry"
)

// metrics are the gateway's figures. With a nil registry they count nothing.
type metrics struct {
	decisions *telemetry.Counter
	deciding  *telemetry.Histogram
	refusals  *telemetry.Counter
	cuts      *telemetry.Counter
	cutting   *telemetry.Histogram
	bytes     *telemetry.Counter
}

func newMetrics(reg *telemetry.Registry, t *table) metrics {
	count := func(what func() int) func() float64 { return func() float64 { return float64(what()) } }
	if reg != nil {
		reg.GaugeFunc("sallyport_gateway_flows", "flows that live or wait", count(t.flowCount))
		reg.GaugeFunc("sallyport_gateway_carriers", "connections that are admitted", count(t.carrierCount))
	}
	return metrics{
		decisions: reg.Counter("sallyport_gateway_decisions_total", "answers of policyd to new flows and carriers", "verdict"),
		deciding:  reg.Histogram("sallyport_gateway_decision_seconds", "how long an answer of policyd took", telemetry.Seconds),
		refusals:  reg.Counter("sallyport_gateway_refusals_total", "flows that were refused", "code"),
		cuts:      reg.Counter("sallyport_gateway_cuts_total", "live flows that were withdrawn", "code"),
		cutting:   reg.Histogram("sallyport_gateway_cut_seconds", "from learning of a change to the cut", telemetry.Seconds),
		bytes:     reg.Counter("sallyport_gateway_bytes_total", "bytes of finished flows", "direction"),
	}
}

func (m metrics) cut(word string, after time.Duration) {
	m.cuts.Inc(word)
	m.cutting.Observe(after.Seconds())
}

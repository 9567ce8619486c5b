package policyd

import "sallyport/internal/telemetry"

// metrics are policyd's figures. With a nil registry they count nothing.
type metrics struct {
	decisions *telemetry.Counter
	observed  *telemetry.Counter
	reports   *telemetry.Counter
	deciding  *telemetry.Histogram
}

func newMetrics(reg *telemetry.Registry, s *Server) metrics {
	if reg != nil {
		reg.GaugeFunc("sallyport_policyd_source_age_seconds", "since cached last confirmed the snapshot; below zero: never",
			func() float64 { return s.sourceAge().Seconds() })
		reg.GaugeFunc("sallyport_policyd_policy_stale", "1 while the newest configuration does not load and an older one is in force",
			func() float64 { return s.gauge(func(snap *snapshot) float64 { return oneIf(s.broken(snap) != nil) }) })
		reg.GaugeFunc("sallyport_policyd_revision", "revision of the snapshot",
			func() float64 { return s.gauge(func(snap *snapshot) float64 { return float64(snap.revision) }) })
		reg.GaugeFunc("sallyport_policyd_direct_revocations", "direct revocations that the snapshot does not show yet",
			func() float64 { return float64(len(s.revoked.Load().all)) })
	}
	return metrics{
		decisions: reg.Counter("sallyport_policyd_decisions_total", "answers that were given", "verdict"),
		observed:  reg.Counter("sallyport_policyd_observed_total", "answers that a rule with mode observe would have changed, by what it would have made them", "verdict"),
		reports:   reg.Counter("sallyport_policyd_posture_reports_total", "posture reports, by the code of their refusal or ok", "code"),
		deciding:  reg.Histogram("sallyport_policyd_batch_seconds", "from a batch of questions to its answers, the audit included", telemetry.Seconds),
	}
}

// gauge reads a figure of the snapshot; 0 before the first one.
func (s *Server) gauge(read func(*snapshot) float64) float64 {
	if snap := s.snap.Load(); snap != nil {
		return read(snap)
	}
	return 0
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

package daemons

import (
	"testing"
	"time"

	"sallyport/cmd/internal/config"
)

// policyd.decision_timeout is the one key for it; it must not be worth nothing
// because the gateway gives up earlier.
func TestGatewayWaitsAsLongAsPolicydMay(t *testing.T) {
	for _, c := range []struct{ policyd, own, want time.Duration }{
		{0, 0, 0}, // both have the same default
		{5 * time.Second, 0, 5 * time.Second},
		{5 * time.Second, time.Second, time.Second},
	} {
		var f config.File
		f.Policyd.DecisionTimeout, f.Gateway.Limits.DecisionTimeout = c.policyd, c.own
		if got := gatewayConfig(&f).Limits.DecisionTimeout; got != c.want {
			t.Errorf("policyd %s, gateway %s: got %s; want %s", c.policyd, c.own, got, c.want)
		}
	}
}

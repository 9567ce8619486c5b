package policyd

import (
	"net"
	"slices"
	"strconv"
	"time"

	"sallyport"
	"sallyport/internal/fault"
)

// Config is the section `policyd` of the configuration file.
type Config struct {
	// Listen is where the gRPC API with mTLS listens, host:port. Port 0 takes a
	// free one. Empty in the all-in-one, which needs no listener.
	Listen string `yaml:"listen"`
	// MaxStale is for how long answers are given, and live flows go on, without
	// cached confirming that nothing has changed. 0: 30 s.
	MaxStale time.Duration `yaml:"max_stale"`
	// DecisionTimeout bounds one batch of questions, the audit included. 0: 2 s.
	DecisionTimeout time.Duration `yaml:"decision_timeout"`
	// PostureTTL is how long a fact counts without a newer report, where the
	// applied configuration says nothing. 0: 10 min.
	PostureTTL time.Duration `yaml:"posture_ttl"`
	// PostureSources are the sources whose facts count (os, file, attested), where
	// the applied configuration says nothing. Empty: os, attested.
	PostureSources []string `yaml:"posture_sources"`
}

func (c Config) withDefaults() Config {
	if c.MaxStale == 0 {
		c.MaxStale = 30 * time.Second
	}
	if c.DecisionTimeout == 0 {
		c.DecisionTimeout = 2 * time.Second
	}
	if c.PostureTTL == 0 {
		c.PostureTTL = 10 * time.Minute
	}
	return c
}

// Validate returns every fault, with keys relative to the section.
func (c Config) Validate() fault.List {
	var faults fault.List
	if c.Listen != "" {
		_, port, err := net.SplitHostPort(c.Listen)
		if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || strconv.FormatUint(n, 10) != port {
			faults.Addf("listen", "%q is not host:port", c.Listen)
		}
	}
	atLeast := func(key string, d, least time.Duration) {
		if d != 0 && d < least {
			faults.Addf(key, "%v is too short; at least %v", d, least)
		}
	}
	// Heartbeats come each second: below three a busy moment would cut everybody.
	atLeast("max_stale", c.MaxStale, 3*time.Second)
	atLeast("decision_timeout", c.DecisionTimeout, 100*time.Millisecond)
	atLeast("posture_ttl", c.PostureTTL, 3*time.Second)
	known := []string{sallyport.SourceOS, sallyport.SourceFile, sallyport.SourceAttested}
	for i, s := range c.PostureSources {
		if !slices.Contains(known, s) {
			faults.Addf("posture_sources["+strconv.Itoa(i)+"]", "unknown source %q; use os, file or attested", s)
		}
	}
	return faults
}

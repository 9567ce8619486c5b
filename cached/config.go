package cached

import (
	"net"
	"strconv"
	"strings"

	"sallyport/internal/fault"
)

// Config is the section `cached` of the configuration file.
type Config struct {
	// Listen is where the gRPC API with mTLS listens, host:port. Port 0 takes a
	// free one. Empty in the all-in-one, which needs no listener.
	Listen string `yaml:"listen"`
	// Store is the engine; "sqlite", which is also what empty means. The file is
	// cached.db in data_dir.
	Store string `yaml:"store"`
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
	switch {
	case c.Store == "", c.Store == "sqlite":
	case strings.HasPrefix(c.Store, "postgres://"), strings.HasPrefix(c.Store, "postgresql://"):
		faults.Addf("store", "PostgreSQL is not supported by this version; use sqlite")
	default:
		faults.Addf("store", "unknown engine %q; use sqlite", c.Store)
	}
	return faults
}

package cached

import (
	"net"
	"strconv"

	"sallyport/internal/fault"
)

// Config is the section `cached` of the configuration file.
type Config struct {
	// Listen is where the gRPC API with mTLS listens, host:port. Port 0 takes a
	// free one. Empty in the all-in-one, which needs no listener.
	Listen string `yaml:"listen"`
	// Store is the engine: "sqlite", which is also what empty means (the file is
	// cached.db in data_dir), or the URL of a PostgreSQL database, where several
	// cacheds may work on one store. Several hosts, separated by commas, are tried
	// in their order until one is the primary. The tables lie in the schema
	// `sallyport`, or in that of the parameter search_path.
	Store string `yaml:"store"`
	// StorePasswordFile holds the password for PostgreSQL. None: a client
	// certificate (sslcert and sslkey in the URL), peer authentication, or none.
	StorePasswordFile string `yaml:"store_password_file"`
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
	case c.Store == "", c.Store == SQLite:
	case c.OnPostgres():
		faults = append(faults, postgresFaults(c.Store)...)
	default:
		faults.Addf("store", "unknown engine; use sqlite, or postgres://USER@HOST/DATABASE?sslmode=verify-full")
	}
	if c.StorePasswordFile != "" && !c.OnPostgres() {
		faults.Addf("store_password_file", "is the password of PostgreSQL, and cached.store is %s", SQLite)
	}
	return faults
}

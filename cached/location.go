package cached

import (
	"net"
	"net/url"
	"slices"
	"strings"

	"sallyport/internal/fault"
)

// SQLite is the engine that needs no URL.
const SQLite = "sqlite"

// OnPostgres reports whether the store is a PostgreSQL database.
func (c Config) OnPostgres() bool {
	return strings.HasPrefix(c.Store, "postgres://") || strings.HasPrefix(c.Store, "postgresql://")
}

// parameters are those that a URL may have after its question mark. What is not
// here could bring a password, or change what the engine relies on.
var parameters = []string{
	"host", "port", "user", "dbname", "search_path", "application_name", "connect_timeout", "target_session_attrs",
	"sslmode", "sslrootcert", "sslcert", "sslkey", "sslnegotiation",
}

// postgresFaults says what is wrong with the URL of a database, never quoting it:
// there may be a password in it.
func postgresFaults(raw string) (faults fault.List) {
	_, rest, _ := strings.Cut(raw, "://")
	rest, query, _ := strings.Cut(rest, "?")
	authority, _, _ := strings.Cut(rest, "/")
	params, err := url.ParseQuery(query)
	if err != nil || strings.ContainsAny(raw, "\x00 \t\r\n") {
		faults.Addf("store", "is no URL of PostgreSQL; write postgres://USER@HOST/DATABASE?sslmode=verify-full")
		return faults
	}
	hosts := authority
	if at := strings.LastIndexByte(authority, '@'); at >= 0 {
		hosts = authority[at+1:]
		if strings.Contains(authority[:at], ":") {
			params.Set("password", "")
		}
	}
	if params.Has("password") || params.Has("sslpassword") || params.Has("passfile") {
		faults.Addf("store", "a password does not belong in the configuration: put it into a file of its own (mode 0600) "+
			"and name that in cached.store_password_file, or use a client certificate (sslcert, sslkey)")
	}
	for name, values := range params {
		switch {
		case name == "password", name == "sslpassword", name == "passfile": // said above
		case len(values) > 1:
			faults.Addf("store", "%s is given twice", name)
		case !slices.Contains(parameters, name):
			faults.Addf("store", "the parameter %q is not supported; there are %s", name, strings.Join(parameters, ", "))
		}
	}
	if a := params.Get("target_session_attrs"); a != "" && a != "read-write" && a != "primary" {
		faults.Addf("store", "target_session_attrs=%s is refused: records are only read from the primary", a)
	}
	if params.Get("host") != "" {
		hosts = params.Get("host")
	}
	return append(faults, hostFaults(hosts, params.Get("sslmode"))...)
}

// hostFaults refuses connections that could be listened to, or that end at
// whoever answers.
func hostFaults(hosts, sslmode string) (faults fault.List) {
	for _, host := range strings.Split(hosts, ",") {
		name, err := url.PathUnescape(host)
		if h, _, split := net.SplitHostPort(name); split == nil {
			name = h
		}
		switch {
		case err != nil || name == "":
			faults.Addf("store", "names no host")
		case !onThisMachine(name) && sslmode != "verify-full":
			faults.Addf("store", "the connection to %s must be encrypted and its certificate checked: add sslmode=verify-full, "+
				"and sslrootcert=FILE where the CA is not one of the system's", name)
		}
	}
	return faults
}

func onThisMachine(host string) bool {
	if strings.HasPrefix(host, "/") || strings.HasPrefix(host, "@") || host == "localhost" {
		return true // a unix socket
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return ip != nil && ip.IsLoopback()
}

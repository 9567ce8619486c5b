package gateway

import (
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/fault"
)

// Config is the section "gateway" of the configuration file. The zero value of
// every field that is not called required has a working default.
type Config struct {
	// Name is how people call this gateway: "eu1". Empty: the host of PublicURL.
	Name string `yaml:"name"`
	// PublicURL is the tunnel host, https://host[:port] without a path. Agents
	// connect to it with a client certificate; nothing else is served there. This
	// field is required.
	PublicURL string `yaml:"public_url"`
	// Listen is the address of the TCP and the UDP listener, host:port; port 0
	// chooses one. Empty: ":443".
	Listen string `yaml:"listen"`
	// Addresses are what agents dial instead of resolving PublicURL's host,
	// host:port. Empty: they resolve it.
	Addresses []string `yaml:"addresses"`
	// TLS is the certificate of the tunnel host. Empty: signed by the deployment's
	// own public CA, which a login hands to agents.
	TLS TLSFiles `yaml:"tls"`
	// Limits bound what one session and all of them together may hold.
	Limits Limits `yaml:"limits"`
}

// TLSFiles names a certificate chain and its key, both PEM.
type TLSFiles struct {
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
}

// Limits are bounds; 0 means the default in parentheses.
type Limits struct {
	// Carriers is how many multiplexed connections one session may hold (64).
	Carriers int `yaml:"carriers"`
	// Lanes is how many connections of one flow each a session may hold (512).
	Lanes int `yaml:"lanes"`
	// Flows is how many flows one session may hold (16384).
	Flows int `yaml:"flows"`
	// Pending is how many flows of all sessions may wait for a decision or a dial
	// at the same time (10000); the next one is refused at once.
	Pending int `yaml:"pending"`
	// Handshakes is how many TLS handshakes may be under way at the same time
	// (4096). One source address may hold a quarter of them.
	Handshakes int `yaml:"handshakes"`
	// DecisionTimeout is how long policyd may take to answer (2s; the daemons take
	// policyd.decision_timeout where the file has it).
	DecisionTimeout time.Duration `yaml:"decision_timeout"`
	// DialTimeout is how long a service may take to accept (10s).
	DialTimeout time.Duration `yaml:"dial_timeout"`
	// Idle ends a flow on which no byte moved for this long (0: never).
	Idle time.Duration `yaml:"idle"`
	// Drain is how long live flows may go on when the gateway ends (5s).
	Drain time.Duration `yaml:"drain"`
}

// withDefaults returns l with every 0 replaced.
func (l Limits) withDefaults() Limits {
	set := func(p *int, def int) {
		if *p == 0 {
			*p = def
		}
	}
	set(&l.Carriers, 64)
	set(&l.Lanes, 512)
	set(&l.Flows, 16384)
	set(&l.Pending, 10000)
	set(&l.Handshakes, 4096)
	if l.DecisionTimeout == 0 {
		l.DecisionTimeout = 2 * time.Second
	}
	if l.DialTimeout == 0 {
		l.DialTimeout = 10 * time.Second
	}
	if l.Drain == 0 {
		l.Drain = 5 * time.Second
	}
	return l
}

// Validate returns every fault, with keys relative to the section.
func (c Config) Validate() fault.List {
	var l fault.List
	checkPublicURL(&l, c.PublicURL)
	if c.Listen != "" {
		if _, port, err := net.SplitHostPort(c.Listen); err != nil || !isPort(port, 0) {
			l.Addf("listen", "%.80q is not host:port, for example %q", c.Listen, ":443")
		}
	}
	for i, a := range c.Addresses {
		if _, port, err := net.SplitHostPort(a); err != nil || !isPort(port, 1) {
			l.Addf("addresses["+strconv.Itoa(i)+"]", "%.80q is not host:port, for example %q", a, "203.0.113.7:443")
		}
	}
	if (c.TLS.CertFile == "") != (c.TLS.KeyFile == "") {
		l.Addf("tls", "cert_file and key_file belong together: set both or neither")
	}
	l.Under("limits", c.Limits.validate())
	return l
}

func checkPublicURL(l *fault.List, s string) {
	if s == "" {
		l.Addf("public_url", "is required, for example https://gw.corp.example")
		return
	}
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Scheme != "https" || u.Hostname() == "":
		l.Addf("public_url", "%.80q is not an https URL, for example https://gw.corp.example", s)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Path != "" && u.Path != "/":
		l.Addf("public_url", "%.80q has more than a host and a port", s)
	case u.Port() != "" && !isPort(u.Port(), 0):
		l.Addf("public_url", "%.80q has no port from 0 to 65535", s)
	default:
		if _, err := netip.ParseAddr(u.Hostname()); err == nil {
			l.Addf("public_url", "%.80q names an address: agents and the TLS port need a host name (SNI)", s)
		}
	}
}

func (l Limits) validate() fault.List {
	var f fault.List
	for _, n := range []struct {
		key   string
		value int
	}{
		{"carriers", l.Carriers},
		{"lanes", l.Lanes},
		{"flows", l.Flows},
		{"pending", l.Pending},
		{"handshakes", l.Handshakes},
	} {
		if n.value < 0 {
			f.Addf(n.key, "%d is below 0 (0 means the default)", n.value)
		}
	}
	for _, d := range []struct {
		key   string
		value time.Duration
	}{
		{"decision_timeout", l.DecisionTimeout}, {"dial_timeout", l.DialTimeout}, {"idle", l.Idle}, {"drain", l.Drain},
	} {
		if d.value < 0 {
			f.Addf(d.key, "%s is below 0 (0 means the default)", d.value)
		}
	}
	return f
}

func isPort(s string, least uint64) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n >= least
}

// host returns the tunnel host's name, lower case.
func (c Config) host() string {
	u, err := url.Parse(c.PublicURL)
	if err != nil {
		return "" // Validate has refused it
	}
	return strings.ToLower(u.Hostname())
}

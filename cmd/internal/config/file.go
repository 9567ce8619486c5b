// Package config is the configuration file of DESIGN, section 6: one YAML file
// from which every daemon reads its sections. It owns the form of the file (strict,
// every fault at once with file, line and key path), what sections have to do
// with each other, and where everything lies in the data directory. What a
// section means is its daemon's business: each has a Config with a Validate.
package config

import (
	"errors"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"time"

	"go.yaml.in/yaml/v3"

	"sallyport"
	"sallyport/authd"
	"sallyport/cached"
	"sallyport/gateway"
	"sallyport/internal/fault"
	"sallyport/internal/logging"
	"sallyport/internal/telemetry"
	"sallyport/policyd"
	"sallyport/policyd/policy"
)

// File is a configuration file.
type File struct {
	// Domain is the trust domain: it stands in every certificate, so changing it
	// ends every session. This field is required.
	Domain string `yaml:"domain"`
	// DataDir holds keys, records, sockets and audit logs (mode 0700). A relative
	// path starts at this file's directory. This field is required.
	DataDir string `yaml:"data_dir"`
	// Log says what the daemons write to stderr.
	Log Log `yaml:"log"`
	// Admin is where each process answers /healthz, /readyz, /metrics and
	// /debug/pprof.
	Admin Admin `yaml:"admin"`
	// TLS is this daemon's certificate towards the other daemons. Not needed in
	// the all-in-one, nor where `sallyport init` put one into data_dir.
	TLS TLS `yaml:"tls"`
	// Gateway is the daemon that agents connect to.
	Gateway gateway.Config `yaml:"gateway"`
	// Gateways are all that agents may use, the preferred first. Empty: the one of
	// section gateway. A gateway itself reads section gateway only.
	Gateways []Gateway `yaml:"gateways"`
	// Authd is the daemon that logs people in.
	Authd authd.Config `yaml:"authd"`
	// Cached is the daemon that keeps records.
	Cached cached.Config `yaml:"cached"`
	// Policyd is the daemon that decides.
	Policyd policyd.Config `yaml:"policyd"`
	// Audit says where audit logs lie and what happens when they cannot be written.
	Audit Audit `yaml:"audit"`
	// Keys says where the keys come from that protect data at rest.
	Keys Keys `yaml:"keys"`
	// Connect is where the daemons find each other; not needed in the all-in-one.
	Connect Connect `yaml:"connect"`
	// Routes are what people can reach, and their policies.
	Routes []Route `yaml:"routes"`
	// ExplainGroups lets a denial name the groups that a rule asks for.
	ExplainGroups bool `yaml:"explain_groups"`

	path    string
	present map[string]bool           // sections that stand in the file
	parsed  map[string]*policy.Policy // of the routes, by text
}

// Log says what a daemon logs.
type Log struct {
	// Level is trace, debug, info, warn or error (info).
	Level string `yaml:"level"`
	// Format is json or text (text).
	Format string `yaml:"format"`
}

// Admin are the admin listeners: a loopback address, host:port, or
// unix:PATH; port 0 chooses one. Empty: 127.0.0.1:0.
type Admin struct {
	Gateway string `yaml:"gateway"`
	Authd   string `yaml:"authd"`
	Policyd string `yaml:"policyd"`
	Cached  string `yaml:"cached"`
	// Serve is the all-in-one's.
	Serve string `yaml:"serve"`
}

// TLS is a service's certificate (PEM files).
type TLS struct {
	// CAFile is the internal CA.
	CAFile   string `yaml:"ca_file"`
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
}

// Audit configures the audit logs.
type Audit struct {
	// Dir holds one directory for each daemon; relative to data_dir (audit).
	Dir string `yaml:"dir"`
	// OnFailure is what happens to something that cannot be audited: deny refuses
	// it; allow lets it happen and logs an error (deny).
	OnFailure string `yaml:"on_failure"`
}

// Connect lists addresses, host:port.
type Connect struct {
	Policyd []string `yaml:"policyd"`
	Cached  []string `yaml:"cached"`
	// Authd is where a gateway passes connections for authd on to; it is never a
	// route's destination.
	Authd string `yaml:"authd"`
}

// Route is one entry of routes.
type Route struct {
	// From is what people ask for: tcp://db.internal:5432, tcp://*.svc.internal:22,
	// tcp://10.0.0.0/8:22, tcp://[2001:db8::/32]:22, tcp://db.internal:5000-5010.
	From string `yaml:"from"`
	// To is what the gateway dials; empty: the host that was asked for.
	To string `yaml:"to"`
	// Name is a short name that people may type instead.
	Name string `yaml:"name"`
	// Policy is the policy (docs/policy.md).
	Policy Policy `yaml:"policy"`
	// Hidden routes answer those they do not allow as if they did not exist.
	Hidden bool `yaml:"hidden"`
	// Carrier is bulk to prefer one TLS connection for each flow; empty: any.
	Carrier string `yaml:"carrier"`
}

// Policy is the policy of a route. It was checked when the file was read.
type Policy struct {
	// Text is what stands in the file, in few words and without comments.
	Text string

	parsed *policy.Policy // with the file's lines and columns
}

// Who reads a file besides the daemons.
const (
	AllInOne = "sallyport" // needs the sections of all four daemons
	Checker  = "check"     // checks what is there
	Tool     = "tool"      // needs domain, data_dir and routes only
)

// Load reads the file for a daemon, AllInOne, Checker or Tool, and checks it as
// a whole. The error of a file that is not right is Problems; any other means
// that the file could not be read.
func Load(path, reader string) (*File, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeUsage, Message: "configuration " + plainly(err).Error(),
			Hint: "name it with --config FILE",
		}
	}
	return parse(path, text, reader)
}

func newFile(path string) *File { return &File{path: path, present: map[string]bool{}} }

// IsFile reports whether text is a configuration, and not a policy alone.
func IsFile(text []byte) bool {
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil || len(doc.Content) != 1 || doc.Content[0].Kind != yaml.MappingNode {
		return false // what is no YAML is for the policy's parser to refuse
	}
	for i, n := range doc.Content[0].Content {
		if i%2 == 0 && (n.Value == "routes" || n.Value == "data_dir" || n.Value == "domain") {
			return true
		}
	}
	return false
}

func parse(path string, text []byte, reader string) (*File, error) {
	d, f, ok := (*decoder)(nil), (*File)(nil), false
	if len(text) >= worthCutting {
		d, f, ok = inPieces(path, text, 4*runtime.GOMAXPROCS(0))
	}
	if !ok {
		d, f = newDecoder(path), newFile(path)
		d.decode(text, f)
	}
	if len(d.lines) > 1 { // else there is no mapping, and nothing more to say
		f.settle(d)
		f.check(d, reader)
	}
	if len(d.problems) > 0 {
		return nil, d.problems.sorted()
	}
	if reader != "policyd" && slices.Contains(Daemons, reader) {
		f.parsed = nil // nobody there decides
	}
	return f, nil
}

// settle fills in defaults and makes paths absolute.
func (f *File) settle(d *decoder) {
	for _, field := range fieldsOf(reflect.TypeFor[File]()) {
		_, f.present[field.name] = d.lines[field.name]
	}
	dir, err := filepath.Abs(filepath.Dir(f.path))
	if err != nil {
		d.fault(0, "", "%v", err)
		return
	}
	if f.DataDir != "" && !filepath.IsAbs(f.DataDir) {
		f.DataDir = filepath.Join(dir, f.DataDir)
	}
	if f.Audit.Dir != "" && !filepath.IsAbs(f.Audit.Dir) {
		f.Audit.Dir = filepath.Join(f.DataDir, f.Audit.Dir)
	}
	d.files(reflect.ValueOf(f).Elem(), "", dir)
}

// check reports everything that is wrong for the reader.
func (f *File) check(d *decoder, reader string) {
	var l fault.List
	f.checkCommon(&l)
	sections := map[string]func() fault.List{
		"gateway": f.Gateway.Validate, "authd": f.Authd.Validate, "cached": f.Cached.Validate, "policyd": f.Policyd.Validate,
	}
	for _, name := range Daemons {
		needed := reader == name || reader == AllInOne && (name == "gateway" || name == "authd")
		if f.present[name] || needed {
			l.Under(name, sections[name]())
		}
	}
	f.checkGateways(&l)
	l.Under("connect", f.checkConnect(reader))
	l.Under("admin", f.Admin.validate())
	l.Under("keys", f.Keys.validate())
	f.checkRoutes(d, &l)
	for _, p := range l {
		if !d.isBad(p.Key) {
			d.problems = append(d.problems, Problem{File: f.path, Line: d.line(p.Key), Key: p.Key, Message: p.Message})
		}
	}
}

func (f *File) checkCommon(l *fault.List) {
	if t, err := sallyport.ParseAuthority(sallyport.TCP, f.Domain+":1"); f.Domain == "" {
		l.Addf("domain", "is required, for example corp.example")
	} else if err != nil || t.Host != f.Domain {
		l.Addf("domain", "%.80q is no domain name in lower case, for example corp.example", f.Domain)
	}
	if f.DataDir == "" {
		l.Addf("data_dir", "is required, for example /var/lib/sallyport")
	}
	if err := logging.Check(f.Log.Level, f.Log.Format); err != nil {
		l.Addf("log", "%v", err)
	}
	if o := f.Audit.OnFailure; o != "" && o != "deny" && o != "allow" {
		l.Addf("audit.on_failure", "%.40q is neither deny nor allow", o)
	}
	if f.TLS != (TLS{}) && (f.TLS.CAFile == "" || f.TLS.CertFile == "" || f.TLS.KeyFile == "") {
		l.Addf("tls", "ca_file, cert_file and key_file belong together: give all three or none")
	}
}

// checkConnect asks for what the daemon must be able to reach.
func (f *File) checkConnect(reader string) fault.List {
	var l fault.List
	for i, a := range f.Connect.Policyd {
		checkDial(&l, index("policyd", i), a)
	}
	for i, a := range f.Connect.Cached {
		checkDial(&l, index("cached", i), a)
	}
	if f.Connect.Authd != "" {
		checkDial(&l, "authd", f.Connect.Authd)
	}
	switch {
	case reader == "gateway" && len(f.Connect.Policyd) == 0:
		l.Addf("policyd", "is required for a gateway that runs apart, for example [\"127.0.0.1:8445\"]")
	case (reader == "policyd" || reader == "authd") && len(f.Connect.Cached) == 0:
		l.Addf("cached", "is required for a %s that runs apart, for example [\"127.0.0.1:8444\"]", reader)
	}
	return l
}

func checkDial(l *fault.List, key, addr string) {
	t, err := sallyport.ParseAuthority(sallyport.TCP, addr)
	if err != nil {
		l.Addf(key, "%v", err)
	} else if ip, ok := t.Addr(); ok && ip.IsUnspecified() {
		l.Addf(key, "%s is no address that can be connected to", addr)
	}
}

// validate lets admin listeners be reached from this machine only: profiles and
// metrics are nobody else's business (SECURITY-CASES J7).
func (a Admin) validate() fault.List {
	var l fault.List
	for _, x := range []struct{ key, addr string }{
		{"gateway", a.Gateway}, {"authd", a.Authd}, {"policyd", a.Policyd}, {"cached", a.Cached}, {"serve", a.Serve},
	} {
		if x.addr == "" {
			continue
		}
		if err := telemetry.CheckListen(x.addr); err != nil {
			l.Addf(x.key, "%v", err)
		}
	}
	return l
}

// checkRoutes compiles all routes together as policyd will.
func (f *File) checkRoutes(d *decoder, l *fault.List) {
	for i, r := range f.Routes {
		key := index("routes", i)
		switch {
		case r.From == "":
			l.Addf(key+".from", "is required, for example tcp://db.internal:5432")
		case r.Policy.Text == "":
			l.Addf(key+".policy", "is required: a route without a policy would be open to nobody")
		}
	}
	if len(*l) > 0 || len(d.problems) > 0 {
		return // what compiling says of broken routes would only repeat it
	}
	f.compile(l)
}

// compile lets policyd's own compiler say what is wrong with the routes taken
// together: two for one place, destinations that no gateway may dial.
func (f *File) compile(l *fault.List) {
	f.parsed = make(map[string]*policy.Policy, len(f.Routes))
	for i := range f.Routes {
		p := &f.Routes[i].Policy
		if f.parsed[p.Text] == nil {
			f.parsed[p.Text] = p.parsed
		}
		p.parsed = nil
	}
	r := f.Record(nil, f.publicHosts(), time.Time{})
	err := loads(r, f.Known)
	var faults fault.List
	if errors.As(err, &faults) {
		*l = append(*l, faults...)
		return
	}
	// A record that cached would refuse is refused here, where it is to be changed.
	if size := sizeOf(r); size > cached.MaxPayload {
		l.Addf("routes", "make a record of %d bytes, and %d are the most; say more with fewer words: wildcards, networks, groups",
			size, cached.MaxPayload)
	}
}

// Known returns the policy of a route by its text, or nil. The policy has the
// file's lines and columns.
func (f *File) Known(text string) *policy.Policy { return f.parsed[text] }

// Has reports whether the file has the section.
func (f *File) Has(section string) bool { return f.present[section] }

// Path is the file's name as it was given.
func (f *File) Path() string { return f.path }

// Layout returns where everything lies in the data directory.
func (f *File) Layout() Layout { return Layout{Dir: f.DataDir, Audit: f.Audit.Dir, Keys: f.Keys} }

// AdminAddress returns where the daemon's admin listener is to be.
func (f *File) AdminAddress(daemon string) string {
	a := map[string]string{
		"gateway": f.Admin.Gateway, "authd": f.Admin.Authd, "policyd": f.Admin.Policyd, "cached": f.Admin.Cached, AllInOne: f.Admin.Serve,
	}[daemon]
	if a == "" {
		return "127.0.0.1:0"
	}
	return a
}

// Services returns a pair of files and the CA for a service certificate: those
// of the section tls, else what `sallyport init` made for the kind.
func (f *File) Services(kind string) TLS {
	if f.TLS != (TLS{}) {
		return f.TLS
	}
	ca, _ := f.Layout().CAPair(InternalCA)
	cert, key := f.Layout().ServicePair(kind)
	return TLS{ca, cert, key}
}

// WithPort returns rawURL with port 0 replaced by the port that addr has.
func WithPort(rawURL string, addr net.Addr) string {
	u, err := url.Parse(rawURL)
	if err != nil || u.Port() != "0" {
		return rawURL
	}
	_, port, err := net.SplitHostPort(addr.String())
	if err != nil {
		return rawURL
	}
	u.Host = net.JoinHostPort(u.Hostname(), port)
	return u.String()
}

// Changed compares two files. changed are the sections that differ; fixed are
// those keys among them that a running daemon cannot take over.
func Changed(before, after *File) (changed, fixed []string) {
	a, b := reflect.ValueOf(before).Elem(), reflect.ValueOf(after).Elem()
	for _, f := range fieldsOf(a.Type()) {
		x, y := a.FieldByIndex(f.index), b.FieldByIndex(f.index)
		if f.name == "routes" {
			if !sameRoutes(before.Routes, after.Routes) {
				changed = append(changed, f.name)
			}
			continue
		}
		if !reflect.DeepEqual(x.Interface(), y.Interface()) {
			changed = append(changed, f.name)
			fixed = append(fixed, fixedKeys(f.name, x, y)...)
		}
	}
	return changed, fixed
}

// reloadable are the keys that take effect without a restart.
var reloadable = []string{"routes", "gateways", "explain_groups", "policyd.posture_sources", "policyd.posture_ttl", "authd.users", "authd.session", "authd.idp.client_secret_file"}

// fixedKeys returns the differing keys below a section that need a restart.
func fixedKeys(key string, a, b reflect.Value) []string {
	for _, r := range reloadable {
		if key == r || inside(key, r) {
			return nil
		}
	}
	if a.Kind() != reflect.Struct || a.Type() == policyType {
		if reflect.DeepEqual(a.Interface(), b.Interface()) {
			return nil
		}
		return []string{key}
	}
	var keys []string
	for _, f := range fieldsOf(a.Type()) {
		keys = append(keys, fixedKeys(join(key, f.name), a.FieldByIndex(f.index), b.FieldByIndex(f.index))...)
	}
	return keys
}

func sameRoutes(a, b []Route) bool {
	return slices.EqualFunc(a, b, func(x, y Route) bool { return routeOf(x) == routeOf(y) })
}

func routeOf(r Route) sallyport.Route {
	return sallyport.Route{From: r.From, To: r.To, Name: r.Name, Policy: r.Policy.Text, Hidden: r.Hidden, Carrier: r.Carrier}
}

package config

import (
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"sallyport"
	"sallyport/cached"
)

// Record returns the configuration record that the file stands for: routes and
// policy under one revision (DESIGN, section 5). gateways is where agents find
// them; own are addresses that processes listen on beside those in the file.
func (f *File) Record(gateways []sallyport.GatewayInfo, own []string, now time.Time) sallyport.Config {
	routes := make([]sallyport.Route, len(f.Routes))
	for i, r := range f.Routes {
		routes[i] = routeOf(r)
	}
	return sallyport.Config{
		Domain:         f.Domain,
		Routes:         routes,
		Gateways:       gateways,
		ExplainGroups:  f.ExplainGroups,
		PostureSources: f.Policyd.PostureSources,
		PostureTTL:     f.Policyd.PostureTTL,
		Forbidden:      slices.Compact(slices.Sorted(slices.Values(append(f.forbidden(), own...)))),
		Applied:        now.UTC(),
		Source:         f.path,
	}
}

// sizeOf returns how large the record of c is, in bytes; 0: small.
func sizeOf(c sallyport.Config) int {
	const worst = 6 // bytes of JSON for a byte of text
	text := 0
	for _, r := range c.Routes {
		text += len(r.Policy) + len(r.From) + len(r.To) + len(r.Name)
	}
	if worst*(text+100*len(c.Routes)) < cached.MaxPayload {
		return 0
	}
	return len(sallyport.Put(sallyport.KindConfig, currentConfig, c).Payload)
}

// forbidden lists what the file says that our own processes listen on. An
// address without a host stands for every address of the machine.
func (f *File) forbidden() []string {
	var all []string
	add := func(addrs ...string) {
		for _, a := range addrs {
			host, port, err := net.SplitHostPort(strings.TrimPrefix(a, "unix:"))
			if err != nil || port == "0" || port == "" {
				continue
			}
			if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
				host = ""
			}
			all = append(all, net.JoinHostPort(host, port))
		}
	}
	if f.present["gateway"] {
		add(f.Gateway.Listen)
		if f.Gateway.Listen == "" {
			add(":443")
		}
		add(f.Gateway.Addresses...)
	}
	for _, g := range f.Gateways {
		add(g.Addresses...)
	}
	add(f.Authd.Listen, f.Cached.Listen, f.Policyd.Listen, f.Connect.Authd)
	add(f.Connect.Policyd...)
	add(f.Connect.Cached...)
	add(f.Admin.Gateway, f.Admin.Authd, f.Admin.Policyd, f.Admin.Cached, f.Admin.Serve)
	return all
}

// publicHosts are the host:port of our own public URLs, where no route may lead.
func (f *File) publicHosts() []string {
	var all []string
	urls := []string{f.Gateway.PublicURL, f.Authd.PublicURL}
	for _, g := range f.Gateways {
		urls = append(urls, g.URL)
	}
	for _, raw := range urls {
		u, err := url.Parse(raw)
		if err != nil || u.Host == "" {
			continue
		}
		port := u.Port()
		switch port {
		case "":
			port = "443"
		case "0":
			continue // not known yet
		}
		all = append(all, net.JoinHostPort(strings.ToLower(u.Hostname()), port))
	}
	return all
}

func hostOf(rawURL string) string {
	u, err := url.Parse(rawURL)
	if err != nil {
		return ""
	}
	return u.Hostname()
}

// PortOf returns the port in rawURL; empty if it names none.
func PortOf(rawURL string) string {
	u, err := url.Parse(rawURL)
	if err != nil {
		return ""
	}
	return u.Port()
}

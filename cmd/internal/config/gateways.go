package config

import (
	"cmp"
	"os"
	"strings"

	"sallyport"
	"sallyport/gateway"
	"sallyport/internal/fault"
)

// Gateway is one entry of gateways: how agents find one of several.
type Gateway struct {
	// Name is how people call it. Empty: the host of URL.
	Name string `yaml:"name"`
	// URL is that gateway's public_url. This field is required.
	URL string `yaml:"url"`
	// CAFile signs its certificate. Empty: as for section gateway, that is our own
	// public CA, or the system's roots where gateway.tls names a certificate.
	CAFile string `yaml:"ca_file"`
	// Addresses are what agents dial instead of resolving URL's host.
	Addresses []string `yaml:"addresses"`
}

func (g Gateway) name() string { return cmp.Or(g.Name, hostOf(g.URL)) }

// checkGateways asks of every entry what section gateway asks of itself, for a
// port that agents can be told, and for what tells the gateways apart.
func (f *File) checkGateways(l *fault.List) {
	names, urls := map[string]string{}, map[string]string{}
	for i, g := range f.Gateways {
		key := index("gateways", i)
		for _, p := range (gateway.Config{PublicURL: g.URL, Addresses: g.Addresses}).Validate() {
			l.Addf(key+"."+strings.Replace(p.Key, "public_url", "url", 1), "%s", p.Message)
		}
		if PortOf(g.URL) == "0" {
			l.Addf(key+".url", "%s has port 0: write the port that the gateway's ready line names", g.URL)
		}
		if first, taken := urls[g.URL]; taken {
			l.Addf(key+".url", "%s is that of %s", g.URL, first)
		} else if first, taken := names[g.name()]; taken {
			l.Addf(key+".name", "%q is what %s is called: people tell gateways apart by it", g.name(), first)
		}
		names[g.name()], urls[g.URL] = key, key
	}
}

// GatewayInfos returns the gateways that agents may use, the preferred first:
// those that are listed, else the one of section gateway, whose url is the one
// that it really has.
func (f *File) GatewayInfos(url string) ([]sallyport.GatewayInfo, error) {
	list := f.Gateways
	if len(list) == 0 {
		list = []Gateway{{Name: f.Gateway.Name, URL: url, Addresses: f.Gateway.Addresses}}
	}
	infos := make([]sallyport.GatewayInfo, len(list))
	for i, g := range list {
		ca, err := f.gatewayCA(g)
		if err != nil {
			return nil, err
		}
		infos[i] = sallyport.GatewayInfo{Name: g.name(), URL: g.URL, Addresses: g.Addresses, CA: ca}
	}
	return infos, nil
}

// gatewayCA returns what signs the gateway's certificate, PEM; empty: the
// system's roots do.
func (f *File) gatewayCA(g Gateway) (string, error) {
	file := g.CAFile
	if file == "" {
		if f.Gateway.TLS.CertFile != "" {
			return "", nil
		}
		file, _ = f.Layout().CAPair(PublicCA)
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return "", Missing(err)
	}
	return string(pem), nil
}

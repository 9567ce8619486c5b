package agent

import (
	"context"
	"net"
	"net/netip"
	"net/url"
	"time"

	"sallyport/internal/localhost"
	"sallyport/tunnel"
	"sallyport/tunnel/h3"
	"sallyport/tunnel/lane"
)

// dialCarrier races the transports, in this order with a head start for each.
func dialCarrier(ctx context.Context, transports []string, d tunnel.DialConfig) (tunnel.Carrier, error) {
	var dials []tunnel.DialFunc[tunnel.Carrier]
	for _, name := range transports {
		switch name {
		case quic:
			dials = append(dials, func(ctx context.Context) (tunnel.Carrier, error) { return h3.Dial(ctx, d) })
		case overTLS:
			dials = append(dials, func(ctx context.Context) (tunnel.Carrier, error) { return lane.Dial(ctx, d) })
		}
	}
	return tunnel.Race(ctx, tunnel.HeadStart, dials...)
}

// The transports by the names that people use.
const (
	automatic = "auto"
	quic      = "quic"
	overTLS   = "tls"
)

// order returns which transports to try, best first. Automatically that is QUIC,
// unless a lane won on this network last time.
func (a *Agent) order(network string) []string {
	if a.cfg.Transport != automatic {
		return []string{a.cfg.Transport}
	}
	if w := a.networks()[network]; w.Carrier == overTLS && time.Since(w.At) < trustWinner {
		return []string{overTLS, quic}
	}
	return []string{quic, overTLS}
}

const (
	networksFile = "networks.json"
	trustWinner  = 24 * time.Hour // then QUIC gets its head start again
	maxNetworks  = 64
)

// winner is the carrier that won on a network.
type winner struct {
	Carrier string    `json:"carrier"`
	At      time.Time `json:"at"`
}

func (a *Agent) networks() map[string]winner {
	known := map[string]winner{}
	a.dir.ReadJSON(networksFile, &known) // a lost memory costs 250 ms once
	return known
}

// won remembers the winner of a race that QUIC could have won: that a lane wins
// when it goes first says nothing new.
func (a *Agent) won(network string, order []string, carrier string) {
	if network == "" || len(order) < 2 || order[0] == carrier && carrier == overTLS {
		return
	}
	known := a.networks()
	if known[network].Carrier == carrier && carrier == quic {
		return
	}
	for len(known) >= maxNetworks {
		oldest := ""
		for name, w := range known {
			if oldest == "" || w.At.Before(known[oldest].At) {
				oldest = name
			}
		}
		delete(known, oldest)
	}
	known[network] = winner{carrier, time.Now().UTC().Round(time.Second)}
	if err := a.dir.WriteJSON(networksFile, known); err != nil {
		a.cfg.Log.Debug("network not remembered", "error", err)
	}
}

// networkTo names the network through which the gateway is reached: the prefix of
// the local address that the system would use. It sends nothing.
func networkTo(ctx context.Context, gateway *url.URL) string {
	port := gateway.Port()
	if port == "" {
		port = "443"
	}
	host := gateway.Hostname()
	if localhost.Is(host) {
		host = "127.0.0.1"
	}
	d := net.Dialer{Timeout: 2 * time.Second}
	c, err := d.DialContext(ctx, "udp", net.JoinHostPort(host, port))
	if err != nil {
		return ""
	}
	defer c.Close()
	local, err := netip.ParseAddrPort(c.LocalAddr().String())
	if err != nil {
		return ""
	}
	bits := 24
	if local.Addr().Unmap().Is6() {
		bits = 64
	}
	prefix, err := local.Addr().Unmap().WithZone("").Prefix(bits)
	if err != nil {
		return ""
	}
	return prefix.String()
}

// Package daemons builds the services that need no C compiler from a
// configuration and hands them to a process. A daemon that runs apart and the
// all-in-one call the same functions; they differ only in whether the interfaces
// that come in are remote or in the same process.
package daemons

import (
	"cmp"
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"os"
	"sync/atomic"

	"sallyport"
	"sallyport/audit"
	"sallyport/authd"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/gateway"
	"sallyport/policyd"
	"sallyport/policyd/policy"
	"sallyport/proto/control"
)

// Default addresses of listeners whose section names none.
const (
	authdListen   = "127.0.0.1:8443"
	cachedListen  = "127.0.0.1:8444"
	policydListen = "127.0.0.1:8445"
	gatewayListen = ":443"
)

func or(addr, def string) string {
	if addr == "" {
		return def
	}
	return addr
}

// Policyd starts the service that decides.
func Policyd(p *run.Process, records policyd.Cached) (*policyd.Server, error) {
	auditor, err := p.Audit("policyd", p.KeepHeads("policyd", records))
	if err != nil {
		return nil, err
	}
	// What the file's reader has parsed policyd need not parse again.
	var newest atomic.Pointer[config.File]
	newest.Store(p.Config)
	p.OnReload(func(f *config.File) error { newest.Store(f); return nil })
	server, err := policyd.New(p.Config.Policyd, policyd.Deps{
		Records: records, Audit: auditor, Log: p.Log.Named("policyd"), Metrics: p.Metrics(),
		Known: func(text string) *policy.Policy { return newest.Load().Known(text) },
	})
	if err != nil {
		return nil, err
	}
	p.OnRefused(server.Refuse)
	p.Go("policyd", server.Run)
	return server, nil
}

// AuthdListener is authd's public listener with its real address.
type AuthdListener struct {
	net.Listener
	URL string
}

// ListenAuthd opens authd's listener.
func ListenAuthd(p *run.Process) (*AuthdListener, error) {
	l, err := p.Listen(or(p.Config.Authd.Listen, authdListen))
	if err != nil {
		return nil, err
	}
	return &AuthdListener{l, config.WithPort(p.Config.Authd.PublicURL, l.Addr())}, nil
}

// Authd starts the service that logs people in.
func Authd(p *run.Process, l *AuthdListener, records sallyport.Records) (*authd.Server, error) {
	layout := p.Config.Layout()
	auditor, err := p.Audit("authd", p.KeepHeads("authd", records))
	if err != nil {
		return nil, err
	}
	p.Watch(func(f *config.File) []string {
		return append(f.Layout().SessionCAFiles(), f.Authd.IDP.ClientSecretFile, f.Layout().KEKFile(config.SealKey))
	})
	cas, err := layout.SessionCAs()
	if err != nil {
		return nil, err
	}
	kek, err := layout.KEK(config.SealKey)
	if err != nil {
		return nil, err
	}
	cfg := p.Config.Authd
	cfg.PublicURL = l.URL
	pair, err := p.PublicPair("authd", l.URL, cfg.TLS.CertFile, cfg.TLS.KeyFile)
	if err != nil {
		return nil, err
	}
	server, err := authd.New(cfg, authd.Deps{
		Domain: p.Config.Domain, Records: records, Audit: auditor, Log: p.Log.Named("authd"), KEK: kek,
		SessionCAs: cas, MaxStale: p.Config.Policyd.MaxStale,
	})
	if err != nil {
		return nil, err
	}
	p.OnReload(func(f *config.File) error {
		cas, err := layout.SessionCAs()
		if err != nil {
			return err
		}
		next := f.Authd
		next.PublicURL = l.URL
		if err := server.Reload(next); err != nil {
			return err
		}
		server.TakeSessionCAs(cas)
		return nil
	})
	p.OnReload(func(*config.File) error {
		kek, err := layout.KEK(config.SealKey)
		if err != nil {
			return err
		}
		return server.SetKEK(kek)
	})
	p.Go("authd", server.Run)
	p.ServeHTTP("authd listener", l, &http.Server{
		Handler: server.Handler(),
		TLSConfig: &tls.Config{
			MinVersion: tls.VersionTLS13, GetCertificate: pair.GetCertificate, SessionTicketsDisabled: true,
		},
	})
	return server, nil
}

// GatewayListener is the gateway's public listeners with their real address.
type GatewayListener struct {
	TCP net.Listener
	UDP net.PacketConn
	URL string

	certificate func() *tls.Certificate
}

// ListenGateway opens the gateway's listeners.
func ListenGateway(p *run.Process) (*GatewayListener, error) {
	cfg := p.Config.Gateway
	tcp, udp, err := p.ListenBoth(or(cfg.Listen, gatewayListen))
	if err != nil {
		return nil, err
	}
	l := &GatewayListener{TCP: tcp, UDP: udp, URL: config.WithPort(cfg.PublicURL, tcp.Addr())}
	pair, err := p.PublicPair("gateway", l.URL, cfg.TLS.CertFile, cfg.TLS.KeyFile)
	if err != nil {
		return nil, err
	}
	l.certificate = pair.Certificate
	return l, nil
}

// Decider is what a gateway asks: policyd in the same process, or a client of it.
type Decider interface {
	sallyport.Authorizer
	sallyport.Explainer
	sallyport.Changes
	sallyport.PostureSink
}

// Gateway starts the service that agents connect to. keep stores its audit heads;
// nil for a gateway that runs apart, which may write no records.
func Gateway(p *run.Process, l *GatewayListener, d Decider, keep func(context.Context, audit.Head) error) (*gateway.Server, error) {
	auditor, err := p.Audit("gateway", keep)
	if err != nil {
		return nil, err
	}
	reset, err := p.Config.Layout().Secret(config.ResetKey)
	if err != nil {
		return nil, err
	}
	cfg := gatewayConfig(p.Config)
	cfg.PublicURL = l.URL
	server, err := gateway.New(cfg, gateway.Deps{
		Domain: p.Config.Domain, Authorizer: d, Explainer: d, Changes: d, Posture: d,
		Audit: auditor, Log: p.Log.Named("gateway"), Certificate: l.certificate, ResetKey: reset, Version: run.Version(), Metrics: p.Metrics(),
	})
	if err != nil {
		return nil, err
	}
	p.Go("gateway", func(ctx context.Context) error { return server.Serve(ctx, l.TCP, l.UDP) })
	return server, nil
}

// gatewayConfig is the file's section gateway. A gateway waits for policyd as long
// as policyd may take, where its own section does not say otherwise.
func gatewayConfig(f *config.File) gateway.Config {
	cfg := f.Gateway
	cfg.Limits.DecisionTimeout = cmp.Or(cfg.Limits.DecisionTimeout, f.Policyd.DecisionTimeout)
	return cfg
}

// ControlListener opens the mTLS listener of cached or policyd.
func ControlListener(p *run.Process, daemon string) (net.Listener, error) {
	if daemon == "policyd" {
		return p.Listen(or(p.Config.Policyd.Listen, policydListen))
	}
	return p.Listen(or(p.Config.Cached.Listen, cachedListen))
}

// ServeControl offers services on a listener until the process ends: with mTLS,
// or on a unix socket if id is nil.
func ServeControl(p *run.Process, what string, l net.Listener, id *run.Identity, s control.Services) {
	var conf *tls.Config
	if id != nil {
		conf = id.Server()
	}
	server := control.NewServer(conf, p.Config.Domain, s, p.Log.Named(what))
	p.Go(what, func(ctx context.Context) error { return server.Serve(ctx, l) })
}

// Dial connects to daemons of the kind, which need not be there yet.
func Dial(p *run.Process, kind string, addrs []string, id *run.Identity) (*control.Client, error) {
	client, err := control.Dial(addrs, id.Client(kind), p.Log.Named(kind+" client"))
	if err != nil {
		return nil, err
	}
	p.AtEnd(client.Close)
	return client, nil
}

// Ready is what the ready line tells.
type Ready struct {
	Gateway *ReadyGateway `json:"gateway,omitempty"`
	Authd   *ReadyAuthd   `json:"authd,omitempty"`
	Cached  *ReadyControl `json:"cached,omitempty"`
	Policyd *ReadyControl `json:"policyd,omitempty"`
	Admin   string        `json:"admin"`
	// CAFile signs the public listeners that have no certificate of their own:
	// what `agent login --ca` takes.
	CAFile  string `json:"ca_file,omitempty"`
	Version string `json:"version"`
	PID     int    `json:"pid"`
}

// ReadyGateway tells where a gateway listens.
type ReadyGateway struct {
	URL string `json:"url"`
	TCP string `json:"tcp"`
	UDP string `json:"udp"`
}

// ReadyAuthd tells where authd listens.
type ReadyAuthd struct {
	URL    string `json:"url"`
	Listen string `json:"listen"`
}

// ReadyControl tells where cached or policyd listens.
type ReadyControl struct {
	Listen string `json:"listen,omitempty"` // mTLS; empty in the all-in-one
	Socket string `json:"socket"`           // this user and root only
}

// Announce opens the admin listener and prints the ready line.
func Announce(p *run.Process, r Ready, ready func() error) error {
	admin, err := p.Admin(ready)
	if err != nil {
		return err
	}
	r.Admin, r.Version, r.PID = admin, run.Version(), os.Getpid()
	return p.Ready(r)
}

// Of returns the part of the ready line that is about l.
func (l *GatewayListener) Of() *ReadyGateway {
	return &ReadyGateway{l.URL, l.TCP.Addr().String(), l.UDP.LocalAddr().String()}
}

// Of returns the part of the ready line that is about l.
func (l *AuthdListener) Of() *ReadyAuthd { return &ReadyAuthd{l.URL, l.Addr().String()} }

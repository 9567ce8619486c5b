package run

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"sallyport"
	"sallyport/audit"
	"sallyport/cmd/internal/config"
	"sallyport/internal/logging"
	"sallyport/internal/telemetry"
	"sallyport/internal/tlsid"
	"sallyport/proto/control"
)

// Audit opens the daemon's audit chain. What the configuration wants when it
// cannot be written is the returned auditor's business. keep stores signed heads
// elsewhere; nil where the daemon may write no records.
func (p *Process) Audit(daemon string, keep func(context.Context, audit.Head) error) (sallyport.Auditor, error) {
	layout := p.Config.Layout()
	key, err := layout.AuditKey(daemon)
	if err != nil {
		return nil, err
	}
	log, err := audit.Open(layout.AuditDir(daemon), daemon, key, audit.Options{Keep: keep, Log: p.Log.Named("audit")})
	if err != nil {
		return nil, err
	}
	p.AtEnd(log.Close)
	if p.Config.Audit.OnFailure == "allow" {
		return lenient{log, p.Log.Named("audit")}, nil
	}
	return log, nil
}

// KeepHeads returns a function that stores the daemon's audit heads in cached,
// so that a chain whose end was cut off shows.
func (p *Process) KeepHeads(daemon string, records sallyport.Records) func(context.Context, audit.Head) error {
	id := AuditHeadID(p.Config, daemon)
	return func(ctx context.Context, h audit.Head) error {
		_, err := records.Apply(ctx, []sallyport.Op{sallyport.Put(sallyport.KindAuditHead, id, h)})
		return err
	}
}

// AuditHeadID is the id of the record with the audit head of the daemon that runs by
// this file: where there are several of a kind, the service certificate tells which
// one that is.
func AuditHeadID(f *config.File, daemon string) string {
	files := f.Services(daemon)
	if pair, err := tlsid.LoadKeyPair(files.CertFile, files.KeyFile); err == nil {
		if kind, name, err := tlsid.Service(pair.Leaf, f.Domain); err == nil && kind == daemon {
			return control.AuditHeadID(kind, name)
		}
	}
	return daemon // in the all-in-one
}

// lenient lets things happen that cannot be audited (audit.on_failure: allow).
type lenient struct {
	sallyport.Auditor
	log logging.Logger
}

func (l lenient) Append(ctx context.Context, r sallyport.AuditRecord) error {
	if err := l.Auditor.Append(ctx, r); err != nil {
		l.log.Error("audit record lost", "type", r.Type, "error", err)
	}
	return nil
}

// Admin opens the admin listener of the process and returns its address.
func (p *Process) Admin(ready func() error) (string, error) {
	addr := p.Config.AdminAddress(p.Name)
	l, err := telemetry.Listen(addr)
	if err != nil {
		return "", listenError(addr, err)
	}
	p.opened = append(p.opened, l)
	handler := telemetry.Handler(p.metrics, func() error { return errors.Join(ready(), p.Stale()) })
	p.Go("admin", func(ctx context.Context) error { return telemetry.Serve(ctx, l, handler) })
	if l.Addr().Network() == "unix" {
		return addr, nil
	}
	return l.Addr().String(), nil
}

// bounded sets what strangers may take of s, where s does not say so itself. The
// answer has more time than the request: it may wait for an identity provider.
func bounded(s *http.Server) *http.Server {
	s.ReadHeaderTimeout = cmp.Or(s.ReadHeaderTimeout, 10*time.Second)
	s.ReadTimeout = cmp.Or(s.ReadTimeout, 30*time.Second)
	s.WriteTimeout = cmp.Or(s.WriteTimeout, time.Minute)
	s.IdleTimeout = cmp.Or(s.IdleTimeout, 2*time.Minute)
	s.MaxHeaderBytes = cmp.Or(s.MaxHeaderBytes, 64<<10)
	return s
}

// ServeHTTP runs an HTTP server on l until the process ends; requests under way
// get five seconds.
func (p *Process) ServeHTTP(what string, l net.Listener, s *http.Server) {
	s = bounded(s)
	s.ErrorLog = p.Log.Named(what).StandardLogger(nil)
	p.Go(what, func(ctx context.Context) error {
		done := make(chan error, 1)
		go func() {
			if s.TLSConfig != nil {
				done <- s.ServeTLS(l, "", "")
			} else {
				done <- s.Serve(l)
			}
		}()
		select {
		case err := <-done:
			return err
		case <-ctx.Done():
		}
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if s.Shutdown(end) != nil {
			s.Close() // what is still under way after five seconds is cut
		}
		<-done
		return ctx.Err()
	})
}

// Identity is a daemon's own certificate towards the others.
type Identity struct {
	Domain string
	pair   *tlsid.Pair
	roots  *x509.CertPool
}

// Identity loads the service certificate of the kind.
func (p *Process) Identity(kind string) (*Identity, error) { return LoadIdentity(p.Config, kind) }

// LoadIdentity loads the service certificate of the kind that the configuration
// names, or that `sallyport init` made.
func LoadIdentity(f *config.File, kind string) (*Identity, error) {
	files := f.Services(kind)
	pair, err := tlsid.OpenPair(files.CertFile, files.KeyFile)
	if err != nil {
		return nil, config.Missing(err)
	}
	got, _, err := tlsid.Service(pair.Certificate().Leaf, f.Domain)
	if err != nil || got != kind {
		return nil, Usage("make one with: sallyport init --config FILE", "%s is no certificate for a %s in %s", files.CertFile, kind, f.Domain)
	}
	roots, err := tlsid.LoadPool(files.CAFile)
	if err != nil {
		return nil, config.Missing(err)
	}
	return &Identity{f.Domain, pair, roots}, nil
}

// Server is the configuration of a listener for other daemons.
func (i *Identity) Server() *tls.Config {
	conf := tlsid.ServerConfig(*i.pair.Certificate(), i.roots)
	conf.Certificates, conf.GetCertificate = nil, i.pair.GetCertificate
	return conf
}

// Client is the configuration for connecting to daemons of the kind.
func (i *Identity) Client(kind string) *tls.Config {
	conf := tlsid.ClientConfig(*i.pair.Certificate(), i.roots, i.Domain, kind)
	conf.Certificates, conf.GetClientCertificate = nil, i.pair.GetClientCertificate
	return conf
}

// PublicPair returns the certificate of a public listener: the configured one,
// else the one that our own CA signs.
func (p *Process) PublicPair(daemon, publicURL, certFile, keyFile string) (*tlsid.Pair, error) {
	if certFile != "" {
		return tlsid.OpenPair(certFile, keyFile)
	}
	layout := p.Config.Layout()
	certFile, keyFile = layout.PublicPair(daemon)
	if p.Name == config.AllInOne {
		if err := p.renewPublic(layout, daemon, publicURL); err != nil {
			return nil, err
		}
	}
	pair, err := tlsid.OpenPair(certFile, keyFile)
	if err != nil {
		return nil, config.Missing(err)
	}
	return pair, nil
}

// renewPublic makes the pair, and replaces it at half of its life as long as the
// process runs.
func (p *Process) renewPublic(layout config.Layout, daemon, publicURL string) error {
	u, err := url.Parse(publicURL)
	if err != nil {
		return fmt.Errorf("%s.public_url: %w", daemon, err)
	}
	if err := layout.EnsurePublic(daemon, u.Hostname(), time.Now()); err != nil {
		return err
	}
	p.Go(daemon+" certificate", func(ctx context.Context) error {
		tick := time.NewTicker(12 * time.Hour)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case now := <-tick.C:
				if err := layout.EnsurePublic(daemon, u.Hostname(), now); err != nil {
					p.Log.Error("certificate not renewed", "daemon", daemon, "error", err)
				}
			}
		}
	})
	return nil
}

// Package allinone is all four daemons in one process. Where a daemon that runs
// apart gets a gRPC client, the next service gets the server itself here: both
// are the same interface. It also makes keys by itself and applies the file's
// routes at start and whenever they change.
package allinone

import (
	"context"
	"errors"
	"time"

	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/daemons"
	"sallyport/cmd/internal/run"
	"sallyport/cmd/internal/store"
	"sallyport/proto/control"
)

// Start wires the four daemons.
func Start(p *run.Process) error {
	return StartWith(p, func(d daemons.Decider) daemons.Decider { return d })
}

// StartWith is Start with something put between the gateway and its policyd. The
// demonstration shows with it that its own claims can fail; nothing else has a
// reason to.
func StartWith(p *run.Process, between func(daemons.Decider) daemons.Decider) error {
	layout := p.Config.Layout()
	if err := layout.EnsureKeys(); err != nil {
		return err
	}
	ls, err := listen(p, layout)
	if err != nil {
		return err
	}
	records, err := store.Open(p)
	if err != nil {
		return err
	}
	decider, err := daemons.Policyd(p, records)
	if err != nil {
		return err
	}
	logins, err := daemons.Authd(p, ls.authd, records)
	if err != nil {
		return err
	}
	gate, err := daemons.Gateway(p, ls.gateway, between(decider), p.KeepHeads("gateway", records))
	if err != nil {
		return err
	}
	daemons.ServeControl(p, "cached socket", ls.cached, nil, control.Services{
		Records: records, Lister: records, Revoker: records, Backuper: records, Keys: records,
	})
	daemons.ServeControl(p, "policyd socket", ls.policyd, nil, control.Services{
		Authorizer: decider, Explainer: decider, Changes: decider, Posture: decider, Revoker: decider,
	})
	apply := func(f *config.File) error { return ls.apply(p.Context(), records, f) }
	if err := apply(p.Config); err != nil {
		return err
	}
	p.OnReload(apply)
	ready := func() error {
		return errors.Join(records.Ready(), decider.Ready(), logins.Ready(), gate.Ready())
	}
	p.Go("announcement", func(ctx context.Context) error { return announce(ctx, p, ls, ready) })
	return nil
}

// announce prints the ready line once everything is, or after five seconds: an
// IdP that is down must not keep live sessions from working.
func announce(ctx context.Context, p *run.Process, ls *listeners, ready func() error) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	late := time.After(5 * time.Second)
	for waiting := true; waiting && ready() != nil; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-late:
			p.Log.Warn("not everything is ready", "error", ready())
			waiting = false
		case <-tick.C:
		}
	}
	if err := daemons.Announce(p, ls.ready(p.Config.Layout()), ready); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}

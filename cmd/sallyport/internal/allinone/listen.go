package allinone

import (
	"context"
	"net"
	"time"

	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/daemons"
	"sallyport/cmd/internal/run"
)

// listeners are opened before anything else is done, so that an address that is
// taken leaves nothing half-started.
type listeners struct {
	gateway         *daemons.GatewayListener
	authd           *daemons.AuthdListener
	cached, policyd net.Listener
}

func listen(p *run.Process, layout config.Layout) (*listeners, error) {
	var ls listeners
	var err error
	if ls.gateway, err = daemons.ListenGateway(p); err != nil {
		return nil, err
	}
	if ls.authd, err = daemons.ListenAuthd(p); err != nil {
		return nil, err
	}
	if ls.cached, err = p.ListenUnix(layout.Socket("cached")); err != nil {
		return nil, err
	}
	if ls.policyd, err = p.ListenUnix(layout.Socket("policyd")); err != nil {
		return nil, err
	}
	return &ls, nil
}

func (ls *listeners) ready(layout config.Layout) daemons.Ready {
	r := daemons.Ready{
		Gateway: ls.gateway.Of(),
		Authd:   ls.authd.Of(),
		Cached:  &daemons.ReadyControl{Socket: layout.Socket("cached")},
		Policyd: &daemons.ReadyControl{Socket: layout.Socket("policyd")},
	}
	r.CAFile, _ = layout.CAPair(config.PublicCA)
	return r
}

// apply makes the file's routes the configuration record, unless they are
// already: a restart changes no policy revision.
func (ls *listeners) apply(ctx context.Context, records config.Store, f *config.File) error {
	own := []string{ls.gateway.TCP.Addr().String(), ls.authd.Addr().String()}
	gateways, err := f.GatewayInfos(ls.gateway.URL)
	if err != nil {
		return err
	}
	_, _, err = config.Apply(ctx, records, f.Record(gateways, own, time.Now()))
	return err
}

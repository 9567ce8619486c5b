// Command cached keeps sessions, identity and configuration.
package main

import (
	"sallyport/cmd/internal/daemons"
	"sallyport/cmd/internal/run"
	"sallyport/cmd/internal/store"
	"sallyport/proto/control"
)

func main() { run.Main(run.Daemon("cached", "keeps sessions, identity and configuration", start)) }

func start(p *run.Process) error {
	id, err := p.Identity(control.KindCached)
	if err != nil {
		return err
	}
	l, err := daemons.ControlListener(p, "cached")
	if err != nil {
		return err
	}
	socket := p.Config.Layout().Socket("cached")
	admin, err := p.ListenUnix(socket)
	if err != nil {
		return err
	}
	records, err := store.Open(p)
	if err != nil {
		return err
	}
	services := control.Services{Records: records, Lister: records, Revoker: records, Backuper: records, Keys: records}
	daemons.ServeControl(p, "cached api", l, id, services)
	daemons.ServeControl(p, "cached socket", admin, nil, services)
	ready := daemons.Ready{Cached: &daemons.ReadyControl{Listen: l.Addr().String(), Socket: socket}}
	return daemons.Announce(p, ready, records.Ready)
}

// Command authd logs people in.
package main

import (
	"sallyport/cmd/internal/daemons"
	"sallyport/cmd/internal/run"
	"sallyport/proto/control"
)

func main() {
	run.Main(run.Daemon("authd", "logs people in and gives out session certificates", start))
}

func start(p *run.Process) error {
	id, err := p.Identity(control.KindAuthd)
	if err != nil {
		return err
	}
	l, err := daemons.ListenAuthd(p)
	if err != nil {
		return err
	}
	client, err := daemons.Dial(p, control.KindCached, p.Config.Connect.Cached, id)
	if err != nil {
		return err
	}
	server, err := daemons.Authd(p, l, client.Records())
	if err != nil {
		return err
	}
	return daemons.Announce(p, daemons.Ready{Authd: l.Of()}, server.Ready)
}

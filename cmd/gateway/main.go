// Command gateway carries connections that policyd allows.
package main

import (
	"sallyport/cmd/internal/daemons"
	"sallyport/cmd/internal/run"
	"sallyport/proto/control"
)

func main() { run.Main(run.Daemon("gateway", "carries connections that policyd allows", start)) }

func start(p *run.Process) error {
	id, err := p.Identity(control.KindGateway)
	if err != nil {
		return err
	}
	l, err := daemons.ListenGateway(p)
	if err != nil {
		return err
	}
	client, err := daemons.Dial(p, control.KindPolicyd, p.Config.Connect.Policyd, id)
	if err != nil {
		return err
	}
	server, err := daemons.Gateway(p, l, client.Policy(), nil)
	if err != nil {
		return err
	}
	return daemons.Announce(p, daemons.Ready{Gateway: l.Of()}, server.Ready)
}

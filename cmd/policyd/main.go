// Command policyd decides who may reach what.
package main

import (
	"sallyport/cmd/internal/daemons"
	"sallyport/cmd/internal/run"
	"sallyport/proto/control"
)

func main() { run.Main(run.Daemon("policyd", "decides who may reach what", start)) }

func start(p *run.Process) error {
	id, err := p.Identity(control.KindPolicyd)
	if err != nil {
		return err
	}
	l, err := daemons.ControlListener(p, "policyd")
	if err != nil {
		return err
	}
	socket := p.Config.Layout().Socket("policyd")
	admin, err := p.ListenUnix(socket)
	if err != nil {
		return err
	}
	client, err := daemons.Dial(p, control.KindCached, p.Config.Connect.Cached, id)
	if err != nil {
		return err
	}
	decider, err := daemons.Policyd(p, client.Records())
	if err != nil {
		return err
	}
	services := control.Services{Authorizer: decider, Explainer: decider, Changes: decider, Posture: decider, Revoker: decider}
	daemons.ServeControl(p, "policyd api", l, id, services)
	daemons.ServeControl(p, "policyd socket", admin, nil, services)
	ready := daemons.Ready{Policyd: &daemons.ReadyControl{Listen: l.Addr().String(), Socket: socket}}
	return daemons.Announce(p, ready, decider.Ready)
}

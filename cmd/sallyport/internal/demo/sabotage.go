package demo

import (
	"context"
	"net"
	"strconv"

	"sallyport"
	"sallyport/cmd/internal/daemons"
)

// sabotaged puts a broken guard between the gateway and its policyd. It exists
// so that the demonstration can be seen to fail; no configuration and no flag of a
// daemon leads here.
func sabotaged(d daemons.Decider, kind, upstream string) daemons.Decider {
	switch kind {
	case "cut":
		return deaf{d}
	case "deny":
		return lax{d, upstream}
	}
	return d
}

// deaf never learns what changed.
type deaf struct{ daemons.Decider }

func (d deaf) Watch(ctx context.Context, each func(sallyport.Notice) error) error {
	return d.Decider.Watch(ctx, func(n sallyport.Notice) error {
		n.Changes = nil
		return each(n)
	})
}

// lax turns every denial into leave to reach one service.
type lax struct {
	daemons.Decider
	upstream string
}

func (l lax) Authorize(ctx context.Context, questions []sallyport.Request) ([]sallyport.Decision, error) {
	answers, err := l.Decider.Authorize(ctx, questions)
	for i := range answers {
		answers[i] = l.allow(answers[i])
	}
	return answers, err
}

func (l lax) Explain(ctx context.Context, q sallyport.Request) (sallyport.Decision, error) {
	d, err := l.Decider.Explain(ctx, q)
	return l.allow(d), err
}

func (l lax) allow(d sallyport.Decision) sallyport.Decision {
	if d.Verdict != sallyport.VerdictDeny {
		return d
	}
	host, port, _ := net.SplitHostPort(l.upstream) // our own listener's address
	n, _ := strconv.ParseUint(port, 10, 16)
	d.Verdict, d.Rule = sallyport.VerdictAllow, "sabotage"
	d.Upstream = sallyport.Upstream{Network: sallyport.TCP, Host: host, Port: uint16(n), Literal: true}
	return d
}

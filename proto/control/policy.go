package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"sallyport"
	"sallyport/proto/control/internal/pb"
)

// Policy is policyd at the other end of a client. It implements
// sallyport.Authorizer, Explainer, Changes, PostureSink and Revoker.
type Policy struct {
	client *Client
	rpc    pb.PolicyClient
	gather *gatherer
	revoker
}

var (
	_ sallyport.Authorizer  = (*Policy)(nil)
	_ sallyport.Explainer   = (*Policy)(nil)
	_ sallyport.Changes     = (*Policy)(nil)
	_ sallyport.PostureSink = (*Policy)(nil)
	_ sallyport.Revoker     = (*Policy)(nil)
)

// Policy returns the client's view of policyd.
func (c *Client) Policy() *Policy {
	return &Policy{
		client: c, rpc: pb.NewPolicyClient(unaryConn{c}), gather: &c.gather,
		revoker: revoker{pb.NewRevokerClient(unaryConn{c})},
	}
}

// Authorize implements sallyport.Authorizer. Questions that are asked at the same
// time travel together.
func (p *Policy) Authorize(ctx context.Context, questions []sallyport.Request) ([]sallyport.Decision, error) {
	answers, err := p.gather.authorize(ctx, questions)
	if err != nil && err == ctx.Err() { // who waits for another's call is told what its own would have told
		err = p.client.failed(ctx, status.FromContextError(err).Err())
	}
	return answers, err
}

func (p *Policy) ask(ctx context.Context, questions []sallyport.Request) ([]sallyport.Decision, error) {
	m, err := p.rpc.Authorize(ctx, &pb.AuthorizeRequest{Questions: each(questions, requestToWire)})
	if err != nil {
		return nil, err
	}
	decisions, err := eachOrErr(m.GetDecisions(), decisionFromWire)
	if err == nil && len(decisions) != len(questions) {
		err = fmt.Errorf("%d answers to %d questions", len(decisions), len(questions))
	}
	if err != nil {
		return nil, badMessage("the answer of "+p.client.name, err)
	}
	return decisions, nil
}

// Explain implements sallyport.Explainer.
func (p *Policy) Explain(ctx context.Context, q sallyport.Request) (sallyport.Decision, error) {
	m, err := p.rpc.Explain(ctx, requestToWire(q))
	if err != nil {
		return sallyport.Decision{}, err
	}
	d, err := decisionFromWire(m)
	if err != nil {
		return sallyport.Decision{}, badMessage("the answer of "+p.client.name, err)
	}
	return d, nil
}

// List implements sallyport.Explainer.
func (p *Policy) List(ctx context.Context, q sallyport.ListRequest) (sallyport.Listing, error) {
	m, err := p.rpc.List(ctx, listRequestToWire(q))
	if err != nil {
		return sallyport.Listing{}, err
	}
	var listing sallyport.Listing
	if err := json.Unmarshal(m.GetListing(), &listing); err != nil {
		return sallyport.Listing{}, badMessage("the answer of "+p.client.name, err)
	}
	return listing, nil
}

// Watch implements sallyport.Changes. It also ends, with CodeUnavailable, when
// nothing was heard for Silence.
func (p *Policy) Watch(ctx context.Context, each func(sallyport.Notice) error) error {
	open := func(ctx context.Context, conn grpc.ClientConnInterface) (grpc.ServerStreamingClient[pb.ChangesEvent], error) {
		return pb.NewPolicyClient(conn).Changes(ctx, &pb.ChangesRequest{})
	}
	err := receive(ctx, p.client, open, func(m *pb.ChangesEvent) error {
		if m.GetNotice() == nil {
			return nil
		}
		return each(noticeFromWire(m.GetNotice()))
	})
	return p.client.ended(err)
}

// ReportPosture implements sallyport.PostureSink.
func (p *Policy) ReportPosture(ctx context.Context, session sallyport.SessionID, jws string) error {
	_, err := p.rpc.ReportPosture(ctx, &pb.ReportPostureRequest{Session: string(session), Jws: jws})
	return err
}

// revoker is the Revoker that both services have.
type revoker struct{ rpc pb.RevokerClient }

// Revoke implements sallyport.Revoker.
func (r revoker) Revoke(ctx context.Context, q sallyport.Revocation) (sallyport.Revoked, error) {
	m, err := r.rpc.Revoke(ctx, revocationToWire(q))
	if err != nil {
		return sallyport.Revoked{}, err
	}
	return revokedFromWire(m), nil
}

func isEOF(err error) bool { return errors.Is(err, io.EOF) }

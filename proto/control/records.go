package control

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"

	"sallyport"
	"sallyport/proto/control/internal/pb"
)

// Records is cached at the other end of a client. It implements
// sallyport.Records, Lister, Revoker, Backuper and KeyKeeper. An Apply or Revoke
// that fails with CodeTimeout or CodeUnavailable may have happened.
type Records struct {
	client *Client
	rpc    pb.RecordsClient
	revoker
	backuper
	keyKeeper
}

var (
	_ sallyport.Records  = (*Records)(nil)
	_ sallyport.Lister   = (*Records)(nil)
	_ sallyport.Revoker  = (*Records)(nil)
	_ sallyport.Backuper = (*Records)(nil)
)

// Records returns the client's view of cached.
func (c *Client) Records() *Records {
	return &Records{
		client: c, rpc: pb.NewRecordsClient(unaryConn{c}), revoker: revoker{pb.NewRevokerClient(unaryConn{c})},
		backuper: backuper{c}, keyKeeper: keyKeeper{pb.NewKeysClient(unaryConn{c})},
	}
}

// Get implements sallyport.Records.
func (r *Records) Get(ctx context.Context, kind sallyport.Kind, id string) (sallyport.Record, error) {
	m, err := r.rpc.Get(ctx, &pb.GetRequest{Kind: string(kind), Id: id})
	if err != nil {
		return sallyport.Record{}, err
	}
	return recordFromWire(m), nil
}

// Apply implements sallyport.Records.
func (r *Records) Apply(ctx context.Context, batch []sallyport.Op) (sallyport.Revision, error) {
	m, err := r.rpc.Apply(ctx, &pb.ApplyRequest{Ops: each(batch, opToWire)})
	if err != nil {
		return 0, err
	}
	return sallyport.Revision(m.GetRevision()), nil
}

// Watch implements sallyport.Records. It also ends, with CodeUnavailable, when
// nothing was heard for Silence.
func (r *Records) Watch(ctx context.Context, q sallyport.WatchRequest, each func(sallyport.WatchEvent) error) error {
	open := func(ctx context.Context, conn grpc.ClientConnInterface) (grpc.ServerStreamingClient[pb.WatchEvent], error) {
		return pb.NewRecordsClient(conn).Watch(ctx, watchRequestToWire(q))
	}
	var change joiner
	err := receive(ctx, r.client, open, func(m *pb.WatchEvent) error {
		if m.GetType() == pb.WatchEvent_NONE {
			return nil
		}
		e, err := watchEventFromWire(m)
		if err != nil {
			return badMessage("the stream", err)
		}
		if e, ok := change.add(e, m.GetMore()); ok {
			return each(e)
		}
		return nil
	})
	return r.client.ended(err)
}

// joiner puts the parts of a change together.
type joiner struct{ parts []sallyport.Record }

// add returns the whole event once its last part is there.
func (j *joiner) add(e sallyport.WatchEvent, more bool) (sallyport.WatchEvent, bool) {
	if more {
		j.parts = append(j.parts, e.Records...)
		return e, false
	}
	if len(j.parts) > 0 {
		e.Records = append(j.parts, e.Records...)
		j.parts = nil
	}
	return e, true
}

// ended makes an error of a stream that the other side ended without one: it
// never does while it is well.
func (c *Client) ended(err error) error {
	if err == nil {
		return unavailable(c.name, errors.New("the stream ended"))
	}
	return err
}

// List implements sallyport.Lister.
func (r *Records) List(ctx context.Context, kind sallyport.Kind) ([]sallyport.Record, error) {
	open := func(ctx context.Context, conn grpc.ClientConnInterface) (grpc.ServerStreamingClient[pb.ListRecordsPart], error) {
		return pb.NewRecordsClient(conn).List(ctx, &pb.ListRecordsRequest{Kind: string(kind)})
	}
	var all []sallyport.Record
	var err error
	for range r.client.addrs { // once at each
		all = nil
		err = receive(ctx, r.client, open, func(m *pb.ListRecordsPart) error {
			all = append(all, each(m.GetRecords(), recordFromWire)...)
			return nil
		})
		if _, place := placeCodes[sallyport.CodeOf(err)]; !place || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	return all, nil
}

// Lease implements sallyport.Records. The lease is held as long as the stream
// lives, and counts as lost after Silence without a word.
func (r *Records) Lease(ctx context.Context, name string, ttl time.Duration, hold func(context.Context) error) error {
	conn, err := r.client.current()
	if err != nil {
		return err
	}
	// The stream outlives ctx by a moment, in which the lease is given back.
	streamCtx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	giveUp := context.AfterFunc(ctx, func() { cancel(ctx.Err()) })
	quiet := time.AfterFunc(Silence, func() { cancel(errSilent) })
	defer quiet.Stop()

	stream, err := pb.NewRecordsClient(conn).Lease(streamCtx)
	if err == nil {
		err = stream.Send(&pb.LeaseRequest{Name: name, Ttl: int64(ttl)})
	}
	if err == nil || isEOF(err) { // Send's EOF: the error is with Recv
		_, err = stream.Recv()
	}
	if err != nil {
		return r.client.streamEnded(ctx, streamCtx, conn, err)
	}
	giveUp()
	return holdLease(ctx, stream, quiet, hold)
}

// holdLease runs hold while messages arrive on the stream.
func holdLease(ctx context.Context, stream grpc.BidiStreamingClient[pb.LeaseRequest, pb.LeaseEvent], quiet *time.Timer, hold func(context.Context) error) error {
	held, lose := context.WithCancel(ctx)
	defer lose()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer lose()
		for {
			quiet.Reset(Silence)
			if _, err := stream.Recv(); err != nil {
				return
			}
		}
	}()
	err := hold(held)
	if closeErr := stream.CloseSend(); closeErr != nil && err == nil {
		err = closeErr
	}
	<-ended // given back, or broken; Silence bounds the wait
	return err
}

package control

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"google.golang.org/grpc"

	"sallyport"
	"sallyport/proto/control/internal/pb"
)

// errNotServed answers a method whose interface the daemon does not have.
var errNotServed = &sallyport.Error{
	Outcome: sallyport.OutcomeInternal, Code: CodeUnsupported, Message: "this service does not offer that",
}

// recordsServer is Records and Lister for remote callers.
type recordsServer struct {
	pb.UnimplementedRecordsServer
	records sallyport.Records // may be nil
	lister  sallyport.Lister  // may be nil
}

func (s *recordsServer) Get(ctx context.Context, q *pb.GetRequest) (*pb.Record, error) {
	if s.records == nil {
		return nil, errNotServed
	}
	r, err := s.records.Get(ctx, sallyport.Kind(q.GetKind()), q.GetId())
	if err != nil {
		return nil, err
	}
	return recordToWire(r), nil
}

func (s *recordsServer) Apply(ctx context.Context, q *pb.ApplyRequest) (*pb.ApplyResponse, error) {
	if s.records == nil {
		return nil, errNotServed
	}
	revision, err := s.records.Apply(ctx, each(q.GetOps(), opFromWire))
	if err != nil {
		return nil, err
	}
	return &pb.ApplyResponse{Revision: uint64(revision)}, nil
}

func (s *recordsServer) Watch(q *pb.WatchRequest, stream grpc.ServerStreamingServer[pb.WatchEvent]) error {
	if s.records == nil {
		return errNotServed
	}
	return pulsed(stream.Context(), stream.Send, func(ctx context.Context, send func(*pb.WatchEvent) error) error {
		return s.records.Watch(ctx, watchRequestFromWire(q), func(e sallyport.WatchEvent) error {
			return sendEvent(e, send)
		})
	})
}

// part is about how many bytes of records go into one message.
const part = 1 << 20

// sendEvent sends an event in one or more messages. Parts of a snapshot are
// events of their own; those of a change are put together again by the receiver.
func sendEvent(e sallyport.WatchEvent, send func(*pb.WatchEvent) error) error {
	rest := e.Records
	for {
		var head []sallyport.Record
		head, rest = split(rest, part)
		m := e
		m.Records = head
		w := watchEventToWire(m)
		w.More = len(rest) > 0 && e.Type == sallyport.WatchChange
		if err := send(w); err != nil {
			return err
		}
		if len(rest) == 0 {
			return nil
		}
	}
}

// split cuts records so that head is at most about size bytes, but at least one
// record.
func split(records []sallyport.Record, size int) (head, rest []sallyport.Record) {
	const overhead = 48 // of a record's other fields on the wire
	for i, r := range records {
		size -= len(r.Payload) + len(r.ID) + overhead
		if size < 0 && i > 0 {
			return records[:i], records[i:]
		}
	}
	return records, nil
}

func (s *recordsServer) Lease(stream grpc.BidiStreamingServer[pb.LeaseRequest, pb.LeaseEvent]) error {
	if s.records == nil {
		return errNotServed
	}
	q, err := stream.Recv()
	if err != nil {
		return err
	}
	return s.records.Lease(stream.Context(), q.GetName(), time.Duration(q.GetTtl()), func(ctx context.Context) error {
		return pulsed(ctx, stream.Send, func(ctx context.Context, send func(*pb.LeaseEvent) error) error {
			if err := send(&pb.LeaseEvent{}); err != nil {
				return err
			}
			return untilGivenBack(ctx, stream)
		})
	})
}

// untilGivenBack waits for the client to close its side. The goroutine ends with
// the stream at the latest, that is, when the handler returns.
func untilGivenBack(ctx context.Context, stream grpc.BidiStreamingServer[pb.LeaseRequest, pb.LeaseEvent]) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			if _, err := stream.Recv(); err != nil {
				return
			}
		}
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *recordsServer) List(q *pb.ListRecordsRequest, stream grpc.ServerStreamingServer[pb.ListRecordsPart]) error {
	if s.lister == nil {
		return errNotServed
	}
	return pulsed(stream.Context(), stream.Send, func(ctx context.Context, send func(*pb.ListRecordsPart) error) error {
		rest, err := s.lister.List(ctx, sallyport.Kind(q.GetKind()))
		for err == nil && len(rest) > 0 {
			var head []sallyport.Record
			head, rest = split(rest, part)
			err = send(&pb.ListRecordsPart{Records: each(head, recordToWire)})
		}
		return err
	})
}

// policyServer is what policyd offers to gateways.
type policyServer struct {
	pb.UnimplementedPolicyServer
	s Services // any of its fields may be nil
}

func (p *policyServer) Authorize(ctx context.Context, q *pb.AuthorizeRequest) (*pb.AuthorizeResponse, error) {
	if p.s.Authorizer == nil {
		return nil, errNotServed
	}
	questions, err := eachOrErr(q.GetQuestions(), requestFromWire)
	if err != nil {
		return nil, badMessage("the question", err)
	}
	decisions, err := p.s.Authorizer.Authorize(ctx, questions)
	if err != nil {
		return nil, err
	}
	return &pb.AuthorizeResponse{Decisions: each(decisions, decisionToWire)}, nil
}

func (p *policyServer) Explain(ctx context.Context, m *pb.Request) (*pb.Decision, error) {
	if p.s.Explainer == nil {
		return nil, errNotServed
	}
	q, err := requestFromWire(m)
	if err != nil {
		return nil, badMessage("the question", err)
	}
	d, err := p.s.Explainer.Explain(ctx, q)
	if err != nil {
		return nil, err
	}
	return decisionToWire(d), nil
}

func (p *policyServer) List(ctx context.Context, m *pb.ListRequest) (*pb.ListResponse, error) {
	if p.s.Explainer == nil {
		return nil, errNotServed
	}
	q, err := listRequestFromWire(m)
	if err != nil {
		return nil, badMessage("the question", err)
	}
	listing, err := p.s.Explainer.List(ctx, q)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(listing)
	if err != nil {
		return nil, err
	}
	return &pb.ListResponse{Listing: b}, nil
}

func (p *policyServer) Changes(_ *pb.ChangesRequest, stream grpc.ServerStreamingServer[pb.ChangesEvent]) error {
	if p.s.Changes == nil {
		return errNotServed
	}
	return pulsed(stream.Context(), stream.Send, func(ctx context.Context, send func(*pb.ChangesEvent) error) error {
		return p.s.Changes.Watch(ctx, func(n sallyport.Notice) error {
			return send(&pb.ChangesEvent{Notice: noticeToWire(n)})
		})
	})
}

func (p *policyServer) ReportPosture(ctx context.Context, q *pb.ReportPostureRequest) (*pb.ReportPostureResponse, error) {
	if p.s.Posture == nil {
		return nil, errNotServed
	}
	if err := p.s.Posture.ReportPosture(ctx, sallyport.SessionID(q.GetSession()), q.GetJws()); err != nil {
		return nil, err
	}
	return &pb.ReportPostureResponse{}, nil
}

// revokerServer is cached's and policyd's Revoker for remote callers.
type revokerServer struct {
	pb.UnimplementedRevokerServer
	revoker sallyport.Revoker
}

func (s *revokerServer) Revoke(ctx context.Context, q *pb.Revocation) (*pb.Revoked, error) {
	if len(q.GetSubjects()) == 0 {
		return nil, badMessage("the revocation", errors.New("it names no subject"))
	}
	done, err := s.revoker.Revoke(ctx, revocationFromWire(q))
	if err != nil {
		return nil, err
	}
	return revokedToWire(done), nil
}

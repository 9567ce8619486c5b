package control

import (
	"context"
	"errors"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"sallyport"
	"sallyport/proto/control/internal/pb"
)

// Codes of the *sallyport.Error values that this package makes itself.
const (
	CodeUnavailable = "control.unavailable" // down, or gone in the middle of a call
	CodeTimeout     = "control.timeout"     // no answer before the deadline; what was asked may still happen
	CodeForbidden   = "control.forbidden"   // the caller may not call this
	CodeUnsupported = "control.unsupported" // the other side does not serve this
	CodeTooLarge    = "control.too_large"   // above MaxMessage
	CodeBadMessage  = "control.bad_message" // an answer or a question that makes no sense
)

// maxFailure bounds the error that travels in a status: it is an HTTP/2 header.
const (
	maxFailure     = 32 << 10
	maxFailureText = 2 << 10
	maxHeaderList  = 128 << 10
)

// sentinels are the errors that callers test with errors.Is, and their status.
var sentinels = [...]struct {
	err  error
	wire pb.Failure_Sentinel
	code codes.Code
}{
	{sallyport.ErrNotFound, pb.Failure_NOT_FOUND, codes.NotFound},
	{sallyport.ErrConflict, pb.Failure_CONFLICT, codes.Aborted},
	{sallyport.ErrCompacted, pb.Failure_COMPACTED, codes.OutOfRange},
	{sallyport.ErrLeaseHeld, pb.Failure_LEASE_HELD, codes.FailedPrecondition},
	{context.DeadlineExceeded, pb.Failure_DEADLINE, codes.DeadlineExceeded},
}

// failureToWire makes the status that failureFromWire reads back. An
// *sallyport.Error leaves its cause behind: that is for this side's log.
func failureToWire(err error) error {
	m := &pb.Failure{Text: clip(err.Error())}
	code := codes.Unknown
	for _, s := range sentinels {
		if errors.Is(err, s.err) {
			m.Sentinel, code = s.wire, s.code
			break
		}
	}
	var e *sallyport.Error
	if errors.As(err, &e) {
		m.Error = errorToWire(e)
		if code == codes.Unknown {
			code = statusOf(e)
		}
	}
	if m.Error != nil && proto.Size(m) > maxFailure {
		m.Error.Decision = nil
	}
	st, detailErr := status.New(code, m.Text).WithDetails(m)
	if detailErr != nil {
		return status.Error(codes.Internal, m.Text)
	}
	return st.Err()
}

// statusOf is for foreign clients and gRPC's own tools; ours read the detail.
func statusOf(e *sallyport.Error) codes.Code {
	switch {
	case e.Code == CodeForbidden:
		return codes.PermissionDenied
	case e.Code == CodeBadMessage:
		return codes.InvalidArgument
	case e.Outcome == sallyport.OutcomeUnavailable:
		return codes.Unavailable
	}
	return codes.Unknown
}

func errorToWire(e *sallyport.Error) *pb.Error {
	m := &pb.Error{
		Outcome: int32(e.Outcome), Code: clip(e.Code), Message: clip(e.Message), Hint: clip(e.Hint), After: int64(e.After),
	}
	if e.Decision != nil {
		m.Decision = decisionToWire(*e.Decision)
	}
	return m
}

// failureFromWire returns the error that the other side's interface returned,
// or false if the failure is gRPC's own.
func failureFromWire(st *status.Status) (error, bool) {
	for _, detail := range st.Details() {
		if m, ok := detail.(*pb.Failure); ok {
			return failure(m), true
		}
	}
	return nil, false
}

func failure(m *pb.Failure) error {
	remote := &remoteError{text: m.GetText()}
	for _, s := range sentinels {
		if s.wire == m.GetSentinel() {
			remote.sentinel = s.err
		}
	}
	w := m.GetError()
	if w == nil {
		return remote
	}
	e := &sallyport.Error{
		Outcome: sallyport.Outcome(w.GetOutcome()), Code: w.GetCode(), Message: w.GetMessage(), Hint: w.GetHint(),
		After: time.Duration(w.GetAfter()), Err: remote.sentinel,
	}
	if w.GetDecision() != nil {
		d, err := decisionFromWire(w.GetDecision())
		if err != nil {
			return err
		}
		e.Decision = &d
	}
	return e
}

// remoteError says what the other side's error said and is what it was.
type remoteError struct {
	text     string
	sentinel error // nil if it was none
}

func (e *remoteError) Error() string { return e.text }

func (e *remoteError) Unwrap() error { return e.sentinel }

func clip(s string) string {
	if len(s) > maxFailureText {
		s = s[:maxFailureText] + "…"
	}
	return strings.ToValidUTF8(s, "�") // proto3 strings are UTF-8, and a text cut in a rune is not
}

// transportError turns gRPC's own failures into ours. Peer is the service's
// name, for people.
func transportError(peer string, err error) error {
	switch status.Code(err) {
	case codes.DeadlineExceeded:
		return &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable, Code: CodeTimeout,
			Message: peer + " did not answer in time", Err: context.DeadlineExceeded,
		}
	case codes.Unimplemented:
		return &sallyport.Error{
			Outcome: sallyport.OutcomeInternal, Code: CodeUnsupported,
			Message: peer + " does not offer this", Err: err,
		}
	case codes.ResourceExhausted:
		return &sallyport.Error{
			Outcome: sallyport.OutcomeInternal, Code: CodeTooLarge,
			Message: "message to or from " + peer + " is too large", Err: err,
		}
	case codes.Internal:
		return &sallyport.Error{
			Outcome: sallyport.OutcomeInternal, Code: CodeBadMessage,
			Message: "message to or from " + peer + " makes no sense", Err: err,
		}
	}
	return unavailable(peer, err)
}

func unavailable(peer string, err error) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable, Code: CodeUnavailable,
		Message: peer + " is out of reach", Err: err,
	}
}

func forbidden(caller, method string) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal, Code: CodeForbidden,
		Message: caller + " may not call " + method,
	}
}

func badMessage(what string, err error) error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal, Code: CodeBadMessage,
		Message: what + " makes no sense", Err: err,
	}
}

package control

import (
	"fmt"
	"net/netip"
	"time"

	"sallyport"
	"sallyport/proto/control/internal/pb"
)

// Both directions of every message, each pair side by side. Empty lists come
// back as nil. A field that is added to a type of the root package and forgotten
// here is found by TestConversionsKeepEveryField.

func recordToWire(r sallyport.Record) *pb.Record {
	return &pb.Record{
		Kind: string(r.Kind), Id: r.ID, Version: uint32(r.Version), Payload: r.Payload,
		Revision: uint64(r.Revision), Deleted: r.Deleted, Expires: timeToWire(r.Expires),
	}
}

func recordFromWire(m *pb.Record) sallyport.Record {
	return sallyport.Record{
		Kind: sallyport.Kind(m.GetKind()), ID: m.GetId(), Version: uint16(m.GetVersion()), Payload: m.GetPayload(),
		Revision: sallyport.Revision(m.GetRevision()), Deleted: m.GetDeleted(), Expires: timeFromWire(m.Expires),
	}
}

// timeToWire keeps nanoseconds; the zone is not kept.
func timeToWire(t time.Time) *int64 {
	if t.IsZero() {
		return nil
	}
	ns := t.UnixNano()
	return &ns
}

func timeFromWire(ns *int64) time.Time {
	if ns == nil {
		return time.Time{}
	}
	return time.Unix(0, *ns).UTC()
}

func opToWire(o sallyport.Op) *pb.Op {
	return &pb.Op{
		Kind: string(o.Kind), Id: o.ID, Version: uint32(o.Version), Payload: o.Payload,
		Expires: timeToWire(o.Expires), Delete: o.Delete,
		IfAbsent: o.If.Absent, IfExists: o.If.Exists, IfRevision: uint64(o.If.Revision),
	}
}

func opFromWire(m *pb.Op) sallyport.Op {
	return sallyport.Op{
		Kind: sallyport.Kind(m.GetKind()), ID: m.GetId(), Version: uint16(m.GetVersion()), Payload: m.GetPayload(),
		Expires: timeFromWire(m.Expires), Delete: m.GetDelete(),
		If: sallyport.Condition{
			Absent: m.GetIfAbsent(), Exists: m.GetIfExists(), Revision: sallyport.Revision(m.GetIfRevision()),
		},
	}
}

func watchRequestToWire(q sallyport.WatchRequest) *pb.WatchRequest {
	return &pb.WatchRequest{Kinds: stringsOf(q.Kinds), Epoch: string(q.Epoch), Since: uint64(q.Since)}
}

func watchRequestFromWire(m *pb.WatchRequest) sallyport.WatchRequest {
	return sallyport.WatchRequest{
		Kinds: namesOf[sallyport.Kind](m.GetKinds()), Epoch: sallyport.Epoch(m.GetEpoch()), Since: sallyport.Revision(m.GetSince()),
	}
}

func watchEventToWire(e sallyport.WatchEvent) *pb.WatchEvent {
	return &pb.WatchEvent{
		Type: pb.WatchEvent_Type(e.Type), Epoch: string(e.Epoch), Revision: uint64(e.Revision),
		Records: each(e.Records, recordToWire), Count: int64(e.Count),
	}
}

func watchEventFromWire(m *pb.WatchEvent) (sallyport.WatchEvent, error) {
	// A type that this version does not know may be anything, a change too:
	// going on without it would be a gap.
	if m.GetType() < pb.WatchEvent_BEGIN || m.GetType() > pb.WatchEvent_HEARTBEAT {
		return sallyport.WatchEvent{}, fmt.Errorf("watch event of unknown type %d", m.GetType())
	}
	return sallyport.WatchEvent{
		Type: sallyport.WatchEventType(m.GetType()), Epoch: sallyport.Epoch(m.GetEpoch()), Revision: sallyport.Revision(m.GetRevision()),
		Records: each(m.GetRecords(), recordFromWire), Count: int(m.GetCount()),
	}, nil
}

func requestToWire(q sallyport.Request) *pb.Request {
	return &pb.Request{
		Session: string(q.Session), Target: targetToWire(q.Target), Method: q.Method, Path: q.Path,
		Headers: headersToWire(q.Headers), Peer: peerToWire(q.Peer), Flow: string(q.Flow), Recheck: string(q.Recheck),
		Ssh: sshToWire(q.SSH), Mcp: mcpToWire(q.MCP), Certificate: certificateToWire(q.Certificate),
	}
}

func requestFromWire(m *pb.Request) (sallyport.Request, error) {
	peer, err := peerFromWire(m.GetPeer())
	if err != nil {
		return sallyport.Request{}, err
	}
	target, err := targetFromWire(m.GetTarget())
	if err != nil {
		return sallyport.Request{}, err
	}
	return sallyport.Request{
		Session: sallyport.SessionID(m.GetSession()), Target: target, Method: m.GetMethod(), Path: m.GetPath(),
		Headers: headersFromWire(m.GetHeaders()), Peer: peer, Flow: sallyport.FlowID(m.GetFlow()), Recheck: sallyport.DecisionID(m.GetRecheck()),
		SSH: sshFromWire(m.GetSsh()), MCP: mcpFromWire(m.GetMcp()), Certificate: certificateFromWire(m.GetCertificate()),
	}, nil
}

func sshToWire(q *sallyport.SSHRequest) *pb.SSHRequest {
	if q == nil {
		return nil
	}
	return &pb.SSHRequest{Username: q.Username, PublicKey: q.PublicKey}
}

func sshFromWire(m *pb.SSHRequest) *sallyport.SSHRequest {
	if m == nil {
		return nil
	}
	return &sallyport.SSHRequest{Username: m.GetUsername(), PublicKey: m.GetPublicKey()}
}

func mcpToWire(q *sallyport.MCPRequest) *pb.MCPRequest {
	if q == nil {
		return nil
	}
	return &pb.MCPRequest{Method: q.Method, Tool: q.Tool}
}

func mcpFromWire(m *pb.MCPRequest) *sallyport.MCPRequest {
	if m == nil {
		return nil
	}
	return &sallyport.MCPRequest{Method: m.GetMethod(), Tool: m.GetTool()}
}

func certificateToWire(c *sallyport.ClientCertificate) *pb.ClientCertificate {
	if c == nil {
		return nil
	}
	return &pb.ClientCertificate{Presented: c.Presented, Valid: c.Valid, Leaf: c.Leaf}
}

func certificateFromWire(m *pb.ClientCertificate) *sallyport.ClientCertificate {
	if m == nil {
		return nil
	}
	return &sallyport.ClientCertificate{Presented: m.GetPresented(), Valid: m.GetValid(), Leaf: m.GetLeaf()}
}

func targetToWire(t sallyport.Target) *pb.Target {
	if t.IsZero() {
		return nil
	}
	return &pb.Target{Network: string(t.Network), Host: t.Host, Port: uint32(t.Port)}
}

func targetFromWire(m *pb.Target) (sallyport.Target, error) {
	port, err := portFromWire(m.GetPort())
	return sallyport.Target{Network: sallyport.Network(m.GetNetwork()), Host: m.GetHost(), Port: port}, err
}

// portFromWire refuses what a uint16 cannot hold: cut off, it would be another port.
func portFromWire(n uint32) (uint16, error) {
	if n > 0xffff {
		return 0, fmt.Errorf("port %d is above 65535", n)
	}
	return uint16(n), nil
}

func headersToWire(h map[string][]string) []*pb.Header {
	if len(h) == 0 {
		return nil
	}
	out := make([]*pb.Header, 0, len(h))
	for name, values := range h {
		out = append(out, &pb.Header{Name: name, Values: values})
	}
	return out
}

func headersFromWire(ms []*pb.Header) map[string][]string {
	if len(ms) == 0 {
		return nil
	}
	out := make(map[string][]string, len(ms))
	for _, m := range ms {
		out[m.GetName()] = append(out[m.GetName()], m.GetValues()...)
	}
	return out
}

func peerToWire(a netip.AddrPort) []byte {
	if a == (netip.AddrPort{}) {
		return nil
	}
	b, err := a.MarshalBinary()
	if err != nil {
		return nil // documented never to fail
	}
	return b
}

func peerFromWire(b []byte) (netip.AddrPort, error) {
	if len(b) == 0 {
		return netip.AddrPort{}, nil
	}
	var a netip.AddrPort
	if err := a.UnmarshalBinary(b); err != nil {
		return netip.AddrPort{}, fmt.Errorf("peer address of %d bytes: %w", len(b), err)
	}
	return a, nil
}

func decisionToWire(d sallyport.Decision) *pb.Decision {
	return &pb.Decision{
		Id: string(d.ID), Verdict: verdictToWire(d.Verdict), Rule: d.Rule, Route: d.Route,
		Reasons: each(d.Reasons, reasonToWire), WouldAllowIf: each(d.WouldAllowIf, remediesToWire),
		ValidFor: int64(d.ValidFor), DependsOn: each(d.DependsOn, subjectToWire), DependsOnPeer: d.DependsOnPeer,
		Upstream: upstreamToWire(d.Upstream), Carrier: d.Carrier, Epoch: string(d.Epoch), AsOf: uint64(d.AsOf),
		PolicyRevision: uint64(d.PolicyRevision), Who: identityToWire(d.Who), Observed: each(d.Observed, observationToWire),
	}
}

func decisionFromWire(m *pb.Decision) (sallyport.Decision, error) {
	upstream, err := upstreamFromWire(m.GetUpstream())
	if err != nil {
		return sallyport.Decision{}, fmt.Errorf("decision %.40q: upstream: %w", m.GetId(), err)
	}
	return sallyport.Decision{
		ID: sallyport.DecisionID(m.GetId()), Verdict: verdictFromWire(m.GetVerdict()), Rule: m.GetRule(), Route: m.GetRoute(),
		Reasons: each(m.GetReasons(), reasonFromWire), WouldAllowIf: each(m.GetWouldAllowIf(), remediesFromWire),
		ValidFor: time.Duration(m.GetValidFor()), DependsOn: each(m.GetDependsOn(), subjectFromWire), DependsOnPeer: m.GetDependsOnPeer(),
		Upstream: upstream, Carrier: m.GetCarrier(), Epoch: sallyport.Epoch(m.GetEpoch()), AsOf: sallyport.Revision(m.GetAsOf()),
		PolicyRevision: sallyport.Revision(m.GetPolicyRevision()), Who: identityFromWire(m.GetWho()),
		Observed: each(m.GetObserved(), observationFromWire),
	}, nil
}

func observationToWire(o sallyport.Observation) *pb.Observation {
	return &pb.Observation{Rule: o.Rule, Would: verdictToWire(o.Would)}
}

func observationFromWire(m *pb.Observation) sallyport.Observation {
	return sallyport.Observation{Rule: m.GetRule(), Would: verdictFromWire(m.GetWould())}
}

// verdicts pairs the two sides by name, not by number: what is missing here on
// either side is a deny.
var verdicts = [...]struct {
	root sallyport.Verdict
	wire pb.Decision_Verdict
}{
	{sallyport.VerdictAllow, pb.Decision_ALLOW},
	{sallyport.VerdictLogin, pb.Decision_LOGIN},
	{sallyport.VerdictNoRoute, pb.Decision_NO_ROUTE},
	{sallyport.VerdictPending, pb.Decision_PENDING},
}

func verdictToWire(v sallyport.Verdict) pb.Decision_Verdict {
	for _, pair := range verdicts {
		if pair.root == v {
			return pair.wire
		}
	}
	return pb.Decision_DENY
}

func verdictFromWire(v pb.Decision_Verdict) sallyport.Verdict {
	for _, pair := range verdicts {
		if pair.wire == v {
			return pair.root
		}
	}
	return sallyport.VerdictDeny
}

func reasonToWire(r sallyport.Reason) *pb.Reason {
	return &pb.Reason{Rule: r.Rule, Condition: r.Condition, Wanted: r.Wanted, Found: r.Found, Age: int64(r.Age), Result: r.Result}
}

func reasonFromWire(m *pb.Reason) sallyport.Reason {
	return sallyport.Reason{
		Rule: m.GetRule(), Condition: m.GetCondition(), Wanted: m.GetWanted(), Found: m.GetFound(),
		Age: time.Duration(m.GetAge()), Result: m.GetResult(),
	}
}

func remediesToWire(all []sallyport.Remedy) *pb.Remedies {
	return &pb.Remedies{All: each(all, func(r sallyport.Remedy) *pb.Remedy {
		return &pb.Remedy{Condition: r.Condition, Want: r.Want, Hint: r.Hint}
	})}
}

func remediesFromWire(m *pb.Remedies) []sallyport.Remedy {
	return each(m.GetAll(), func(r *pb.Remedy) sallyport.Remedy {
		return sallyport.Remedy{Condition: r.GetCondition(), Want: r.GetWant(), Hint: r.GetHint()}
	})
}

func subjectToWire(s sallyport.Subject) *pb.Subject {
	return &pb.Subject{Kind: string(s.Kind), Id: s.ID}
}

func subjectFromWire(m *pb.Subject) sallyport.Subject {
	return sallyport.Subject{Kind: sallyport.SubjectKind(m.GetKind()), ID: m.GetId()}
}

func upstreamToWire(u sallyport.Upstream) *pb.Upstream {
	if u == (sallyport.Upstream{}) {
		return nil
	}
	return &pb.Upstream{Network: string(u.Network), Host: u.Host, Port: uint32(u.Port), Literal: u.Literal}
}

func upstreamFromWire(m *pb.Upstream) (sallyport.Upstream, error) {
	port, err := portFromWire(m.GetPort())
	return sallyport.Upstream{
		Network: sallyport.Network(m.GetNetwork()), Host: m.GetHost(), Port: port, Literal: m.GetLiteral(),
	}, err
}

func identityToWire(i sallyport.Identity) *pb.Identity {
	if i.Session == "" && i.Login == "" && i.User == "" {
		return nil
	}
	return &pb.Identity{
		Session: string(i.Session), Login: string(i.Login), User: string(i.User), Email: i.Email, Name: i.Name,
		Groups: i.Groups, Device: string(i.Device), ExpiresIn: int64(i.ExpiresIn),
	}
}

func identityFromWire(m *pb.Identity) sallyport.Identity {
	return sallyport.Identity{
		Session: sallyport.SessionID(m.GetSession()), Login: sallyport.LoginID(m.GetLogin()), User: sallyport.UserID(m.GetUser()),
		Email: m.GetEmail(), Name: m.GetName(), Groups: m.GetGroups(), Device: sallyport.DeviceID(m.GetDevice()),
		ExpiresIn: time.Duration(m.GetExpiresIn()),
	}
}

func listRequestToWire(q sallyport.ListRequest) *pb.ListRequest {
	return &pb.ListRequest{Session: string(q.Session), Peer: peerToWire(q.Peer), All: q.All}
}

func listRequestFromWire(m *pb.ListRequest) (sallyport.ListRequest, error) {
	peer, err := peerFromWire(m.GetPeer())
	return sallyport.ListRequest{Session: sallyport.SessionID(m.GetSession()), Peer: peer, All: m.GetAll()}, err
}

func noticeToWire(n sallyport.Notice) *pb.Notice {
	m := &pb.Notice{
		Epoch: string(n.Epoch), Revision: uint64(n.Revision), PolicyRevision: uint64(n.PolicyRevision),
		SourceAge: int64(n.SourceAge), MaxStale: int64(n.MaxStale), Forbidden: n.Forbidden, First: n.First,
		Changes: each(n.Changes, func(c sallyport.SubjectChange) *pb.SubjectChange {
			return &pb.SubjectChange{Subject: subjectToWire(c.Subject), Revision: uint64(c.Revision), Why: c.Why}
		}),
	}
	if n.Trust != nil {
		m.Trust = &pb.Trust{SessionCas: n.Trust.SessionCAs}
	}
	return m
}

func noticeFromWire(m *pb.Notice) sallyport.Notice {
	n := sallyport.Notice{
		Epoch: sallyport.Epoch(m.GetEpoch()), Revision: sallyport.Revision(m.GetRevision()), PolicyRevision: sallyport.Revision(m.GetPolicyRevision()),
		SourceAge: time.Duration(m.GetSourceAge()), MaxStale: time.Duration(m.GetMaxStale()), Forbidden: m.GetForbidden(), First: m.GetFirst(),
		Changes: each(m.GetChanges(), func(c *pb.SubjectChange) sallyport.SubjectChange {
			return sallyport.SubjectChange{Subject: subjectFromWire(c.GetSubject()), Revision: sallyport.Revision(c.GetRevision()), Why: c.GetWhy()}
		}),
	}
	if m.GetTrust() != nil {
		n.Trust = &sallyport.Trust{SessionCAs: m.GetTrust().GetSessionCas()}
	}
	return n
}

func revocationToWire(r sallyport.Revocation) *pb.Revocation {
	return &pb.Revocation{Subjects: each(r.Subjects, subjectToWire), Reason: r.Reason, By: r.By}
}

func revocationFromWire(m *pb.Revocation) sallyport.Revocation {
	return sallyport.Revocation{Subjects: each(m.GetSubjects(), subjectFromWire), Reason: m.GetReason(), By: m.GetBy()}
}

func revokedToWire(r sallyport.Revoked) *pb.Revoked {
	return &pb.Revoked{Sessions: int64(r.Sessions), Durable: r.Durable, Revision: uint64(r.Revision)}
}

func revokedFromWire(m *pb.Revoked) sallyport.Revoked {
	return sallyport.Revoked{Sessions: int(m.GetSessions()), Durable: m.GetDurable(), Revision: sallyport.Revision(m.GetRevision())}
}

// each converts a list; an empty one is nil.
func each[A, B any](in []A, convert func(A) B) []B {
	if len(in) == 0 {
		return nil
	}
	out := make([]B, len(in))
	for i, v := range in {
		out[i] = convert(v)
	}
	return out
}

// eachOrErr is each for conversions that can fail.
func eachOrErr[A, B any](in []A, convert func(A) (B, error)) ([]B, error) {
	out := make([]B, 0, len(in))
	for _, v := range in {
		w, err := convert(v)
		if err != nil {
			return nil, err
		}
		out = append(out, w)
	}
	return out, nil
}

func stringsOf[T ~string](in []T) []string { return each(in, func(s T) string { return string(s) }) }

func namesOf[T ~string](in []string) []T { return each(in, func(s string) T { return T(s) }) }

package control

import (
	"fmt"
	"strings"

	"sallyport"
	"sallyport/proto/control/internal/pb"
)

// Kinds of services, as their certificates name them (tlsid.Service).
const (
	KindGateway  = "gateway"
	KindAuthd    = "authd"
	KindPolicyd  = "policyd"
	KindCached   = "cached"
	KindOperator = "operator" // an administrator's tool
)

// access says who may call what; everything else is refused. Operators, and
// this machine's own user or root on the unix socket, may call everything; only
// they may take a backup, which holds what no daemon gets to see as a whole. A
// gateway, the daemon that strangers talk to, may ask and may not write.
var access = map[string]map[string]rule{
	KindGateway: {
		pb.Policy_Authorize_FullMethodName:     always,
		pb.Policy_Explain_FullMethodName:       always,
		pb.Policy_List_FullMethodName:          always,
		pb.Policy_Changes_FullMethodName:       always,
		pb.Policy_ReportPosture_FullMethodName: always,
	},
	KindPolicyd: {
		pb.Records_Get_FullMethodName:    noSecrets,
		pb.Records_Watch_FullMethodName:  always, // never carries secrets
		pb.Records_Apply_FullMethodName:  policydWrites,
		pb.Revoker_Revoke_FullMethodName: always, // replay of direct revocations
	},
	KindAuthd: {
		pb.Records_Get_FullMethodName:   authdReads,
		pb.Records_Apply_FullMethodName: authdWrites,
		pb.Records_Watch_FullMethodName: always,
		pb.Records_Lease_FullMethodName: always,
		pb.Records_List_FullMethodName:  always,
	},
}

// rule looks at a request that a method of the table was called with. Streams
// are checked before their first message, so theirs can only be always.
type rule func(who caller, request any) error

func always(caller, any) error { return nil }

func noSecrets(_ caller, request any) error {
	if q, ok := request.(*pb.GetRequest); !ok || !sallyport.Kind(q.GetKind()).Streamed() {
		return fmt.Errorf("records of kind %.40q are not for policyd", q.GetKind())
	}
	return nil
}

// authdReads lets authd read everything but other daemons' keys, wrapped as they are.
func authdReads(_ caller, request any) error {
	q, ok := request.(*pb.GetRequest)
	if !ok || sallyport.Kind(q.GetKind()) == sallyport.KindKeyring && q.GetId() != KindAuthd {
		return fmt.Errorf("keys of other daemons are not for authd")
	}
	return nil
}

// authdWrites lets authd keep everything about people and what it gave them.
// The configuration, that is the policy, is the operator's.
func authdWrites(who caller, request any) error {
	return eachOp(request, func(op *pb.Op) error {
		switch kind := sallyport.Kind(op.GetKind()); kind {
		case sallyport.KindConfig, sallyport.KindConfigHistory, sallyport.KindRecord:
			return fmt.Errorf("records of kind %s are the operator's", kind)
		case sallyport.KindAuditHead:
			return ownHead(who, op)
		case sallyport.KindKeyring:
			if op.GetId() != KindAuthd || op.GetDelete() {
				return fmt.Errorf("authd may only replace its own keys")
			}
		}
		return nil
	})
}

// policydWrites lets policyd store what agents report. What was revoked at it, it
// has cached revoke.
func policydWrites(who caller, request any) error {
	return eachOp(request, func(op *pb.Op) error {
		switch kind := sallyport.Kind(op.GetKind()); kind {
		case sallyport.KindPosture:
			return nil
		case sallyport.KindAuditHead:
			return ownHead(who, op)
		default:
			return fmt.Errorf("policyd may not write records of kind %.40q", kind)
		}
	})
}

// ownHead lets a daemon vouch for its own audit chain and for no other.
func ownHead(who caller, op *pb.Op) error {
	if op.GetId() != AuditHeadID(who.kind, who.name) || op.GetDelete() {
		return fmt.Errorf("%s may only replace its own audit head", who)
	}
	return nil
}

// AuditHeadID is the id of the record with the audit head of a service, by the kind
// and the name in its certificate: the kind for the first of a kind, which is
// called like it, and policyd/NAME for one of several.
func AuditHeadID(kind, name string) string {
	if name == kind {
		return kind
	}
	return kind + "/" + name
}

func eachOp(request any, check func(*pb.Op) error) error {
	q, ok := request.(*pb.ApplyRequest)
	if !ok {
		return fmt.Errorf("no batch")
	}
	for _, op := range q.GetOps() {
		if err := check(op); err != nil {
			return err
		}
	}
	return nil
}

// caller is who is at the other end of a connection, found once at its start.
type caller struct {
	// kind and name are the service's; empty on a unix socket.
	kind, name string
	// local is a process of our own user or root on the unix socket.
	local bool
	uid   uint32
}

func (c caller) String() string {
	switch {
	case c.local:
		return fmt.Sprintf("uid %d", c.uid)
	case c.kind != "":
		return c.kind + "/" + c.name
	}
	return "unknown caller"
}

// check returns nil if c may call the method with the request; request is nil
// for streams.
func (c caller) check(method string, request any) error {
	if c.local || c.kind == KindOperator {
		return nil
	}
	allowed, ok := access[c.kind][method]
	if !ok {
		return forbidden(c.String(), shortMethod(method))
	}
	if err := allowed(c, request); err != nil {
		e := forbidden(c.String(), shortMethod(method)).(*sallyport.Error)
		e.Message += " with this: " + err.Error()
		return e
	}
	return nil
}

// shortMethod makes Records/Get of /sallyport.control.v1.Records/Get.
func shortMethod(full string) string {
	return full[strings.LastIndexByte(full, '.')+1:]
}

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
// this machine's own user or root on the unix socket, may call everything. A
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
		pb.Records_Apply_FullMethodName:  postureAndRevocations,
		pb.Revoker_Revoke_FullMethodName: always, // replay of direct revocations
	},
	KindAuthd: {
		pb.Records_Get_FullMethodName:   always,
		pb.Records_Apply_FullMethodName: noConfiguration,
		pb.Records_Watch_FullMethodName: always,
		pb.Records_Lease_FullMethodName: always,
		pb.Records_List_FullMethodName:  always,
	},
}

// rule looks at a request that a method of the table was called with. Streams
// are checked before their first message, so theirs can only be always.
type rule func(request any) error

func always(any) error { return nil }

func noSecrets(request any) error {
	if q, ok := request.(*pb.GetRequest); !ok || !sallyport.Kind(q.GetKind()).Streamed() {
		return fmt.Errorf("records of kind %.40q are authd's", q.GetKind())
	}
	return nil
}

func noConfiguration(request any) error {
	q, _ := request.(*pb.ApplyRequest)
	for _, op := range q.GetOps() {
		if sallyport.Kind(op.GetKind()) == sallyport.KindConfig {
			return fmt.Errorf("the configuration is the operator's")
		}
	}
	return nil
}

// postureAndRevocations lets policyd store what agents report and replay what
// was revoked at it; it cannot create a session.
func postureAndRevocations(request any) error {
	q, _ := request.(*pb.ApplyRequest)
	for _, op := range q.GetOps() {
		switch sallyport.Kind(op.GetKind()) {
		case sallyport.KindPosture, sallyport.KindDevice, sallyport.KindUser:
		case sallyport.KindSession, sallyport.KindLogin:
			if !op.GetDelete() {
				return fmt.Errorf("policyd may only delete records of kind %.40q", op.GetKind())
			}
		default:
			return fmt.Errorf("policyd may not write records of kind %.40q", op.GetKind())
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
	rule, ok := access[c.kind][method]
	if !ok {
		return forbidden(c.String(), shortMethod(method))
	}
	if err := rule(request); err != nil {
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

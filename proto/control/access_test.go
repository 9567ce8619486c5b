package control

import (
	"slices"
	"testing"

	"google.golang.org/grpc"

	"sallyport"
	"sallyport/proto/control/internal/pb"
)

// allMethods are those of the generated services.
func allMethods() (methods []string) {
	for _, d := range []grpc.ServiceDesc{pb.Records_ServiceDesc, pb.Policy_ServiceDesc, pb.Revoker_ServiceDesc, pb.Backuper_ServiceDesc, pb.Keys_ServiceDesc} {
		for _, m := range d.Methods {
			methods = append(methods, "/"+d.ServiceName+"/"+m.MethodName)
		}
		for _, m := range d.Streams {
			methods = append(methods, "/"+d.ServiceName+"/"+m.StreamName)
		}
	}
	return methods
}

// The whole table once more, as people would say it, so that a change of it is
// a decision and not a slip.
func TestAccess(t *testing.T) {
	may := map[string][]string{
		"gateway":  {"Policy/Authorize", "Policy/Explain", "Policy/List", "Policy/Changes", "Policy/ReportPosture"},
		"policyd":  {"Records/Get", "Records/Apply", "Records/Watch", "Revoker/Revoke"},
		"authd":    {"Records/Get", "Records/Apply", "Records/Watch", "Records/Lease", "Records/List"},
		"cached":   nil,
		"agent":    nil,
		"":         nil,
		"Operator": nil,
	}
	requests := map[string]any{
		"Records/Get":   &pb.GetRequest{Kind: string(sallyport.KindSession)},
		"Records/Apply": &pb.ApplyRequest{},
	}
	methods := allMethods()
	if len(methods) != 15 {
		t.Errorf("%d methods; who may call the new one?", len(methods))
	}
	for kind, allowed := range may {
		for _, method := range methods {
			short := shortMethod(method)
			err := caller{kind: kind, name: "x"}.check(method, requests[short])
			if got, want := err == nil, slices.Contains(allowed, short); got != want {
				t.Errorf("%q calls %s: allowed %t; want %t", kind, short, got, want)
			}
			if err != nil && sallyport.CodeOf(err) != CodeForbidden {
				t.Errorf("%q calls %s: got %v; want %s", kind, short, err, CodeForbidden)
			}
		}
	}
	for _, method := range methods {
		for _, c := range []caller{{kind: KindOperator}, {local: true, uid: 1000}} {
			if err := c.check(method, nil); err != nil {
				t.Errorf("%v calls %s: %v", c, method, err)
			}
		}
	}
}

func TestAccessLooksAtRequests(t *testing.T) {
	apply := func(kind sallyport.Kind, del bool) any {
		return &pb.ApplyRequest{Ops: []*pb.Op{
			{Kind: string(sallyport.KindPosture)}, {Kind: string(kind), Delete: del},
		}}
	}
	head := func(id string, del bool) any {
		return &pb.ApplyRequest{Ops: []*pb.Op{{Kind: string(sallyport.KindAuditHead), Id: id, Delete: del}}}
	}
	device := func(payload string, del bool) any {
		return &pb.ApplyRequest{Ops: []*pb.Op{{Kind: string(sallyport.KindDevice), Id: "d", Payload: []byte(payload), Delete: del}}}
	}
	get := func(kind sallyport.Kind) any { return &pb.GetRequest{Kind: string(kind)} }
	tests := []struct {
		kind    string
		method  string
		request any
		ok      bool
	}{
		{KindPolicyd, pb.Records_Apply_FullMethodName, apply(sallyport.KindPosture, false), true},
		{KindPolicyd, pb.Records_Apply_FullMethodName, apply(sallyport.KindSession, true), false},
		{KindPolicyd, pb.Records_Apply_FullMethodName, apply(sallyport.KindSession, false), false},
		{KindPolicyd, pb.Records_Apply_FullMethodName, apply(sallyport.KindLogin, false), false},
		{KindPolicyd, pb.Records_Apply_FullMethodName, apply(sallyport.KindDirectoryUser, false), false},
		{KindPolicyd, pb.Records_Apply_FullMethodName, apply(sallyport.KindConfig, false), false},
		{KindPolicyd, pb.Records_Apply_FullMethodName, apply(sallyport.KindTrust, false), false},
		{KindPolicyd, pb.Records_Apply_FullMethodName, apply(sallyport.KindUser, false), false},
		{KindPolicyd, pb.Records_Apply_FullMethodName, device(`{"id":"d","revoked":true}`, false), false},
		{KindPolicyd, pb.Records_Apply_FullMethodName, device(`{"id":"d","approved":true}`, false), false},
		{KindPolicyd, pb.Records_Apply_FullMethodName, device(``, true), false},
		{KindPolicyd, pb.Records_Get_FullMethodName, get(sallyport.KindSession), true},
		{KindPolicyd, pb.Records_Get_FullMethodName, get(sallyport.KindIDPToken), false},
		{KindPolicyd, pb.Records_Get_FullMethodName, get(sallyport.KindCode), false},
		{KindPolicyd, pb.Records_Get_FullMethodName, nil, false},
		{KindAuthd, pb.Records_Get_FullMethodName, get(sallyport.KindIDPToken), true},
		{KindAuthd, pb.Records_Apply_FullMethodName, apply(sallyport.KindSession, false), true},
		{KindAuthd, pb.Records_Apply_FullMethodName, apply(sallyport.KindConfig, false), false},
		{KindAuthd, pb.Records_Apply_FullMethodName, apply(sallyport.KindRecord, true), false},
		{KindAuthd, pb.Records_Apply_FullMethodName, head("authd", false), true},
		{KindAuthd, pb.Records_Apply_FullMethodName, head("policyd", false), false},
		{KindAuthd, pb.Records_Apply_FullMethodName, head("authd", true), false},
		{KindPolicyd, pb.Records_Apply_FullMethodName, head("policyd", false), true},
		{KindPolicyd, pb.Records_Apply_FullMethodName, head("cached", false), false},
		{KindPolicyd, pb.Records_Apply_FullMethodName, nil, false},
		{KindOperator, pb.Records_Apply_FullMethodName, apply(sallyport.KindConfig, false), true},
	}
	for _, tt := range tests {
		err := caller{kind: tt.kind, name: tt.kind}.check(tt.method, tt.request)
		if (err == nil) != tt.ok {
			t.Errorf("%s: %s %v: got %v; want ok %t", tt.kind, shortMethod(tt.method), tt.request, err, tt.ok)
		}
	}
	second := caller{kind: KindPolicyd, name: "policyd-2"}
	for id, ok := range map[string]bool{"policyd/policyd-2": true, "policyd": false, "policyd-2": false, "policyd/policyd-3": false} {
		if err := second.check(pb.Records_Apply_FullMethodName, head(id, false)); (err == nil) != ok {
			t.Errorf("%s writes the head %s: got %v; want ok %t", second, id, err, ok)
		}
	}
}

func TestTrustedUID(t *testing.T) {
	for _, tt := range []struct {
		uid  uint32
		own  int
		want bool
	}{{1000, 1000, true}, {0, 1000, true}, {1001, 1000, false}, {1000, 0, false}, {0, 0, true}, {4294967295, -1, false}} {
		if got := trustedUID(tt.uid, tt.own); got != tt.want {
			t.Errorf("uid %d at a process of %d: got %t; want %t", tt.uid, tt.own, got, tt.want)
		}
	}
}

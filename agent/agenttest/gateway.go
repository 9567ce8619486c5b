package agenttest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/proto/proof"
	"sallyport/tunnel"
)

// handler is the gateway's side of a Site.
type handler Site

func (h *handler) site() *Site { return (*Site)(h) }

// Admit implements tunnel.Handler.
func (h *handler) Admit(_ context.Context, c tunnel.ServerConn) (func(), error) {
	s := h.site()
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, live := s.live[c.Peer().Session]; !live {
		return nil, &tunnel.AdmitError{Code: connect.CodeSessionRevoked, Reason: "session revoked"}
	}
	s.conns[c] = true
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.conns, c)
	}, nil
}

// Connect implements tunnel.Handler: an allowed target echoes, and says how much
// it got after the end.
func (h *handler) Connect(_ context.Context, stream tunnel.ServerStream) {
	s, t := h.site(), stream.Target()
	s.note("connect " + t.Authority())
	d := s.decide(t)
	if !s.lives(stream.Conn()) {
		d = sallyport.Decision{ID: "d-NOSESSION", Verdict: sallyport.VerdictLogin}
	}
	if !d.Allowed() {
		stream.Refuse(connect.Denial(d))
		return
	}
	id := sallyport.FlowID(sallyport.NewID("f"))
	header := http.Header{}
	header.Set(connect.HeaderFlow, string(id))
	header.Set(connect.HeaderDecision, string(d.ID))
	header.Set(connect.HeaderRule, d.Rule)
	conn, err := stream.Accept(header)
	if err != nil {
		return
	}
	s.mu.Lock()
	s.flows[id] = &flow{t, conn}
	s.mu.Unlock()
	if n, err := io.Copy(conn, conn); err == nil {
		fmt.Fprintf(conn, "[%d bytes]", n)
		conn.CloseWrite()
	}
	conn.Close()
	s.mu.Lock()
	delete(s.flows, id)
	s.mu.Unlock()
}

func (s *Site) decide(t sallyport.Target) sallyport.Decision {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d, ok := s.decisions[t.String()]; ok {
		return d
	}
	return sallyport.Decision{ID: "d-NOROUTE", Verdict: sallyport.VerdictNoRoute}
}

func (s *Site) lives(c tunnel.ServerConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, live := s.live[c.Peer().Session]
	return live
}

func (s *Site) note(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.history = append(s.history, what)
}

// History returns what the gateway was asked for, in order.
func (s *Site) History() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.history)
}

// Facts returns those of the last posture report.
func (s *Site) Facts() map[string]sallyport.Fact {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.facts
}

// Decide sets the decision for a target ("tcp://db.internal:5432").
func (s *Site) Decide(target string, d sallyport.Decision) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.decisions[target] = d
}

// Withdraw cuts every flow to the target, first the bytes, then the reason, as a
// gateway does. It returns how many.
func (s *Site) Withdraw(target string, e connect.Event) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for id, f := range s.flows {
		if f.target.String() != target {
			continue
		}
		n++
		f.conn.Reset(connect.CodeFlowWithdrawn)
		e.Type, e.Flow = connect.EventWithdrawn, id
		s.publish(e)
	}
	return n
}

// Flows returns how many flows are open.
func (s *Site) Flows() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.flows)
}

// publish needs s.mu.
func (s *Site) publish(e connect.Event) {
	for c := range s.streams {
		select {
		case c <- e:
		default:
		}
	}
}

// EndSession revokes or expires a session: its flows are cut, its streams told,
// its connections closed.
func (s *Site) EndSession(id sallyport.SessionID, code, reason string) {
	s.mu.Lock()
	delete(s.live, id)
	for flow, f := range s.flows {
		f.conn.Reset(connect.CodeSessionRevoked)
		s.publish(connect.Event{Type: connect.EventWithdrawn, Flow: flow, Code: code, Reason: reason})
	}
	s.publish(connect.Event{Type: connect.EventSession, Code: code, Reason: reason})
	var conns []tunnel.ServerConn
	for c := range s.conns {
		if c.Peer().Session == id {
			conns = append(conns, c)
		}
	}
	s.mu.Unlock()
	for _, c := range conns {
		time.AfterFunc(100*time.Millisecond, func() { c.Close(connect.CodeSessionRevoked, reason) })
	}
}

// DropCarriers closes every connection, as a gateway that is restarted does.
func (s *Site) DropCarriers() {
	s.mu.Lock()
	conns := make([]tunnel.ServerConn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.Close(connect.CodeDraining, "restart")
	}
}

// ServeAPI implements tunnel.Handler.
func (h *handler) ServeAPI(w http.ResponseWriter, r *http.Request, c tunnel.ServerConn) {
	s := h.site()
	if !s.lives(c) {
		connect.WriteRefusal(w, connect.Denial(sallyport.Decision{ID: "d-NOSESSION", Verdict: sallyport.VerdictLogin}))
		return
	}
	switch r.URL.Path {
	case connect.PathMe, connect.PathTargets:
		s.note(r.URL.Path)
		json.NewEncoder(w).Encode(s.listing(c.Peer().Session, r.URL.Query().Get("all") == "1"))
	case connect.PathWhy:
		t, err := sallyport.ParseTarget(r.URL.Query().Get("target"))
		if err != nil {
			connect.WriteRefusal(w, tunnel.BadTarget(err))
			return
		}
		json.NewEncoder(w).Encode(s.decide(t))
	case connect.PathPosture:
		s.posture(w, r, c)
	case connect.PathEvents:
		s.events(w, r)
	default:
		http.NotFound(w, r)
	}
}

func (s *Site) listing(id sallyport.SessionID, all bool) sallyport.Listing {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := sallyport.Listing{
		Facts: s.facts, Targets: []sallyport.ListedTarget{}, PolicyRevision: 7,
		Me: sallyport.Identity{
			Session: id, User: "u-alice", Email: "alice@corp.example", Name: "Alice",
			Groups: []string{"dba", "staff"}, Device: s.live[id].ID, ExpiresIn: 12 * time.Hour,
		},
	}
	for from, d := range s.decisions {
		if d.Allowed() || all {
			l.Targets = append(l.Targets, sallyport.ListedTarget{From: from, Verdict: d.Verdict, Rule: d.Rule, Reasons: d.Reasons})
		}
	}
	slices.SortFunc(l.Targets, func(a, b sallyport.ListedTarget) int { return strings.Compare(a.From, b.From) })
	return l
}

func (s *Site) posture(w http.ResponseWriter, r *http.Request, c tunnel.ServerConn) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 96<<10))
	if err != nil {
		return
	}
	var report sallyport.PostureReport
	key, err := proof.Verify(string(body), proof.TypePosture, &report)
	s.mu.Lock()
	owner := s.live[c.Peer().Session]
	ok := err == nil && key.ID == owner.ID && report.Device == key.ID && report.Session == c.Peer().Session
	if ok {
		s.facts = report.Facts
		s.history = append(s.history, "posture")
	}
	s.mu.Unlock()
	if !ok {
		connect.WriteProblem(w, connect.Problem{Status: http.StatusBadRequest, Code: "posture.invalid", Detail: "the report does not verify"})
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *Site) events(w http.ResponseWriter, r *http.Request) {
	queue := make(chan connect.Event, 64)
	s.mu.Lock()
	s.streams[queue] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.streams, queue)
	}()
	e := connect.Event{Type: connect.EventHello, Version: "test"}
	for {
		if json.NewEncoder(w).Encode(e) != nil || http.NewResponseController(w).Flush() != nil {
			return
		}
		select {
		case e = <-queue:
		case <-r.Context().Done():
			return
		}
	}
}

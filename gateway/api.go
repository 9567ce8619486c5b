package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

// maxPosture bounds the body of a posture report: 64 KiB of facts, as a JWS.
const maxPosture = 96 << 10

// postureTimeout is how long a report may take to govern decisions: it is
// written to cached first.
const postureTimeout = 10 * time.Second

// features are what /v1/events says this gateway can do; agents ignore what
// they do not know.
var features = []string{"connect-tcp", "events", "posture", "why"}

// oldestAgent is the oldest agent that this gateway still understands.
const oldestAgent = "0.1.0"

// ServeAPI implements tunnel.Handler: the /v1 requests of the tunnel host, and
// nothing else.
func (s *Server) ServeAPI(w http.ResponseWriter, r *http.Request, c tunnel.ServerConn) {
	w.Header().Set("Cache-Control", "no-store")
	if refusal := s.table.admitted(c); refusal != nil {
		connect.WriteRefusal(w, refusal)
		return
	}
	method, serve := http.MethodGet, (func(http.ResponseWriter, *http.Request, tunnel.ServerConn))(nil)
	switch r.URL.Path {
	case connect.PathMe:
		serve = s.serveMe
	case connect.PathTargets:
		serve = s.serveTargets
	case connect.PathWhy:
		serve = s.serveWhy
	case connect.PathPing:
		serve = func(w http.ResponseWriter, _ *http.Request, _ tunnel.ServerConn) { w.WriteHeader(http.StatusNoContent) }
	case connect.PathPosture:
		method, serve = http.MethodPost, s.servePosture
	case connect.PathEvents:
		serve = s.serveEvents
	default:
		connect.WriteRefusal(w, &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: "path.unknown", Message: "there is nothing at this path"})
		return
	}
	if r.Method != method {
		w.Header().Set("Allow", method)
		connect.WriteProblem(w, connect.Problem{Status: http.StatusMethodNotAllowed, Code: "method.wrong", Detail: "this path takes " + method + " only"})
		return
	}
	serve(w, r, c)
}

// asking bounds a question to policyd on behalf of r.
func (s *Server) asking(r *http.Request) (context.Context, context.CancelFunc) {
	return context.WithTimeout(r.Context(), s.limits.DecisionTimeout)
}

func (s *Server) serveMe(w http.ResponseWriter, r *http.Request, c tunnel.ServerConn) {
	ctx, cancel := s.asking(r)
	defer cancel()
	listing, err := s.deps.Explainer.List(ctx, sallyport.ListRequest{Session: c.Peer().Session, Peer: c.RemoteAddr()})
	if err != nil {
		writeError(w, err)
		return
	}
	listing.Targets = []sallyport.ListedTarget{}
	writeJSON(w, listing)
}

func (s *Server) serveTargets(w http.ResponseWriter, r *http.Request, c tunnel.ServerConn) {
	q := sallyport.ListRequest{Session: c.Peer().Session, Peer: c.RemoteAddr(), All: r.URL.Query().Get("all") == "1"}
	ctx, cancel := s.asking(r)
	defer cancel()
	listing, err := s.deps.Explainer.List(ctx, q)
	if err != nil {
		writeError(w, err)
		return
	}
	if listing.Targets == nil {
		listing.Targets = []sallyport.ListedTarget{}
	}
	writeJSON(w, listing)
}

func (s *Server) serveWhy(w http.ResponseWriter, r *http.Request, c tunnel.ServerConn) {
	target, err := sallyport.ParseTarget(r.URL.Query().Get("target"))
	if err != nil {
		connect.WriteRefusal(w, &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: connect.ProblemBadTarget, Message: err.Error()})
		return
	}
	ctx, cancel := s.asking(r)
	defer cancel()
	d, err := s.deps.Explainer.Explain(ctx, sallyport.Request{Session: c.Peer().Session, Target: target, Peer: c.RemoteAddr()})
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, connect.Visible(d))
}

func (s *Server) servePosture(w http.ResponseWriter, r *http.Request, c tunnel.ServerConn) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxPosture))
	if err != nil {
		connect.WriteRefusal(w, &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: connect.ProblemBadRequest, Message: "the report is too large or did not arrive whole", Err: err})
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), postureTimeout)
	defer cancel()
	err = s.deps.Posture.ReportPosture(ctx, c.Peer().Session, strings.TrimSpace(string(body)))
	var e *sallyport.Error
	switch {
	case err == nil:
		w.WriteHeader(http.StatusNoContent)
	case errors.As(err, &e) && strings.HasPrefix(e.Code, "posture.") && e.Outcome != sallyport.OutcomeUnavailable:
		// What is wrong with the report itself; else nothing is.
		p := connect.ProblemOf(e)
		p.Status, p.Title, p.RetryAfter = http.StatusBadRequest, "", 0
		connect.WriteProblem(w, p)
	default:
		writeError(w, err)
	}
}

func (s *Server) serveEvents(w http.ResponseWriter, r *http.Request, c tunnel.ServerConn) {
	session := c.Peer().Session
	sub, ok := s.hub.subscribe(session, c)
	if !ok {
		connect.WriteRefusal(w, &sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: connect.ProblemTooMany, Message: "this session reads its events too often already"})
		return
	}
	defer s.hub.unsubscribe(session, sub)
	sub.serve(r.Context(), w, connect.Event{
		Type: connect.EventHello, Version: s.deps.Version, Features: features, OldestAgent: oldestAgent,
	})
}

// writeError answers with err if a person may see it, else with "could not be
// answered": policyd did not.
func writeError(w http.ResponseWriter, err error) {
	var e *sallyport.Error
	if !errors.As(err, &e) {
		e = unavailable(hopPolicyd, err)
	}
	connect.WriteRefusal(w, e)
}

func writeJSON(w http.ResponseWriter, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		connect.WriteRefusal(w, &sallyport.Error{Outcome: sallyport.OutcomeInternal, Code: "internal", Message: "the answer cannot be written", Err: err})
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(append(b, '\n')) // the client is gone if this fails
}

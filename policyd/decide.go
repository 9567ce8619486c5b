package policyd

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"sallyport"
	"sallyport/policyd/policy"
)

// maxAsking bounds the batches under way: when the audit log hangs, more of them
// waiting would help nobody.
const maxAsking = 10_000

// Authorize implements sallyport.Authorizer. Every decision is audited before it
// is returned, re-checks of live flows only when they do not allow. Errors are
// *sallyport.Error with OutcomeUnavailable and the codes policy.source,
// policy.stale, policy.none, policy.busy and policy.audit.
func (s *Server) Authorize(ctx context.Context, questions []sallyport.Request) ([]sallyport.Decision, error) {
	defer s.asking.Add(-1)
	if s.asking.Add(1) > maxAsking {
		return nil, unavailable("policy.busy", "too many questions wait for an answer")
	}
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, s.cfg.DecisionTimeout)
	defer cancel()
	v, err := s.view()
	if err != nil {
		return nil, err
	}
	out := make([]sallyport.Decision, len(questions))
	a := asker{view: v}
	for i := range questions {
		q := &questions[i]
		out[i] = a.decide(q)
		s.metrics.decisions.Inc(out[i].Verdict.String())
		for _, o := range out[i].Observed {
			s.metrics.observed.Inc(o.Would.String())
		}
		if q.Recheck != "" && out[i].Allowed() {
			continue
		}
		if err := s.audit.Append(ctx, a.record(&out[i])); err != nil {
			if q.Recheck == "" {
				return nil, &sallyport.Error{
					Outcome: sallyport.OutcomeUnavailable, Code: "policy.audit",
					Message: "the decision could not be written down", Err: err,
				}
			}
			s.log.Error("audit record lost", "type", sallyport.AuditDecision, "error", err) // a cut must not wait for it
		}
	}
	s.metrics.deciding.Observe(time.Since(start).Seconds())
	return out, nil
}

// Explain implements sallyport.Explainer.
func (s *Server) Explain(_ context.Context, q sallyport.Request) (sallyport.Decision, error) {
	v, err := s.view()
	if err != nil {
		return sallyport.Decision{}, err
	}
	a := asker{view: v}
	return a.explain(&q), nil
}

// List implements sallyport.Explainer. Without a live session it returns an
// *sallyport.Error with OutcomeLogin.
func (s *Server) List(_ context.Context, q sallyport.ListRequest) (sallyport.Listing, error) {
	v, err := s.view()
	if err != nil {
		return sallyport.Listing{}, err
	}
	a := asker{view: v}
	return a.list(q)
}

// asker decides the questions of one batch, one after the other, in the same
// memory.
type asker struct {
	view
	in     policy.Input
	person person
	answer policy.Answer
	budget policy.Budget // of the batch, for what would help
}

// ask prepares the input for q.
func (a *asker) ask(q *sallyport.Request) {
	a.in = policy.Input{Now: a.now, Request: q, Records: a, Budget: &a.budget}
	if a.in.Absent = a.snapshot.person(q.Session, a.revoked, a.now, &a.person); a.in.Absent == "" {
		a.in.Person = &a.person.Person
	}
}

// External implements policy.Records.
func (a *asker) External(typ, id string) (map[string]any, bool) {
	r, ok := a.snapshot.external(typ, id, a.now)
	if !ok {
		return nil, false
	}
	if r.expires != 0 {
		a.in.Lasts(r.expires.until(a.now))
	}
	return r.value.Fields, true
}

func (a *asker) list(q sallyport.ListRequest) (sallyport.Listing, error) {
	a.ask(&sallyport.Request{Session: q.Session, Peer: q.Peer})
	if a.in.Person == nil {
		return sallyport.Listing{}, &sallyport.Error{
			Outcome: sallyport.OutcomeLogin, Code: "session.revoked", Message: a.in.Absent, Hint: "run: agent login",
		}
	}
	out := sallyport.Listing{Me: a.identity(&a.person.Person), PolicyRevision: a.rules.revision, Targets: []sallyport.ListedTarget{}}
	if p := a.person.Posture; p != nil {
		out.Facts, out.FactAges = p.Facts, make(map[string]int64, len(p.Facts))
		for name, f := range p.Facts {
			out.FactAges[name] = policy.FactAge(p, f, a.now).Milliseconds()
		}
	}
	a.rules.set.Each(&a.in, func(e policy.Entry) {
		allowed := e.Answer.Verdict == sallyport.VerdictAllow
		if !allowed && !q.All {
			return
		}
		t := sallyport.ListedTarget{From: e.From, Name: e.Name, Verdict: e.Answer.Verdict, Rule: e.Answer.Rule()}
		if !allowed {
			t.Reasons = a.rules.set.Reasons(&a.in, e.Answer, false)
		}
		out.Targets = append(out.Targets, t)
	})
	return out, nil
}

func (a *asker) decide(q *sallyport.Request) sallyport.Decision {
	a.ask(q)
	set := a.rules.set
	a.answer = set.Decide(&a.in)
	d := sallyport.Decision{
		ID:             sallyport.DecisionID(sallyport.NewID("d")),
		Verdict:        a.answer.Verdict,
		Rule:           a.answer.Rule(),
		ValidFor:       a.answer.ValidFor,
		DependsOn:      a.answer.Subjects(&a.in),
		DependsOnPeer:  a.answer.DependsOnPeer,
		Epoch:          a.epoch,
		AsOf:           a.revision,
		PolicyRevision: a.rules.revision,
	}
	var upstream sallyport.Upstream
	d.Route, d.Carrier, upstream = a.answer.Route(q.Target)
	if d.Allowed() {
		d.Upstream = upstream
	} else {
		d.Reasons = set.Reasons(&a.in, a.answer, false)
		d.WouldAllowIf = set.Remedies(&a.in, a.answer)
	}
	d.Observed = set.Observed(&a.in, a.answer)
	if a.in.Person != nil {
		d.Who = a.identity(&a.person.Person)
	}
	return d
}

// explain decides q with the reasons of every rule.
func (a *asker) explain(q *sallyport.Request) sallyport.Decision {
	d := a.decide(q)
	d.Reasons = a.rules.set.Reasons(&a.in, a.answer, true)
	return d
}

// record is what the audit log keeps of the decision just made.
func (a *asker) record(d *sallyport.Decision) sallyport.AuditRecord {
	q := *a.in.Request
	q.Path, _, _ = strings.Cut(q.Path, "?")
	kept := *d
	kept.Who.Groups = nil // those that counted stand in the inputs
	inputs, err := json.Marshal(a.answer.Inputs(&a.in))
	if err != nil { // a claim that JSON brought is one that JSON takes
		inputs, _ = json.Marshal(fmt.Sprint("unreadable: ", err))
	}
	return sallyport.AuditRecord{
		Type: sallyport.AuditDecision, Time: time.Now(),
		User: d.Who.User, Session: q.Session, Device: d.Who.Device, Flow: q.Flow, DecisionID: d.ID,
		Target: q.Target.String(), Peer: peerText(q), Code: d.Verdict.String(),
		Request: &q, Decision: &kept, Inputs: inputs,
	}
}

func peerText(q sallyport.Request) string {
	if !q.Peer.IsValid() {
		return ""
	}
	return q.Peer.String()
}

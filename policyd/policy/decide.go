package policy

import (
	"slices"
	"time"

	"sallyport"
)

// Answer is what a Set says to an Input.
type Answer struct {
	Verdict sallyport.Verdict
	// ValidFor is how long the clock alone cannot change the answer; 0: never.
	ValidFor time.Duration
	// DependsOnPeer: the peer's address was looked at.
	DependsOnPeer bool

	route *route // nil: no such target, or none that the person may know of
	rule  *rule  // that decided; nil: none
	asked *route // that was looked at; beside route also one that hides itself
}

// Rule is the name of the rule that decided; empty if none matched.
func (a Answer) Rule() string {
	if a.route == nil {
		return ""
	}
	return a.route.label(a.rule)
}

// Decide answers the question of in. It allocates nothing.
//
//	no live session, zero Target          login
//	live session, zero Target             allow
//	no route                              no route (login without a live session)
//	a deny rule is true                   deny
//	a deny rule is unknown                deny (login without a live session)
//	an allow rule is true                 allow
//	without a live session, an allow rule
//	is unknown                            login
//	otherwise                             deny
//
// On a hidden route everything but an allow is answered as if there were no
// route. Someone without a live session is told to log in for targets that do
// not exist, or the difference would tell which ones do.
func (s *Set) Decide(in *Input) Answer {
	in.prepare(&s.site)
	var a Answer
	if in.Request.Target.IsZero() {
		a.Verdict = sallyport.VerdictAllow
		if in.Person == nil {
			a.Verdict = sallyport.VerdictLogin
		}
	} else if a.route = s.lookup(in.Request.Target); a.route == nil {
		a.Verdict = nowhere(in)
	} else {
		a.asked = a.route
		a.Verdict, a.rule = a.route.decide(in)
		if a.route.hidden && a.Verdict != sallyport.VerdictAllow {
			a = Answer{Verdict: nowhere(in), asked: a.asked}
			in.prepare(&s.site) // what was looked at leaves no trace in the answer
		}
	}
	a.ValidFor, a.DependsOnPeer = in.until, in.peer
	return a
}

func nowhere(in *Input) sallyport.Verdict {
	if in.Person == nil {
		return sallyport.VerdictLogin
	}
	return sallyport.VerdictNoRoute
}

// decide applies the route's rules; the rule is the one that settled it, or nil.
func (r *route) decide(in *Input) (sallyport.Verdict, *rule) {
	anonymous := in.Person == nil
	denied, by := strongest(r.policy.deny, in)
	if denied != False {
		v := judge(denied, False, anonymous)
		if v == sallyport.VerdictLogin {
			by = nil
		}
		return v, by
	}
	allowed, by := strongest(r.policy.allow, in)
	v := judge(False, allowed, anonymous)
	if v != sallyport.VerdictAllow {
		by = nil
	}
	return v, by
}

// judge is the table of Set.Decide: the verdict on the strongest deny and allow
// rule of a route that exists.
func judge(denied, allowed Value, anonymous bool) sallyport.Verdict {
	switch {
	case denied == Unknown && anonymous:
		return sallyport.VerdictLogin
	case denied != False:
		return sallyport.VerdictDeny
	case allowed == True:
		return sallyport.VerdictAllow
	case allowed == Unknown && anonymous:
		return sallyport.VerdictLogin
	}
	return sallyport.VerdictDeny
}

// strongest returns the highest value among the rules and the first rule that has it.
func strongest(rules []rule, in *Input) (Value, *rule) {
	v := False
	var by *rule
	for i := range rules {
		if got := rules[i].when.eval(in); got > v {
			v, by = got, &rules[i]
			if v == True {
				break
			}
		}
	}
	return v, by
}

// Route returns the route's from, its wish for a carrier and what to dial; all
// zero if the answer has no route. Dial only after an allow.
func (a Answer) Route(t sallyport.Target) (from, carrier string, up sallyport.Upstream) {
	if a.route == nil {
		return "", "", sallyport.Upstream{}
	}
	up = a.route.upstream
	if up.Host == "" {
		up.Host = t.Host
	}
	if up.Port == 0 {
		up.Port = t.Port
	}
	return a.route.from, a.route.carrier, up
}

// Subjects returns whose changes could change the answer: the session with what
// stands behind it, external records that the route's rules look at, and the policy.
func (a Answer) Subjects(in *Input) []sallyport.Subject {
	out := make([]sallyport.Subject, 0, 5)
	if id := in.Request.Session; id != "" {
		out = append(out, sallyport.Subject{Kind: sallyport.SubjectSession, ID: string(id)})
	}
	if p := in.Person; p != nil {
		out = append(out,
			sallyport.Subject{Kind: sallyport.SubjectLogin, ID: string(p.Session.Login)},
			sallyport.Subject{Kind: sallyport.SubjectUser, ID: string(p.Session.User)})
		if p.Session.Device != "" {
			out = append(out, sallyport.Subject{Kind: sallyport.SubjectDevice, ID: string(p.Session.Device)})
		}
	}
	if a.route != nil {
		a.route.each(func(c criterion) {
			if r, is := c.(*record); is {
				if s, ok := r.subject(in); ok && !slices.Contains(out, s) {
					out = append(out, s)
				}
			}
		})
	}
	return append(out, sallyport.Subject{Kind: sallyport.SubjectPolicy})
}

// Inputs returns what the route's rules look at, also those of a route that
// hides itself: the audit log is not for the person who asked.
func (a Answer) Inputs(in *Input) Inputs {
	out := Inputs{Now: in.Now, Absent: in.Absent}
	if a.asked != nil {
		a.asked.each(func(c criterion) { c.note(in, &out) })
		a.asked.eachWatched(func(c criterion) { c.note(in, &out) })
	}
	return out
}

// Observed tells which of the route's rules that are only observed would have
// changed the answer a to in, and to what. in must be as it was for a.
func (s *Set) Observed(in *Input, a Answer) []sallyport.Observation {
	if a.route == nil || len(a.route.policy.observed) == 0 {
		return nil
	}
	in.prepare(&s.site)
	anonymous := in.Person == nil
	denied, _ := strongest(a.route.policy.deny, in)
	allowed, _ := strongest(a.route.policy.allow, in)
	var out []sallyport.Observation
	for i := range a.route.policy.observed {
		r := &a.route.policy.observed[i]
		would := judge(max(denied, r.when.eval(in)), allowed, anonymous)
		if !r.denies {
			would = judge(denied, max(allowed, r.when.eval(in)), anonymous)
		}
		if would != a.Verdict {
			out = append(out, sallyport.Observation{Rule: a.route.label(r), Would: would})
		}
	}
	return out
}

// Entry is one route of a Set as seen by one person.
type Entry struct {
	From, Name string
	Answer     Answer
}

// Each decides every route for in's person, in the order of the configuration,
// and calls f for those that are not hidden from it. A route of many targets
// answers for one of them, which stands for all where rules do not look at the
// target: its lowest port, a network's first address, a wildcard's suffix.
// in.Request is overwritten.
func (s *Set) Each(in *Input, f func(Entry)) {
	q := *in.Request
	in.Request = &q
	for _, r := range s.routes {
		q.Target = r.at.sample()
		in.prepare(&s.site)
		a := Answer{route: r}
		a.Verdict, a.rule = r.decide(in)
		if a.Verdict == sallyport.VerdictAllow || !r.hidden {
			f(Entry{r.from, r.name, a})
		}
	}
}

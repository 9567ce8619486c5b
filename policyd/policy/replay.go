package policy

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"sallyport"
)

// Recording is an audited decision: what was asked, and everything that was
// looked at then. It can be decided again, also by another Set. ReadRecording
// makes them.
type Recording struct {
	Request sallyport.Request
	// Who asked; no Session: nobody with a live session.
	Who sallyport.Identity
	// Inputs is what was looked at.
	Inputs Inputs
}

// ReadRecording takes a decision out of the audit log. It is an error if the
// record does not hold one, or not what it was made from.
func ReadRecording(r *sallyport.AuditRecord) (*Recording, error) {
	if r.Request == nil || r.Decision == nil || len(r.Inputs) == 0 {
		return nil, fmt.Errorf("audit record of type %q holds no request, decision and inputs", r.Type)
	}
	out := &Recording{Request: *r.Request, Who: r.Decision.Who}
	if err := json.Unmarshal(r.Inputs, &out.Inputs); err != nil {
		return nil, fmt.Errorf("decision %s: inputs: %w", r.DecisionID, err)
	}
	if out.Inputs.Now.IsZero() {
		return nil, fmt.Errorf("decision %s: the inputs do not say when it was made", r.DecisionID)
	}
	if out.Who.Session != "" { // what the identity tells was looked at, so to speak
		if out.Inputs.Email == nil {
			out.Inputs.Email = &out.Who.Email
		}
		if out.Inputs.Device == nil && out.Who.Device == "" {
			out.Inputs.Device = &DeviceInput{}
		}
	}
	return out, nil
}

// Replayed is what a Set says to a Recording.
type Replayed struct {
	// Certain: the recording holds enough to tell. Otherwise Verdict allows
	// nothing and means nothing.
	Certain bool
	Verdict sallyport.Verdict
	// Route and Rule are those that decided, also on a route that hides itself;
	// empty if there is none, and Rule if the recording does not tell which of
	// several it was.
	Route, Rule string
	// Reasons are as those of Set.Reasons, without what the recording lacks.
	Reasons []sallyport.Reason
	// Missing is what would have to be known: `group "dba"`, `fact "firewall"`.
	Missing []string
}

// Replay decides a recording's question again, with the records as they were.
// The verdict is certain if it is the same for everything that the recording
// does not tell: a criterion that looks at something else may have any value. For
// a Set with the same policy it is always certain and the one that was recorded.
func (s *Set) Replay(from *Recording) Replayed {
	p := playback{from: from}
	p.in = from.input()
	a := s.Decide(&p.in)
	anonymous := p.in.Person == nil
	if a.asked == nil { // carriers, and targets without a route
		return Replayed{Certain: true, Verdict: a.Verdict}
	}
	r := a.asked
	denied, denier := p.strongest(r.policy.deny)
	allowed, allower := p.strongest(r.policy.allow)
	out := Replayed{Certain: true, Verdict: r.shown(judge(denied.lo, allowed.lo, anonymous), anonymous)}
	for d := denied.lo; d <= denied.hi; d++ {
		for v := allowed.lo; v <= allowed.hi; v++ {
			if r.shown(judge(d, v, anonymous), anonymous) != out.Verdict {
				return Replayed{Missing: p.missing(r)}
			}
		}
	}
	out.Route = r.from
	switch out.Verdict {
	case sallyport.VerdictDeny, sallyport.VerdictNoRoute:
		out.Rule = r.label(denier)
	case sallyport.VerdictAllow:
		out.Rule = r.label(allower)
	}
	a.route, a.Verdict = r, out.Verdict
	out.Reasons = s.reasons(&p.in, a, false, p.knows)
	return out
}

// shown is a verdict as the person sees it; see Set.Decide about hidden routes.
func (r *route) shown(v sallyport.Verdict, anonymous bool) sallyport.Verdict {
	switch {
	case !r.hidden || v == sallyport.VerdictAllow:
		return v
	case anonymous:
		return sallyport.VerdictLogin
	}
	return sallyport.VerdictNoRoute
}

// playback evaluates conditions over what a recording tells.
type playback struct {
	from *Recording
	in   Input // as far as it tells
}

// span is the lowest and the highest value that a condition may have had.
type span struct{ lo, hi Value }

func (s span) not() span { return span{s.hi.not(), s.lo.not()} }

// knows reports whether the recording holds what c looks at. Of nobody nothing is
// to be known but what was recorded about the address.
func (p *playback) knows(c criterion) bool {
	if r, is := c.(*record); p.in.Person == nil && !(is && r.of == ofPeer) {
		return true
	}
	return c.recalled(&p.from.Inputs)
}

func (p *playback) eval(c *condition) span {
	if c.op == leaf {
		if !p.knows(c.is) {
			return span{False, True}
		}
		v := c.is.eval(&p.in)
		return span{v, v}
	}
	least, most := span{True, True}, span{False, False}
	for i := range c.of {
		v := p.eval(&c.of[i])
		least = span{min(least.lo, v.lo), min(least.hi, v.hi)}
		most = span{max(most.lo, v.lo), max(most.hi, v.hi)}
	}
	switch c.op {
	case and:
		return least
	case or:
		return most
	case not:
		return most.not()
	default:
		return least.not()
	}
}

// strongest is the span of the highest value among rules, and the first rule
// that has it; nil if that cannot be told.
func (p *playback) strongest(rules []rule) (span, *rule) {
	best := span{False, False}
	var by *rule
	doubt := False // what a rule that came before could have been
	for i := range rules {
		v := p.eval(&rules[i].when)
		if v.lo > best.lo {
			by = nil
			if v.lo > doubt {
				by = &rules[i]
			}
		}
		if v.lo != v.hi {
			doubt = max(doubt, v.hi)
		}
		best = span{max(best.lo, v.lo), max(best.hi, v.hi)}
	}
	if best.lo != best.hi {
		by = nil
	}
	return best, by
}

// missing names what a route's undecided rules look at and the recording lacks.
func (p *playback) missing(r *route) []string {
	var out []string
	for _, rules := range [][]rule{r.policy.deny, r.policy.allow} {
		for i := range rules {
			if v := p.eval(&rules[i].when); v.lo == v.hi {
				continue
			}
			rules[i].when.each(func(c criterion) {
				if !p.knows(c) {
					out = append(out, unrecalled(c, &p.from.Inputs)...)
				}
			})
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// unrecalled names what a criterion lacks.
func unrecalled(c criterion, from *Inputs) []string {
	switch c := c.(type) {
	case *groups:
		var out []string
		for _, t := range c.tests {
			if _, ok := from.Groups[t.of[0].s]; !ok {
				out = append(out, "group "+strconv.Quote(t.of[0].s))
			}
		}
		return out
	case *fact:
		return []string{"fact " + strconv.Quote(c.name)}
	case *claim:
		return []string{"claim " + strconv.Quote(c.name)}
	}
	return []string{c.path()}
}

// input rebuilds what was looked at.
// CEL expressions see what was recorded for them, by path.
func (r *Recording) input() Input {
	q := r.Request
	in := Input{
		Now: r.Inputs.Now, Request: &q, Absent: r.Inputs.Absent,
		Records: recordedRecords(r.Inputs.Records),
	}
	in.recallValues(&r.Inputs)
	if r.Who.Session == "" {
		return in
	}
	now := r.Inputs.Now
	claims := maps.Clone(r.Inputs.Claims) // under their full names, which go before paths; nil for what is not there
	in.Person = &Person{
		Session: &sallyport.Session{ID: r.Who.Session, Login: r.Who.Login, User: r.Who.User, Device: r.Who.Device},
		Login:   &sallyport.Login{ID: r.Who.Login, User: r.Who.User},
		User:    &sallyport.User{ID: r.Who.User, Email: r.Who.Email, Name: r.Who.Name, Claims: claims},
		Email:   *r.Inputs.Email, Groups: r.Inputs.groups(), ExpiresIn: r.Who.ExpiresIn,
	}
	if l := r.Inputs.Login; l != nil {
		in.Person.Login.AuthMethods, in.Person.Session.AuthMethods = l.AuthMethods, l.AuthMethods
		if l.Age >= 0 {
			at := now.Add(-l.Age)
			in.Person.Login.Created, in.Person.Login.Authenticated, in.Person.Session.Created = at, at, at
		}
	}
	r.device(in.Person)
	return in
}

// device rebuilds the device's record and report.
func (r *Recording) device(p *Person) {
	d := r.Inputs.Device
	if r.Who.Device == "" || d != nil && d.ID == "" {
		return
	}
	p.Device = &sallyport.Device{ID: r.Who.Device}
	if d != nil {
		*p.Device = sallyport.Device{ID: d.ID, Approved: d.Approved, Type: d.Type}
	}
	// Received and signed at the time of the decision: a fact's age is then that
	// of its reading alone. The signature's time counts in milliseconds.
	now := r.Inputs.Now
	p.Posture = &sallyport.Posture{Device: p.Device.ID, Received: now, Sequence: now.UnixMilli(), Facts: map[string]sallyport.Fact{}}
	for name, f := range r.Inputs.Facts {
		if f != nil {
			at := time.UnixMilli(now.UnixMilli()).Add(-f.Age)
			p.Posture.Facts[name] = sallyport.Fact{Value: f.Value, Source: f.Source, At: at}
		}
	}
}

// groups rebuilds those memberships that were looked at. Of others only the
// number is known: one that no policy can name stands for all of them.
func (in *Inputs) groups() Groups {
	if in.NoDirectory || in.Groups == nil {
		return Groups{}
	}
	names := []string{}
	for name, member := range in.Groups {
		if member {
			names = append(names, name)
		}
	}
	if in.GroupCount > len(names) {
		names = append(names, "\x00")
	}
	slices.Sort(names)
	return Groups{names: names}
}

// groupsAreAll reports whether all of the person's groups are among those that
// were looked at.
func (in *Inputs) groupsAreAll() bool {
	members := 0
	for _, member := range in.Groups {
		if member {
			members++
		}
	}
	return len(in.Groups) > 0 && members == in.GroupCount
}

// recordedRecords are the external records that were looked at.
type recordedRecords map[string]map[string]any

// External implements Records.
func (r recordedRecords) External(typ, id string) (map[string]any, bool) {
	fields := r[sallyport.ExternalID(typ, id)]
	return fields, fields != nil
}

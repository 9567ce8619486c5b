package gateway

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"sallyport"
	"sallyport/proto/connect"
	"sallyport/tunnel"
)

// grant is something that lives only as long as its decision holds: a flow, or
// the carrier that flows come on.
type grant struct {
	// Set once, before anybody else sees the grant.
	conn    tunnel.ServerConn
	session sallyport.SessionID
	carrier *grant           // what a flow came on; nil for a carrier
	target  sallyport.Target // zero for a carrier
	flow    sallyport.FlowID // empty for a carrier
	cancel  func(cut)        // ends a flow's context; nil for a carrier
	gone    chan struct{}    // closed by drop

	audited bool // flow.open has been written; its own goroutine's

	// Guarded by table.mu.
	state      state
	flows      map[*grant]struct{} // of a carrier
	decision   sallyport.Decision  // what it rests on; zero before the first allow
	depends    []sallyport.Subject // of decision, as indexed
	asked      stamp               // of the question behind decision
	peer       netip.Addr          // as that question told it
	validUntil time.Time           // zero: the clock alone cannot change the decision
	due        *due                // must be asked about again; nil: need not
	withdrawal *cut                // why it was withdrawn
}

func (g *grant) isCarrier() bool { return g.carrier == nil }

// question is what policyd is asked about g.
func (g *grant) question(peer netip.AddrPort) sallyport.Request {
	q := sallyport.Request{Session: g.session, Target: g.target, Peer: peer, Flow: g.flow}
	if g.state.held() {
		q.Recheck = g.decision.ID
	}
	return q
}

// rest makes g rest on d.
func (g *grant) rest(d sallyport.Decision, asked stamp, peer netip.Addr, at time.Time) {
	g.decision, g.asked, g.peer = d, asked, peer
	g.validUntil = time.Time{}
	if d.ValidFor > 0 {
		g.validUntil = at.Add(d.ValidFor)
	}
	if g.due != nil && g.due.since <= asked {
		g.due = nil
	}
}

// due says that a grant must be asked about again, and why.
type due struct {
	since     stamp     // a question asked later answers it
	learned   time.Time // when the gateway learned of the reason
	confirmBy time.Time // cut if no allow came by then; zero: not for this reason
	expired   bool      // the clock is the reason: valid_for has ended
	why       []string  // changes in words, at most maxWhy
}

const maxWhy = 3

// join adds another reason to d.
func (d *due) join(o due) {
	d.since = max(d.since, o.since)
	d.expired = d.expired || o.expired
	if o.learned.Before(d.learned) {
		d.learned = o.learned
	}
	if d.confirmBy.IsZero() || !o.confirmBy.IsZero() && o.confirmBy.Before(d.confirmBy) {
		d.confirmBy = o.confirmBy
	}
	for _, w := range o.why {
		if len(d.why) < maxWhy && !slices.Contains(d.why, w) {
			d.why = append(d.why, w)
		}
	}
}

// late reports whether d should have been answered by now.
func (d *due) late(now time.Time) bool { return !d.confirmBy.IsZero() && now.After(d.confirmBy) }

// words returns why as a list; nothing said is no word.
func words(why string) []string {
	if why == "" {
		return nil
	}
	return []string{why}
}

// cut says why something was withdrawn, for the stream (a code of
// proto/connect), for machines (a word of connect.Event) and for people.
type cut struct {
	code     uint64
	word     string
	reason   string
	decision sallyport.Decision // the answer that withdrew it; zero if none did
	learned  time.Time          // when the gateway learned of the cause
}

// Words of connect.Event's Code.
const (
	wordPolicy         = "policy"
	wordSessionRevoked = "session_revoked"
	wordSessionExpired = "session_expired"
	wordStale          = "policy_stale"
	wordValidFor       = "valid_for"
	wordUpstreamReset  = "upstream_reset"
	wordIdle           = "idle"
	wordDrain          = "drain"
)

// cutFor explains why d, the answer to a question that was asked because of why,
// ends what it was asked about.
func cutFor(d sallyport.Decision, why due) cut {
	c := cut{code: connect.CodeFlowWithdrawn, word: wordPolicy, decision: d, learned: why.learned}
	switch {
	case d.Allowed():
		c.reason = "the route leads elsewhere now"
		return c
	case d.Verdict == sallyport.VerdictLogin && why.expired:
		c.code, c.word, c.reason = connect.CodeSessionRevoked, wordSessionExpired, "the session has ended"
	case d.Verdict == sallyport.VerdictLogin:
		c.code, c.word, c.reason = connect.CodeSessionRevoked, wordSessionRevoked, "session revoked"
	case why.expired:
		c.word, c.reason = wordValidFor, connect.Denial(d).Message
	case d.Verdict == sallyport.VerdictNoRoute:
		c.reason = "the route was removed"
	default:
		c.reason = connect.Denial(d).Message
	}
	if len(why.why) > 0 {
		c.reason = strings.Join(why.why, "; ")
	}
	return c
}

// unconfirmed is the cut of what nobody could confirm in time.
func unconfirmed(why due) cut {
	c := cut{code: connect.CodePolicyStale, word: wordStale, learned: why.learned}
	c.reason = "policyd did not confirm the decision in time"
	if why.expired {
		c.word = wordValidFor
	}
	if len(why.why) > 0 {
		c.reason += " after: " + strings.Join(why.why, "; ")
	}
	return c
}

// refusal is c told to somebody whose flow was still waiting.
func (c cut) refusal() *sallyport.Error {
	if !c.decision.Allowed() && c.decision.ID != "" {
		return connect.Denial(c.decision)
	}
	switch c.code {
	case connect.CodeSessionRevoked:
		return &sallyport.Error{Outcome: sallyport.OutcomeLogin, Code: connect.ProblemSessionRevoked, Message: c.reason, Hint: "run: agent login"}
	case connect.CodeDraining:
		return errDraining()
	}
	return unavailable(c.reason, nil)
}

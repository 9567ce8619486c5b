package sallyport

import (
	"context"
	"net/netip"
	"time"
)

// Request is one question: may this session reach this target now?
type Request struct {
	// Session is who asks. A session without a live record is no session.
	Session SessionID `json:"session"`
	// Target is what is asked for, canonical. The zero Target asks whether the
	// session may hold a carrier (the answer depends on the session's subjects).
	Target Target `json:"target"`
	// Method and Path are those of the HTTP request; empty for TCP and UDP.
	Method string `json:"method,omitempty"`
	Path   string `json:"path,omitempty"`
	// Headers holds the few request headers a criterion may look at (Origin,
	// Access-Control-Request-Method), canonical names; nil for TCP and UDP.
	Headers map[string][]string `json:"headers,omitempty"`
	// SSH and MCP are what a gateway knows that ends these protocols itself; nil:
	// it only carries bytes.
	SSH *SSHRequest `json:"ssh,omitempty"`
	MCP *MCPRequest `json:"mcp,omitempty"`
	// Certificate is the certificate that a browser or program showed of its own,
	// beside the session; nil: nobody asked for one.
	Certificate *ClientCertificate `json:"certificate,omitempty"`
	// Peer is the address the gateway sees the session at, IPv4 unmapped.
	Peer netip.AddrPort `json:"peer"`
	// Flow joins the audit of policyd with that of the gateway; empty in
	// questions that no flow stands behind.
	Flow FlowID `json:"flow,omitempty"`
	// Recheck is the decision that let a live flow in, when the gateway asks
	// about it again; policyd then audits the answer only if it is not an allow.
	Recheck DecisionID `json:"recheck,omitempty"`
}

// SSHRequest is a login that asks for a shell, RFC 4252.
type SSHRequest struct {
	// Username is the account that is asked for.
	Username string `json:"username"`
	// PublicKey is the key or certificate that was proved, in the wire format of
	// RFC 4253, section 6.6.
	PublicKey []byte `json:"public_key,omitempty"`
}

// MCPRequest is a request of the Model Context Protocol.
type MCPRequest struct {
	Method string `json:"method"`         // "tools/call"
	Tool   string `json:"tool,omitempty"` // of tools/call
}

// ClientCertificate is what was shown in a TLS handshake.
type ClientCertificate struct {
	// Presented: a certificate was shown. Valid: it chains to a CA that the site
	// trusts for this.
	Presented bool `json:"presented,omitempty"`
	Valid     bool `json:"valid,omitempty"`
	// Leaf is the certificate itself, DER.
	Leaf []byte `json:"leaf,omitempty"`
}

// Verdict is the answer in one word. The zero Verdict allows nothing.
type Verdict uint8

// The verdicts.
const (
	// VerdictDeny: an existing route, and the policy does not allow it.
	VerdictDeny Verdict = iota
	// VerdictAllow is the only verdict after which an upstream may be dialled.
	VerdictAllow
	// VerdictLogin: no live session; logging in could change the answer.
	VerdictLogin
	// VerdictNoRoute: no such target, or one that hides itself from this person.
	VerdictNoRoute
	// VerdictPending: an approval has been asked for and not been given yet.
	VerdictPending
)

var verdictNames = [...]string{"deny", "allow", "login", "no_route", "pending"}

// String returns deny, allow, login, no_route or pending.
func (v Verdict) String() string {
	if int(v) < len(verdictNames) {
		return verdictNames[v]
	}
	return "deny"
}

// MarshalText implements encoding.TextMarshaler.
func (v Verdict) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler. A word it does not know is
// VerdictDeny, so that a newer policyd can never be misread as allowing.
func (v *Verdict) UnmarshalText(b []byte) error {
	*v = VerdictDeny
	for i, name := range verdictNames {
		if name == string(b) {
			*v = Verdict(i)
		}
	}
	return nil
}

// Decision is policyd's answer to a Request. It is a value: nothing in it
// changes after it was made.
type Decision struct {
	ID      DecisionID `json:"id"`
	Verdict Verdict    `json:"verdict"`
	// Rule is the name of the rule that decided; empty when no rule matched.
	Rule string `json:"rule,omitempty"`
	// Route is the route's "from"; empty when there is none.
	Route string `json:"route,omitempty"`
	// Reasons say what was looked at and did not hold (or, for a deny rule,
	// did). Empty on an allow: explanations are computed for those who ask.
	Reasons []Reason `json:"reasons,omitempty"`
	// WouldAllowIf lists the smallest sets of changes to the caller's own device
	// and session that would turn the answer into an allow; it never tells of other
	// people's data. Each inner list must hold as a whole.
	WouldAllowIf [][]Remedy `json:"would_allow_if,omitempty"`
	// Observed tells what rules with "mode: observe" would have changed; they have
	// no effect.
	Observed []Observation `json:"observed,omitempty"`
	// ValidFor is how long the clock alone cannot change the answer; 0 means it
	// never can. It is a duration, so gateways need no synchronised clock.
	ValidFor time.Duration `json:"valid_for,omitempty"`
	// DependsOn names the subjects whose change could change the answer.
	DependsOn []Subject `json:"depends_on,omitempty"`
	// DependsOnPeer is set when the peer's address was looked at.
	DependsOnPeer bool `json:"depends_on_peer,omitempty"`
	// Upstream is what to dial after an allow.
	Upstream Upstream `json:"upstream,omitzero"`
	// Carrier is the route's wish ("bulk" or empty); advice for the agent.
	Carrier string `json:"carrier,omitempty"`
	// Epoch and AsOf are the epoch and revision of the records the answer was
	// computed from; PolicyRevision is the revision of the configuration record.
	Epoch          Epoch    `json:"epoch"`
	AsOf           Revision `json:"as_of"`
	PolicyRevision Revision `json:"policy_revision"`
	// Who is the session's identity, for the gateway's log and /v1/me; zero
	// without a live session.
	Who Identity `json:"who,omitzero"`
}

// Allowed reports whether an upstream may be dialled.
func (d Decision) Allowed() bool { return d.Verdict == VerdictAllow }

// Observation is a rule that is only watched, and would have changed the answer.
type Observation struct {
	Rule string `json:"rule"`
	// Would is the verdict if this rule had been in force.
	Would Verdict `json:"would"`
}

// Reason is one condition that stood between the caller and an allow.
type Reason struct {
	// Rule names the rule the condition stands in.
	Rule string `json:"rule,omitempty"`
	// Condition is the criterion's path: "device.disk_encrypted", "groups".
	Condition string `json:"condition"`
	// Wanted is the matcher in words: "is true", "has dba". Group names are left
	// out unless the configuration says explain_groups.
	Wanted string `json:"wanted"`
	// Found is what was there in words: "false", "unknown (no report)".
	Found string `json:"found"`
	// Age is how old the looked-at fact was; 0 if it has none.
	Age time.Duration `json:"age,omitempty"`
	// Result is the three-valued outcome: "false", "unknown", or "true" for a
	// deny rule that matched.
	Result string `json:"result"`
}

// Remedy is one change that the caller could make.
type Remedy struct {
	// Condition is the criterion's path, as in Reason.
	Condition string `json:"condition"`
	// Want is what it must become, in words: "true", "at least 15.4".
	Want string `json:"want"`
	// Hint tells the person how: "turn on disk encryption".
	Hint string `json:"hint,omitempty"`
}

// Upstream is what a gateway dials after an allow.
type Upstream struct {
	Network Network `json:"network"`
	// Host is a name to resolve or a literal address.
	Host string `json:"host"`
	Port uint16 `json:"port"`
	// Literal is set when the route itself names this address, not a network
	// around it; only then may it be a loopback address.
	Literal bool `json:"literal,omitempty"`
}

// Identity is who a session belongs to, as people may see it.
type Identity struct {
	Session SessionID `json:"session"`
	Login   LoginID   `json:"login"`
	User    UserID    `json:"user"`
	Email   string    `json:"email,omitempty"`
	Name    string    `json:"name,omitempty"`
	Groups  []string  `json:"groups,omitempty"`
	Device  DeviceID  `json:"device,omitempty"`
	// ExpiresIn is how long the session still lives, by policyd's clock.
	ExpiresIn time.Duration `json:"expires_in"`
}

// Authorizer answers questions. Answers come in the order of the questions and
// in the same number. An error means that nothing was decided: refuse.
// Implementations: policyd.Server in the same process, proto/control's client.
type Authorizer interface {
	Authorize(ctx context.Context, questions []Request) ([]Decision, error)
}

// Explainer answers what is not on the path of a connection.
type Explainer interface {
	// Explain decides q with everything a person wants to know: reasons of every
	// rule that could have allowed it, also when it is allowed. It is not audited
	// as an access.
	Explain(ctx context.Context, q Request) (Decision, error)
	// List tells who a session is and what it may reach.
	List(ctx context.Context, q ListRequest) (Listing, error)
}

// ListRequest asks for a Listing.
type ListRequest struct {
	Session SessionID      `json:"session"`
	Peer    netip.AddrPort `json:"peer"`
	// All includes the routes the session may not use, with reasons; hidden ones
	// stay hidden.
	All bool `json:"all,omitempty"`
}

// Listing is a person's view of the site.
type Listing struct {
	Me             Identity         `json:"me"`
	Facts          map[string]Fact  `json:"facts,omitempty"`     // the device's posture as policyd sees it
	FactAges       map[string]int64 `json:"fact_ages,omitempty"` // milliseconds
	Targets        []ListedTarget   `json:"targets"`
	PolicyRevision Revision         `json:"policy_revision"`
}

// ListedTarget is one route in a Listing.
type ListedTarget struct {
	// From is the route as written: it may hold a wildcard, a network or a range
	// of ports. The answer is then that for one of its targets.
	From    string   `json:"from"`
	Name    string   `json:"name,omitempty"`
	Verdict Verdict  `json:"verdict"`
	Rule    string   `json:"rule,omitempty"`
	Reasons []Reason `json:"reasons,omitempty"`
}

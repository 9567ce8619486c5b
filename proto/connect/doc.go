// Package connect is the tunnel's HTTP conventions: how CONNECT names a target
// (RFC 9110, section 9.3.6), which headers an answer carries, how a refusal is
// told (Proxy-Status, RFC 9209, and problem+json, RFC 9457), and the JSON
// messages of /v1 on the tunnel host. It owns their names, forms and limits, for
// both sides of every carrier; it knows no sockets and no policy.
package connect

import (
	"time"

	"sallyport"
)

// Headers of an answer to CONNECT.
const (
	HeaderFlow        = "Sallyport-Flow"      // FlowID of the accepted flow
	HeaderDecision    = "Sallyport-Decision"  // DecisionID, also on refusals
	HeaderRule        = "Sallyport-Rule"      // name of the rule that allowed
	HeaderValidFor    = "Sallyport-Valid-For" // seconds, absent when unlimited
	HeaderCarrier     = "Sallyport-Carrier"   // the route's wish: "bulk"
	HeaderProxyStatus = "Proxy-Status"        // RFC 9209
	ContentProblem    = "application/problem+json"
)

// Paths on the tunnel host.
const (
	PathMe      = "/v1/me"      // GET: sallyport.Listing without targets
	PathTargets = "/v1/targets" // GET [?all=1]: sallyport.Listing
	PathWhy     = "/v1/why"     // GET ?target=: sallyport.Decision
	PathPing    = "/v1/ping"    // GET: 204; that anything is answered is a sign of life
	PathPosture = "/v1/posture" // POST: compact JWS of a sallyport.PostureReport; 204
	PathEvents  = "/v1/events"  // GET: Event, one JSON object a line, until the carrier ends
)

// Codes with which a carrier or a stream is closed, as QUIC application error
// codes (RFC 9000, section 20.2); a lane closes its TCP connection and the event
// stream tells the code.
const (
	CodeSessionRevoked = 0x1000 // the session is over: log in again
	CodeFlowWithdrawn  = 0x1001 // this flow is no longer allowed; the event says why
	CodePolicyStale    = 0x1002 // the gateway cannot confirm the decision any more
	CodeDraining       = 0x1003 // the gateway goes away: use another
	CodeTooMany        = 0x1004 // over the limit of carriers or flows of one session
	CodeUpstreamReset  = 0x1005 // the service reset the connection
)

// MaxEarlyBytes is how much a client may send behind a CONNECT before the answer.
const MaxEarlyBytes = 64 << 10

// Event types of /v1/events.
const (
	EventHello     = "hello"     // first: Version, Features, OldestAgent
	EventWithdrawn = "withdrawn" // a flow was cut: Flow, Decision, Reason, AfterMS
	EventSession   = "session"   // the session changed or ended: Code, Reason
	EventGateways  = "gateways"  // the list of gateways changed
	EventDrain     = "drain"     // this gateway is going away
	EventPing      = "ping"      // nothing, every 10 s
)

// Event is one line of /v1/events. Unknown types and fields are ignored.
type Event struct {
	Type        string   `json:"type"`
	Version     string   `json:"version,omitempty"`
	Features    []string `json:"features,omitempty"`
	OldestAgent string   `json:"oldest_agent,omitempty"`

	Flow     sallyport.FlowID     `json:"flow,omitempty"`
	Target   string               `json:"target,omitempty"`
	Decision sallyport.DecisionID `json:"decision,omitempty"`
	// Code is stable: "policy", "session_revoked", "session_expired",
	// "policy_stale", "valid_for", "upstream_reset", "drain".
	Code string `json:"code,omitempty"`
	// Reason is for people: "device.disk_encrypted is false".
	Reason string `json:"reason,omitempty"`
	// Reasons are those of the decision that withdrew it.
	Reasons        []sallyport.Reason   `json:"reasons,omitempty"`
	WouldAllowIf   [][]sallyport.Remedy `json:"would_allow_if,omitempty"`
	PolicyRevision sallyport.Revision   `json:"policy_revision,omitempty"`
	// AfterMS is how long after the gateway learned of the change it cut.
	AfterMS  int64                   `json:"after_ms,omitempty"`
	Gateways []sallyport.GatewayInfo `json:"gateways,omitempty"`
}

// Problem is the body of every refusal (RFC 9457). It is made from a
// *sallyport.Error and read back into one, so that an agent and a foreign client
// see the same facts.
type Problem struct {
	Type   string `json:"type"` // "urn:sallyport:problem:" + Code
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail,omitempty"`
	// Code is sallyport.Error's: "denied", "login_required", "upstream.timeout".
	Code string `json:"code"`
	Hint string `json:"hint,omitempty"`
	// DecisionID and Decision stand behind a denial; Decision is what its owner
	// may see: no upstream, no subjects.
	DecisionID sallyport.DecisionID `json:"decision_id,omitempty"`
	Decision   *sallyport.Decision  `json:"decision,omitempty"`
	RequestID  string               `json:"request_id,omitempty"`
	// RetryAfter is that of the Retry-After header, in whole seconds on the wire.
	RetryAfter time.Duration `json:"-"`
}

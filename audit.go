package sallyport

import (
	"context"
	"encoding/json"
	"time"
)

// Types of audit records.
const (
	AuditDecision     = "decision"      // policyd: Request, Decision, Inputs
	AuditFlowOpen     = "flow.open"     // gateway, before the dial: Flow, DecisionID, Target
	AuditFlowClose    = "flow.close"    // gateway: Flow, DecisionID, bytes, Code says why
	AuditLogin        = "login.ok"      // authd
	AuditLoginFailed  = "login.failed"  // authd: Code, RequestID, Detail
	AuditLogout       = "logout"        // authd
	AuditRenewal      = "renewal"       // authd
	AuditChange       = "change"        // cached: Detail names kind, id, revision, never payloads of secrets
	AuditRevocation   = "revocation"    // cached, policyd
	AuditConfigApply  = "config.apply"  // cached
	AuditRestore      = "restore"       // cached's chain, written by the operator's tool while cached is stopped
	AuditPolicyBroken = "policy.broken" // policyd
)

// AuditRecord is what a daemon writes down before it acts. Each daemon has one
// chain (package audit); decisions and flows are joined by the decision's id.
// It never holds tokens, codes, cookies, key material or query strings.
type AuditRecord struct {
	Type string    `json:"type"`
	Time time.Time `json:"time"` // wall clock, for people; the chain's sequence is the order

	User       UserID     `json:"user,omitempty"`
	Session    SessionID  `json:"session,omitempty"`
	Device     DeviceID   `json:"device,omitempty"`
	Flow       FlowID     `json:"flow,omitempty"`
	DecisionID DecisionID `json:"decision_id,omitempty"`
	Target     string     `json:"target,omitempty"`
	Peer       string     `json:"peer,omitempty"`

	Request  *Request  `json:"request,omitempty"`
	Decision *Decision `json:"decision,omitempty"`
	// Inputs is everything the decision looked at (facts with ages, groups,
	// claims), JSON, without secrets.
	Inputs json.RawMessage `json:"inputs,omitempty"`

	Code      string `json:"code,omitempty"`
	RequestID string `json:"request_id,omitempty"`
	Detail    string `json:"detail,omitempty"` // at most 200 characters
	BytesUp   int64  `json:"bytes_up,omitempty"`
	BytesDown int64  `json:"bytes_down,omitempty"`
}

// Auditor appends to the audit log. An error means that the record is not
// written: with audit.on_failure deny the caller refuses what it was about to do.
type Auditor interface {
	Append(ctx context.Context, r AuditRecord) error
}

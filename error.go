package sallyport

import (
	"errors"
	"net/http"
	"time"
)

// Outcome is how something ended, as people, scripts and HTTP clients see it
// (DESIGN section 9). The numbers are the agent's exit codes and never change.
type Outcome int

// The outcomes.
const (
	OutcomeOK          Outcome = 0
	OutcomeInternal    Outcome = 1
	OutcomeUsage       Outcome = 2 // wrong words, unknown or ambiguous target
	OutcomeLogin       Outcome = 3 // login needed or expired
	OutcomeDenied      Outcome = 4
	OutcomePending     Outcome = 5 // approval asked for
	OutcomeUpstream    Outcome = 6 // allowed, but the service did not answer
	OutcomeUnavailable Outcome = 7 // gateway or policy unavailable
	OutcomePortal      Outcome = 8 // captive portal
	OutcomeConflict    Outcome = 9 // local port taken and the like
	OutcomeRevoked     Outcome = 10
)

// HTTPStatus returns the status that a refusal with this outcome carries.
func (o Outcome) HTTPStatus() int {
	switch o {
	case OutcomeOK:
		return http.StatusOK
	case OutcomeUsage:
		return http.StatusNotFound
	case OutcomeLogin:
		return http.StatusUnauthorized
	case OutcomeDenied, OutcomePending, OutcomeRevoked:
		return http.StatusForbidden
	case OutcomeUpstream:
		return http.StatusBadGateway
	case OutcomeUnavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// Error is a failure that a person may see: what failed, what to do, and which
// decision stands behind it. Internals go to Err, which is logged, not shown.
type Error struct {
	Outcome Outcome
	// Code is stable and dotted, for machines: "oidc.bad_alg", "upstream.timeout".
	Code string
	// Message says what failed, lower case, without internals.
	Message string
	// Hint says what to do: "run: agent login". Empty if there is nothing.
	Hint string
	// Decision is the denial, if one stands behind it.
	Decision *Decision
	// After is how long the flow had lived or the change took, where that is told.
	After time.Duration
	// Err is the cause.
	Err error
}

// Error returns the message and the cause.
func (e *Error) Error() string {
	if e.Err != nil {
		return e.Message + ": " + e.Err.Error()
	}
	return e.Message
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// OutcomeOf returns the outcome of the first *Error in err's chain, OutcomeOK
// for nil and OutcomeInternal for everything else.
func OutcomeOf(err error) Outcome {
	if err == nil {
		return OutcomeOK
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Outcome
	}
	return OutcomeInternal
}

// CodeOf returns the code of the first *Error in err's chain, or "".
func CodeOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// Secret is text that never prints itself.
type Secret string

// String returns [redacted].
func (Secret) String() string { return "[redacted]" }

// GoString returns [redacted].
func (Secret) GoString() string { return "[redacted]" }

// MarshalText returns [redacted]: a secret does not leave through JSON or logs.
func (Secret) MarshalText() ([]byte, error) { return []byte("[redacted]"), nil }

// Reveal returns the secret itself; every call of it is a place to review.
func (s Secret) Reveal() string { return string(s) }

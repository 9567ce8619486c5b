package tunnel

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"

	"sallyport"
	"sallyport/proto/connect"
)

// TLS alerts by which a server says that it does not take the client's
// certificate (RFC 8446, section 6.2).
var certificateAlerts = []tls.AlertError{
	42,  // bad_certificate
	43,  // unsupported_certificate
	44,  // certificate_revoked
	45,  // certificate_expired
	46,  // certificate_unknown
	48,  // unknown_ca
	49,  // access_denied
	116, // certificate_required
}

// DialFailure returns why a gateway could not be reached, or why a carrier to it
// broke, as an error that a person understands. host is how people know the
// gateway. An error that already is one passes through.
//
//   - The gateway does not take our certificate: OutcomeLogin. With TLS 1.3 this
//     comes at the first read, after a handshake that looked complete.
//   - We do not take the gateway's: OutcomeUnavailable, tls.server_untrusted; there
//     is no way to go on regardless.
//   - Everything else: OutcomeUnavailable, gateway.unreachable.
func DialFailure(host string, err error) error {
	if err == nil {
		return nil
	}
	var known *sallyport.Error
	if errors.As(err, &known) {
		return err
	}
	// This first: a certificate we refuse shows up in QUIC as the alert we sent.
	if why, ok := untrusted(err); ok {
		return &sallyport.Error{
			Outcome: sallyport.OutcomeUnavailable, Code: connect.ProblemUntrusted,
			Message: fmt.Sprintf("gateway %s shows a certificate that is not to be trusted: %s", host, why),
			Hint:    "somebody may be listening in; tell your administrator, or log in again if the site's CA changed", Err: err,
		}
	}
	if refusedCertificate(err) {
		return &sallyport.Error{
			Outcome: sallyport.OutcomeLogin, Code: connect.ProblemLogin,
			Message: fmt.Sprintf("gateway %s does not take this session's certificate", host),
			Hint:    "run: agent login", Err: err,
		}
	}
	message := fmt.Sprintf("gateway %s is out of reach", host)
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns):
		message = fmt.Sprintf("gateway %s: its name does not resolve", host)
	case errors.Is(err, context.DeadlineExceeded):
		message = fmt.Sprintf("gateway %s did not answer in time", host)
	}
	return &sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: connect.ProblemGatewayDown, Message: message, Err: err}
}

func refusedCertificate(err error) bool {
	var alert tls.AlertError
	isAlert := errors.As(err, &alert)
	var op *net.OpError
	remote := errors.As(err, &op) && op.Op == "remote error"
	for _, a := range certificateAlerts {
		// crypto/tls keeps the type of an alert it received to itself; its text is
		// that of the public type.
		if isAlert && alert == a || remote && op.Err.Error() == a.Error() {
			return true
		}
	}
	return false
}

func untrusted(err error) (why string, ok bool) {
	var (
		authority x509.UnknownAuthorityError
		hostname  x509.HostnameError
		invalid   x509.CertificateInvalidError
		verify    *tls.CertificateVerificationError
	)
	switch {
	case errors.As(err, &authority):
		return "it is signed by an authority this profile does not know", true
	case errors.As(err, &hostname):
		return "it is made for another name", true
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "it has expired or is not valid yet", true
	case errors.As(err, &invalid), errors.As(err, &verify):
		return "it does not verify", true
	}
	return "", false
}

// CloseFailure returns what it means that a gateway closed a carrier, or a stream
// before its answer, with a code of proto/connect.
func CloseFailure(host string, code uint64, reason string) error {
	e := &sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Err: &ResetError{Code: code}}
	switch code {
	case connect.CodeSessionRevoked:
		e.Outcome, e.Code = sallyport.OutcomeLogin, connect.ProblemSessionRevoked
		e.Message, e.Hint = "the session is over", "run: agent login"
	case connect.CodePolicyStale:
		e.Code, e.Message = connect.ProblemUnavailable, fmt.Sprintf("gateway %s cannot confirm its policy", host)
	case connect.CodeDraining:
		e.Code, e.Message = connect.ProblemGatewayDown, fmt.Sprintf("gateway %s is going away", host)
	case connect.CodeTooMany:
		e.Code, e.Message = connect.ProblemTooMany, "this session has too many connections open"
	case connect.CodeFlowWithdrawn:
		e.Outcome, e.Code = sallyport.OutcomeRevoked, connect.ProblemWithdrawn
		e.Message = "the connection is no longer allowed"
	case connect.CodeUpstreamReset:
		e.Outcome, e.Code = sallyport.OutcomeUpstream, connect.ProblemReset
		e.Message = "you are allowed; the service reset the connection"
	default:
		e.Code, e.Message = connect.ProblemGatewayDown, fmt.Sprintf("gateway %s closed the connection", host)
	}
	if reason != "" {
		e.Message += " (" + connect.Printable(reason, 200) + ")"
	}
	return e
}

// AdmitRefusal returns what a carrier that can refuse only by an HTTP answer (a
// lane) answers after Admit failed.
func AdmitRefusal(err error) *sallyport.Error {
	var known *sallyport.Error
	if errors.As(err, &known) {
		return known
	}
	code := uint64(connect.CodeSessionRevoked)
	var admit *AdmitError
	if errors.As(err, &admit) {
		code = admit.Code
	}
	errors.As(CloseFailure("here", code, ""), &known)
	known.Err = err
	return known
}

// AdmitCode returns the code that a refused connection is closed with.
func AdmitCode(err error) uint64 {
	var admit *AdmitError
	if errors.As(err, &admit) {
		return admit.Code
	}
	return connect.CodeSessionRevoked
}

package tunnel

import (
	"net/url"
	"strings"

	"sallyport"
	"sallyport/proto/connect"
)

// MaxHead bounds the head of a request or an answer on every carrier, in bytes.
const MaxHead = 16 << 10

// MaxBody bounds the body of a /v1 request, in bytes.
const MaxBody = 1 << 20

// Hostname returns the host of an authority, lower case and without its port.
func Hostname(authority string) string {
	return strings.ToLower((&url.URL{Host: authority}).Hostname())
}

// RefuseAPI returns why a request that is no CONNECT must not reach a Handler on
// the tunnel host named host, or nil.
func RefuseAPI(host, authority, path string) *sallyport.Error {
	switch {
	case Hostname(authority) != host:
		return &sallyport.Error{Outcome: sallyport.OutcomeUnavailable, Code: connect.ProblemMisdirected, Message: "this is another host's request"}
	case !strings.HasPrefix(path, "/v1/"):
		return &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: connect.ProblemNotFound, Message: "the tunnel host serves CONNECT and /v1 only"}
	}
	return nil
}

// BadTarget refuses a target that has no canonical form.
func BadTarget(err error) *sallyport.Error {
	return &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: connect.ProblemBadTarget, Message: err.Error()}
}

// BadRequest refuses a request that breaks HTTP's grammar.
func BadRequest(err error) *sallyport.Error {
	return &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: connect.ProblemBadRequest, Message: "the request is not well-formed", Err: err}
}

// Unsupported refuses a protocol that the carrier does not carry.
func Unsupported(what string) *sallyport.Error {
	return &sallyport.Error{Outcome: sallyport.OutcomeInternal, Code: connect.ProblemUnsupported, Message: "this gateway does not carry " + what}
}

// Unanswered is what a request gets whose Handler returned without an answer.
func Unanswered() *sallyport.Error {
	return &sallyport.Error{Outcome: sallyport.OutcomeInternal, Code: "internal", Message: "the request was not answered"}
}

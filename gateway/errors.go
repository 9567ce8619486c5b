package gateway

import (
	"sallyport"
	"sallyport/proto/connect"
)

// unavailable refuses because nothing could be decided: 503, and the upstream
// gets no packet. hop says in words for people what did not answer; cause is for
// the log.
func unavailable(hop string, cause error) *sallyport.Error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable, Code: connect.ProblemUnavailable,
		Message: "the gateway cannot decide right now, so it refuses: " + hop,
		Hint:    "try again in a moment; if it stays, tell an administrator",
		Err:     cause,
	}
}

// Hops that may fail to answer.
const (
	hopPolicyd   = "policyd did not answer it"
	hopOvertaken = "policyd is behind what it has told already"
	hopWaiting   = "too many connections wait for an answer"
)

func errDraining() *sallyport.Error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable, Code: "gateway.draining",
		Message: "the gateway is going away", Hint: "the agent tries another gateway, or this one again in a moment",
	}
}

func errAudit(cause error) *sallyport.Error {
	return &sallyport.Error{
		Outcome: sallyport.OutcomeUnavailable, Code: "audit.unavailable",
		Message: "the gateway cannot write its audit log, so it refuses",
		Hint:    "tell an administrator",
		Err:     cause,
	}
}

// Package gateway lets connections in: it asks whether a session may reach a
// target, dials after an allow and nothing else, carries the bytes, and ends the
// connection when its reason ends.
//
// It owns the carriers and flows that live now, what is known about changes
// since their decisions, and the /v1 requests of the tunnel host. It knows
// neither how carriers move bytes (package tunnel) nor how decisions are made
// (package policyd): it meets them as [tunnel.Handler] and
// [sallyport.Authorizer]. Only gateway/upstream dials inwards.
//
// # A flow
//
// Connect registers the flow, asks, and looks under the table's lock whether
// anything that the answer depends on has changed since; it looks again after
// the dial. What changed meanwhile is asked again. See [Server.Connect],
// machine.go (the states of a flow) and freshness.go (what "changed since"
// means).
//
// # Withdrawal
//
// Three loops run beside the flows. watch takes policyd's notices and marks
// every grant (a flow or a carrier) whose decision depends on a changed
// subject. reask asks again for what is marked, in batches, and cuts what is not
// allowed any more. guard is the clock: it marks what has reached the end of its
// validity or whose peer has moved, and cuts what could not be confirmed in
// time. A flow whose answer nobody can confirm is cut: the gateway fails closed.
package gateway

// Package sallyport is the vocabulary of Sallyport: the types that two of its
// services exchange and the small interfaces through which they meet. It
// imports the standard library only and holds no behaviour beyond parsing,
// printing and comparing its own values.
//
// # One connection
//
// A person types "agent connect db.internal:5432". The words become a
// [Target]. The agent opens a carrier to the gateway (package tunnel) and sends
// CONNECT on it. The gateway knows from the client certificate which
// [SessionID] speaks, registers the flow and asks an [Authorizer] a [Request].
// policyd answers from memory with a [Decision]: allowed or not, by which rule,
// for which reasons, what would change the answer, until when the clock alone
// cannot change it, and on which [Subject]s it depends. Only after an allow does
// the gateway dial the decision's upstream and carry bytes.
//
// # The way back
//
// A change in cached (a [Record] with a higher [Revision]) flows through
// [Records].Watch to policyd, which swaps its snapshot and names the changed
// subjects through [Changes].Watch to every gateway. A gateway asks again for
// its flows that depend on those subjects and cuts the ones that no longer
// hold.
//
// A denial is a value (a Decision whose Verdict is not Allow). An error means
// "could not decide", and whoever gets one refuses.
package sallyport

package gateway

// state is where a grant (a flow, or a carrier) stands.
//
//	             ask             allow             accept
//	pending ───────────► deciding ───────► dialling ───────► open
//	   │                 │  ▲ ask │ ▲         │ renew          │ renew
//	   │                 │  └─────┘ └── ask ──┤ (stays)        │ (stays)
//	   │                 │                    │                │
//	   ├── withdraw ─────┴────────────────────┴────────────────┴──► withdrawn
//	   │                 │                    │                │        │
//	   └── end ──────────┴────────────────────┴────────────────┴────────┴──► closed
//
// A carrier dials nothing: it goes from dialling to open in one step. A grant
// that was withdrawn while its dial was under way can never be accepted; that is
// how a change wins every race against the flow that it concerns.
type state uint8

const (
	pending   state = iota // registered, nothing asked yet
	deciding               // a question is under way
	dialling               // allowed, the upstream is being dialled
	open                   // bytes flow
	withdrawn              // no longer allowed; waits for its goroutine to end
	closed                 // gone
)

// event is what happens to a grant.
type event uint8

const (
	ask      event = iota // a question goes out, the first or another one
	allow                 // the answer is an allow, and nothing newer touches it
	accept                // the upstream answered, and still nothing newer touches the answer
	renew                 // a live grant was asked about again and is still allowed
	withdraw              // it is no longer allowed, or nobody can confirm that it is
	end                   // its goroutine is done with it
)

// transitions says where each event leads; a missing entry means that the event
// has no meaning in that state and changes nothing.
var transitions = map[state]map[event]state{
	pending:   {ask: deciding, withdraw: withdrawn, end: closed},
	deciding:  {ask: deciding, allow: dialling, withdraw: withdrawn, end: closed},
	dialling:  {ask: deciding, accept: open, renew: dialling, withdraw: withdrawn, end: closed},
	open:      {renew: open, withdraw: withdrawn, end: closed},
	withdrawn: {end: closed},
	closed:    {},
}

// step returns the state after e; ok is false if e has no meaning in s.
func (s state) step(e event) (next state, ok bool) {
	next, ok = transitions[s][e]
	if !ok {
		return s, false
	}
	return next, true
}

// held reports whether the grant rests on a decision that must keep holding.
func (s state) held() bool { return s == dialling || s == open }

func (s state) String() string {
	return [...]string{"pending", "deciding", "dialling", "open", "withdrawn", "closed"}[s]
}

func (e event) String() string {
	return [...]string{"ask", "allow", "accept", "renew", "withdraw", "end"}[e]
}

package policy

import (
	"math"
	"slices"
	"time"

	"sallyport"
)

// Input is everything that one question is decided on. It belongs to one
// goroutine; it may be used again for the next question, which keeps the path of
// a decision free of allocations.
type Input struct {
	// Now is policyd's clock. Required.
	Now time.Time
	// Request is the question. Required.
	Request *sallyport.Request
	// Person is who asks; nil without a live session.
	Person *Person
	// Absent says in words why there is no Person: "session revoked".
	Absent string
	// Records finds external records; nil: there are none.
	Records Records
	// Budget is shared by the questions of a batch, for Remedies; nil: the question
	// has one of its own.
	Budget *Budget

	site      *Options      // of the Set that decides
	reportAge time.Duration // since the posture was received
	signed    time.Time     // when the device signed it, by its clock
	until     time.Duration // how long what was looked at stays as it is; 0: for ever
	peer      bool          // the peer's address was looked at
}

// Records finds the external records that policies look at. One that finds records
// which end by themselves calls [Input.Lasts].
type Records interface {
	// External returns the fields of the live record of the type and id.
	External(typ, id string) (fields map[string]any, ok bool)
}

// prepare readies in for a question to site.
func (in *Input) prepare(site *Options) {
	in.site, in.until, in.peer = site, 0, false
	if in.Person == nil {
		return
	}
	if p := in.Person.Posture; p != nil {
		in.reportAge, in.signed = max(in.Now.Sub(p.Received), 0), time.UnixMilli(p.Sequence)
	}
	if in.Person.ExpiresIn != 0 {
		in.lasts(in.Person.ExpiresIn)
	}
}

// external returns an external record's fields.
func (in *Input) external(typ, id string) (map[string]any, bool) {
	if in.Records == nil {
		return nil, false
	}
	return in.Records.External(typ, id)
}

// age is how old a fact of the person's posture is. A fact that was read in the
// year 2 is as old as a duration can say: the sum of two ages that both are must
// not turn into a new one.
func (in *Input) age(f *sallyport.Fact) time.Duration {
	if f.At.IsZero() {
		return in.reportAge
	}
	before := max(in.signed.Sub(f.At), 0)
	if before > math.MaxInt64-in.reportAge {
		return math.MaxInt64
	}
	return in.reportAge + before
}

// Person is a live session and the records behind it.
type Person struct {
	Session *sallyport.Session
	Login   *sallyport.Login
	User    *sallyport.User
	// Email is that of the directory user, else the user's; may be empty.
	Email string
	// Groups are the directory's.
	Groups Groups
	// Device and Posture are nil for a session without a device, or a device
	// that has not reported.
	Device  *sallyport.Device
	Posture *sallyport.Posture
	// ExpiresIn is how long the session still lives; 0: no end.
	ExpiresIn time.Duration
}

// Groups is a set of directory groups, findable by id and by name. The zero
// Groups are those of a person the directory knows nothing about: every question
// about them is unknown.
type Groups struct {
	names []string // ids and names, sorted, without doubles; nil: not known
}

// NewGroups returns the set of gs; an empty one is known to be empty.
func NewGroups(gs []sallyport.Group) Groups {
	names := make([]string, 0, 2*len(gs))
	for _, g := range gs {
		names = append(names, g.ID)
		if g.Name != "" {
			names = append(names, g.Name)
		}
	}
	slices.Sort(names)
	return Groups{names: slices.Clip(slices.Compact(names))}
}

func (g Groups) known() bool { return g.names != nil }

func (g Groups) has(name string) bool {
	_, ok := slices.BinarySearch(g.names, name)
	return ok
}

// lasts notes that something that was looked at changes by the clock after d.
func (in *Input) lasts(d time.Duration) {
	if in.until == 0 || d < in.until {
		in.until = d
	}
}

// Lasts notes for the answer's ValidFor that a record that was just found, or not
// found, stays so for d; above zero.
func (in *Input) Lasts(d time.Duration) { in.lasts(d) }

// FactAge is how old a fact of p is at now. Two clocks are at work: between
// reading the fact and signing the report the device's own, whose error cancels
// out; since then policyd's.
func FactAge(p *sallyport.Posture, f sallyport.Fact, now time.Time) time.Duration {
	in := Input{Now: now, Person: &Person{Posture: p}}
	in.prepare(nil)
	return in.age(&f)
}

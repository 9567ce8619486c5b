package policy

import (
	"hash/maphash"
	"math/bits"
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

	site      *Options          // of the Set that decides
	reportAge time.Duration     // since the posture was received
	signed    int64             // when the device signed it, by its clock, in Unix milliseconds
	until     time.Duration     // how long what was looked at stays as it is; 0: for ever
	peer      bool              // the peer's address was looked at
	recall    map[string]any    // what CEL expressions see instead of Person; nil: Person
	shown     *shownCertificate // the last that was looked at; nil: none yet
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
		in.reportAge, in.signed = max(min(in.Now.Sub(p.Received), century*time.Second), 0), p.Sequence
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

// age is how old a fact of the person's posture is, for at most two centuries:
// the sum of two ages must not overflow and make what is old new.
func (in *Input) age(f *sallyport.Fact) time.Duration {
	if f.At.IsZero() {
		return in.reportAge
	}
	// As Time.Sub, which costs a tenth of a decision.
	seconds := max(min(in.signed/1000-f.At.Unix(), century), -1)
	before := time.Duration(seconds)*time.Second + time.Duration(in.signed%1000)*time.Millisecond -
		time.Duration(f.At.Nanosecond())
	return in.reportAge + max(before, 0)
}

const century = 100 * 365 * 24 * 60 * 60 // in seconds

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
	// index finds names by their hash: places in names plus 1, with open addressing
	// in at least half as many slots again, a power of two. Nil for few names.
	index []uint32
	seed  maphash.Seed // so that nobody can name groups to collide
}

// fewNames are searched as fast as they are hashed.
const fewNames = 4

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
	g := Groups{names: slices.Clip(slices.Compact(names))}
	if len(g.names) > fewNames {
		g.buildIndex()
	}
	return g
}

func (g *Groups) buildIndex() {
	g.seed = maphash.MakeSeed()
	g.index = make([]uint32, 1<<bits.Len(uint(len(g.names)*3/2)))
	for i, name := range g.names {
		slot := g.slot(name)
		for g.index[slot] != 0 {
			slot = g.after(slot)
		}
		g.index[slot] = uint32(i + 1)
	}
}

// slot is where the search for name starts.
func (g *Groups) slot(name string) int {
	return int(maphash.String(g.seed, name)) & (len(g.index) - 1)
}

func (g *Groups) after(slot int) int { return (slot + 1) & (len(g.index) - 1) }

func (g *Groups) known() bool { return g.names != nil }

func (g *Groups) has(name string) bool {
	if g.index == nil {
		_, ok := slices.BinarySearch(g.names, name)
		return ok
	}
	for slot := g.slot(name); g.index[slot] != 0; slot = g.after(slot) {
		if g.names[g.index[slot]-1] == name {
			return true
		}
	}
	return false
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

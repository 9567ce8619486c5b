package policyd

import (
	"hash/maphash"
	"iter"
	"math/bits"
	"slices"
)

// A node has a place for each value of so many bits of a hash.
const placeBits = 6

// levels is how many nodes deep one hash leads.
const levels = 64 / placeBits

var tableSeed = maphash.MakeSeed() // so that nobody can name records to collide

// keyed is a record that knows its id: no id is kept twice.
type keyed interface{ key() string }

// table is an immutable map of records by id. The zero table is empty.
//
// It is a trie over the bits of the ids' hashes, each node of which holds records
// and further nodes (Steindorfer and Vinju, "Optimizing Hash-Array Mapped Tries for
// Fast and Lean Immutable JVM Collections", OOPSLA 2015). A change copies the nodes
// on the way to its record, four among a million records, and shares all others
// with the table that it came from.
type table[V keyed] struct{ root *node[V] }

// node is one level of a table.
type node[V keyed] struct {
	owner   *ownership // the draft that may change it in place
	holds   uint64     // the places of records …
	leads   uint64     // … and those of nodes below
	records []V        // in order of their places
	below   []*node[V]
}

// ownership marks what a draft has made itself. It has a size, so that no two of
// them are the same.
type ownership struct{ _ byte }

// path leads an id down a table.
type path struct {
	id    string
	hash  uint64
	depth int
}

func pathOf(id string) path { return path{id: id, hash: maphash.String(tableSeed, id)} }

// step returns the place in the next node down, as a bit. Where the bits of a hash
// run out, those of another follow.
func (p *path) step() uint64 {
	if p.depth > 0 && p.depth%levels == 0 {
		p.hash = maphash.Comparable(tableSeed, path{id: p.id, depth: p.depth})
	}
	place := uint64(1) << (p.hash % (1 << placeBits))
	p.hash >>= placeBits
	p.depth++
	return place
}

// rank is where the entry of a place stands in the list of a node.
func rank(places, place uint64) int { return bits.OnesCount64(places & (place - 1)) }

func (t table[V]) get(id string) (v V, ok bool) {
	n, p := t.root, pathOf(id)
	for n != nil {
		place := p.step()
		if n.leads&place != 0 {
			n = n.below[rank(n.leads, place)]
			continue
		}
		if n.holds&place != 0 {
			if r := n.records[rank(n.holds, place)]; r.key() == id {
				return r, true
			}
		}
		break
	}
	return v, false
}

// all yields the records in no order.
func (t table[V]) all() iter.Seq[V] {
	return func(yield func(V) bool) { t.root.each(yield) }
}

func (n *node[V]) each(yield func(V) bool) bool {
	if n == nil {
		return true
	}
	for _, r := range n.records {
		if !yield(r) {
			return false
		}
	}
	for _, b := range n.below {
		if !b.each(yield) {
			return false
		}
	}
	return true
}

// draft is a table under construction; it leaves the one it came from as it was.
// It belongs to one goroutine, and is over once its table is in use.
type draft[V keyed] struct {
	table[V]
	own *ownership // nil: nothing is changed yet
}

func (t table[V]) edit() draft[V] { return draft[V]{table: t} }

// mine returns n, or a copy of it, ready to be changed.
func (d *draft[V]) mine(n *node[V]) *node[V] {
	if d.own == nil {
		d.own = new(ownership)
	}
	switch {
	case n == nil:
		return &node[V]{owner: d.own}
	case n.owner == d.own:
		return n
	}
	return &node[V]{d.own, n.holds, n.leads, slices.Clone(n.records), slices.Clone(n.below)}
}

func (d *draft[V]) set(v V) { d.root = d.with(d.root, pathOf(v.key()), v) }

func (d *draft[V]) with(n *node[V], p path, v V) *node[V] {
	n = d.mine(n)
	place := p.step()
	switch {
	case n.leads&place != 0:
		b := &n.below[rank(n.leads, place)]
		*b = d.with(*b, p, v)
	case n.holds&place == 0:
		n.hold(place, v)
	case n.records[rank(n.holds, place)].key() == p.id:
		n.records[rank(n.holds, place)] = v
	default: // whoever stands there goes down with it
		old := n.drop(place)
		q := pathOf(old.key())
		for q.depth < p.depth {
			q.step()
		}
		n.lead(place, d.with(d.with(nil, q, old), p, v))
	}
	return n
}

func (d *draft[V]) delete(id string) {
	if _, ok := d.get(id); ok {
		d.root = d.without(d.root, pathOf(id))
	}
}

// without takes out the record at the end of p. A node that is left with a single
// record gives it up to the one above.
func (d *draft[V]) without(n *node[V], p path) *node[V] {
	n = d.mine(n)
	place := p.step()
	if n.holds&place != 0 {
		n.drop(place)
		return n
	}
	i := rank(n.leads, place)
	b := d.without(n.below[i], p)
	if n.below[i] = b; len(b.records) == 1 && len(b.below) == 0 {
		n.below = slices.Delete(n.below, i, i+1)
		n.leads &^= place
		n.hold(place, b.records[0])
	}
	return n
}

func (n *node[V]) hold(place uint64, v V) {
	n.records = inserted(n.records, rank(n.holds, place), v)
	n.holds |= place
}

func (n *node[V]) lead(place uint64, b *node[V]) {
	n.below = inserted(n.below, rank(n.leads, place), b)
	n.leads |= place
}

// drop takes the record out of its place and returns it.
func (n *node[V]) drop(place uint64) V {
	i := rank(n.holds, place)
	v := n.records[i]
	n.records = slices.Delete(n.records, i, i+1)
	n.holds &^= place
	return v
}

// inserted returns list with v at i. Most lists are short and stay as they are for
// hours: none has room to spare.
func inserted[E any](list []E, i int, v E) []E {
	longer := make([]E, len(list)+1)
	copy(longer, list[:i])
	longer[i] = v
	copy(longer[i+1:], list[i:])
	return longer
}

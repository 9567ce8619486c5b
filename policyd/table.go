package policyd

import (
	"hash/maphash"
	"iter"
	"slices"
)

// shards is how many maps a table has. A change copies one of them and the list
// of all: with a million records about a thousand entries and 8 KiB.
const shards = 1024

var tableSeed = maphash.MakeSeed()

func shardOf(key string) int { return int(maphash.String(tableSeed, key) % shards) }

// table is an immutable map from ids to values. The zero table is empty.
type table[V any] struct {
	maps []map[string]V // nil or of length shards
}

func (t table[V]) get(key string) (v V, ok bool) {
	if t.maps == nil {
		return v, false
	}
	v, ok = t.maps[shardOf(key)][key]
	return v, ok
}

func (t table[V]) all() iter.Seq2[string, V] {
	return func(yield func(string, V) bool) {
		for _, m := range t.maps {
			for k, v := range m {
				if !yield(k, v) {
					return
				}
			}
		}
	}
}

// draft is a table under construction; it leaves the one it came from as it was.
// It belongs to one goroutine.
type draft[V any] struct {
	table[V]
	own []bool // shards that are copied already; nil: not even the list is
}

func (t table[V]) edit() draft[V] { return draft[V]{table: t} }

// shard returns the map for key, ready to be changed.
func (d *draft[V]) shard(key string) map[string]V {
	if d.own == nil {
		d.own = make([]bool, shards)
		if d.maps = slices.Clone(d.maps); d.maps == nil {
			d.maps = make([]map[string]V, shards)
		}
	}
	i := shardOf(key)
	if !d.own[i] {
		d.own[i] = true
		old := d.maps[i]
		d.maps[i] = make(map[string]V, len(old)+1)
		for k, v := range old {
			d.maps[i][k] = v
		}
	}
	return d.maps[i]
}

func (d *draft[V]) set(key string, v V) { d.shard(key)[key] = v }

func (d *draft[V]) delete(key string) {
	if _, ok := d.get(key); ok {
		delete(d.shard(key), key)
	}
}

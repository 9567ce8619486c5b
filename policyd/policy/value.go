package policy

// Value is the outcome of a condition. The order matters: and is the minimum,
// or the maximum, and the opposite of v is True-v.
type Value uint8

// The three values. The zero Value allows nothing.
const (
	False Value = iota
	Unknown
	True
)

var valueNames = [...]string{"false", "unknown", "true"}

// String returns false, unknown or true.
func (v Value) String() string { return valueNames[v] }

func (v Value) not() Value { return True - v }

func truth(b bool) Value {
	if b {
		return True
	}
	return False
}

// Package fault is how a configuration tells what is wrong with it: every fault
// at once, each with the path of its key. Whoever knows the file adds the line.
package fault

import (
	"fmt"
	"strings"
)

// Fault is one bad value.
type Fault struct {
	// Key is the path in the file: "authd.idp.issuer", "routes[2].from".
	Key string
	// Message says what is wrong and what would be right.
	Message string
}

func (f Fault) Error() string { return f.Key + ": " + f.Message }

// List collects faults. The zero List has none.
type List []Fault

// Addf appends a fault.
func (l *List) Addf(key, format string, args ...any) {
	*l = append(*l, Fault{key, fmt.Sprintf(format, args...)})
}

// Under appends other's faults with prefix put before their keys.
func (l *List) Under(prefix string, other List) {
	for _, f := range other {
		*l = append(*l, Fault{prefix + "." + f.Key, f.Message})
	}
}

// Err returns nil for an empty list and the list itself otherwise.
func (l List) Err() error {
	if len(l) == 0 {
		return nil
	}
	return l
}

func (l List) Error() string {
	lines := make([]string, len(l))
	for i, f := range l {
		lines[i] = f.Error()
	}
	return strings.Join(lines, "\n")
}

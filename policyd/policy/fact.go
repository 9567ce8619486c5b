package policy

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"

	"sallyport"
)

// maxFactText is the longest text of a fact, in bytes.
const maxFactText = 256

// CheckFact refuses a fact that no honest agent reports: a name that no policy
// could ask for, a known fact of another type, a version that is none.
func CheckFact(name string, value any) error {
	if !factName.MatchString(name) {
		return fmt.Errorf("%.80q is no name of a fact", name)
	}
	if _, isField := recordFields[name]; isField || isBound(name) {
		return fmt.Errorf("%q is no name of a fact", name)
	}
	kind := kindOf(value)
	if kind == 0 {
		return fmt.Errorf("fact %s: want text, a number or a truth value, got %T", name, value)
	}
	s, _ := value.(string)
	if len(s) > maxFactText || strings.ContainsFunc(s, unicode.IsControl) {
		return fmt.Errorf("fact %s: longer than %d bytes, or with control characters", name, maxFactText)
	}
	known, isKnown := knownFacts[name]
	switch {
	case isKnown && kind != known.kind:
		return fmt.Errorf("fact %s has the wrong type (%T)", name, value)
	case name == sallyport.FactOS && s != "linux" && s != "darwin" && s != "windows":
		return fmt.Errorf("unknown operating system %.40q", s)
	case isKnown && known.order != nil:
		if _, ok := known.order(s, s); !ok || !plausibleVersion(s) {
			return fmt.Errorf("fact %s: %.40q is no version", name, s)
		}
	}
	return nil
}

// plausibleVersion refuses numbers that no system counts up to, with which a
// machine would pass every "at least". Single numbers above 999 are years and
// dates (Amazon Linux 2023, Tumbleweed 20260102).
func plausibleVersion(s string) bool {
	first, rest, _ := strings.Cut(strings.TrimPrefix(s, "v"), ".")
	end := strings.IndexFunc(first, func(r rune) bool { return r < '0' || r > '9' })
	if end >= 0 {
		first, rest = first[:end], ""
	}
	n, err := strconv.Atoi(first)
	switch {
	case err != nil:
		return false
	case n <= 999, rest != "" && n <= 9999:
		return true
	}
	return n >= 2000 && n < 2100 || n >= 2000_01_01 && n < 2100_01_01
}

package policy

import "strings"

// compareVersions orders dotted versions of systems and kernels: part by part as
// numbers (1.10 > 1.9), missing parts are 0. What follows the numbers
// ("6.1.0-18-amd64") does not count, unless it names a pre-release ("6.9-rc3"),
// which comes before the release. ok is false if one of them is no version.
func compareVersions(a, b string) (c int, ok bool) {
	c, a, b, ok = compareNumbers(a, b)
	if !ok || c != 0 {
		return c, ok
	}
	return preRelease(b) - preRelease(a), true
}

// compareSemantic orders by Semantic Versioning 2.0.0, section 11, with missing
// parts as 0 and a leading v allowed.
func compareSemantic(a, b string) (c int, ok bool) {
	c, a, b, ok = compareNumbers(a, b)
	if !ok || !semanticRest(a) || !semanticRest(b) {
		return 0, false
	}
	if c != 0 {
		return c, true
	}
	a, _, _ = strings.Cut(a, "+")
	b, _, _ = strings.Cut(b, "+")
	switch {
	case a == b:
		return 0, true
	case a == "":
		return 1, true
	case b == "":
		return -1, true
	}
	return comparePreReleases(a[1:], b[1:]), true
}

func semanticRest(s string) bool {
	return s == "" || (s[0] == '-' || s[0] == '+') && len(s) > 1
}

// compareNumbers compares the leading dotted numbers and returns what follows them.
func compareNumbers(a, b string) (c int, restA, restB string, ok bool) {
	a, b = strings.TrimPrefix(a, "v"), strings.TrimPrefix(b, "v")
	if !digitAt(a, 0) || !digitAt(b, 0) {
		return 0, a, b, false
	}
	for digitAt(a, 0) || digitAt(b, 0) {
		var x, y string
		x, a = nextNumber(a)
		y, b = nextNumber(b)
		if c == 0 {
			c = compareDigits(x, y)
		}
	}
	return c, a, b, true
}

func digitAt(s string, i int) bool { return i < len(s) && s[i] >= '0' && s[i] <= '9' }

// nextNumber cuts the leading number off s, and the dot if another one follows.
func nextNumber(s string) (digits, rest string) {
	i := 0
	for digitAt(s, i) {
		i++
	}
	digits, rest = s[:i], s[i:]
	if strings.HasPrefix(rest, ".") && digitAt(rest, 1) {
		rest = rest[1:]
	}
	return strings.TrimLeft(digits, "0"), rest
}

// compareDigits compares numbers of any length without leading zeros; "" is 0.
func compareDigits(a, b string) int {
	if len(a) != len(b) {
		return len(a) - len(b)
	}
	return strings.Compare(a, b)
}

var preReleaseWords = [...]string{"alpha", "beta", "rc", "pre", "dev", "snapshot", "nightly"}

func preRelease(rest string) int {
	rest = strings.TrimLeft(rest, "-_.~ ")
	for _, w := range preReleaseWords {
		if len(rest) >= len(w) && strings.EqualFold(rest[:len(w)], w) {
			return 1
		}
	}
	return 0
}

// comparePreReleases compares identifier by identifier: numbers as numbers and
// below words, fewer identifiers first.
func comparePreReleases(a, b string) int {
	for a != "" && b != "" {
		var x, y string
		x, a, _ = strings.Cut(a, ".")
		y, b, _ = strings.Cut(b, ".")
		nx, ny := allDigits(x), allDigits(y)
		c := 0
		switch {
		case nx && ny:
			c = compareDigits(strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0"))
		case nx:
			c = -1
		case ny:
			c = 1
		default:
			c = strings.Compare(x, y)
		}
		if c != 0 {
			return c
		}
	}
	return len(a) - len(b)
}

func allDigits(s string) bool {
	for i := range len(s) {
		if !digitAt(s, i) {
			return false
		}
	}
	return s != ""
}

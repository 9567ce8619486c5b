package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Problem is one fault of a configuration file, where a person can find it.
type Problem struct {
	File    string
	Line    int    // from 1; 0 if the fault has no line
	Column  int    // from 1; 0 outside of policies
	Key     string // "authd.idp.issuer", "routes[2].from"; empty for the whole file
	Message string
}

// Error returns file:line: key.path: message.
func (p Problem) Error() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	b.WriteString(": ")
	if p.Key != "" {
		b.WriteString(p.Key + ": ")
	}
	if p.Column > 0 {
		fmt.Fprintf(&b, "column %d: ", p.Column)
	}
	b.WriteString(p.Message)
	return b.String()
}

// Problems are all faults of a file in the order of its lines. It is the error
// that Load returns for a file that could be read but is not right.
type Problems []Problem

// Error returns one line for each problem.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.Error()
	}
	return strings.Join(lines, "\n")
}

func (ps Problems) sorted() Problems {
	slices.SortStableFunc(ps, func(a, b Problem) int { return cmp.Compare(a.Line, b.Line) })
	return ps
}

// nearest returns the name among names that a person most likely meant by
// typed: at most two edits away (one for names of three letters or less).
func nearest(typed string, names []string) (string, bool) {
	best, at := "", 3
	if len(typed) <= 3 {
		at = 2
	}
	for _, name := range names {
		if d := distance(strings.ToLower(typed), name); d < at {
			best, at = name, d
		}
	}
	return best, best != ""
}

// distance is the optimal string alignment distance: insertions, deletions,
// substitutions and swaps of neighbours each count one.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return max(len(a), len(b))
	}
	before, last := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row := make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}

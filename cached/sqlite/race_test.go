//go:build race

package sqlite_test

// oneIn says how many there are for one that is tried: the same run comes without the
// race detector, whole.
const oneIn = 10

//go:build !race

package sqlite_test

const oneIn = 1

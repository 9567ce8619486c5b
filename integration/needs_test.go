package integration

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// need returns the path of a program that the test cannot do without. One that is
// missing fails the test: nothing is skipped.
func need(t testing.TB, program, debianPackage string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Fatalf("%s is missing: run tools/needs.sh, or install the Debian package %s", program, debianPackage)
	}
	return path
}

// needGlob is need for a program whose directory bears a version.
func needGlob(t testing.TB, pattern, debianPackage string) string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil || len(found) == 0 {
		t.Fatalf("%s is missing: run tools/needs.sh, or install the Debian package %s", pattern, debianPackage)
	}
	return found[len(found)-1]
}

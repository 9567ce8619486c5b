// Package tpmtest gives tests a TPM of their own, in software (swtpm).
package tpmtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Start starts a TPM in software that ends with the test, and returns its socket.
func Start(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm") // names of sockets are short
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir,
		"--server", "type=unixio,path="+socket, "--ctrl", "type=unixio,path="+socket+".ctrl", "--flags", "not-need-init,startup-clear")
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v (Debian: swtpm)", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		os.RemoveAll(dir)
	})
	for end := time.Now().Add(10 * time.Second); ; {
		if _, err := os.Stat(socket); err == nil {
			return socket
		}
		if time.Now().After(end) {
			t.Fatal("swtpm does not listen")
		}
		<-time.After(5 * time.Millisecond)
	}
}

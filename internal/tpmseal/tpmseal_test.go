package tpmseal_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"sallyport/internal/tpmseal"
)

// softTPM starts a TPM in software that ends with the test, and returns its socket.
func softTPM(t *testing.T) string {
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

func TestOnlyTheSameTPMUnseals(t *testing.T) {
	secret := bytes.Repeat([]byte("k"), 96)
	one, other := softTPM(t), softTPM(t)
	sealed, err := tpmseal.Seal(one, secret)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(sealed, secret[:8]) {
		t.Error("the secret stands in the file")
	}
	for range 5 { // nothing is left behind in the TPM's few slots
		got, err := tpmseal.Unseal(one, sealed)
		if err != nil || !bytes.Equal(got, secret) {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	if _, err := tpmseal.Unseal(other, sealed); err == nil {
		t.Error("another TPM gave the secret")
	}
	for i := range sealed {
		bad := bytes.Clone(sealed)
		bad[i] ^= 1
		if got, err := tpmseal.Unseal(one, bad); err == nil && !bytes.Equal(got, secret) {
			t.Fatalf("byte %d changed: got %q", i, got)
		}
	}
	if _, err := tpmseal.Seal(one, make([]byte, tpmseal.MaxSecret+1)); err == nil {
		t.Error("too long a secret was sealed")
	}
	if _, err := tpmseal.Unseal(filepath.Join(t.TempDir(), "none"), sealed); err == nil {
		t.Error("a TPM that is not there gave the secret")
	}
}

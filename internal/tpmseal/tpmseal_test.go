package tpmseal_test

import (
	"bytes"
	"path/filepath"
	"testing"

	"sallyport/internal/tpmseal"
	"sallyport/internal/tpmseal/tpmtest"
)

func TestOnlyTheSameTPMUnseals(t *testing.T) {
	secret := bytes.Repeat([]byte("k"), 96)
	one, other := tpmtest.Start(t), tpmtest.Start(t)
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

package authd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"sallyport"
	"sallyport/authd/idp"
	"sallyport/cached"
	"sallyport/cached/memory"
	"sallyport/internal/keyring"
	"sallyport/proto/connect"
)

func testVault(t testing.TB, now func() time.Time) *vault {
	t.Helper()
	records, err := cached.New(cached.Config{}, cached.Deps{Store: memory.New(), KEK: keyring.NewKEK(), Now: now})
	if err != nil {
		t.Fatal(err)
	}
	v, err := newVault(records, keyring.NewKEK(), now)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestVaultKeepsOnce(t *testing.T) {
	v := testVault(t, time.Now)
	ctx := context.Background()
	secret, err := v.keep(ctx, forCode, time.Minute, "value")
	if err != nil {
		t.Fatal(err)
	}
	var got string
	if err := v.take(ctx, forState, secret, &got); !errors.Is(err, sallyport.ErrNotFound) {
		t.Errorf("a code passed for a state: %v", err)
	}
	if err := v.take(ctx, forCode, secret, &got); err != nil || got != "value" {
		t.Errorf("got %q, %v", got, err)
	}
	if err := v.take(ctx, forCode, secret, &got); !errors.Is(err, sallyport.ErrNotFound) {
		t.Errorf("taken twice: %v", err)
	}
}

// L8: a sealed payload moved to another record does not open there.
func TestCase_L8_SwappedSecretsDoNotOpen(t *testing.T) {
	v := testVault(t, time.Now)
	ctx := context.Background()
	a, err := v.keep(ctx, forCode, time.Minute, "of a")
	if err != nil {
		t.Fatal(err)
	}
	b, err := v.keep(ctx, forCode, time.Minute, "of b")
	if err != nil {
		t.Fatal(err)
	}
	rec, err := v.records.Get(ctx, sallyport.KindCode, recordID(forCode, a))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.records.Apply(ctx, []sallyport.Op{{Kind: sallyport.KindCode, ID: recordID(forCode, b), Payload: rec.Payload}}); err != nil {
		t.Fatal(err)
	}
	var got string
	if err := v.take(ctx, forCode, b, &got); err == nil {
		t.Errorf("b opened as %q", got)
	}
}

func TestVaultWithAnotherKey(t *testing.T) {
	v := testVault(t, time.Now)
	ctx := context.Background()
	secret, err := v.keep(ctx, forCode, time.Minute, "value")
	if err != nil {
		t.Fatal(err)
	}
	other, err := newVault(v.records, keyring.NewKEK(), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	var got string
	if err := other.take(ctx, forCode, secret, &got); sallyport.CodeOf(err) != "keys.wrong" {
		t.Errorf("got %v; want keys.wrong", err)
	}
	if _, err := other.nonce(ctx); sallyport.CodeOf(err) != "keys.wrong" {
		t.Errorf("got %v; want keys.wrong", err)
	}
	if _, err := newVault(v.records, keyring.KEK{}, time.Now); err == nil {
		t.Error("no key was taken for one")
	}
}

func TestNonces(t *testing.T) {
	now := time.Now()
	v := testVault(t, func() time.Time { return now })
	n := mustNonce(t, v)
	if mustNonce(t, v) == n {
		t.Error("two nonces are the same")
	}
	use, err := v.useNonce(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.records.Apply(context.Background(), []sallyport.Op{use}); err != nil {
		t.Fatal(err)
	}
	use, err = v.useNonce(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.records.Apply(context.Background(), []sallyport.Op{use}); !errors.Is(err, sallyport.ErrConflict) {
		t.Errorf("used twice: %v", err)
	}
	for name, bad := range map[string]string{
		"empty": "", "cut": n[:len(n)-1], "upper case": strings.ToUpper(n), "longer": n + "a", "line break": n[:10] + "\n" + n[10:], "flipped": flip(n),
	} {
		if _, err := v.useNonce(t.Context(), bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	now = now.Add(nonceLife + time.Millisecond)
	if _, err := v.useNonce(t.Context(), n); err == nil {
		t.Error("an old nonce was accepted")
	}
}

func flip(s string) string {
	if s[20] == 'a' {
		return s[:20] + "b" + s[21:]
	}
	return s[:20] + "a" + s[21:]
}

func FuzzUseNonce(f *testing.F) {
	v := testVault(f, time.Now)
	good := mustNonce(f, v)
	f.Add(good)
	f.Add(strings.Repeat("a", len(good)))
	f.Fuzz(func(t *testing.T, nonce string) {
		use, err := v.useNonce(t.Context(), nonce)
		if err != nil {
			return
		}
		// Every spelling of one nonce is used up by one record.
		raw, err := lowerBase32.DecodeString(nonce)
		if err != nil {
			t.Fatalf("accepted %q: %v", nonce, err)
		}
		again, err := v.useNonce(t.Context(), lowerBase32.EncodeToString(raw))
		if err != nil || again.ID != use.ID {
			t.Fatalf("%q is used up as %s, its other spelling as %s: %v", nonce, use.ID, again.ID, err)
		}
	})
}

func FuzzCheckCSR(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	session := connect.SessionURI("corp.example", "s-1")
	f.Fuzz(func(t *testing.T, der []byte) {
		if pub, err := checkCSR(der, session); err == nil && pub.Curve != elliptic.P256() {
			t.Fatal("accepted a key that is not P-256")
		}
	})
}

func FuzzLoopbackRedirect(f *testing.F) {
	f.Add("http://127.0.0.1:1/x")
	f.Add("http://[::1]:65535/")
	f.Add("http://127.0.0.1:1@evil.example/x")
	f.Fuzz(func(t *testing.T, raw string) {
		if !loopbackRedirect(raw) {
			return
		}
		if !strings.HasPrefix(raw, "http://127.0.0.1:") && !strings.HasPrefix(raw, "http://[::1]:") {
			t.Fatalf("accepted %q", raw)
		}
		if strings.ContainsAny(raw, "\r\n \"<>#?@\\") {
			t.Fatalf("accepted %q", raw)
		}
	})
}

func TestValidate(t *testing.T) {
	good := func() Config {
		return Config{PublicURL: "https://auth.corp.example", Listen: ":443", IDP: IDP{Issuer: "https://login.corp.example", ClientID: "c"}}
	}
	if faults := good().Validate(); len(faults) != 0 {
		t.Fatalf("a good configuration has faults: %v", faults)
	}
	cases := []struct {
		key    string
		change func(*Config)
	}{
		{"public_url", func(c *Config) { c.PublicURL = "" }},
		{"public_url", func(c *Config) { c.PublicURL = "http://auth.corp.example" }},
		{"public_url", func(c *Config) { c.PublicURL = "https://auth.corp.example/x" }},
		{"public_url", func(c *Config) { c.PublicURL = "https://auth.corp.example?x" }},
		{"public_url", func(c *Config) { c.PublicURL = "https://u@auth.corp.example" }},
		{"listen", func(c *Config) { c.Listen = "8443" }},
		{"tls", func(c *Config) { c.TLS.CertFile = "x" }},
		{"idp.issuer", func(c *Config) { c.IDP.Issuer = "" }},
		{"idp.client_id", func(c *Config) { c.IDP.ClientID = "" }},
		{"idp.scopes[1]", func(c *Config) { c.IDP.Scopes = []string{"ok", "not ok"} }},
		{"users[0].password_hash", func(c *Config) { c.IDP = IDP{}; c.Users = []idp.User{{ID: "a", PasswordHash: "x"}} }},
		{"session.lifetime", func(c *Config) { c.Session.Lifetime = time.Second }},
		{"session.lifetime", func(c *Config) { c.Session.Lifetime = -time.Hour }},
		{"session.certificate_lifetime", func(c *Config) { c.Session.CertificateLifetime = time.Second }},
		{"session.certificate_lifetime", func(c *Config) { c.Session.CertificateLifetime = 48 * time.Hour }},
		{"session.idle", func(c *Config) { c.Session.Idle = time.Minute }},
		{"device_grant", func(c *Config) { c.DeviceGrant = true }},
	}
	for _, tc := range cases {
		c := good()
		tc.change(&c)
		if faults := c.Validate(); len(faults) != 1 || faults[0].Key != tc.key {
			t.Errorf("got %v; want one fault at %s", faults, tc.key)
		}
	}
}

func mustNonce(t testing.TB, v *vault) string {
	t.Helper()
	n, err := v.nonce(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

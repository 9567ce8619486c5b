package sallyport

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestCase_G2_AuthorityHasOneForm(t *testing.T) {
	tests := []struct{ in, want string }{
		{"db.internal:5432", "tcp://db.internal:5432"},
		{"DB.Internal:5432", "tcp://db.internal:5432"},
		{"db.internal.:5432", "tcp://db.internal:5432"},
		{"a:1", "tcp://a:1"},
		{"3com.example:443", "tcp://3com.example:443"},
		{"_srv.db_1.internal:65535", "tcp://_srv.db_1.internal:65535"},
		{"xn--bcher-kva.example:443", "tcp://xn--bcher-kva.example:443"},
		{"10.0.3.7:22", "tcp://10.0.3.7:22"},
		{"[2001:DB8:0:0::1]:22", "tcp://[2001:db8::1]:22"},
		{"[::ffff:10.0.3.7]:22", "tcp://10.0.3.7:22"},
		{"[::1]:80", "tcp://[::1]:80"},
	}
	for _, tt := range tests {
		got, err := ParseAuthority(TCP, tt.in)
		if err != nil || got.String() != tt.want {
			t.Errorf("%q: got %v, %v; want %s", tt.in, got, err, tt.want)
		}
		again, err := ParseTarget(got.String())
		if err != nil || again != got {
			t.Errorf("%q: reads back as %v, %v", tt.in, again, err)
		}
	}
}

// What has no canonical form, or could be read in two ways (cases G2, G8, Q1).
var noAuthorities = []string{
	// ports
	"db.internal", "db.internal:", "db.internal:0", "db.internal:65536", "db.internal:+22", "db.internal: 22",
	"db.internal:22 ", "db.internal:0x16", "db.internal:22:22", "db.internal:022", "db.internal:abc", "db.internal:-1",
	"db.internal:１２", "db.internal:99999999999999999999", ":22",
	// hosts
	"", ":", "[::1", "::1:22", "[::1]", "[::1]22", "[fe80::1%eth0]:22", "[10.0.3.7]:22", "[]:22", "[db]:22", "..:22", ".:22",
	"db..internal:22", ".db:22", "db.internal..:22", "-db:22", "db-:22", "--:22", "user@db:22", "db/x:22", "bücher.example:443",
	"db internal:22", "db\x00:22", "db\r\n:22", "db\t:22", "db%2e:22", "*.internal:22",
	strings.Repeat("a", 64) + ":22", strings.Repeat("a.", 127) + "aa:22", strings.Repeat("a", 64<<10) + ":22",
	// numbers that a resolver takes for an address (G8)
	"2130706433:22", "127.1:22", "0x7f.1:22", "0x7f000001:22", "0177.0.0.1:22", "127.0.0.1.1:22", "1.2.3:22", "a.0x1:22", "a.1:22",
	"256.1.1.1:22", "127.0.0.01:22",
}

func TestCase_G8_Q1_NoAuthority(t *testing.T) {
	for _, in := range noAuthorities {
		if got, err := ParseAuthority(TCP, in); err == nil {
			t.Errorf("%.80q: got %v; want an error", in, got)
		}
		got, err := ParseTarget(in)
		if err == nil {
			t.Errorf("%.80q as typed: got %v; want an error", in, got)
		} else if len(err.Error()) > 400 {
			t.Errorf("%.80q: an error of %d bytes", in, len(err.Error()))
		}
	}
}

func TestParseTarget(t *testing.T) {
	tests := []struct{ in, want string }{
		{"db.internal:5432", "tcp://db.internal:5432"},
		{"tcp://db.internal:5432", "tcp://db.internal:5432"},
		{"TCP://db.internal:5432", "tcp://db.internal:5432"},
		{"udp://dns.internal:53", "udp://dns.internal:53"},
		{"postgres://db.internal/app", "tcp://db.internal:5432"},
		{"postgres://alice:secret@db.internal:5433/app?sslmode=disable", "tcp://db.internal:5433"},
		{"ssh://build.internal", "tcp://build.internal:22"},
		{"ssh://[2001:db8::1]", "tcp://[2001:db8::1]:22"},
		{"https://wiki.corp.example/page", "https://wiki.corp.example:443"},
		{"http://wiki.corp.example", "http://wiki.corp.example:80"},
		{"https://wiki.corp.example:8443?x=1", "https://wiki.corp.example:8443"},
	}
	for _, tt := range tests {
		got, err := ParseTarget(tt.in)
		if err != nil || got.String() != tt.want {
			t.Errorf("%q: got %v, %v; want %s", tt.in, got, err, tt.want)
		}
	}
	for _, in := range []string{"gopher://db.internal", "tcp://", "tcp://db.internal", "://db:1", "postgres://", "postgres:///app", "tcp:///db:1", "javascript://db:1", "ssh://a@b@"} {
		if got, err := ParseTarget(in); err == nil {
			t.Errorf("%q: got %v; want an error", in, got)
		}
	}
}

func TestTargetJSON(t *testing.T) {
	for _, want := range []Target{{}, {Network: TCP, Host: "db.internal", Port: 5432}, {Network: UDP, Host: "2001:db8::1", Port: 53}} {
		b, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		var got Target
		if err := json.Unmarshal(b, &got); err != nil || got != want {
			t.Errorf("%s reads back as %+v, %v; want %+v", b, got, err, want)
		}
	}
	var got Target
	if err := json.Unmarshal([]byte(`"tcp://127.1:22"`), &got); err == nil {
		t.Errorf("got %v from JSON; want the same strictness", got)
	}
	if a, ok := (Target{Host: "10.0.3.7"}).Addr(); !ok || !a.Is4() {
		t.Errorf("Addr of a literal: %v, %v", a, ok)
	}
	if _, ok := (Target{Host: "db.internal"}).Addr(); ok {
		t.Error("Addr of a name")
	}
}

func FuzzParseAuthority(f *testing.F) {
	for _, s := range append(noAuthorities[:20:20], "db.internal:5432", "[::1]:80", "DB.:1") {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseAuthority(TCP, s)
		if err != nil {
			return
		}
		again, err := ParseAuthority(TCP, got.Authority())
		if err != nil || again != got {
			t.Fatalf("%q is %v, which reads back as %v, %v", s, got, again, err)
		}
		if got.Port == 0 || got.Host == "" || got.Host != strings.ToLower(got.Host) || strings.HasSuffix(got.Host, ".") {
			t.Fatalf("%q is %+v, which is not canonical", s, got)
		}
		if strings.ContainsAny(got.Host, " \x00\r\n%@/[]") {
			t.Fatalf("%q keeps what a host cannot hold: %q", s, got.Host)
		}
	})
}

package localhost_test

import (
	"net"
	"testing"

	"sallyport/internal/localhost"
)

func TestIs(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "LocalHost.": true, "gw.localhost": true, "a.b.localhost": true,
		"": false, "localhost.example": false, "notlocalhost": false, "127.0.0.1": false,
	} {
		if got := localhost.Is(host); got != want {
			t.Errorf("Is(%q) = %v; want %v", host, got, want)
		}
	}
}

func TestDial(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", listen)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		c, err := localhost.Dial(&net.Dialer{})(t.Context(), "tcp", net.JoinHostPort("gw.localhost", port))
		if err != nil {
			t.Fatalf("a listener on %s: %v", listen, err)
		}
		if got, want := c.RemoteAddr().String(), l.Addr().String(); got != want {
			t.Errorf("dialled %s; want %s", got, want)
		}
		c.Close()
	}
}

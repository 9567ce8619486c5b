package gateway

import (
	"strings"
	"testing"
	"time"
)

func TestConfigValidate(t *testing.T) {
	good := Config{PublicURL: "https://gw.corp.example"}
	tests := []struct {
		name  string
		edit  func(*Config)
		fault string // key: start of the message; "" means none
	}{
		{"least", func(*Config) {}, ""},
		{"everything", func(c *Config) {
			c.Name, c.Listen, c.Addresses = "eu1", ":443", []string{"203.0.113.7:443", "[2001:db8::1]:443"}
			c.TLS = TLSFiles{"gw.pem", "gw.key"}
			c.Limits = Limits{Carriers: 1, Idle: time.Hour}
		}, ""},
		{"port 0 is chosen later", func(c *Config) { c.PublicURL, c.Listen = "https://gw.localhost:0", "127.0.0.1:0" }, ""},
		{"no URL", func(c *Config) { c.PublicURL = "" }, "public_url: is required"},
		{"http", func(c *Config) { c.PublicURL = "http://gw.corp.example" }, "public_url: "},
		{"no scheme", func(c *Config) { c.PublicURL = "gw.corp.example" }, "public_url: "},
		{"with a path", func(c *Config) { c.PublicURL += "/vpn" }, "public_url: "},
		{"with a query", func(c *Config) { c.PublicURL += "?a=b" }, "public_url: "},
		{"with a user", func(c *Config) { c.PublicURL = "https://me@gw.corp.example" }, "public_url: "},
		{"an address", func(c *Config) { c.PublicURL = "https://203.0.113.7" }, "public_url: "},
		{"port too high", func(c *Config) { c.PublicURL += ":65536" }, "public_url: "},
		{"listen without port", func(c *Config) { c.Listen = "127.0.0.1" }, "listen: "},
		{"listen on a service name", func(c *Config) { c.Listen = ":https" }, "listen: "},
		{"address without port", func(c *Config) { c.Addresses = []string{"203.0.113.7:443", "203.0.113.8"} }, "addresses[1]: "},
		{"certificate without key", func(c *Config) { c.TLS.CertFile = "gw.pem" }, "tls: "},
		{"negative limit", func(c *Config) { c.Limits.Pending = -1 }, "limits.pending: "},
		{"negative duration", func(c *Config) { c.Limits.Drain = -time.Second }, "limits.drain: "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := good
			tt.edit(&c)
			err := c.Validate().Err()
			switch {
			case tt.fault == "" && err != nil:
				t.Errorf("got %v; want none", err)
			case tt.fault != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.fault)):
				t.Errorf("got %v; want %s…", err, tt.fault)
			}
		})
	}
}

// TestConfigTellsEveryFault at once.
func TestConfigTellsEveryFault(t *testing.T) {
	c := Config{Listen: "x", Addresses: []string{"y"}, TLS: TLSFiles{KeyFile: "k"}, Limits: Limits{Lanes: -1, Idle: -1}}
	if faults := c.Validate(); len(faults) != 6 {
		t.Errorf("got %d faults:\n%v\nwant 6", len(faults), faults)
	}
}

// Package resolve is how the agent reaches authd and gateways by name. It owns
// one rule that Go's resolver lacks: "localhost" and names below it are loopback
// addresses (RFC 6761, section 6.3) and are never asked of a name server.
package resolve

import (
	"context"
	"errors"
	"net"
	"strings"
	"time"
)

var dialer = net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}

// Loopback reports whether host is localhost or a name below it.
func Loopback(host string) bool {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	return host == "localhost" || strings.HasSuffix(host, ".localhost")
}

// Dial is net.Dialer.DialContext with the rule.
func Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || !Loopback(host) {
		return dialer.DialContext(ctx, network, addr)
	}
	c, err4 := dialer.DialContext(ctx, network, net.JoinHostPort("127.0.0.1", port))
	if err4 == nil {
		return c, nil
	}
	c, err6 := dialer.DialContext(ctx, network, net.JoinHostPort("::1", port))
	if err6 == nil {
		return c, nil
	}
	return nil, errors.Join(err4, err6)
}

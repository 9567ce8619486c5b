// Package localhost is the one rule about names that Go's resolver lacks:
// "localhost" and the names below it are loopback addresses and are never asked
// of a name server (RFC 6761, section 6.3).
package localhost

import (
	"context"
	"errors"
	"net"
	"strings"
)

// Is reports whether host is localhost or a name below it.
func Is(host string) bool {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	return host == "localhost" || strings.HasSuffix(host, ".localhost")
}

// Addresses returns what to dial for such a name, host:port, in order.
func Addresses(port string) []string {
	return []string{net.JoinHostPort("127.0.0.1", port), net.JoinHostPort("::1", port)}
}

// Dial returns d.DialContext with the rule.
func Dial(d *net.Dialer) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		host, port, err := net.SplitHostPort(addr)
		if err != nil || !Is(host) {
			return d.DialContext(ctx, network, addr)
		}
		var errs []error
		for _, a := range Addresses(port) {
			c, err := d.DialContext(ctx, network, a)
			if err == nil {
				return c, nil
			}
			errs = append(errs, err)
		}
		return nil, errors.Join(errs...)
	}
}

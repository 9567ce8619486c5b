// Package ratelimit counts attempts by key (an address, a name) in token buckets.
// It owns the bound on how many keys are remembered; what a key means, and what
// happens to whoever is over the limit, is its user's.
package ratelimit

import (
	"net/netip"
	"sync"
	"time"
)

// maxKeys bounds the memory of a Limiter, about 100 bytes each.
const maxKeys = 1 << 16

// Limiter allows Burst attempts of a key at once and then one every Every. Set
// the fields before the first use; they do not change.
type Limiter struct {
	Burst int
	Every time.Duration
	// Now is the clock; nil: time.Now.
	Now func() time.Time

	mu   sync.Mutex
	full map[string]time.Time // when the key's bucket will be full again
}

// Allow takes one attempt of key, and reports whether there was one left.
func (l *Limiter) Allow(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	full := l.full[key]
	if full.Before(now) {
		full = now
	}
	next := full.Add(l.Every)
	if next.Sub(now) > time.Duration(l.Burst)*l.Every {
		return false
	}
	if l.full == nil {
		l.full = make(map[string]time.Time)
	}
	if len(l.full) >= maxKeys {
		l.forget(now)
	}
	l.full[key] = next
	return true
}

// Refund gives back an attempt that shall not count, such as a successful one.
func (l *Limiter) Refund(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if full, ok := l.full[key]; ok {
		l.full[key] = full.Add(-l.Every)
	}
}

// forget drops keys with a full bucket, and if that is not enough, any.
func (l *Limiter) forget(now time.Time) {
	for key, full := range l.full {
		if !full.After(now) {
			delete(l.full, key)
		}
	}
	for key := range l.full {
		if len(l.full) < maxKeys {
			return
		}
		delete(l.full, key)
	}
}

func (l *Limiter) now() time.Time {
	if l.Now != nil {
		return l.Now()
	}
	return time.Now()
}

// Key returns what to count for a remote address (host:port): the address, or
// the /64 of an IPv6 one, which is what one customer is given.
func Key(remoteAddr string) string {
	ap, err := netip.ParseAddrPort(remoteAddr)
	if err != nil {
		return remoteAddr
	}
	addr := ap.Addr().Unmap()
	if addr.Is4() {
		return addr.String()
	}
	prefix, err := addr.WithZone("").Prefix(64)
	if err != nil {
		return addr.String()
	}
	return prefix.String()
}

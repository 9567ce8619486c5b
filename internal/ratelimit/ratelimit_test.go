package ratelimit

import (
	"strconv"
	"testing"
	"time"
)

func TestAllow(t *testing.T) {
	now := time.Unix(1000, 0)
	l := &Limiter{Burst: 3, Every: time.Second, Now: func() time.Time { return now }}
	take := func(want ...bool) {
		t.Helper()
		for i, w := range want {
			if got := l.Allow("a"); got != w {
				t.Errorf("attempt %d: got %v; want %v", i, got, w)
			}
		}
	}
	take(true, true, true, false)
	if !l.Allow("b") {
		t.Error("another key is limited too")
	}
	now = now.Add(time.Second)
	take(true, false)
	l.Refund("a")
	take(true, false)
	now = now.Add(time.Hour)
	take(true, true, true, false)
}

func TestMemoryIsBounded(t *testing.T) {
	l := &Limiter{Burst: 1, Every: time.Hour}
	for i := range maxKeys + 100 {
		if !l.Allow(strconv.Itoa(i)) {
			t.Fatalf("key %d: limited at its first attempt", i)
		}
	}
	if len(l.full) > maxKeys {
		t.Errorf("got %d keys; want at most %d", len(l.full), maxKeys)
	}
}

func TestKey(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.7:443":               "192.0.2.7",
		"[::ffff:192.0.2.7]:443":      "192.0.2.7",
		"[2001:db8:1:2:3:4:5:6]:1":    "2001:db8:1:2::/64",
		"[2001:db8:1:2:ffff::9%e0]:1": "2001:db8:1:2::/64",
		"pipe":                        "pipe",
	} {
		if got := Key(addr); got != want {
			t.Errorf("%s: got %s; want %s", addr, got, want)
		}
	}
}

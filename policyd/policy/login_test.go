package policy

import (
	"testing"
	"time"
)

func TestDurationsWithDays(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"7d": 7 * day, "1d12h": 36 * time.Hour, "90m": 90 * time.Minute, "0d1h": time.Hour,
		"d": 0, "1d-1h": 0, "-1d": 0, "1.5d": 0, "1h1d": 0, "0d": 0, "1d1d": 0, "99999d99999h": 99999*day + 99999*time.Hour, "99999d2400000h": 0,
	} {
		p, err := Parse([]byte(`allow: {and: [{session_age: {"<": ` + text + `}}]}`))
		if want == 0 {
			if err == nil {
				t.Errorf("%s loads", text)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := p.allow[0].when.of[0].is.(*sessionAge).limits[0].of; got != want {
			t.Errorf("%s: got %v; want %v", text, got, want)
		}
	}
}

package run

import (
	"runtime/debug"
	"time"

	"sallyport"
)

// release is the version that the build writes in (-ldflags -X), and built the
// time, RFC 3339; both may be empty.
var release, built string

// Version returns the version of this program: the released one, else the
// commit that it was built from.
func Version() string {
	if release != "" {
		return release
	}
	commit, dirty := setting("vcs.revision"), setting("vcs.modified")
	if commit == "" {
		return "0.0.0-dev"
	}
	v := "0.0.0-dev+" + commit[:min(12, len(commit))]
	if dirty == "true" {
		v += ".dirty"
	}
	return v
}

// BuildTime returns a time that surely lies in the past: when this program was
// built, else when its commit was made. Zero if neither is known.
func BuildTime() time.Time {
	for _, text := range []string{built, setting("vcs.time")} {
		if t, err := time.Parse(time.RFC3339, text); err == nil {
			return t
		}
	}
	return time.Time{}
}

func setting(key string) string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, s := range info.Settings {
		if s.Key == key {
			return s.Value
		}
	}
	return ""
}

// CheckClock refuses to start with a clock that cannot be right: sessions and
// certificates would be judged by it. A day is left for time zones and builds.
func CheckClock(now, built time.Time) error {
	if built.IsZero() || now.After(built.Add(-24*time.Hour)) {
		return nil
	}
	return &sallyport.Error{
		Outcome: sallyport.OutcomeInternal,
		Code:    "clock.implausible",
		Message: "the clock says " + now.UTC().Format(time.RFC3339) + ", but this program was built " + built.UTC().Format(time.RFC3339),
		Hint:    "set the clock, then start again",
	}
}

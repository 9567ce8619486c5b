package policy

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sallyport"

	"pgregory.net/rapid"
)

func TestCase_I13_windowsAcrossClockChanges(t *testing.T) {
	for _, file := range []string{"dst_gap", "dst_overlap", "dst_new_york", "dst_half_hour"} {
		golden(t, "testdata/time_of_day/"+file+".txtar")
	}
	golden(t, "testdata/day_of_week/dst.txtar")
	golden(t, "testdata/day_of_week/skipped_day.txtar")
	golden(t, "testdata/date/dst.txtar")
}

func TestCase_I13_reversedAndImpossibleTimes(t *testing.T) {
	for _, file := range []string{"time_of_day/bad_times", "time_of_day/bad_windows", "day_of_week/bad_days", "date/bad_dates", "date/bad_spans", "time_of_day/never", "date/never"} {
		golden(t, "testdata/"+file+".txtar")
	}
}

func TestCase_I13_unknownZones(t *testing.T) { golden(t, "testdata/time_of_day/bad_zones.txtar") }

// The answer to a single criterion of time changes at the very nanosecond that
// valid_for says, and not before.
func TestAnswersChangeWhenTheySay(t *testing.T) {
	zones := []string{
		"UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia", "Asia/Kolkata",
		"Africa/Casablanca", "America/St_Johns", "Europe/Dublin", "Asia/Beirut", "Antarctica/Troll",
	}
	clock := func(t *rapid.T, label string) string {
		return clockText(time.Duration(rapid.IntRange(0, 24*12-1).Draw(t, label)) * 5 * time.Minute)
	}
	rapid.Check(t, func(t *rapid.T) {
		zone := rapid.SampledFrom(zones).Draw(t, "zone")
		var text string
		switch rapid.IntRange(0, 2).Draw(t, "kind") {
		case 0:
			after, before := clock(t, "after"), clock(t, "before")
			if after >= before {
				before = "23:59:59.999999999"
			}
			text = fmt.Sprintf("time_of_day: {timezone: %s, after: %q, before: %q}", zone, after, before)
		case 1:
			days := rapid.SampledFrom([]string{"mon", "tue-sat", "sun,fri", "sat", "mon-fri", "thu"}).Draw(t, "days")
			text = fmt.Sprintf("day_of_week: {is: %q, timezone: %s}", days, zone)
		default:
			after := rapid.IntRange(1, 28).Draw(t, "day")
			text = fmt.Sprintf("date: {after: 2026-01-%02dT12:34, before: 2026-11-%02d, timezone: %s}", after, after, zone)
		}
		set, err := Compile([]sallyport.Route{{From: "tcp://db.internal:5432", Policy: "allow: {and: [{" + text + "}]}"}}, Options{})
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		in := drawInput(t)
		in.Person = nil
		start := in.Now
		a := set.Decide(in)
		if a.ValidFor == 0 { // only a date can be over
			if !strings.HasPrefix(text, "date") || start.Year() != 2026 {
				t.Fatalf("%s at %v is said never to change", text, start)
			}
			return
		}
		in.Now = start.Add(a.ValidFor - 1)
		if b := set.Decide(in); b.Verdict != a.Verdict || b.ValidFor != 1 {
			t.Fatalf("%s at %v: %v for %v, but a nanosecond before that %v for %v", text, start, a.Verdict, a.ValidFor, b.Verdict, b.ValidFor)
		}
		in.Now = start.Add(a.ValidFor)
		if b := set.Decide(in); b.Verdict == a.Verdict {
			t.Fatalf("%s at %v: %v for %v, and still then", text, start, a.Verdict, a.ValidFor)
		}
	})
}

// Zones come from the program, whatever the machine has.
func TestZonesAreBuiltIn(t *testing.T) {
	t.Setenv("ZONEINFO", t.TempDir())
	all, err := zones()
	if err != nil {
		t.Fatal(err)
	}
	for name, load := range all {
		zone, err := load()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if zone.String() != name {
			t.Errorf("%s calls itself %s", name, zone)
		}
	}
	if len(all) < 400 || all["Europe/Berlin"] == nil || all["UTC"] == nil || all["Local"] != nil || all[""] != nil {
		t.Errorf("%d zones", len(all))
	}
}

// Monotonic readings of the process's clock do not confuse wall clocks.
func TestWallClockWithMonotonicTime(t *testing.T) {
	set := compileOne(t, "allow: {and: [{time_of_day: {timezone: UTC, after: 0:00}}]}")
	now := time.Now()
	in := asker(t, "nobody")
	in.Now = now
	want := time.Date(now.UTC().Year(), now.UTC().Month(), now.UTC().Day()+1, 0, 0, 0, 0, time.UTC).Sub(now.Round(0))
	if a := set.Decide(in); a.ValidFor != want || a.Verdict != sallyport.VerdictAllow {
		t.Errorf("%v for %v; want allow for %v", a.Verdict, a.ValidFor, want)
	}
}

package policy

import (
	"fmt"
	"strings"
	"time"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// wallClock is a criterion that looks at nothing but what a clock on the wall
// reads in a zone at this moment.
//
// So times that are left out when the clock is put forward are never read: a
// window that begins among them begins, and one that ends among them ends, at the
// moment of the change; one that lies within them does not come that day. Times
// that come twice when it is put back count both times: a window within them comes
// twice, one that ends among them opens again at the change, and one that begins
// among them is shut again until its beginning is read for the second time. A day
// that a zone leaves out (Pacific/Apia, 30 December 2011) is no day of the week.
type wallClock interface {
	// holds reports whether it is true when the clock reads t.
	holds(t time.Time) bool
	// next is how long after t its answer changes if the clock is not put forward
	// or back; above zero.
	next(t time.Time) time.Duration
}

// longest bounds how long an answer may be valid: beyond it is never, and
// gateways' clocks need not be able to count to it.
const longest = 100 * 365 * 24 * time.Hour

// untilChange is how long after now c's answer changes.
func untilChange(c wallClock, now time.Time) time.Duration {
	is := c.holds(now)
	for t := now; ; {
		d := c.next(t)
		_, change := t.ZoneBounds()
		if change.IsZero() || d < change.Sub(t) {
			return t.Add(d).Sub(now)
		}
		if t = change; c.holds(t) != is {
			return t.Sub(now)
		}
	}
}

func (in *Input) wall(c wallClock, zone *time.Location) Value {
	now := in.Now.In(zone)
	in.lasts(untilChange(c, now))
	return truth(c.holds(now))
}

// timeOfDay is a window that comes every day.
type timeOfDay struct {
	zone          *time.Location
	after, before time.Duration // as written, since midnight
	hasAfter      bool
	hasBefore     bool
}

// parseTimeOfDay reads {timezone, after, before}, both of them exclusive.
func parseTimeOfDay(p *parser, _ string, n *yaml.Node) (condition, bool) {
	entries, ok := p.mapping(n, "time_of_day", []string{"timezone", "after", "before"})
	if !ok {
		return condition{}, false
	}
	c := &timeOfDay{}
	for _, e := range entries {
		good := false
		switch e.key {
		case "timezone":
			c.zone, good = p.zone(e.value, "timezone")
		case "after":
			c.hasAfter = true
			c.after, good = p.timeOfDay(e.value, "after")
		case "before":
			c.hasBefore = true
			c.before, good = p.timeOfDay(e.value, "before")
		}
		ok = ok && good
	}
	switch {
	case !ok:
	case c.zone == nil:
		p.fail(n, "time_of_day needs a timezone, like Europe/Berlin or UTC")
		ok = false
	case !c.hasAfter && !c.hasBefore:
		p.fail(n, "time_of_day says no time; write after, before or both")
		ok = false
	}
	return leafOf(c), ok
}

// timeLayouts are PPL's formats of a time of day; Go reads hours of one digit too.
var timeLayouts = []string{"3:04 PM", "3:04PM", "3 PM", "3PM", "15:04:05.999999999", "15:04:05", "15:04"}

// timeOfDay reads a time of day as the time since midnight.
func (p *parser) timeOfDay(n *yaml.Node, what string) (time.Duration, bool) {
	s, ok := p.plainText(n, what)
	if !ok {
		return 0, false
	}
	if strings.HasPrefix(s, "24:") {
		p.fail(n, "%s: a day ends before 24:00; a window without before lasts to its end", what)
		return 0, false
	}
	for _, layout := range timeLayouts {
		if t, err := time.Parse(layout, s); err == nil {
			return sinceMidnight(t), true
		}
	}
	p.fail(n, "%s: %.40q is no time of day; write 15:04, 15:04:05, 3:04 PM or 3 PM", what, s)
	return 0, false
}

// sinceMidnight is what the clock reads, as a duration.
func sinceMidnight(t time.Time) time.Duration {
	h, m, s := t.Clock()
	return time.Duration(h)*time.Hour + time.Duration(m)*time.Minute + time.Duration(s)*time.Second + time.Duration(t.Nanosecond())
}

const day = 24 * time.Hour

// bounds are the first reading within the window and the first behind it.
func (c *timeOfDay) bounds() (from, to time.Duration) {
	to = day
	if c.hasAfter {
		from = c.after + 1 // the time itself is not after it
	}
	if c.hasBefore {
		to = c.before
	}
	return from, to
}

func (c *timeOfDay) holds(t time.Time) bool {
	from, to := c.bounds()
	now := sinceMidnight(t)
	return from <= now && now < to
}

func (c *timeOfDay) next(t time.Time) time.Duration {
	from, to := c.bounds()
	switch now := sinceMidnight(t); {
	case now < from:
		return from - now
	case now < to:
		return to - now
	default:
		return day - now + from
	}
}

func (c *timeOfDay) eval(in *Input) Value {
	if from, to := c.bounds(); from >= to {
		return False
	}
	return in.wall(c, c.zone)
}

// never implements neverer. As in PPL, a window does not reach into the next day.
func (c *timeOfDay) never() string {
	from, to := c.bounds()
	switch {
	case from < to:
		return ""
	case c.hasAfter && c.hasBefore:
		return fmt.Sprintf(`no time is after %s and before %s of one day; for a night write or: [{time_of_day: {timezone: %[3]s, after: "%[1]s"}}, {time_of_day: {timezone: %[3]s, before: "%[2]s"}}]`,
			clockText(c.after), clockText(c.before), c.zone)
	}
	return "no time of a day is " + c.wanted(true)
}

func (c *timeOfDay) path() string { return "time_of_day" }

func (c *timeOfDay) wanted(bool) string {
	if c.hasAfter && c.hasBefore && c.after >= c.before {
		return fmt.Sprintf("after %s and before %s of the same day %s", clockText(c.after), clockText(c.before), c.zone)
	}
	return between(c.hasAfter, c.hasBefore, clockText(c.after), clockText(c.before)) + " " + c.zone.String()
}

func (c *timeOfDay) found(in *Input) (string, time.Duration) {
	now := in.Now.In(c.zone)
	return readingWords(now.Format(time.TimeOnly), c.wanted(true), c.holds(now)), 0
}
func (c *timeOfDay) note(*Input, *Inputs)  {}
func (c *timeOfDay) recalled(*Inputs) bool { return true }

// clockText prints a time since midnight as shortly as it can be.
func clockText(d time.Duration) string {
	layout := "15:04:05.999999999"
	if d%time.Minute == 0 {
		layout = "15:04"
	}
	return time.Time{}.Add(d).Format(layout)
}

// readingWords says what the clock reads and how that compares, because people see
// what was found without what was wanted.
func readingWords(now, wanted string, holds bool) string {
	if holds {
		return now + ", " + wanted
	}
	return now + ", not " + wanted
}

func between(hasAfter, hasBefore bool, after, before string) string {
	switch {
	case !hasBefore:
		return "after " + after
	case !hasAfter:
		return "before " + before
	}
	return "between " + after + " and " + before
}

// dayOfWeek is a set of days.
type dayOfWeek struct {
	zone *time.Location
	days weekdays
}

// weekdays has a bit for each time.Weekday.
type weekdays uint8

const everyDay weekdays = 1<<7 - 1

func (w weekdays) has(d time.Weekday) bool { return w&(1<<d) != 0 }

// parseDayOfWeek reads "*", "mon,wed" or "mon-fri", or {is, timezone}.
func parseDayOfWeek(p *parser, _ string, n *yaml.Node) (condition, bool) {
	c := &dayOfWeek{zone: time.UTC}
	days, ok := n, true
	if n.Kind == yaml.MappingNode {
		entries, good := p.mapping(n, "day_of_week", []string{"is", "timezone"})
		if !good {
			return condition{}, false
		}
		days = nil
		for _, e := range entries {
			if e.key == "is" {
				days = e.value
				continue
			}
			c.zone, ok = p.zone(e.value, "timezone")
		}
	}
	if days == nil {
		p.fail(n, "day_of_week names no day; write is: mon-fri")
		return condition{}, false
	}
	var good bool
	c.days, good = p.weekdays(days)
	return leafOf(c), ok && good
}

func (p *parser) weekdays(n *yaml.Node) (weekdays, bool) {
	if n.Kind == yaml.SequenceNode {
		p.fail(n, `day_of_week takes text, not a list; write "mon,wed,fri"`)
		return 0, false
	}
	s, ok := p.plainText(n, "day_of_week")
	if !ok || s == "*" {
		return everyDay, ok
	}
	var set weekdays
	var names []string
	ranges, backwards := false, false
	parts := strings.Split(s, ",")
	for _, part := range parts {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		first, ok := p.weekday(n, from)
		if !ok {
			return 0, false
		}
		last, ok := p.weekday(n, to)
		if !ok {
			return 0, false
		}
		ranges = ranges || isRange
		// Weeks begin on Sunday or on Monday; a range must mean the same in both.
		backwards = backwards || first > last || first == time.Sunday && last != first
		for d := first; ; d = (d + 1) % 7 {
			set |= 1 << d
			names = append(names, strings.ToLower(d.String()[:3]))
			if d == last {
				break
			}
		}
	}
	switch list := strings.Join(names, ","); {
	case strings.ContainsFunc(s, unicode.IsSpace):
		p.fail(n, "day_of_week: blanks in %.40q; write %s", s, list)
	case ranges && len(parts) > 1:
		p.fail(n, "day_of_week: a range within the list %.40q; write %s", s, list)
	case backwards:
		p.fail(n, "day_of_week: %s goes over the end of the week; write %s", s, list)
	default:
		return set, true
	}
	return 0, false
}

func (p *parser) weekday(n *yaml.Node, s string) (time.Weekday, bool) {
	word := strings.ToLower(strings.TrimSpace(s))
	var known []string
	for d := time.Sunday; d <= time.Saturday; d++ {
		full := strings.ToLower(d.String())
		if word == full || word == full[:3] {
			return d, true
		}
		known = append(known, full, full[:3])
	}
	p.fail(n, "day_of_week: %.40q is no day%s", s, suggest(word, known))
	return 0, false
}

func (c *dayOfWeek) holds(t time.Time) bool { return c.days.has(t.Weekday()) }

func (c *dayOfWeek) next(t time.Time) time.Duration {
	today := t.Weekday()
	left := day - sinceMidnight(t)
	for i := time.Weekday(1); i < 7 && c.days.has((today+i)%7) == c.days.has(today); i++ {
		left += day
	}
	return left
}

func (c *dayOfWeek) eval(in *Input) Value {
	if c.days == everyDay {
		return True
	}
	return in.wall(c, c.zone)
}

func (c *dayOfWeek) path() string { return "day_of_week" }

func (c *dayOfWeek) wanted(bool) string { return c.days.String() + " " + c.zone.String() }

func (c *dayOfWeek) found(in *Input) (string, time.Duration) {
	now := in.Now.In(c.zone)
	return readingWords(now.Format("Monday 15:04"), c.wanted(true), c.holds(now)), 0
}
func (c *dayOfWeek) note(*Input, *Inputs)  {}
func (c *dayOfWeek) recalled(*Inputs) bool { return true }

// String says the days as people do: "Monday to Friday", "Saturday or Sunday".
func (w weekdays) String() string {
	var names []string
	first, last := -1, -1 // counted from Monday
	for i := range 7 {
		if d := time.Weekday(1+i) % 7; w.has(d) {
			if first < 0 {
				first = i
			}
			last = i
			names = append(names, d.String())
		}
	}
	n := len(names)
	switch {
	case w == everyDay:
		return "any day"
	case n == 1:
		return names[0]
	case n > 2 && last-first == n-1:
		return names[0] + " to " + names[n-1]
	}
	return strings.Join(names[:n-1], ", ") + " or " + names[n-1]
}

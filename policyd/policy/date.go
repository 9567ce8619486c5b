package policy

import (
	"slices"
	"time"

	"go.yaml.in/yaml/v3"
)

// date is a span of time.
type date struct {
	zone          *time.Location // to show it in
	after, before time.Time      // zero: no bound
}

// parseDate reads {after, before, timezone}, both bounds exclusive.
func parseDate(p *parser, _ string, n *yaml.Node) (condition, bool) {
	entries, ok := p.mapping(n, "date", []string{"after", "before", "timezone"})
	if !ok {
		return condition{}, false
	}
	c := &date{zone: time.UTC}
	named := slices.IndexFunc(entries, func(e entry) bool { return e.key == "timezone" })
	if named >= 0 {
		if c.zone, ok = p.zone(entries[named].value, "timezone"); !ok {
			return condition{}, false
		}
	}
	for _, e := range entries {
		good := true
		switch e.key {
		case "after":
			c.after, good = p.moment(e.value, "after", c.zone, named >= 0)
		case "before":
			c.before, good = p.moment(e.value, "before", c.zone, named >= 0)
		}
		ok = ok && good
	}
	switch {
	case !ok:
	case c.after.IsZero() && c.before.IsZero():
		p.fail(n, "date says no date; write after, before or both")
		ok = false
	}
	return leafOf(c), ok
}

// Layouts of ISO 8601 dates; Go reads fractions of seconds too.
var (
	dateLayouts   = []string{"2006-01-02", "2006-01-02T15:04", "2006-01-02T15:04:05"}
	offsetLayouts = []string{"Z07:00", "Z0700", "Z07"}
)

// moment reads a date: with an offset, or as zone's clock reads it.
func (p *parser) moment(n *yaml.Node, what string, zone *time.Location, named bool) (time.Time, bool) {
	text := *n
	if n.Tag == "!!timestamp" && n.Style&yaml.TaggedStyle == 0 {
		text.Tag = "!!str" // YAML 1.1 takes unquoted dates for something of their own
	}
	s, ok := p.plainText(&text, what)
	if !ok {
		return time.Time{}, false
	}
	for _, layout := range dateLayouts {
		if wall, err := time.Parse(layout, s); err == nil {
			return p.onWall(n, s, wall, zone)
		}
		for _, offset := range offsetLayouts {
			t, err := time.Parse(layout+offset, s)
			if err == nil && named {
				p.fail(n, "%s has an offset, and there is a timezone; leave out one of them", what)
				return time.Time{}, false
			}
			if err == nil && len(layout) > len(time.DateOnly) {
				return t.UTC(), true
			}
		}
	}
	p.fail(n, "%s: %.40q is no ISO 8601 date; write 2026-01-02 or 2026-01-02T15:04:05, with Z or +01:00 behind it or a timezone beside it", what, s)
	return time.Time{}, false
}

// onWall returns when zone's clock reads wall. A reading that never comes, or
// comes twice, is refused: a date is meant to be one moment.
func (p *parser) onWall(n *yaml.Node, s string, wall time.Time, zone *time.Location) (time.Time, bool) {
	y, m, d := wall.Date()
	hour, minute, second := wall.Clock()
	t := time.Date(y, m, d, hour, minute, second, wall.Nanosecond(), zone)
	_, offset := t.Zone()
	start, end := t.ZoneBounds()
	if reads := t.Add(time.Duration(offset) * time.Second).UTC(); !reads.Equal(wall) {
		change := end
		if reads.After(wall) {
			change = start
		}
		p.fail(n, "%s does not come in %s, where the clock is put forward over it; write %s without timezone", s, zone, change.Format(time.RFC3339))
		return t, false
	}
	var beside []time.Time // moments of the periods before and after
	if !start.IsZero() {
		beside = append(beside, start.Add(-1))
	}
	if !end.IsZero() {
		beside = append(beside, end)
	}
	for _, b := range beside {
		_, other := b.Zone()
		twin := t.Add(time.Duration(offset-other) * time.Second)
		if _, is := twin.Zone(); is == other && !twin.Equal(t) {
			first, second := t, twin
			if twin.Before(t) {
				first, second = twin, t
			}
			p.fail(n, "%s comes twice in %s; write %s or %s without timezone", s, zone, first.Format(time.RFC3339), second.Format(time.RFC3339))
			return t, false
		}
	}
	return t, true
}

func (c *date) eval(in *Input) Value {
	switch {
	case c.isNever():
		return False
	case !c.after.IsZero() && !in.Now.After(c.after):
		in.lasts(min(c.after.Sub(in.Now), longest) + 1) // the moment itself is not after it
	case in.Now.Before(c.before):
		in.lasts(min(c.before.Sub(in.Now), longest))
	}
	return truth(c.holds(in.Now))
}

func (c *date) holds(t time.Time) bool {
	return (c.after.IsZero() || t.After(c.after)) && (c.before.IsZero() || t.Before(c.before))
}

func (c *date) path() string { return "date" }

// never implements neverer.
func (c *date) never() string {
	if c.isNever() {
		return "no time is " + c.wanted(true)
	}
	return ""
}

func (c *date) isNever() bool {
	return !c.after.IsZero() && !c.before.IsZero() && !c.after.Add(1).Before(c.before)
}

// ends implements ender.
func (c *date) ends() time.Time { return c.before }

func (c *date) wanted(bool) string {
	return between(!c.after.IsZero(), !c.before.IsZero(), c.words(c.after), c.words(c.before)) + " " + c.zone.String()
}

func (c *date) found(in *Input) (string, time.Duration) {
	return readingWords(c.words(in.Now.Truncate(time.Second)), c.wanted(true), c.holds(in.Now)), 0
}
func (c *date) note(*Input, *Inputs)  {}
func (c *date) recalled(*Inputs) bool { return true }

func (c *date) words(t time.Time) string {
	t = t.In(c.zone)
	return t.Format(time.DateOnly) + " " + clockText(sinceMidnight(t))
}

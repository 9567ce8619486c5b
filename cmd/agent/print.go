package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"sallyport"
)

// Formats of -o.
const (
	formatText  = "text"
	formatJSON  = "json"
	formatJSONL = "jsonl"
)

// print writes a result: the document as JSON, or each of its items as a line of
// JSON, or text. items may be nil for a result that is one thing.
func (s *shell) print(document any, items []any, text func(io.Writer)) error {
	switch s.o.output {
	case formatJSON:
		e := json.NewEncoder(s.stdout)
		e.SetIndent("", "  ")
		return e.Encode(document)
	case formatJSONL:
		if items == nil {
			items = []any{document}
		}
		e := json.NewEncoder(s.stdout)
		for _, i := range items {
			if err := e.Encode(i); err != nil {
				return err
			}
		}
		return nil
	}
	text(s.stdout)
	return nil
}

// table aligns rows; the first is the heading.
func table(w io.Writer, rows [][]string) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(t, strings.TrimRight(strings.Join(r, "\t"), "\t"))
	}
	t.Flush()
}

// left says a duration as people do: 7 h 12 m, 40 m, 9 s.
func left(d time.Duration) string {
	d = d.Round(time.Second)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d m", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h %d m", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%d d", int(d.Hours()/24))
}

// size is 1.2M, 8.0K, 512.
func size(n int64) string {
	f, units := float64(n), "KMGT"
	if n < 1000 {
		return fmt.Sprint(n)
	}
	for i := range units {
		f /= 1024
		if f < 1000 || i == len(units)-1 {
			return fmt.Sprintf("%.1f%c", f, units[i])
		}
	}
	return ""
}

// clock is the wall clock time at which something ends: 18:40, or a date if that
// is not today.
func clock(t time.Time) string {
	t = t.Local()
	if time.Until(t) < 20*time.Hour {
		return t.Format("15:04")
	}
	return t.Format("2006-01-02 15:04")
}

// factRows shows facts by name; ages may be nil.
func factRows(facts map[string]sallyport.Fact, ages map[string]int64) [][]string {
	rows := [][]string{{"FACT", "VALUE", "SOURCE", "READ"}}
	for _, name := range slices.Sorted(maps.Keys(facts)) {
		f := facts[name]
		age := time.Since(f.At)
		if ms, ok := ages[name]; ok {
			age = time.Duration(ms) * time.Millisecond
		}
		rows = append(rows, []string{name, fmt.Sprint(f.Value), f.Source, left(age) + " ago"})
	}
	return rows
}

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// processes are process ids; their descendants count with them.
type processes []int

func parsePIDs(s string) (processes, error) {
	var p processes
	for _, f := range strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' || r == '\n' }) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			return nil, fmt.Errorf("pids: %w", err)
		}
		p = append(p, pid)
	}
	return p, nil
}

// all returns the processes and their descendants (proc(5)).
func (p processes) all() []int {
	children := map[int][]int{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		pid, err := strconv.Atoi(strings.Split(name, "/")[2])
		fields := stat(pid)
		if err != nil || len(fields) < 2 {
			continue // it has ended meanwhile
		}
		parent, _ := strconv.Atoi(fields[1])
		children[parent] = append(children[parent], pid)
	}
	var found []int
	seen := map[int]bool{}
	for queue := append([]int(nil), p...); len(queue) > 0; queue = queue[1:] {
		pid := queue[0]
		if !seen[pid] {
			seen[pid] = true
			found = append(found, pid)
			queue = append(queue, children[pid]...)
		}
	}
	return found
}

// stat returns the fields of /proc/pid/stat behind the command's name.
func stat(pid int) []string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
}

// cpu returns the seconds used so far, in steps of 10 ms. Children that ended and
// were waited for stay counted.
func (p processes) cpu() (seconds float64) {
	for _, pid := range p.all() {
		fields := stat(pid)
		if len(fields) < 15 {
			continue
		}
		for _, f := range fields[11:15] { // utime, stime, cutime, cstime
			ticks, _ := strconv.ParseFloat(f, 64)
			seconds += ticks / 100
		}
	}
	return seconds
}

// rss returns the KiB of memory that is resident now.
func (p processes) rss() (kib float64) {
	for _, pid := range p.all() {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		for line := range strings.Lines(string(text)) {
			if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
				n, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
				kib += n
			}
		}
	}
	return kib
}

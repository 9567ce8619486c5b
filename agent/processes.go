package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"sallyport"
	"sallyport/agent/forward"
	"sallyport/agent/state"
)

// Process is what an agent process tells the others of the same person, through a
// file in the state directory's run/. Beside it lies a lock that the process
// holds as long as it lives: a file without a held lock is left over.
type Process struct {
	PID     int       `json:"pid"`
	Command string    `json:"command"`
	Profile string    `json:"profile"`
	Started time.Time `json:"started"`
	Updated time.Time `json:"updated"`
	Link    *Link     `json:"link,omitempty"`
	Ends    []Local   `json:"locals"`
}

// Local is one local end.
type Local struct {
	ID     string           `json:"id,omitempty"` // given by whoever lists: f1, f2, …
	Target sallyport.Target `json:"target"`
	Local  string           `json:"local"`
	Since  time.Time        `json:"since"`
	Rule   string           `json:"rule,omitempty"`
	Flows  []forward.Live   `json:"flows"`
	Opened int64            `json:"opened"` // flows, ever
	Up     int64            `json:"bytes_up"`
	Down   int64            `json:"bytes_down"`
}

const (
	publishEvery = time.Second
	// publishPause is between two writes at least. Each writes all flows: a burst
	// of thousands must not write thousands of times.
	publishPause = 100 * time.Millisecond
)

// Publish writes what locals returns into run/ now, soon after each wake, and each
// second while it changes, until ctx ends; then it removes the file.
func (a *Agent) Publish(ctx context.Context, command string, wake <-chan struct{}, locals func() []Local) error {
	run, err := a.state.Sub("run")
	if err != nil {
		return err
	}
	defer run.Close()
	name := fmt.Sprintf("%d-%s", os.Getpid(), strings.ToLower(sallyport.NewID("p")))
	unlock, err := run.TryLock(name + ".lock")
	if err != nil {
		return err
	}
	defer func() {
		run.Remove(name + ".json")
		unlock()
		run.Remove(name + ".lock")
	}()
	p := Process{PID: os.Getpid(), Command: command, Profile: a.cfg.Profile, Started: time.Now().UTC().Round(time.Millisecond)}
	tick := time.NewTicker(publishEvery)
	defer tick.Stop()
	var last []byte
	for {
		p.Ends = locals()
		if l, ok := a.Link(); ok {
			p.Link = &l
		}
		p.Updated = time.Time{} // no change by itself
		b, err := json.Marshal(p)
		p.Updated = time.Now().UTC().Round(time.Millisecond)
		if err == nil && !slices.Equal(b, last) {
			last = b
			if err := run.ShowJSON(name+".json", p); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-wake:
		case <-tick.C:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(0, publishPause-time.Since(p.Updated))):
		}
	}
}

// Processes lists the person's agent processes that live, oldest first, and
// sweeps what dead ones left.
func (a *Agent) Processes() ([]Process, error) {
	run, err := a.state.Sub("run")
	if err != nil {
		return nil, err
	}
	defer run.Close()
	names, err := run.Names()
	if err != nil {
		return nil, err
	}
	var list []Process
	for _, name := range names {
		base, ok := strings.CutSuffix(name, ".json")
		if !ok || strings.HasPrefix(name, ".") || sweep(run, base) {
			continue
		}
		var p Process
		if run.ReadJSON(name, &p) == nil {
			list = append(list, p)
		}
	}
	slices.SortFunc(list, func(a, b Process) int { return a.Started.Compare(b.Started) })
	n := 0
	for i := range list {
		for j := range list[i].Ends {
			n++
			list[i].Ends[j].ID = fmt.Sprintf("f%d", n)
		}
	}
	return list, nil
}

// sweep removes the files of a process whose lock can be taken.
func sweep(run *state.Dir, base string) bool {
	unlock, err := run.TryLock(base + ".lock")
	if errors.Is(err, state.ErrLocked) {
		return false
	}
	if err != nil {
		return true
	}
	defer unlock()
	run.Remove(base + ".json")
	run.Remove(base + ".lock")
	return true
}

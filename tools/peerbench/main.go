// Command peerbench puts load on a forwarded TCP port and measures what the
// tunnel behind it takes. It knows nothing of the tunnel but its address and its
// processes, so that the same load runs over any of them.
//
//	peerbench server -addr 127.0.0.1:9000
//	peerbench run -addr 127.0.0.1:9100 -pids 12,13 -peer chisel -round 1
//	peerbench idle -addr 127.0.0.1:9100 -pids 12,13 -counts 1000,9500
//
// server prints the address it listens on. run prints one JSON line, idle one for
// each count.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"time"
)

func main() {
	verbs := map[string]func(args []string) error{"server": serverVerb, "run": runVerb, "idle": idleVerb}
	if len(os.Args) < 2 || verbs[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: peerbench server|run|idle [-h]")
		os.Exit(2)
	}
	if err := verbs[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "peerbench:", err)
		os.Exit(1)
	}
}

// report is one JSON line.
type report struct {
	Peer  string             `json:"peer"`
	Round int                `json:"round"`
	When  string             `json:"when"`
	M     map[string]float64 `json:"m"`
	Err   []string           `json:"err,omitempty"`
}

func (r *report) fail(what string, err error) {
	if err != nil {
		r.Err = append(r.Err, what+": "+err.Error())
	}
}

func (r *report) print() error { return json.NewEncoder(os.Stdout).Encode(r) }

// common are the flags that run and idle share.
type common struct {
	fs     *flag.FlagSet
	client client
	pids   *string
	peer   *string
	round  *int
}

func newCommon(verb string) *common {
	c := &common{fs: flag.NewFlagSet(verb, flag.ExitOnError)}
	c.fs.StringVar(&c.client.addr, "addr", "", "the tunnel's local end, host:port")
	c.pids = c.fs.String("pids", "", "the tunnel's processes, comma-separated; their children count too")
	c.peer = c.fs.String("peer", "", "the tunnel's name, for the report")
	c.round = c.fs.Int("round", 0, "the round's number, for the report")
	return c
}

func (c *common) parse(args []string) (processes, *report, error) {
	if err := c.fs.Parse(args); err != nil {
		return nil, nil, err
	}
	tunnel, err := parsePIDs(*c.pids)
	return tunnel, &report{Peer: *c.peer, Round: *c.round, When: time.Now().Format(time.RFC3339), M: map[string]float64{}}, err
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/internal/logging"
	"sallyport/proto/control"
)

// callTimeout ends a call on a daemon that does not answer.
const callTimeout = 10 * time.Second

// operatorCall is what commands that read or write records in cached have in
// common: the configuration that says where cached is, and a form of output.
type operatorCall struct {
	file   string // --config
	format string // --output; empty: the command has none
}

// listFlags adds --config and --output to cmd.
func (c *operatorCall) listFlags(cmd *cobra.Command) {
	run.ConfigFlag(cmd, &c.file)
	cmd.Flags().StringVarP(&c.format, "output", "o", "text", "`format`: text, json or jsonl")
}

// output is where a list goes, and in which form.
type output struct {
	io.Writer
	format string
}

// list runs f with a client of cached, for a command with listFlags.
func (c *operatorCall) list(cmd *cobra.Command, f func(context.Context, output, *control.Records) error) error {
	switch c.format {
	case "text", "json", "jsonl":
	default:
		return run.Usage("", "-o %s: want text, json or jsonl", c.format)
	}
	return c.do(cmd, func(ctx context.Context, records *control.Records) error {
		return f(ctx, output{cmd.OutOrStdout(), c.format}, records)
	})
}

// do runs f with a client of cached.
func (c *operatorCall) do(cmd *cobra.Command, f func(context.Context, *control.Records) error) error {
	file, err := config.Load(c.file, config.Tool)
	if err != nil {
		return err
	}
	client, err := dial(file, control.KindCached)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
	defer cancel()
	return f(ctx, client.Records())
}

// dial connects to cached or policyd as an operator: by the admin socket if the
// daemon runs on this machine, else with the operator's certificate.
func dial(f *config.File, kind string) (*control.Client, error) {
	socket := f.Layout().Socket(kind)
	if _, err := os.Lstat(socket); err == nil {
		return control.Dial([]string{"unix:" + socket}, nil, logging.Discard())
	}
	addrs := f.Connect.Cached
	if kind == control.KindPolicyd {
		addrs = f.Connect.Policyd
	}
	if len(addrs) == 0 {
		return nil, run.Failure(kind+" does not run here and connect."+kind+" names no other place",
			"is it started? its socket would be "+socket, errors.New("nothing to connect to"))
	}
	id, err := run.LoadIdentity(f, control.KindOperator)
	if err != nil {
		return nil, err
	}
	return control.Dial(addrs, id.Client(kind), logging.Discard())
}

// listAll returns the live records of a kind by their ids.
func listAll[T any](ctx context.Context, l sallyport.Lister, kind sallyport.Kind) (map[string]T, error) {
	records, err := l.List(ctx, kind)
	if err != nil {
		return nil, fmt.Errorf("list %ss: %w", kind, err)
	}
	all := make(map[string]T, len(records))
	for _, r := range records {
		v, err := sallyport.Decode[T](r)
		if err != nil {
			return nil, err
		}
		all[r.ID] = v
	}
	return all, nil
}

// listing is how a list of T is written: a table for people, one JSON document
// with a schema, or one JSON document a line.
type listing[T any] struct {
	schema string // "sallyport.sessions/v1"
	key    string // of the items in the document
	header string // of the table, tabs between columns
	row    func(T) string
}

func (l listing[T]) write(out output, items []T) error {
	enc := json.NewEncoder(out)
	switch out.format {
	case "json":
		enc.SetIndent("", "  ")
		if items == nil {
			items = []T{} // not null
		}
		return enc.Encode(map[string]any{"schema": l.schema, l.key: items})
	case "jsonl":
		for _, item := range items {
			if err := enc.Encode(item); err != nil {
				return err
			}
		}
		return nil
	}
	t := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, l.header)
	for _, item := range items {
		fmt.Fprintln(t, l.row(item))
	}
	return t.Flush()
}

// tabbed is a row of a table. Tabs and line ends in a value would break it.
func tabbed(values ...any) string {
	cells := make([]string, len(values))
	for i, v := range values {
		cells[i] = strings.Map(func(r rune) rune {
			if r < ' ' || r == 0x7F {
				return '?'
			}
			return r
		}, fmt.Sprint(v))
	}
	return strings.Join(cells, "\t")
}

// operatorName is who runs this tool.
func operatorName() string {
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return "operator"
}

func rounded(d time.Duration) string {
	if d >= time.Hour {
		return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
	}
	return d.Round(time.Second).String()
}

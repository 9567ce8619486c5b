package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/proto/control"
)

// listedConfig is a configuration of the history as an operator sees it.
type listedConfig struct {
	Revision   sallyport.Revision `json:"revision"`
	InForce    bool               `json:"in_force"`
	Applied    time.Time          `json:"applied"`
	By         string             `json:"by"`
	Source     string             `json:"source"`
	RollbackTo sallyport.Revision `json:"rollback_to,omitempty"`
	Routes     int                `json:"routes"`
}

var historyListing = listing[listedConfig]{
	schema: "sallyport.config_history/v1", key: "history",
	header: "REVISION\tAPPLIED\tBY\tROUTES\tFROM\t",
	row: func(c listedConfig) string {
		from, state := c.Source, ""
		if c.RollbackTo != 0 {
			from = fmt.Sprintf("revision %d (rollback)", c.RollbackTo)
		}
		if c.InForce {
			state = "in force"
		}
		return tabbed(c.Revision, c.Applied.Format(time.RFC3339), c.By, c.Routes, from, state)
	},
}

func configHistoryCommand() *cobra.Command {
	var call operatorCall
	cmd := &cobra.Command{
		Use:   "history --config FILE [-o text|json|jsonl]",
		Short: "list the configurations that were in force, the newest first",
		Long: `Lists when routes and policies were applied, by whom and from which file. The
last 50 are kept, fewer if they are very large.`,
		Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return call.list(cmd, func(ctx context.Context, out output, records *control.Records) error {
				history, inForce, err := historyOf(ctx, records)
				if err != nil {
					return err
				}
				var list []listedConfig
				for _, p := range history {
					list = append(list, listedConfig{p.Revision, p.Revision == inForce, p.Applied, p.By, p.Source, p.RollbackTo, p.Routes})
				}
				return historyListing.write(out, list)
			})
		},
	}
	call.listFlags(cmd)
	return cmd
}

// historyOf returns what is kept, and which revision is in force (0: none).
func historyOf(ctx context.Context, records *control.Records) ([]config.Past, sallyport.Revision, error) {
	current, err := records.Get(ctx, sallyport.KindConfig, "current")
	if err != nil && !errors.Is(err, sallyport.ErrNotFound) {
		return nil, 0, err
	}
	history, err := config.History(ctx, records)
	return history, current.Revision, err
}

func configShowCommand() *cobra.Command {
	var call operatorCall
	cmd := &cobra.Command{
		Use:   "show [REVISION] --config FILE",
		Short: "print routes and policies of a revision as YAML; without one, those in force",
		Args:  revisionArg,
		RunE: func(cmd *cobra.Command, args []string) error {
			want, err := revisionOf(args)
			if err != nil {
				return err
			}
			return call.do(cmd, func(ctx context.Context, records *control.Records) error {
				history, inForce, err := historyOf(ctx, records)
				if err != nil {
					return err
				}
				past, err := config.Find(history, cmp.Or(want, inForce), inForce)
				if err != nil {
					return notKept(err)
				}
				c, err := past.Unpack()
				if err != nil {
					return err
				}
				return config.WriteRoutes(cmd.OutOrStdout(), c)
			})
		},
	}
	run.ConfigFlag(cmd, &call.file)
	return cmd
}

func configRollbackCommand() *cobra.Command {
	var call operatorCall
	cmd := &cobra.Command{
		Use:   "rollback [REVISION] --config FILE",
		Short: "put an earlier configuration in force again, as a new revision",
		Long: `Puts routes and policies of an earlier revision in force again; without one, those
of the revision before. The file is not changed: whoever applies it next, or the
all-in-one at its next start or when the file changes, puts the file's in force.
Refused if the revision does not load today, or if another was applied meanwhile.`,
		Args: revisionArg,
		RunE: func(cmd *cobra.Command, args []string) error {
			to, err := revisionOf(args)
			if err != nil {
				return err
			}
			return call.do(cmd, func(ctx context.Context, records *control.Records) error {
				return rollback(ctx, records, to, call.file, cmd.OutOrStdout())
			})
		},
	}
	run.ConfigFlag(cmd, &call.file)
	return cmd
}

func rollback(ctx context.Context, records *control.Records, to sallyport.Revision, file string, out io.Writer) error {
	from, rev, changed, err := config.Rollback(ctx, records, to, time.Now())
	switch {
	case errors.Is(err, config.ErrNotKept):
		return notKept(err)
	case errors.Is(err, sallyport.ErrConflict):
		return run.Failure("roll back", "somebody applied a configuration at the same moment: look at `sallyport config history`", err)
	case err != nil:
		return err
	case !changed:
		_, err := fmt.Fprintf(out, "already in force: what revision %d says, policy revision %d\n", from.Revision, rev)
		return err
	}
	_, err = fmt.Fprintf(out, "rolled back to revision %d: %d routes, policy revision %d\n"+
		"%s still says otherwise: `sallyport apply`, or the all-in-one at its next start or when the file changes, puts it in force again\n",
		from.Revision, from.Routes, rev, file)
	return err
}

func notKept(err error) error {
	return run.Usage("list what is kept with: sallyport config history", "%v", err)
}

// revisionArg asks for a revision or nothing.
func revisionArg(cmd *cobra.Command, args []string) error {
	if len(args) > 1 {
		return run.Usage("usage: "+cmd.UseLine(), "%d arguments, want at most 1", len(args))
	}
	return nil
}

// revisionOf reads the argument; 0 if there is none.
func revisionOf(args []string) (sallyport.Revision, error) {
	if len(args) == 0 {
		return 0, nil
	}
	n, err := strconv.ParseUint(args[0], 10, 64)
	if err != nil || n == 0 {
		return 0, run.Usage("list them with: sallyport config history", "%.40q is no revision", args[0])
	}
	return sallyport.Revision(n), nil
}

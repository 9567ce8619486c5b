package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"sallyport"
	"sallyport/audit"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/proto/control"
)

func auditCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "audit", Short: "verify and read audit logs", Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(auditVerifyCommand(), auditTailCommand())
	return cmd
}

// daemonFlag adds --daemon to cmd.
func daemonFlag(cmd *cobra.Command, daemons *[]string) {
	cmd.Flags().StringSliceVar(daemons, "daemon", nil, "only the chain of this `daemon` (cached, policyd, authd, gateway)")
}

func checkDaemons(daemons []string) ([]string, error) {
	if len(daemons) == 0 {
		return config.Daemons, nil
	}
	for _, d := range daemons {
		if !slices.Contains(config.Daemons, d) {
			return nil, run.Usage("", "--daemon %s: want one of %s", d, strings.Join(config.Daemons, ", "))
		}
	}
	return daemons, nil
}

func auditVerifyCommand() *cobra.Command {
	var file string
	var only []string
	cmd := &cobra.Command{
		Use:   "verify --config FILE [--daemon D]…",
		Short: "check that no audit record was changed, removed or reordered",
		Long: `Checks each daemon's chain in data_dir against its public key, and against the
last signed head that cached keeps, if cached can be reached: so a chain whose end
was cut off shows. Exit 1 names the first bad sequence number.`,
		Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			daemons, err := checkDaemons(only)
			if err != nil {
				return err
			}
			f, err := config.Load(file, config.Tool)
			if err != nil {
				return err
			}
			return verifyAll(cmd.Context(), f, daemons, len(only) > 0, cmd.OutOrStdout())
		},
	}
	run.ConfigFlag(cmd, &file)
	daemonFlag(cmd, &only)
	return cmd
}

// verifyAll verifies chains; one that does not exist is an error only if it was
// asked for by name, since the daemons of a site may be on several machines.
func verifyAll(ctx context.Context, f *config.File, daemons []string, named bool, out io.Writer) error {
	layout := f.Layout()
	heads := keptHeads(ctx, f)
	var errs []error
	verified := 0
	for _, daemon := range daemons {
		pub, err := layout.AuditPublicKey(daemon)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		report, err := audit.Verify(layout.AuditDir(daemon), pub, heads[daemon]...)
		var bad *audit.Fault
		switch {
		case (errors.Is(err, audit.ErrNoChain) || errors.Is(err, fs.ErrNotExist)) && !named:
			continue
		case errors.As(err, &bad):
			errs = append(errs, run.Failure(fmt.Sprintf("%s: the audit chain does not hold", daemon), "compare with a backup; whoever changed it had access to "+layout.AuditDir(daemon), bad))
			continue
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", daemon, err))
			continue
		}
		verified++
		compared := "compared with the head in cached"
		if len(heads[daemon]) == 0 {
			compared = "no head in cached to compare with"
		}
		fmt.Fprintf(out, "%-8s ok  %d records up to sequence %d, signed up to %d, %s\n", daemon, report.Records, report.Last, report.Signed, compared)
		for _, seq := range report.Torn {
			fmt.Fprintf(out, "%-8s     a record before sequence %d was torn when the daemon died; it was never acknowledged\n", daemon, seq)
		}
	}
	if verified == 0 && len(errs) == 0 {
		errs = append(errs, run.Failure("no audit chain here", "", errors.New(layout.AuditDir(""))))
	}
	return errors.Join(errs...)
}

// keptHeads returns the heads that cached keeps; none if it cannot be reached.
func keptHeads(ctx context.Context, f *config.File) map[string][]audit.Head {
	heads := map[string][]audit.Head{}
	client, err := dial(f, control.KindCached)
	if err != nil {
		return heads
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	for _, daemon := range config.Daemons {
		r, err := client.Records().Get(ctx, sallyport.KindAuditHead, run.AuditHeadID(f, daemon))
		if err != nil {
			continue
		}
		if h, err := sallyport.Decode[audit.Head](r); err == nil {
			heads[daemon] = []audit.Head{h}
		}
	}
	return heads
}

func auditTailCommand() *cobra.Command {
	var file, output string
	var only []string
	var last int
	var follow bool
	cmd := &cobra.Command{
		Use:   "tail --config FILE [--daemon D]… [-n N] [-f] [-o text|jsonl]",
		Short: "print the last audit records, and new ones as they come",
		Args:  run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			daemons, err := checkDaemons(only)
			if err != nil {
				return err
			}
			if output != "text" && output != "jsonl" {
				return run.Usage("", "-o %s: want text or jsonl", output)
			}
			f, err := config.Load(file, config.Tool)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			t := tail{layout: f.Layout(), out: cmd.OutOrStdout(), json: output == "jsonl"}
			from, err := t.past(daemons, last)
			if err != nil || !follow {
				return err
			}
			return t.follow(ctx, from)
		},
	}
	run.ConfigFlag(cmd, &file)
	daemonFlag(cmd, &only)
	cmd.Flags().IntVarP(&last, "lines", "n", 20, "how many of the last records of all chains together")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "wait for new records")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "`format`: text or jsonl")
	return cmd
}

// tail prints audit records of several chains.
type tail struct {
	layout config.Layout
	json   bool

	mu  sync.Mutex // guards out
	out io.Writer
}

// taken is an entry and whose it is.
type taken struct {
	Daemon string `json:"daemon"`
	audit.Entry
}

// past prints the last n records and returns where each chain goes on.
func (t *tail) past(daemons []string, n int) (next map[string]uint64, err error) {
	var all []taken
	next = map[string]uint64{}
	for _, daemon := range daemons {
		next[daemon] = 0
		var own []taken
		for e, err := range audit.Read(t.layout.AuditDir(daemon), 0) {
			if err != nil {
				return nil, fmt.Errorf("%s: %w", daemon, err)
			}
			next[daemon] = e.Sequence + 1
			if own = append(own, taken{daemon, e}); len(own) > 2*n {
				own = slices.Delete(own, 0, len(own)-n)
			}
		}
		all = append(all, own[max(0, len(own)-n):]...)
	}
	slices.SortStableFunc(all, func(a, b taken) int {
		return cmp.Or(a.Record.Time.Compare(b.Record.Time), cmp.Compare(a.Sequence, b.Sequence))
	})
	for _, e := range all[max(0, len(all)-n):] {
		if err := t.print(e); err != nil {
			return nil, err
		}
	}
	return next, nil
}

func (t *tail) follow(ctx context.Context, from map[string]uint64) error {
	g, ctx := errgroup.WithContext(ctx)
	for daemon, next := range from {
		g.Go(func() error {
			for e, err := range audit.Tail(ctx, t.layout.AuditDir(daemon), next) {
				if err != nil {
					return fmt.Errorf("%s: %w", daemon, err)
				}
				if err := t.print(taken{daemon, e}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

func (t *tail) print(e taken) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.json {
		return json.NewEncoder(t.out).Encode(e)
	}
	_, err := fmt.Fprintf(t.out, "%s  %-8s %-13s %s\n", e.Record.Time.Local().Format("2006-01-02 15:04:05.000"), e.Daemon, e.Record.Type, strings.Join(words(e.Record), "  "))
	return err
}

// words are the parts of a record that a person looks for first.
func words(r sallyport.AuditRecord) []string {
	var w []string
	add := func(label, value string) {
		if value != "" {
			w = append(w, strings.TrimSpace(label+" "+value))
		}
	}
	add("", r.Target)
	if r.Decision != nil {
		add("", r.Decision.Verdict.String())
		add("rule", r.Decision.Rule)
	}
	add("user", string(r.User))
	add("session", string(r.Session))
	add("peer", r.Peer)
	add("flow", string(r.Flow))
	add("", string(r.DecisionID))
	add("", r.Code)
	if r.BytesUp > 0 || r.BytesDown > 0 {
		add("", fmt.Sprintf("%d bytes up, %d down", r.BytesUp, r.BytesDown))
	}
	add("", r.Detail)
	return w
}

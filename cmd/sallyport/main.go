// Command sallyport is the operator's tool, and all four daemons in one process.
package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/cmd/sallyport/internal/allinone"
)

func main() { run.Main(root()) }

func root() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "sallyport",
		Short: "the guarded door through the wall: all daemons in one process, and the operator's tool",
		Args:  run.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(serveCommand(), initCommand(), applyCommand(), configCommand(), policyCommand(), sessionsCommand(), devicesCommand(), recordsCommand(), backupCommand(), restoreCommand(), auditCommand(), keysCommand(), demoCommand(), passwordCommand(), versionCommand())
	return cmd
}

func serveCommand() *cobra.Command {
	cmd := run.Daemon(config.AllInOne, "run all four daemons in one process", allinone.Start)
	cmd.Use = "serve --config FILE"
	cmd.Long = `Runs cached, policyd, authd and gateway in one process. Keys and certificates
are made in data_dir at the first start. When everything listens, one line is
printed: "ready" and a JSON document with the real addresses. The file is read
again on SIGHUP and when it changes; a bad change is told and not taken.`
	return cmd
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "print the version", Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "sallyport", run.Version())
			return err
		},
	}
}

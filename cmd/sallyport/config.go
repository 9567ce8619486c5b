package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
)

func configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "config", Short: "check a configuration, list and bring back earlier ones", Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(configHistoryCommand(), configShowCommand(), configRollbackCommand(), &cobra.Command{
		Use:   "check FILE",
		Short: "report every fault of a configuration file",
		Long: `Checks a file as every daemon that has a section in it would, including routes
and policies, and reports all faults at once as file:line: key: message.
Exit 0 if there is none, 2 otherwise.`,
		Args: run.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := config.Load(args[0], config.Checker)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: ok, %d routes\n", args[0], len(f.Routes))
			return err
		},
	}, &cobra.Command{
		Use:   "schema",
		Short: "print the JSON Schema of the configuration file",
		Long:  `Prints a JSON Schema (draft 2020-12) for editors that complete and check YAML.`,
		Args:  run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			enc := json.NewEncoder(cmd.OutOrStdout())
			enc.SetIndent("", "  ")
			enc.SetEscapeHTML(false)
			return enc.Encode(config.Schema())
		},
	})
	return cmd
}

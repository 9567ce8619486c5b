package main

import (
	"slices"

	"github.com/spf13/cobra"

	"sallyport/cmd/internal/run"
	"sallyport/cmd/sallyport/internal/demo"
)

func demoCommand() *cobra.Command {
	o := demo.Options{}
	cmd := &cobra.Command{
		Use:   "demo [--exit]",
		Short: "show on this machine what Sallyport does, with every claim measured",
		Long: `Starts the daemons, an identity provider and sample services on loopback, logs a
demo user in through the browser flow, connects, is denied, and is cut when the
reason for a connection ends. Exit 0 only if each claim held. Without --exit it
stays up for trying things out. Needs the built agent beside this program.`,
		Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Sabotage != "" && !slices.Contains(demo.Sabotages, o.Sabotage) {
				return run.Usage("", "--sabotage %s: want cut or deny", o.Sabotage)
			}
			o.Out = cmd.OutOrStdout()
			return demo.Run(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.Exit, "exit", false, "end after the story")
	cmd.Flags().StringVar(&o.Sabotage, "sabotage", "", "switch a guard off, to see the demonstration fail: `cut or deny`")
	if err := cmd.Flags().MarkHidden("sabotage"); err != nil {
		panic(err) // the flag was added one line above
	}
	return cmd
}

package main

import (
	"github.com/spf13/cobra"

	"sallyport/cmd/internal/run"
)

func policyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "policy", Short: "check, test, explain and compare policies", Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(policyCheckCommand(), policyTestCommand(), policyExplainCommand(), policyPlanCommand())
	return cmd
}

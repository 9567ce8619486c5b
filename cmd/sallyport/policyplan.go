package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func policyPlanCommand() *cobra.Command {
	return &cobra.Command{
		Use: "plan", Short: "compare a configuration with the one in force",
		RunE: func(*cobra.Command, []string) error { return errors.New("not built") },
	}
}

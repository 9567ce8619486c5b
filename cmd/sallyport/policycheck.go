package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func policyCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use: "check", Short: "report what is wrong or doubtful in a policy",
		RunE: func(*cobra.Command, []string) error { return errors.New("not built") },
	}
}

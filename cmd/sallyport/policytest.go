package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func policyTestCommand() *cobra.Command {
	return &cobra.Command{
		Use: "test", Short: "run the tests of policies",
		RunE: func(*cobra.Command, []string) error { return errors.New("not built") },
	}
}

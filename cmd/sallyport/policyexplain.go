package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func policyExplainCommand() *cobra.Command {
	return &cobra.Command{
		Use: "explain", Short: "say why somebody may or may not reach a target",
		RunE: func(*cobra.Command, []string) error { return errors.New("not built") },
	}
}

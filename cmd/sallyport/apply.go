package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/proto/control"
)

func applyCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "apply --config FILE",
		Short: "make the file's routes and policies the ones in force",
		Long: `Writes routes and policies of the file into cached as one record; every policyd
takes it over at once, and its revision is the policy revision that decisions
name. For daemons that run apart; the all-in-one does it by itself.`,
		Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f, err := config.Load(file, config.Tool)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 15*time.Second)
			defer cancel()
			return apply(ctx, cmd, f)
		},
	}
	run.ConfigFlag(cmd, &file)
	return cmd
}

func apply(ctx context.Context, cmd *cobra.Command, f *config.File) error {
	gateways, err := gatewaysOf(f)
	if err != nil {
		return err
	}
	client, err := dial(f, control.KindCached)
	if err != nil {
		return err
	}
	defer client.Close()
	rev, changed, err := config.Apply(ctx, client.Records(), f.Record(gateways, nil, time.Now()))
	if err != nil {
		return err
	}
	word := "applied"
	if !changed {
		word = "already in force"
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %d routes, policy revision %d\n", word, len(f.Routes), rev)
	return err
}

// gatewaysOf tells agents of the file's gateways.
func gatewaysOf(f *config.File) ([]sallyport.GatewayInfo, error) {
	url := f.Gateway.PublicURL
	switch {
	case len(f.Gateways) > 0:
	case url == "":
		return nil, run.Usage("add the section gateway, as the gateway has it, or list all in gateways", "%s: gateway.public_url is required: agents learn of it by this record", f.Path())
	case config.PortOf(url) == "0":
		return nil, run.Usage("write the port that the gateway's ready line names", "%s: gateway.public_url has port 0", f.Path())
	}
	return f.GatewayInfos(url)
}

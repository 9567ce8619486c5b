package main

import (
	"fmt"
	"io"
	"net/url"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/proto/control"
)

func initCommand() *cobra.Command {
	var file, replace string
	cmd := &cobra.Command{
		Use:   "init --config FILE [--rotate session-ca]",
		Short: "make keys and certificates for daemons that run apart",
		Long: `Makes the CAs, keys and service certificates of DESIGN section 3 in data_dir,
and says which daemon needs which file. What exists stays; certificates past half
of their life are made anew, so run it again within 45 days. Where all daemons
run on one machine nothing has to be copied. The all-in-one does not need it.

--rotate session-ca makes a new CA for session certificates. Daemons take it over
while they run, and no connection is dropped.`,
		Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f, err := config.Load(file, config.Tool)
			if err != nil {
				return err
			}
			if replace != "" {
				return rotate(replace, f, time.Now(), cmd.OutOrStdout())
			}
			if err := makeKeys(f, time.Now()); err != nil {
				return err
			}
			return tellFiles(cmd.OutOrStdout(), f.Layout())
		},
	}
	run.ConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&replace, "rotate", "", "replace a `key` by a new one: session-ca")
	return cmd
}

func makeKeys(f *config.File, now time.Time) error {
	layout := f.Layout()
	if err := layout.EnsureKeys(); err != nil {
		return err
	}
	for _, kind := range append([]string{control.KindOperator}, config.Daemons...) {
		if err := layout.EnsureService(f.Domain, kind, now); err != nil {
			return err
		}
	}
	for daemon, public := range map[string]struct{ url, certFile string }{
		"gateway": {f.Gateway.PublicURL, f.Gateway.TLS.CertFile},
		"authd":   {f.Authd.PublicURL, f.Authd.TLS.CertFile},
	} {
		u, err := url.Parse(public.url)
		if err != nil || u.Hostname() == "" || public.certFile != "" {
			continue
		}
		if err := layout.EnsurePublic(daemon, u.Hostname(), now); err != nil {
			return err
		}
	}
	return nil
}

// tellFiles prints which files each daemon reads, relative to data_dir.
func tellFiles(w io.Writer, l config.Layout) error {
	rel := func(path string) string {
		if r, err := filepath.Rel(l.Dir, path); err == nil {
			return r
		}
		return path
	}
	fmt.Fprintf(w, "keys and certificates are in %s\n", l.Dir)
	for _, daemon := range append([]string{control.KindOperator}, config.Daemons...) {
		var names []string
		for _, path := range l.FilesOf(daemon) {
			names = append(names, rel(path))
		}
		if _, err := fmt.Fprintf(w, "%-9s%s\n", daemon, names); err != nil {
			return err
		}
	}
	return nil
}

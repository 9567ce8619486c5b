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
	var file, replace, from, name string
	cmd := &cobra.Command{
		Use:   "init --config FILE [--rotate session-ca | --from DIR --name NAME]",
		Short: "make keys and certificates for daemons that run apart",
		Long: `Makes the CAs, keys and service certificates of DESIGN section 3 in data_dir,
and says which daemon needs which file. What exists stays; certificates past half
of their life are made anew, so run it again within 45 days. Where all daemons
run on one machine nothing has to be copied. The all-in-one does not need it.

--rotate session-ca makes a new CA for session certificates. Daemons take it over
while they run, and no connection is dropped.

With --from it fills the data_dir of a further process instead: for the daemons
whose sections FILE has, it takes the keys that all of a kind share from DIR, the
data_dir of the first init, and signs certificates of their own with the CAs there.
NAME tells them from the others of their kind, in logs and in the audit. Run it
where DIR is, and move the data_dir to its machine.`,
		Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f, err := config.Load(file, config.Tool)
			if err != nil {
				return err
			}
			if replace != "" {
				return rotate(replace, f, time.Now(), cmd.OutOrStdout())
			}
			if (from == "") != (name == "") {
				return run.Usage("sallyport init --config FILE --from DIR --name NAME", "--from and --name belong together")
			}
			if from != "" {
				return makeCopy(f, from, name, time.Now())
			}
			if err := makeKeys(f, time.Now()); err != nil {
				return err
			}
			return tellFiles(cmd.OutOrStdout(), f.Layout())
		},
	}
	run.ConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&replace, "rotate", "", "replace a `key` by a new one: session-ca")
	cmd.Flags().StringVar(&from, "from", "", "data_dir `directory` of the first init, for a further process of a kind")
	cmd.Flags().StringVar(&name, "name", "", "`name` of that process, for example policyd-2")
	return cmd
}

func makeKeys(f *config.File, now time.Time) error {
	layout := f.Layout()
	if err := layout.EnsureKeys(); err != nil {
		return err
	}
	for _, kind := range append([]string{control.KindOperator}, config.Daemons...) {
		if err := layout.EnsureService(f.Domain, kind, "", now); err != nil {
			return err
		}
	}
	return makePublic(f, layout, now)
}

// makePublic makes the certificates of public listeners that have none of their
// own.
func makePublic(f *config.File, layout config.Layout, now time.Time) error {
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

// makeCopy fills the file's data_dir for further processes of the daemons that have
// a section in it.
func makeCopy(f *config.File, from, name string, now time.Time) error {
	layout := f.Layout()
	layout.From = from
	daemons := 0
	for _, daemon := range config.Daemons {
		if !f.Has(daemon) {
			continue
		}
		daemons++
		if err := layout.EnsureCopy(daemon); err != nil {
			return err
		}
		if err := layout.EnsureService(f.Domain, daemon, name, now); err != nil {
			return err
		}
	}
	if daemons == 0 {
		return run.Usage("write only the sections of the daemons that are to run there", "%s has a section of no daemon", f.Path())
	}
	return makePublic(f, layout, now)
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

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/cached"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/internal/keyring"
	"sallyport/proto/control"
)

func backupCommand() *cobra.Command {
	var call docCall
	var to string
	var force bool
	cmd := &cobra.Command{
		Use:   "backup --config FILE [--to FILE|-] [--force] [-o text|json]",
		Short: "write everything that cached holds into one file, while it runs",
		Long: `Takes a backup of all records as they are at one instant, from a running cached
(or sallyport serve) with any engine. The file appears under its name only when it
is whole, flushed to the disk, and was read back. With --to - it goes to standard
output, and what is said about it to standard error.

A backup holds no key: what must stay secret is encrypted in it as it is in the
store, and only the records key makes it good for anything. Keep copies of
data_dir/keys apart from backups. ` + "`sallyport restore`" + ` brings a backup back.`,
		Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return call.with(cmd, func(ctx context.Context, f *config.File) error {
				if to == "-" {
					done, err := streamBackup(ctx, f, cmd.OutOrStdout())
					if err != nil {
						return err
					}
					return call.tell(cmd.ErrOrStderr(), done)
				}
				take := func(w io.Writer) error { return takeBackup(ctx, f, w) }
				done, err := saveBackup(f, cmp.Or(to, backupName(time.Now())), force, take)
				if err != nil {
					return err
				}
				return call.tell(cmd.OutOrStdout(), done)
			})
		},
	}
	call.flags(cmd)
	cmd.Flags().StringVar(&to, "to", "", "`file` to write, or - (sallyport-backup-TIME.bak)")
	cmd.Flags().BoolVar(&force, "force", false, "replace a file that is there")
	cmd.AddCommand(backupVerifyCommand())
	return cmd
}

// docCall is what commands have in common that say one thing: the configuration,
// and whether it is told as text or as a JSON document.
type docCall struct{ file, format string }

func (c *docCall) flags(cmd *cobra.Command) {
	run.ConfigFlag(cmd, &c.file)
	cmd.Flags().StringVarP(&c.format, "output", "o", "text", "`format`: text or json")
}

// with runs do with the configuration. SIGINT and SIGTERM end its context, so that
// it can clean up.
func (c *docCall) with(cmd *cobra.Command, do func(context.Context, *config.File) error) error {
	if c.format != "text" && c.format != "json" {
		return run.Usage("", "-o %s: want text or json", c.format)
	}
	f, err := config.Load(c.file, config.Tool)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return do(ctx, f)
}

// tell writes what is to be told; as JSON it is doc itself.
func (c *docCall) tell(w io.Writer, doc interface{ text() string }) error {
	if c.format == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(doc)
	}
	_, err := io.WriteString(w, doc.text())
	return err
}

func backupName(now time.Time) string {
	return "sallyport-backup-" + now.UTC().Format("20060102T150405Z") + ".bak"
}

// backedUp is what is told of a backup.
type backedUp struct {
	Schema   string             `json:"schema"` // sallyport.backup/v1
	File     string             `json:"file"`
	Made     time.Time          `json:"made"`
	Epoch    sallyport.Epoch    `json:"epoch"`
	Revision sallyport.Revision `json:"revision"`
	Records  int                `json:"records"`
	Bytes    int64              `json:"bytes"`
	// RecordsKey is the id of the key that it takes to restore it, KeySource where
	// keys come from here, and KeyFile the file of this key, if it is here.
	RecordsKey string `json:"records_key"`
	KeySource  string `json:"records_key_source"`
	KeyFile    string `json:"records_key_file,omitempty"`
}

func (b *backedUp) text() string {
	where := fmt.Sprintf("nobody has it here (source %s), but it must be where this is restored", b.KeySource)
	if b.KeyFile != "" {
		where = fmt.Sprintf("%s (source %s); keep a copy of it apart from the backup", b.KeyFile, b.KeySource)
	}
	return fmt.Sprintf("backup      %s\nmade        %s\nrevision    %d (epoch %s)\nrecords     %d\nsize        %d bytes\nto restore  the records key %s is needed: %s\n",
		b.File, b.Made.Format(time.RFC3339), b.Revision, b.Epoch, b.Records, b.Bytes, b.RecordsKey, where)
}

// look reads a backup to its end and returns what is to be told of it.
func look(r io.Reader, f *config.File, name string) (*backedUp, error) {
	layout := f.Layout()
	b := &backedUp{Schema: "sallyport.backup/v1", File: name, KeySource: layout.KeySource()}
	in := &counted{r: r}
	var key keyring.ID
	err := cached.ReadBackup(in, func(info cached.BackupInfo) error {
		b.Made, b.Epoch, b.Revision = info.Made, info.Head.Epoch, info.Head.Revision
		return nil
	}, func(row cached.Row) error {
		b.Records++
		if id, ok := cached.WrappedBy(row); ok {
			key = id
		}
		return nil
	})
	b.Bytes, b.RecordsKey = in.n, key.String()
	if kek, err := layout.KEK(config.RecordsKey); err == nil && slices.Contains(kek.IDs(), key) {
		b.KeyFile = layout.KEKFile(config.RecordsKey)
	}
	return b, err
}

// counted counts what is read.
type counted struct {
	r io.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// takeBackup writes the backup of the running cached to w.
func takeBackup(ctx context.Context, f *config.File, w io.Writer) error {
	client, err := dial(f, control.KindCached)
	if err != nil {
		return withoutCached(f, err)
	}
	defer client.Close()
	err = client.Records().Backup(ctx, w)
	if sallyport.CodeOf(err) == control.CodeUnavailable {
		return withoutCached(f, err)
	}
	return err
}

// withoutCached tells what to do where there is nobody to take a backup from.
func withoutCached(f *config.File, err error) error {
	hint := "start cached (or sallyport serve) and try again"
	if !f.Cached.OnPostgres() {
		hint += "; or copy all of " + f.Layout().Database() + "* together while it is stopped"
	}
	return run.Failure("backup: cached does not answer, no backup was written", hint, err)
}

// streamBackup writes a backup to w, looking at it on its way.
func streamBackup(ctx context.Context, f *config.File, w io.Writer) (*backedUp, error) {
	r, to := io.Pipe()
	took := make(chan error, 1)
	go func() {
		err := takeBackup(ctx, f, io.MultiWriter(w, to))
		to.CloseWithError(err)
		took <- err
	}()
	done, err := look(r, f, "-")
	r.CloseWithError(err)
	return done, cmp.Or(<-took, err)
}

// saveBackup has take write a backup into the file path, which is then whole or as
// it was.
func saveBackup(f *config.File, path string, force bool, take func(io.Writer) error) (done *backedUp, err error) {
	if _, err := os.Lstat(path); err == nil && !force {
		return nil, fileExists(path)
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	defer func() {
		tmp.Close() // after Sync there is nothing left to fail
		if err != nil {
			err = errors.Join(err, os.Remove(tmp.Name()))
		}
	}()
	if err := take(tmp); err != nil {
		return nil, err
	}
	if err := tmp.Sync(); err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	if _, err := tmp.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	if done, err = look(tmp, f, path); err != nil {
		return nil, err
	}
	if err := publish(tmp.Name(), path, force); err != nil {
		return nil, err
	}
	return done, nil
}

// publish gives the file tmp its name, for good. Without force it takes nobody
// else's, not even one that appeared meanwhile.
func publish(tmp, path string, force bool) error {
	if !force {
		switch err := os.Link(tmp, path); {
		case errors.Is(err, fs.ErrExist):
			return fileExists(path)
		case err == nil:
			return errors.Join(os.Remove(tmp), syncDir(filepath.Dir(path)))
		} // else there are no links on this disk, and Lstat must do
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	return syncDir(filepath.Dir(path))
}

func fileExists(path string) error {
	return run.Usage("choose another name, or replace it with --force", "%s exists", path)
}

// syncDir makes names in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func backupVerifyCommand() *cobra.Command {
	var call docCall
	cmd := &cobra.Command{
		Use:   "verify FILE --config FILE [-o text|json]",
		Short: "check with the records key that a backup is what cached wrote, whole and unchanged",
		Long: `Reads a backup to its end and checks the code of each record, and that none was
put in, taken out or put back. It needs the records key of the configuration, and
no cached. Exit code 4: the backup does not hold.`,
		Args: run.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return call.with(cmd, func(_ context.Context, f *config.File) error {
				done, err := verifyBackup(f, args[0])
				if err != nil {
					return err
				}
				return call.tell(cmd.OutOrStdout(), done)
			})
		},
	}
	call.flags(cmd)
	return cmd
}

// verified is backedUp of a backup that was checked.
type verified struct{ *backedUp }

func (v verified) text() string {
	return "ok: every record verifies, and none is missing\n" + v.backedUp.text()
}

func verifyBackup(f *config.File, path string) (*verified, error) {
	in, err := openBackup(path)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	kek, err := f.Layout().KEK(config.RecordsKey)
	if err != nil {
		return nil, err
	}
	info, err := cached.VerifyBackup(in, cached.Deps{KEK: kek})
	if code := sallyport.CodeOf(err); code == "backup.changed" || code == "backup.damaged" {
		return nil, unsound{fmt.Errorf("%s: %w", path, err)}
	}
	if err != nil {
		return nil, err
	}
	if info.Damaged > 0 {
		return nil, run.Differs("%s: %d of %d records do not verify; they were damaged in the store already, and restore takes the others with --drop-damaged", path, info.Damaged, info.Rows)
	}
	if _, err := in.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	done, err := look(in, f, path)
	return &verified{done}, err
}

// unsound is why a backup does not hold: a check that differed.
type unsound struct{ error }

func (u unsound) Unwrap() []error { return []error{u.error, run.ErrDiffers} }

// openBackup opens the file of a backup. One that cannot be opened is a slip of
// whoever typed it.
func openBackup(path string) (*os.File, error) {
	in, err := os.Open(path)
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return nil, run.Usage("", "%s: %s", path, strings.ToLower(pe.Err.Error()))
	}
	return in, err
}

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/audit"
	"sallyport/cached"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/cmd/internal/store"
	"sallyport/internal/keyring"
)

func restoreCommand() *cobra.Command {
	var call docCall
	var ask restoring
	cmd := &cobra.Command{
		Use:   "restore FILE --config FILE [--journal auto|none|PATH] | restore --in-place --config FILE",
		Short: "bring back a backup, or a store that cached refuses, while cached is stopped",
		Long: `Puts what a backup holds in the place of cached's store, of any engine: the one
that the configuration names, not the one that the backup was taken from. The
backup is verified first; if it was changed, nothing is touched. The store before
is kept beside it.

Sessions that ended after the backup must not live again. With SQLite the
revocation journal beside the database remembers them: where it covers the time
since the backup, all other sessions live on. Without one, every session ends and
everybody logs in again.

--in-place takes the store itself where cached refuses it with storage.rolled_back:
what verifies in it stays, and every session ends.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if ask.inPlace {
				return run.NoArgs(cmd, args)
			}
			return run.ExactArgs(1)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if ask.inPlace && (cmd.Flags().Changed("journal") || ask.dropDamaged) {
				return run.Usage("", "--in-place takes neither --journal nor --drop-damaged")
			}
			return call.with(cmd, func(ctx context.Context, f *config.File) error {
				if !ask.inPlace {
					ask.file = args[0]
				}
				done, err := ask.run(ctx, f)
				if err != nil {
					return err
				}
				return call.tell(cmd.OutOrStdout(), done)
			})
		},
	}
	call.flags(cmd)
	cmd.Flags().BoolVar(&ask.inPlace, "in-place", false, "take the store itself, as it is")
	cmd.Flags().StringVar(&ask.journal, "journal", "auto", "revocation `journal`: auto (beside the database), none, or a path (cached.db.journal)")
	cmd.Flags().BoolVar(&ask.dropDamaged, "drop-damaged", false, "take what verifies of a backup that was changed, and end every session")
	return cmd
}

// restoring is what `restore` was asked for.
type restoring struct {
	file        string
	inPlace     bool
	journal     string
	dropDamaged bool
}

func (r *restoring) run(ctx context.Context, f *config.File) (*restored, error) {
	if err := asOwner(f.Layout().Dir, os.Geteuid()); err != nil {
		return nil, err
	}
	kek, err := f.Layout().KEK(config.RecordsKey)
	if err != nil {
		return nil, err
	}
	if r.inPlace {
		return restoreInPlace(ctx, f, kek)
	}
	return r.backup(ctx, f, kek)
}

// asOwner refuses to leave files in cached's directory that cached cannot open.
func asOwner(dir string, euid int) error {
	info, err := os.Stat(dir)
	if err != nil {
		return config.Missing(err)
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && int(owner.Uid) != euid {
		return run.Usage("run it as the user that cached runs as, with sudo -u", "%s belongs to uid %d, and this is uid %d", dir, owner.Uid, euid)
	}
	return nil
}

// backup restores a backup.
func (r *restoring) backup(ctx context.Context, f *config.File, kek keyring.KEK) (*restored, error) {
	in, err := openBackup(r.file)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	info, err := cached.VerifyBackup(in, cached.Deps{KEK: kek})
	if err != nil && !(r.dropDamaged && sallyport.CodeOf(err) == "backup.changed") {
		return nil, fmt.Errorf("%s: %w", r.file, err)
	}
	done := &restored{Schema: restoreSchema, File: r.file}
	done.KeptAs, err = store.Replace(ctx, f, kek, func(s cached.Store) error {
		// Only now nobody can write into the journal any more.
		journal, why, err := r.readJournal(f, kek)
		if err != nil {
			return err
		}
		above, err := store.Reached(f)
		if err != nil {
			return err
		}
		done.Journal = journalUseOf(journal, why, info.Head)
		opts := cached.RestoreOptions{Journal: journal, Above: above, DropDamaged: r.dropDamaged}
		what := fmt.Sprintf("restore of the backup of %s at revision %d (%s)", info.Made.Format(time.RFC3339), info.Head.Revision, info.Head.Epoch)
		return audited(ctx, f, what, func() (cached.Restored, error) {
			got, err := cached.Restore(ctx, cached.Deps{Store: s, KEK: kek}, in, opts)
			done.take(got)
			return got, err
		})
	})
	if err != nil {
		return nil, err
	}
	return done, nil
}

// readJournal returns the journal that was asked for; nil, and why, if there is none.
func (r *restoring) readJournal(f *config.File, kek keyring.KEK) (j *cached.Journal, why string, err error) {
	switch {
	case r.dropDamaged:
		return nil, "--drop-damaged", nil
	case r.journal == "none":
		return nil, "--journal none", nil
	case r.journal == "auto":
		j, why = store.Journal(f, kek)
		return j, why, nil
	}
	if j, err = store.JournalAt(strings.TrimSuffix(r.journal, ".journal"), kek); err != nil {
		return nil, "", run.Usage("give the path of the journal, or of the database that it belongs to", "--journal %s: %v", r.journal, err)
	}
	return j, "", nil
}

// restoreInPlace takes the store as it is.
func restoreInPlace(ctx context.Context, f *config.File, kek keyring.KEK) (*restored, error) {
	done := &restored{Schema: restoreSchema, InPlace: true}
	err := store.InPlace(ctx, f, kek, func(s cached.Store) error {
		above, err := store.Reached(f)
		if err != nil {
			return err
		}
		return audited(ctx, f, "restore of the store in place", func() (cached.Restored, error) {
			got, err := cached.RestoreInPlace(ctx, cached.Deps{Store: s, KEK: kek}, cached.RestoreOptions{Above: above})
			done.take(got)
			return got, err
		})
	})
	return done, err
}

// audited writes down in cached's audit chain that a restore begins, and what
// became of it. cached is stopped, so the chain is free.
func audited(ctx context.Context, f *config.File, what string, restore func() (cached.Restored, error)) (err error) {
	layout := f.Layout()
	key, err := layout.AuditKey("cached")
	if err != nil {
		return err
	}
	log, err := audit.Open(layout.AuditDir("cached"), "cached", key, audit.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	note := func(code, format string, args ...any) error {
		return log.Append(ctx, sallyport.AuditRecord{
			Type: sallyport.AuditRestore, Time: time.Now(), Code: code, Detail: fmt.Sprintf(format, args...),
		})
	}
	if err := note("", "%s begins, by %s", what, operatorName()); err != nil {
		return err
	}
	got, err := restore()
	if err != nil {
		return errors.Join(err, note("failed", "%s failed", what))
	}
	return note("", "%s: %d records, %d sessions ended, %d live on, revision %d in epoch %s",
		what, got.Rows, got.SessionsEnded, got.SessionsKept, got.Head.Revision, got.Head.Epoch)
}

const restoreSchema = "sallyport.restore/v1"

// restored is what is told of a restore.
type restored struct {
	Schema  string     `json:"schema"`
	InPlace bool       `json:"in_place"`
	File    string     `json:"file,omitempty"`
	Made    time.Time  `json:"made,omitzero"`
	From    place      `json:"from"` // what was restored
	To      place      `json:"to"`   // where the store goes on
	Journal journalUse `json:"journal"`

	Records        int                `json:"records"`
	Dropped        int                `json:"records_dropped"` // did not verify
	SessionsEnded  int                `json:"sessions_ended"`
	SessionsKept   int                `json:"sessions_kept"`
	Users          int                `json:"users"`
	Devices        int                `json:"devices"`
	DevicesRevoked int                `json:"devices_revoked"`
	Config         sallyport.Revision `json:"config_revision,omitempty"`
	ConfigApplied  time.Time          `json:"config_applied,omitzero"`
	// KeptAs is what the store before is called now.
	KeptAs string `json:"kept_as,omitempty"`
}

// place is a place in a history of records.
type place struct {
	Epoch    sallyport.Epoch    `json:"epoch"`
	Revision sallyport.Revision `json:"revision"`
}

func placeOf(h cached.Head) place { return place{h.Epoch, h.Revision} }

func (r *restored) take(got cached.Restored) {
	r.Made, r.From, r.To = got.From.Made, placeOf(got.From.Head), placeOf(got.Head)
	r.Records, r.Dropped, r.SessionsEnded, r.SessionsKept = got.Rows, got.Dropped, got.SessionsEnded, got.SessionsKept
	r.Users, r.Devices, r.DevicesRevoked = got.Users, got.Devices, got.DevicesRevoked
	r.Config, r.ConfigApplied = got.Config, got.ConfigApplied
}

// journalUse is whether a journal covers the time since a backup, and why not.
type journalUse struct {
	Covers bool               `json:"covers"`
	Why    string             `json:"why,omitempty"`
	From   sallyport.Revision `json:"from,omitempty"`
	To     sallyport.Revision `json:"to,omitempty"`
}

// journalUseOf says what j, nil because of why, is worth for a backup.
func journalUseOf(j *cached.Journal, why string, backup cached.Head) journalUse {
	switch {
	case j.Covers(backup):
		return journalUse{Covers: true, From: backup.Revision, To: max(backup.Revision, j.Reached)}
	case j == nil:
		return journalUse{Why: why}
	case j.Epoch != backup.Epoch:
		return journalUse{Why: "it is that of another store, or of one that was restored since"}
	}
	return journalUse{Why: fmt.Sprintf("it goes back to revision %d only, the backup is of revision %d", j.After, backup.Revision)}
}

func (r *restored) text() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	switch {
	case r.InPlace:
		line("the store is taken as it is: %s", allEnded(r.SessionsEnded))
	case r.Journal.Covers:
		line("journal covers revisions %d to %d: %s ended since the backup stay%s ended, %s live%s on", r.Journal.From, r.Journal.To,
			many(r.SessionsEnded, "session"), ofOne(r.SessionsEnded), many(r.SessionsKept, "session"), ofOne(r.SessionsKept))
	default:
		line("no journal covers the time since the backup (%s): %s", r.Journal.Why, allEnded(r.SessionsEnded))
		line("a device that was revoked, or a user who was disabled, after %s is so no more: look for them in the audit log, and revoke them again",
			r.Made.Format(time.RFC3339))
	}
	line("kept: %s, %s (%d revoked)%s", many(r.Users, "user"), many(r.Devices, "device"), r.DevicesRevoked, r.configText())
	if r.Dropped > 0 {
		line("dropped: %s that did not verify", many(r.Dropped, "record"))
	}
	line("the store goes on at revision %d in a new history (epoch %s)", r.To.Revision, r.To.Epoch)
	if r.KeptAs != "" {
		line("the store before is kept as %s; remove that once all is well", r.KeptAs)
	}
	line("now start cached")
	return b.String()
}

func (r *restored) configText() string {
	if r.Config == 0 {
		return ", no configuration (run: sallyport apply)"
	}
	return fmt.Sprintf(", configuration revision %d applied %s", r.Config, r.ConfigApplied.UTC().Format(time.RFC3339))
}

// allEnded says that n sessions are, which were all.
func allEnded(n int) string {
	switch n {
	case 0:
		return "there were no sessions to end"
	case 1:
		return "the only session is ended; its user logs in again"
	}
	return fmt.Sprintf("all %d sessions are ended; everybody logs in again", n)
}

// many is a number of things.
func many(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// ofOne ends a verb that says what n things do.
func ofOne(n int) string {
	if n == 1 {
		return "s"
	}
	return ""
}

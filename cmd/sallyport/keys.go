package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/internal/keyring"
	"sallyport/proto/control"
)

func keysCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "keys", Short: "list and rotate the keys that protect data at rest", Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(keysListCommand(), keysRotateCommand(), keysRetireCommand())
	return cmd
}

func keysListCommand() *cobra.Command {
	var call operatorCall
	cmd := &cobra.Command{
		Use:   "ls --config FILE [-o text|json|jsonl]",
		Short: "list keys: which are active, how old, and what older ones still protect",
		Long: `Lists the key-encryption keys (kek-records, kek-seal) that this machine can read,
and the data keys that they wrap (records, seal). Never the keys themselves. ROWS
counts the records whose code still needs the key; 0 where that is not counted.`,
		Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f, err := config.Load(call.file, config.Tool)
			if err != nil {
				return err
			}
			return call.list(cmd, func(ctx context.Context, out output, records *control.Records) error {
				list, err := listKeys(ctx, f.Layout(), records)
				if err != nil {
					return err
				}
				return keyListing.write(out, list)
			})
		},
	}
	call.listFlags(cmd)
	return cmd
}

// listedKey is one key as an operator sees it.
type listedKey struct {
	Name    string    `json:"name"` // records, seal, kek-records, kek-seal
	ID      string    `json:"id"`
	State   string    `json:"state"` // active, older
	Created time.Time `json:"created,omitzero"`
	Rows    uint64    `json:"rows"`
	Source  string    `json:"source"` // where it lies
}

var keyListing = listing[listedKey]{
	schema: "sallyport.keys/v1", key: "keys",
	header: "NAME\tID\tSTATE\tAGE\tROWS\tSOURCE",
	row: func(k listedKey) string {
		age := "-"
		if !k.Created.IsZero() {
			age = rounded(time.Since(k.Created))
		}
		return tabbed(k.Name, k.ID, k.State, age, k.Rows, k.Source)
	},
}

func stateOf(place int) string {
	if place == 0 {
		return "active"
	}
	return "older"
}

func listKeys(ctx context.Context, layout config.Layout, records *control.Records) ([]listedKey, error) {
	rows, err := records.RowKeys(ctx)
	if err != nil {
		return nil, fmt.Errorf("keys of cached: %w", err)
	}
	list := listKEK(layout, config.RecordsKey)
	for i, k := range rows.Keys {
		list = append(list, listedKey{config.RecordsKey, k.ID, stateOf(i), k.Created, k.Rows, "wrapped by " + rows.KEK})
	}
	list = append(list, listKEK(layout, config.SealKey)...)
	_, about, err := sealRing(ctx, records)
	if errors.Is(err, sallyport.ErrNotFound) {
		return list, nil // no authd has run yet
	}
	if err != nil {
		return nil, fmt.Errorf("keys of authd: %w", err)
	}
	for i, k := range about.Keys {
		state := stateOf(i)
		if i == 0 && !about.Asked.IsZero() {
			state = "active, to be rotated"
		}
		list = append(list, listedKey{config.SealKey, k.ID.String(), state, k.Created, 0, "wrapped by " + about.KEK.String()})
	}
	return list, nil
}

// listKEK lists a key-encryption key, as far as this machine and user can read it.
func listKEK(layout config.Layout, name string) []listedKey {
	kek, err := layout.KEK(name)
	if err != nil {
		return []listedKey{{Name: "kek-" + name, State: "not readable here", Source: layout.KeySource()}}
	}
	var made time.Time
	if fi, err := os.Stat(layout.KEKFile(name)); err == nil {
		made = fi.ModTime()
	}
	var list []listedKey
	for i, id := range kek.IDs() {
		k := listedKey{Name: "kek-" + name, ID: id.String(), State: stateOf(i), Source: layout.KeySource()}
		if i == 0 {
			k.Created = made
		}
		list = append(list, k)
	}
	return list
}

// authd's ring of data keys, as operators see it (authd/keys.go).
const (
	sealRingID      = "authd"
	sealRingPurpose = "authd vault"
)

func sealRing(ctx context.Context, records sallyport.Records) (sallyport.Record, keyring.Description, error) {
	rec, err := records.Get(ctx, sallyport.KindKeyring, sealRingID)
	if err != nil {
		return rec, keyring.Description{}, err
	}
	about, err := keyring.Describe(rec.Payload, sealRingPurpose)
	return rec, about, err
}

func keysRotateCommand() *cobra.Command {
	var call operatorCall
	cmd := &cobra.Command{
		Use:   "rotate --config FILE records|seal|kek-records|kek-seal",
		Short: "replace a key while everything runs",
		Long: `records: cached codes what it writes by a new key at once and every row in the
background; the old key then goes by itself. seal: authd does the same with what it
stores of others' secrets, within seconds of the request.
kek-records, kek-seal: writes a new key-encryption key where the old one lies, with
the old one behind it; daemons notice within a second and wrap their keys by it.
Copy the file to every machine that has one, then: sallyport keys retire.`,
		Args:      oneValidArg,
		ValidArgs: []string{"records", "seal", "kek-records", "kek-seal"},
		RunE: func(cmd *cobra.Command, args []string) error {
			return rotateKey(cmd, &call, args[0])
		},
	}
	run.ConfigFlag(cmd, &call.file)
	return cmd
}

// oneValidArg wants one of the command's ValidArgs.
func oneValidArg(cmd *cobra.Command, args []string) error {
	if len(args) != 1 || !slices.Contains(cmd.ValidArgs, args[0]) {
		return run.Usage("", "want one of %s", strings.Join(cmd.ValidArgs, ", "))
	}
	return nil
}

func rotateKey(cmd *cobra.Command, call *operatorCall, what string) error {
	tell := func(format string, args ...any) error {
		_, err := fmt.Fprintf(cmd.OutOrStdout(), format+"\n", args...)
		return err
	}
	switch what {
	case "records":
		return call.do(cmd, func(ctx context.Context, records *control.Records) error {
			if err := records.RotateRowKey(ctx); err != nil {
				return err
			}
			return tell("a new key is active; records get new codes in the background: sallyport keys ls")
		})
	case "seal":
		return call.do(cmd, func(ctx context.Context, records *control.Records) error {
			if err := askSealRotation(ctx, records); err != nil {
				return err
			}
			return tell("asked; authd takes a new key within %v: sallyport keys ls", 10*time.Second)
		})
	}
	layout, name, err := kekNamed(call.file, what)
	if err != nil {
		return err
	}
	id, err := layout.RotateKEK(name)
	if err != nil {
		return err
	}
	return tell("%s: %s is active, the old key stays behind it in %s\nonce `sallyport keys ls` shows %s keys wrapped by %s: sallyport keys retire %s",
		what, id, layout.KEKFile(name), name, id, what)
}

// askSealRotation notes in authd's ring that a new key is wanted. It takes no key to
// do so; one of the authds sees it.
func askSealRotation(ctx context.Context, records sallyport.Records) error {
	rec, _, err := sealRing(ctx, records)
	if err != nil {
		return fmt.Errorf("keys of authd: %w", err)
	}
	doc, err := keyring.Ask(rec.Payload, sealRingPurpose, time.Now())
	if err != nil {
		return err
	}
	_, err = records.Apply(ctx, []sallyport.Op{{
		Kind: rec.Kind, ID: rec.ID, Payload: doc, If: sallyport.Condition{Revision: rec.Revision},
	}})
	return err
}

func kekNamed(file, what string) (config.Layout, string, error) {
	f, err := config.Load(file, config.Tool)
	if err != nil {
		return config.Layout{}, "", err
	}
	return f.Layout(), what[len("kek-"):], nil
}

func keysRetireCommand() *cobra.Command {
	var call operatorCall
	cmd := &cobra.Command{
		Use:   "retire --config FILE records|kek-records|kek-seal",
		Short: "drop older keys that nothing needs any more",
		Long: `records: older keys of rows go by themselves two minutes after the last row has its
new code; this does not wait. kek-records, kek-seal: only once the data keys are
wrapped by the newest. Backups from before need the older key: keep a copy of it
as long as you keep them. Older seal keys go by themselves, after 15 minutes.`,
		Args:      oneValidArg,
		ValidArgs: []string{"records", "kek-records", "kek-seal"},
		RunE: func(cmd *cobra.Command, args []string) error {
			return call.do(cmd, func(ctx context.Context, records *control.Records) error {
				if args[0] == "records" {
					return records.RetireRowKeys(ctx)
				}
				return retireKEK(ctx, cmd.OutOrStdout(), call.file, args[0], records)
			})
		},
	}
	run.ConfigFlag(cmd, &call.file)
	return cmd
}

func retireKEK(ctx context.Context, out io.Writer, file, what string, records *control.Records) error {
	layout, name, err := kekNamed(file, what)
	if err != nil {
		return err
	}
	kek, err := layout.KEK(name)
	if err != nil {
		return err
	}
	by, err := wrappedBy(ctx, name, records)
	if err != nil {
		return err
	}
	if newest := kek.IDs()[0].String(); by != newest {
		return run.Failure("retire "+what, "reload the daemon, or copy the key's file to its machine first",
			fmt.Errorf("%s keys are wrapped by %s, not by %s", name, by, newest))
	}
	if err := layout.RetireKEK(name); err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s holds its newest key only\n", layout.KEKFile(name))
	return err
}

// wrappedBy names the key-encryption key of data keys that are in use.
func wrappedBy(ctx context.Context, name string, records *control.Records) (string, error) {
	if name == config.RecordsKey {
		ring, err := records.RowKeys(ctx)
		return ring.KEK, err
	}
	_, about, err := sealRing(ctx, records)
	return about.KEK.String(), err
}

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/cmd/internal/run"
	"sallyport/proto/control"
)

func devicesCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "devices", Short: "list devices and approve them", Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(devicesListCommand(),
		deviceApprovalCommand("approve", "let policies that ask for an approved device take this one", true),
		deviceApprovalCommand("disapprove", "take an approval back; what rests on it is cut within a second", false),
		deviceReinstateCommand())
	return cmd
}

// listedDevice is one device as an operator sees it.
type listedDevice struct {
	Device   sallyport.DeviceID `json:"device"`
	Host     string             `json:"host,omitempty"`
	Type     string             `json:"type,omitempty"`
	Approved bool               `json:"approved"`
	Revoked  bool               `json:"revoked,omitempty"`
	// Users confirmed the device's key; by e-mail address, where it is known.
	Users []string `json:"users"`
}

var deviceListing = listing[listedDevice]{
	schema: "sallyport.devices/v1", key: "devices",
	header: "DEVICE\tHOST\tKEY\tSTATE\tUSERS",
	row: func(d listedDevice) string {
		state := "not approved"
		switch {
		case d.Revoked:
			state = "revoked"
		case d.Approved:
			state = "approved"
		}
		return tabbed(d.Device, d.Host, d.Type, state, strings.Join(d.Users, ", "))
	},
}

func devicesListCommand() *cobra.Command {
	var call operatorCall
	cmd := &cobra.Command{
		Use:   "ls --config FILE [-o text|json|jsonl]",
		Short: "list devices, their users and whether they are approved",
		Args:  run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return call.list(cmd, func(ctx context.Context, out output, records *control.Records) error {
				list, err := listDevices(ctx, records)
				if err != nil {
					return err
				}
				return deviceListing.write(out, list)
			})
		},
	}
	call.listFlags(cmd)
	return cmd
}

func listDevices(ctx context.Context, l sallyport.Lister) ([]listedDevice, error) {
	devices, err := listAll[sallyport.Device](ctx, l, sallyport.KindDevice)
	if err != nil {
		return nil, err
	}
	users, err := listAll[sallyport.User](ctx, l, sallyport.KindUser)
	if err != nil {
		return nil, err
	}
	var list []listedDevice
	for _, d := range devices {
		listed := listedDevice{Device: d.ID, Host: d.Name, Type: d.Type, Approved: d.Approved, Revoked: d.Revoked, Users: []string{}}
		for id := range d.Users {
			listed.Users = append(listed.Users, cmp.Or(users[string(id)].Email, string(id)))
		}
		slices.Sort(listed.Users)
		list = append(list, listed)
	}
	slices.SortFunc(list, func(a, b listedDevice) int {
		return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.Device, b.Device))
	})
	return list, nil
}

func deviceApprovalCommand(verb, short string, approved bool) *cobra.Command {
	var call operatorCall
	cmd := &cobra.Command{
		Use:   verb + " DEVICE --config FILE",
		Short: short,
		Long: `Sets whether the device is approved: what a policy asks for with
"device: {approved: true}". It returns when that is on cached's disk; live
connections are decided again within a second.`,
		Args: run.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return call.do(cmd, func(ctx context.Context, records *control.Records) error {
				return approve(ctx, records, args[0], approved, cmd.OutOrStdout())
			})
		},
	}
	run.ConfigFlag(cmd, &call.file)
	return cmd
}

func deviceReinstateCommand() *cobra.Command {
	var call operatorCall
	cmd := &cobra.Command{
		Use:   "reinstate DEVICE --config FILE",
		Short: "let a revoked device log in again, as a new one",
		Long: `Takes back what "sessions revoke --device" did to the device, once it is in the
right hands again. It has no session then and is like one that was never seen:
its user confirms its key at the next login, and an approval is given anew.`,
		Args: run.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return call.do(cmd, func(ctx context.Context, records *control.Records) error {
				return reinstate(ctx, records, args[0], cmd.OutOrStdout())
			})
		},
	}
	run.ConfigFlag(cmd, &call.file)
	return cmd
}

func approve(ctx context.Context, records sallyport.Records, id string, approved bool, out io.Writer) error {
	word := "approved"
	if !approved {
		word = "not approved"
	}
	return changeDevice(ctx, records, id, word, out, func(d *sallyport.Device) (changed bool, err error) {
		if approved && d.Revoked {
			return false, run.Usage("let it log in again first: sallyport devices reinstate "+id, "device %q is revoked", id)
		}
		changed = d.Approved != approved
		d.Approved = approved
		return changed, nil
	})
}

func reinstate(ctx context.Context, records sallyport.Records, id string, out io.Writer) error {
	return changeDevice(ctx, records, id, "not revoked", out, func(d *sallyport.Device) (changed bool, err error) {
		changed = d.Revoked
		if changed {
			d.Revoked, d.Approved, d.Users = false, false, nil
		}
		return changed, nil
	})
}

// changeDevice changes the device's record as it was read, or not at all: authd may
// be writing it at this moment. word is what the device is afterwards.
func changeDevice(ctx context.Context, records sallyport.Records, id, word string, out io.Writer, change func(*sallyport.Device) (changed bool, err error)) error {
	r, err := records.Get(ctx, sallyport.KindDevice, id)
	if errors.Is(err, sallyport.ErrNotFound) {
		return run.Usage("list them with: sallyport devices ls", "there is no device %q", id)
	}
	if err != nil {
		return err
	}
	d, err := sallyport.Decode[sallyport.Device](r)
	if err != nil {
		return err
	}
	changed, err := change(&d)
	if err != nil {
		return err
	}
	if !changed {
		_, err := fmt.Fprintf(out, "%s is %s already\n", id, word)
		return err
	}
	op := sallyport.Put(sallyport.KindDevice, id, d)
	op.Expires, op.If = r.Expires, sallyport.Condition{Revision: r.Revision}
	rev, err := records.Apply(ctx, []sallyport.Op{op})
	if errors.Is(err, sallyport.ErrConflict) {
		return run.Failure("device "+id, "its record was written by somebody else at the same moment: run the command again", err)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s is %s (revision %d)\n", id, word, rev)
	return err
}

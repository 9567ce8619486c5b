package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/internal/logging"
	"sallyport/proto/control"
)

func sessionsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "sessions", Short: "list and revoke sessions", Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(sessionsListCommand(), sessionsRevokeCommand())
	return cmd
}

func sessionsListCommand() *cobra.Command {
	var call operatorCall
	cmd := &cobra.Command{
		Use:   "ls --config FILE [-o text|json|jsonl]",
		Short: "list live sessions",
		Args:  run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return call.list(cmd, func(ctx context.Context, out output, records *control.Records) error {
				list, err := listSessions(ctx, records)
				if err != nil {
					return err
				}
				return sessionListing.write(out, list)
			})
		},
	}
	call.listFlags(cmd)
	return cmd
}

// listedSession is one session as an operator sees it.
type listedSession struct {
	Session sallyport.SessionID   `json:"session"`
	Login   sallyport.LoginID     `json:"login"`
	User    sallyport.UserID      `json:"user"`
	Email   string                `json:"email,omitempty"`
	Device  sallyport.DeviceID    `json:"device,omitempty"`
	Host    string                `json:"host,omitempty"`
	Kind    sallyport.SessionKind `json:"kind"`
	Created time.Time             `json:"created"`
	Expires time.Time             `json:"expires"`
	Address string                `json:"address,omitempty"`
}

func listSessions(ctx context.Context, records sallyport.Lister) ([]listedSession, error) {
	sessions, err := listAll[sallyport.Session](ctx, records, sallyport.KindSession)
	if err != nil {
		return nil, err
	}
	users, err := listAll[sallyport.User](ctx, records, sallyport.KindUser)
	if err != nil {
		return nil, err
	}
	devices, err := listAll[sallyport.Device](ctx, records, sallyport.KindDevice)
	if err != nil {
		return nil, err
	}
	list := []listedSession{}
	for _, s := range sessions {
		list = append(list, listedSession{
			Session: s.ID, Login: s.Login, User: s.User, Email: users[string(s.User)].Email,
			Device: s.Device, Host: devices[string(s.Device)].Name, Kind: s.Kind,
			Created: s.Created, Expires: s.Expires, Address: s.Address,
		})
	}
	slices.SortFunc(list, func(a, b listedSession) int {
		return cmp.Or(cmp.Compare(a.Email, b.Email), a.Created.Compare(b.Created), cmp.Compare(a.Session, b.Session))
	})
	return list, nil
}

var sessionListing = listing[listedSession]{
	schema: "sallyport.sessions/v1", key: "sessions",
	header: "SESSION\tUSER\tHOST\tKIND\tAGE\tLEFT\tADDRESS",
	row: func(s listedSession) string {
		return tabbed(s.Session, cmp.Or(s.Email, string(s.User)), s.Host, s.Kind,
			rounded(time.Since(s.Created)), rounded(time.Until(s.Expires)), s.Address)
	},
}

// revocation is what `sessions revoke` was asked for.
type revocation struct {
	users, devices, sessions, logins []string
	reason                           string
	direct                           bool
}

func sessionsRevokeCommand() *cobra.Command {
	var file string
	var r revocation
	cmd := &cobra.Command{
		Use:   "revoke --config FILE (--user U | --device D | --session S | --login L)… [--direct]",
		Short: "end sessions now, with their open connections",
		Long: `Ends sessions: of users (id or e-mail address), devices, logins, or single ones.
It returns when the revocation is on cached's disk; open connections are cut
within a second. With --direct it tells every policyd by itself, for the hour in
which cached is down: that is effective at once, and durable when cached is back.`,
		Args: run.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f, err := config.Load(file, config.Tool)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			return r.run(ctx, f, cmd.OutOrStdout())
		},
	}
	run.ConfigFlag(cmd, &file)
	cmd.Flags().StringArrayVar(&r.users, "user", nil, "all sessions of the user with this `id or e-mail` address")
	cmd.Flags().StringArrayVar(&r.devices, "device", nil, "all sessions of the device `id`, which cannot log in until: sallyport devices reinstate")
	cmd.Flags().StringArrayVar(&r.sessions, "session", nil, "the session `id`")
	cmd.Flags().StringArrayVar(&r.logins, "login", nil, "all sessions of the login `id`")
	cmd.Flags().StringVar(&r.reason, "reason", "", "`text` for the audit log")
	cmd.Flags().BoolVar(&r.direct, "direct", false, "tell every policyd, without cached")
	cmd.MarkFlagsOneRequired("user", "device", "session", "login")
	return cmd
}

func (r *revocation) run(ctx context.Context, f *config.File, out io.Writer) error {
	if r.direct {
		return r.tellPolicyds(ctx, f, out)
	}
	client, err := dial(f, control.KindCached)
	if err != nil {
		return withDirect(err)
	}
	defer client.Close()
	if err := r.findUsers(ctx, client.Records()); err != nil {
		return withDirect(err)
	}
	done, err := client.Records().Revoke(ctx, r.asked())
	if err != nil {
		return withDirect(err)
	}
	_, err = fmt.Fprintf(out, "%d sessions ended (revision %d)\n", done.Sessions, done.Revision)
	return err
}

func withDirect(err error) error {
	if sallyport.OutcomeOf(err) == sallyport.OutcomeUsage {
		return err
	}
	return run.Failure("revoke", "cached does not take it? --direct tells policyd at once, and cached later", err)
}

// findUsers replaces e-mail addresses by the ids of their users.
func (r *revocation) findUsers(ctx context.Context, l sallyport.Lister) error {
	if len(r.users) == 0 {
		return nil
	}
	users, err := listAll[sallyport.User](ctx, l, sallyport.KindUser)
	if err != nil {
		return err
	}
	for i, typed := range r.users {
		if _, ok := users[typed]; ok {
			continue
		}
		var ids []string
		for id, u := range users {
			if strings.EqualFold(u.Email, typed) {
				ids = append(ids, id)
			}
		}
		if len(ids) != 1 {
			return run.Usage("list them with: sallyport sessions ls", "user %q: %d users have this id or e-mail address", typed, len(ids))
		}
		r.users[i] = ids[0]
	}
	return nil
}

func (r *revocation) asked() sallyport.Revocation {
	ask := sallyport.Revocation{Reason: r.reason, By: operatorName()}
	for kind, ids := range map[sallyport.SubjectKind][]string{
		sallyport.SubjectUser: r.users, sallyport.SubjectDevice: r.devices, sallyport.SubjectSession: r.sessions, sallyport.SubjectLogin: r.logins,
	} {
		for _, id := range ids {
			ask.Subjects = append(ask.Subjects, sallyport.Subject{Kind: kind, ID: id})
		}
	}
	return ask
}

// tellPolicyds revokes at each policyd; one that cannot be told is an error,
// because its gateways would go on.
func (r *revocation) tellPolicyds(ctx context.Context, f *config.File, out io.Writer) error {
	for _, u := range r.users {
		if strings.Contains(u, "@") {
			return run.Usage("sallyport sessions ls shows ids while cached is up; the audit log has them too", "--direct takes the user's id, not the e-mail address %q", u)
		}
	}
	clients, err := policyds(f)
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range clients {
		done, err := c.Policy().Revoke(ctx, r.asked())
		if err == nil && done.Durable {
			_, err = fmt.Fprintf(out, "%d sessions ended (revision %d)\n", done.Sessions, done.Revision)
		} else if err == nil {
			_, err = fmt.Fprintf(out, "%d sessions ended: effective, not durable; cached gets it when it is back\n", done.Sessions)
		}
		errs = append(errs, err, c.Close())
	}
	return errors.Join(errs...)
}

func policyds(f *config.File) ([]*control.Client, error) {
	if len(f.Connect.Policyd) < 2 { // the one that there is, by its socket if that is here
		c, err := dial(f, control.KindPolicyd)
		return []*control.Client{c}, err
	}
	id, err := run.LoadIdentity(f, control.KindOperator)
	if err != nil {
		return nil, err
	}
	var all []*control.Client
	for _, addr := range f.Connect.Policyd {
		c, err := control.Dial([]string{addr}, id.Client(control.KindPolicyd), logging.Discard())
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

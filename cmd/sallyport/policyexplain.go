package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/policyd"
	"sallyport/policyd/scenario"
	"sallyport/proto/control"
)

func policyExplainCommand() *cobra.Command {
	var file string
	var e policyExplain
	cmd := &cobra.Command{
		Use:   "explain --config FILE --user U [--device D] [--time T] [--ip ADDRESS] [--given FILE] [-o text|json] TARGET",
		Short: "say why somebody may or may not reach a target",
		Long: `Decides with the routes of the file, also if they are not applied yet, and with
the people that cached knows (or those of a test file, with --given). It asks as
the newest live session of the user; if there is none, as if the user had just
logged in, and says so. Exit code 0: allowed; 4: not allowed.`,
		Args: run.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := config.Load(file, config.Tool)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			return e.run(ctx, f, args[0], cmd.OutOrStdout())
		},
	}
	run.ConfigFlag(cmd, &file)
	cmd.Flags().StringVar(&e.user, "user", "", "the user's `id or e-mail` address")
	cmd.Flags().StringVar(&e.device, "device", "", "the device `id` that is used")
	cmd.Flags().StringVar(&e.time, "time", "", "the `moment` of the question, like 2026-01-02T15:04:05Z; now if not given")
	cmd.Flags().StringVar(&e.ip, "ip", "", "the `address` that the gateway sees")
	cmd.Flags().StringVar(&e.given, "given", "", "take people from the given of this test `file`, not from cached")
	cmd.Flags().BoolVar(&e.asIf, "as-if-logged-in", true, "ask as if the user had just logged in when there is no live session")
	cmd.Flags().StringVarP(&e.output, "output", "o", "text", "`format`: text or json")
	if err := cmd.MarkFlagRequired("user"); err != nil {
		panic(err) // the flag was added above
	}
	return cmd
}

// policyExplain is what `policy explain` was asked for.
type policyExplain struct {
	user, device, time, ip, given, output string
	asIf                                  bool
}

// explained is the answer, and its JSON.
type explained struct {
	Schema     string           `json:"schema"`
	Target     sallyport.Target `json:"target"`
	AsIfLogged bool             `json:"as_if_logged_in"` // no session of the user lives
	sallyport.Decision
}

func (e *policyExplain) run(ctx context.Context, f *config.File, typed string, out io.Writer) error {
	q, now, err := e.question(f, typed)
	if err != nil {
		return err
	}
	c := f.Record(nil, nil, now)
	var records []sallyport.Record
	if e.given == "" {
		records, err = people(ctx, f)
	} else {
		c.PostureTTL = scenario.PostureTTL
		records, now, err = e.fromTest(now)
	}
	if err != nil {
		return err
	}
	doc := explained{Schema: "sallyport.explain/v1", Target: q.Target}
	if doc.Decision, doc.AsIfLogged, err = e.decide(f.Policyd, c, records, q, now); err != nil {
		return err
	}
	if err := e.write(out, doc); err != nil {
		return err
	}
	if !doc.Allowed() {
		return run.Differs("%s is not allowed", q.Target.Authority())
	}
	return nil
}

func (e *policyExplain) question(f *config.File, typed string) (q sallyport.Request, now time.Time, err error) {
	if e.output != "text" && e.output != "json" {
		return q, now, run.Usage("", "-o %s: want text or json", e.output)
	}
	for _, r := range f.Routes {
		if r.Name == typed {
			typed = r.From
		}
	}
	if q.Target, err = sallyport.ParseTarget(typed); err != nil {
		return q, now, run.Usage("", "%v", err)
	}
	now = time.Now()
	if e.time != "" {
		if now, err = time.Parse(time.RFC3339Nano, e.time); err != nil {
			return q, now, run.Usage("write it like 2026-01-02T15:04:05Z", "--time %s is no moment", e.time)
		}
	}
	if e.ip != "" {
		addr, err := netip.ParseAddr(e.ip)
		if err != nil {
			return q, now, run.Usage("", "--ip: %v", err)
		}
		q.Peer = netip.AddrPortFrom(addr.Unmap(), 0)
	}
	return q, now, nil
}

// fromTest takes people from a test file, and the time as its tests would.
func (e *policyExplain) fromTest(now time.Time) ([]sallyport.Record, time.Time, error) {
	g, err := scenario.ReadGiven(e.given)
	if err != nil {
		return nil, now, run.Usage("", "%v", err)
	}
	if latest := g.Latest(); e.time == "" && !latest.IsZero() {
		now = latest
	}
	return g.At(now), now, nil
}

func people(ctx context.Context, f *config.File) ([]sallyport.Record, error) {
	const hint = "is cached started? --given FILE takes people from a test file instead"
	client, err := dial(f, control.KindCached)
	if err != nil {
		return nil, run.Failure("cached does not tell who there is", hint, err)
	}
	defer client.Close()
	all, err := policyd.ReadPeople(ctx, client.Records())
	if err != nil {
		return nil, run.Failure("cached does not tell who there is", hint, err)
	}
	return all, nil
}

// decide asks as the newest live session of the user, or as a new one.
func (e *policyExplain) decide(cfg policyd.Config, c sallyport.Config, records []sallyport.Record, q sallyport.Request, now time.Time) (d sallyport.Decision, asIf bool, err error) {
	user, err := e.findUser(records)
	if err != nil {
		return d, false, err
	}
	o, err := policyd.NewOffline(cfg, c, records)
	if err != nil {
		return d, false, err
	}
	newest, err := e.newest(o, records, user, now)
	if err != nil {
		return d, false, err
	}
	q.Session = newest.ID
	if q.Session == "" && e.asIf {
		asIf, q.Session = true, "as-if-logged-in"
		if o, err = policyd.NewOffline(cfg, c, append(records, e.login(user, now)...)); err != nil {
			return d, asIf, err
		}
	}
	return o.Decide(q, now), asIf, nil
}

func (e *policyExplain) findUser(records []sallyport.Record) (sallyport.UserID, error) {
	var ids []sallyport.UserID
	for _, r := range records {
		if r.Kind != sallyport.KindUser {
			continue
		}
		u, err := sallyport.Decode[sallyport.User](r)
		if err != nil {
			return "", err
		}
		if string(u.ID) == e.user {
			return u.ID, nil
		}
		if strings.EqualFold(u.Email, e.user) {
			ids = append(ids, u.ID)
		}
	}
	if len(ids) != 1 {
		return "", run.Usage("list them with: sallyport sessions ls", "user %q: %d users have this id or e-mail address", e.user, len(ids))
	}
	return ids[0], nil
}

// newest is the newest session of user, on the device if one is asked for, that
// counts as live; zero if there is none.
func (e *policyExplain) newest(o *policyd.Offline, records []sallyport.Record, user sallyport.UserID, now time.Time) (newest sallyport.Session, err error) {
	for _, r := range records {
		if r.Kind != sallyport.KindSession {
			continue
		}
		s, err := sallyport.Decode[sallyport.Session](r)
		if err != nil {
			return newest, err
		}
		fits := s.User == user && (e.device == "" || string(s.Device) == e.device)
		if fits && (newest.ID == "" || s.Created.After(newest.Created)) && o.Decide(sallyport.Request{Session: s.ID}, now).Allowed() {
			newest = s
		}
	}
	return newest, nil
}

// login is a session that begins now and lasts for an hour.
func (e *policyExplain) login(user sallyport.UserID, now time.Time) []sallyport.Record {
	s := sallyport.Session{
		ID: "as-if-logged-in", Login: "as-if-logged-in", User: user, Device: sallyport.DeviceID(e.device),
		Kind: sallyport.AgentSession, Created: now, Expires: now.Add(time.Hour),
	}
	var out []sallyport.Record
	for _, op := range []sallyport.Op{
		sallyport.Put(sallyport.KindLogin, string(s.Login), sallyport.Login{ID: s.Login, User: user, Created: now, Expires: s.Expires}),
		sallyport.Put(sallyport.KindSession, string(s.ID), s),
	} {
		out = append(out, sallyport.Record{Kind: op.Kind, ID: op.ID, Version: op.Version, Payload: op.Payload})
	}
	return out
}

func (e *policyExplain) write(w io.Writer, doc explained) error {
	if e.output == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(doc)
	}
	if doc.AsIfLogged {
		fmt.Fprintf(w, "%s has no live session; this is the answer as if they had just logged in\n", e.user)
	}
	words := map[sallyport.Verdict]string{sallyport.VerdictAllow: "allowed", sallyport.VerdictLogin: "login needed", sallyport.VerdictNoRoute: "no such target"}
	word, ok := words[doc.Verdict]
	if !ok {
		word = "denied"
	}
	fmt.Fprintf(w, "%s: %s\n", word, doc.Target.Authority())
	if doc.Allowed() {
		fmt.Fprintf(w, "  rule %q of route %s\n", doc.Rule, doc.Route)
	}
	writeReasons(w, doc.Decision)
	for _, o := range doc.Observed {
		_, err := fmt.Fprintf(w, "  observed: rule %q would make it %s\n", o.Rule, o.Would)
		if err != nil {
			return err
		}
	}
	return nil
}

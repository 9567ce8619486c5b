package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"sallyport"
	"sallyport/agent"
	"sallyport/agent/login"
	"sallyport/agent/posture"
)

func runLogin(s *shell, ctx context.Context, args []string) error {
	var r agent.LoginRequest
	if len(args) > 0 {
		if _, err := login.ParseURL(args[0]); err != nil {
			return err
		}
		r.Authd = args[0]
	}
	if s.o.ca != "" {
		pem, err := os.ReadFile(s.o.ca)
		if err != nil {
			return usage("ca_file", "cannot read the CA file %.200s: %v", s.o.ca, errors.Unwrap(err))
		}
		r.CA = pem
	}
	file, err := s.postureFile()
	if err != nil {
		return err
	}
	if file != "" {
		r.PostureFile = &file
	}
	if r.Options, err = s.askNow(); err != nil {
		return err
	}
	return s.offline(func(a *agent.Agent) error {
		return s.waiting(ctx, a, func() error {
			p, err := a.Login(ctx, r)
			if err != nil {
				return err
			}
			return s.loggedIn("agent.login/v1", "logged in as", p)
		})
	})
}

// postureFile returns the file's absolute path, for other processes read it too,
// after looking whether it can be read.
func (s *shell) postureFile() (string, error) {
	if s.o.postureFile == "" {
		return "", nil
	}
	path, err := filepath.Abs(s.o.postureFile)
	if err != nil {
		return "", fmt.Errorf("posture file: %w", err)
	}
	_, err = posture.Open(posture.Machine{}, path)
	return path, err
}

// loggedIn reports a session: a sentence for people, a document for machines.
func (s *shell) loggedIn(schema, words string, p agent.Profile) error {
	s.say("%s %s until %s", words, p.Person(), clock(p.Ends))
	if s.o.output == formatText {
		return nil
	}
	return s.print(identityDocument(schema, p), nil, nil)
}

type identity struct {
	Schema  string              `json:"schema"`
	User    sallyport.UserID    `json:"user"`
	Email   string              `json:"email,omitempty"`
	Name    string              `json:"name,omitempty"`
	Groups  []string            `json:"groups,omitempty"`
	Device  sallyport.DeviceID  `json:"device,omitempty"`
	Session sallyport.SessionID `json:"session"`
	Ends    time.Time           `json:"ends"`
	Authd   string              `json:"authd"`
}

func identityDocument(schema string, p agent.Profile) identity {
	return identity{Schema: schema, User: p.User, Email: p.Email, Name: p.Name, Session: p.Session, Ends: p.Ends, Authd: p.Authd}
}

func runExtend(s *shell, ctx context.Context, _ []string) error {
	o, err := s.askNow()
	if err != nil {
		return err
	}
	return s.offline(func(a *agent.Agent) error {
		return s.waiting(ctx, a, func() error {
			p, err := a.Extend(ctx, o)
			if err != nil {
				return err
			}
			return s.loggedIn("agent.extend/v1", "still logged in as", p)
		})
	})
}

func runLogout(s *shell, ctx context.Context, _ []string) error {
	if !s.o.allProfiles {
		return s.logout(ctx)
	}
	var names []string
	err := s.offline(func(a *agent.Agent) (err error) {
		names, err = a.Profiles()
		return err
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		s.o.profile = name
		errs = append(errs, s.logout(ctx))
	}
	for _, err := range errs {
		if err != nil {
			s.explain(err)
		}
	}
	if err := worst(errs); err != nil {
		return reported{err}
	}
	return nil
}

func (s *shell) logout(ctx context.Context) error {
	return s.offline(func(a *agent.Agent) error {
		return s.waiting(ctx, a, func() error {
			was, err := a.Logout(ctx)
			switch {
			case err != nil:
				return err
			case was.Session == "":
				s.say("nobody was logged in")
			default:
				s.say("logged out %s", was.Person())
			}
			return nil
		})
	})
}

func runWhoami(s *shell, ctx context.Context, _ []string) error {
	return s.online(ctx, func(ctx context.Context, a *agent.Agent) error {
		me, err := a.Me(ctx)
		if err != nil {
			return err
		}
		p, err := a.Profile()
		if err != nil {
			return err
		}
		doc := identityDocument("agent.whoami/v1", p)
		doc.Groups, doc.Device, doc.Ends = me.Me.Groups, me.Me.Device, time.Now().Add(me.Me.ExpiresIn).UTC().Round(time.Second)
		return s.print(doc, nil, func(w io.Writer) {
			fmt.Fprintln(w, p.Person())
			rows := [][]string{
				{"name", p.Name},
				{"user", string(p.User)},
				{"groups", strings.Join(doc.Groups, ", ")},
				{"device", string(doc.Device)},
				{"session", fmt.Sprintf("%s, %s left", p.Session, left(me.Me.ExpiresIn))},
				{"login", p.Authd},
			}
			table(w, rows)
		})
	})
}

func runRun(s *shell, ctx context.Context, _ []string) error {
	s.o.patience = time.Minute
	return s.online(ctx, func(ctx context.Context, a *agent.Agent) error {
		publishing := make(chan error, 1)
		go func() { publishing <- a.Publish(ctx, "run", nil, func() []agent.Local { return nil }) }()
		err := a.Keep(ctx, func(l agent.Link) {
			s.say("connected to %s over %s; session renewed and posture reported until Ctrl-C", l.Gateway, l.Carrier)
		})
		if err != nil {
			return err
		}
		return <-publishing
	})
}

func runVersion(s *shell, _ context.Context, _ []string) error {
	doc := struct {
		Schema  string `json:"schema"`
		Version string `json:"version"`
		Go      string `json:"go"`
		System  string `json:"system"`
	}{"agent.version/v1", agent.Version, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH}
	return s.print(doc, nil, func(w io.Writer) {
		fmt.Fprintf(w, "agent %s (%s, %s)\n", doc.Version, doc.Go, doc.System)
	})
}

package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"sallyport/authd/idp"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/daemons"
	"sallyport/cmd/internal/run"
	"sallyport/cmd/sallyport/internal/allinone"
)

// The demonstration's one person.
const (
	userID       = "alice"
	userEmail    = "alice@demo.example"
	userPassword = "correct horse battery staple"
)

// site is the company: its services, its configuration and its daemons.
type site struct {
	configFile, postureFile, logFile string
	authd, caFile                    string // from the ready line

	database, wiki, payroll *service
	bastion                 *bastion
	passwordHash            string

	log  *os.File
	stop context.CancelFunc
	done chan error // the daemons' end
}

func newSite(ctx context.Context, dir, sabotage string) (s *site, err error) {
	s = &site{
		configFile:  filepath.Join(dir, "sallyport.yaml"),
		postureFile: filepath.Join(dir, "posture"),
		logFile:     filepath.Join(dir, "daemons.log"),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.passwordHash, err = idp.HashPassword(userPassword); err != nil {
		return s, err
	}
	if err := s.writePosture(true); err != nil {
		return s, err
	}
	if err := s.startServices(dir); err != nil {
		return s, err
	}
	if err := s.setGroups("dba", "sre"); err != nil {
		return s, err
	}
	return s, s.startDaemons(ctx, sabotage)
}

func (s *site) startServices(dir string) (err error) {
	if s.database, err = serve(database); err != nil {
		return err
	}
	if s.wiki, err = serve(wiki); err != nil {
		return err
	}
	if s.payroll, err = serve(database); err != nil {
		return err
	}
	s.bastion, err = newBastion(dir)
	return err
}

// startDaemons runs all four in this process and waits for the ready line.
func (s *site) startDaemons(ctx context.Context, sabotage string) (err error) {
	if s.log, err = os.OpenFile(s.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return err
	}
	ctx, s.stop = context.WithCancel(ctx)
	reader, writer := io.Pipe()
	s.done = make(chan error, 1)
	go func() {
		err := run.Serve(ctx, config.AllInOne, s.configFile, writer, s.log, func(p *run.Process) error {
			return allinone.StartWith(p, func(d daemons.Decider) daemons.Decider { return sabotaged(d, sabotage, s.payroll.addr) })
		})
		writer.CloseWithError(errors.Join(err, io.EOF))
		s.done <- err
	}()
	var ready daemons.Ready
	word := make([]byte, len("ready "))
	if _, err := io.ReadFull(reader, word); err != nil {
		return fmt.Errorf("the daemons did not start: %w", err)
	}
	if err := json.NewDecoder(reader).Decode(&ready); err != nil {
		return fmt.Errorf("the daemons' ready line: %w", err)
	}
	s.authd, s.caFile = ready.Authd.URL, ready.CAFile
	return nil
}

func (s *site) close() error {
	var err error
	if s.stop != nil {
		s.stop()
		err = <-s.done
	}
	for _, x := range []*service{s.database, s.wiki, s.payroll} {
		if x != nil {
			x.close()
		}
	}
	if s.bastion != nil {
		s.bastion.close()
	}
	if s.log != nil {
		s.log.Close()
	}
	return err
}

// writePosture writes the file that Alice's agent takes facts from. The firewall
// is off all the time.
func (s *site) writePosture(encrypted bool) error {
	return replace(s.postureFile, fmt.Sprintf("disk_encrypted: %v\nfirewall: false\n", encrypted))
}

// setGroups writes the configuration with Alice in these groups; the running
// daemons take it over.
func (s *site) setGroups(groups ...string) error {
	var text strings.Builder
	err := configText.Execute(&text, map[string]any{
		"ID": userID, "Email": userEmail, "Hash": s.passwordHash, "Groups": strings.Join(groups, ", "),
		"Database": s.database.addr, "Wiki": s.wiki.addr, "Payroll": s.payroll.addr, "Bastion": s.bastion.addr,
	})
	if err != nil {
		return err
	}
	return replace(s.configFile, text.String())
}

// replace puts a whole new file in the place of an old one.
func replace(path, text string) error {
	fresh := path + ".new"
	if err := os.WriteFile(fresh, []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(fresh, path)
}

var configText = template.Must(template.New("").Parse(`# The demonstration's configuration. Change it while it runs, and see.
domain: demo.example
data_dir: data
log: {level: info, format: text}
gateway:
  public_url: https://gw.localhost:0
  listen: 127.0.0.1:0
authd:
  public_url: https://auth.localhost:0
  listen: 127.0.0.1:0
  users:                                  # the embedded identity provider
    - {id: {{.ID}}, name: Alice, email: {{.Email}}, password_hash: "{{.Hash}}", groups: [{{.Groups}}]}
policyd:
  posture_sources: [os, file]             # the file stands for a disk that can be switched
routes:
  - from: tcp://db.internal:5432
    to: tcp://{{.Database}}
    policy:
      - name: dba
        allow: {and: [{groups: {has: dba}}, {device: {disk_encrypted: true}}]}
  - from: tcp://bastion.internal:22
    to: tcp://{{.Bastion}}
    policy:
      - name: sre
        allow: {and: [{groups: {has: sre}}]}
  - from: tcp://wiki.internal:80
    to: tcp://{{.Wiki}}
    policy:
      - name: staff
        allow: {and: [{domain: demo.example}]}
  - from: tcp://payroll.internal:443
    to: tcp://{{.Payroll}}
    policy:
      - name: finance
        allow: {and: [{domain: demo.example}, {device: {disk_encrypted: true}}, {device: {firewall: true}}]}
`))

// patience is how long the demonstration waits for what should be there at once.
const patience = 10 * time.Second

// Package agent is the desktop side of Sallyport as a library: it keeps one
// person's session alive (certificates in memory, renewed by the device key), one
// carrier to a gateway, and the gateway's knowledge of this machine fresh, and it
// opens flows. It owns what happens when one of these fails: what is tried again,
// when a login is asked for, and what a person is told. How a login, the device
// key, facts, and local ports work is the business of its subpackages; which
// words are printed is that of cmd/agent.
package agent

import (
	"context"
	"errors"
	"io/fs"
	"regexp"
	"slices"
	"time"

	"sallyport"
	"sallyport/agent/keys"
	"sallyport/agent/login"
	"sallyport/agent/state"
	"sallyport/internal/logging"
	"sallyport/tunnel"
)

// Transports that a person may ask for.
var Transports = []string{automatic, quic, overTLS}

// Config is what an agent is told.
type Config struct {
	// StateDir is where profiles are; empty: state.DefaultPath.
	StateDir string
	// Profile names one login of the person; empty: "default".
	Profile string
	// Transport is auto, quic or tls; empty: auto.
	Transport string
	// PostureFile adds facts; empty: that of the profile.
	PostureFile string
	// KeyStore is where a new device key goes: keyring, file, or empty for the
	// keyring if there is one.
	KeyStore string
	// Ask returns how to ask the person for a login when one is needed; an error,
	// or a nil Ask, means that nobody can be asked.
	Ask func() (login.Options, error)
	// Say gets what a person should know and nobody waits for; nil: nobody.
	Say func(message string)
	// Log gets the rest; nil: nowhere.
	Log logging.Logger
	// Patience is how long Open tries to reach a gateway, and authd, before it
	// fails; 0: once.
	Patience time.Duration
	// Dial reaches a gateway over the first of the transports ("quic", "tls") that
	// works; nil: package tunnel's carriers.
	Dial func(ctx context.Context, transports []string, d tunnel.DialConfig) (tunnel.Carrier, error)
}

var profileName = regexp.MustCompile(`^[a-z0-9][a-z0-9_.-]{0,63}$`)

// withDefaults fills in what is empty and refuses what is wrong (OutcomeUsage).
func (c Config) withDefaults() (Config, error) {
	if c.Profile == "" {
		c.Profile = "default"
	}
	if c.Transport == "" {
		c.Transport = automatic
	}
	if c.Log == nil {
		c.Log = logging.Discard()
	}
	if c.Say == nil {
		c.Say = func(string) {}
	}
	if c.Dial == nil {
		c.Dial = dialCarrier
	}
	if c.StateDir == "" {
		dir, err := state.DefaultPath()
		if err != nil {
			return c, err
		}
		c.StateDir = dir
	}
	switch {
	case !profileName.MatchString(c.Profile):
		return c, usage("usage.profile", "the profile name must be of a to z, 0 to 9, - _ and ., at most 64 of them", "")
	case c.Transport == "wireguard":
		return c, usage("usage.transport", "the WireGuard carrier is not in this version", "take auto, quic or tls")
	case !slices.Contains(Transports, c.Transport):
		return c, usage("usage.transport", "there is no such transport", "take auto, quic or tls")
	case c.KeyStore != "" && c.KeyStore != keys.Keyring && c.KeyStore != keys.File:
		return c, usage("usage.key_store", "there is no such key store", "take keyring or file")
	}
	return c, nil
}

func usage(code, message, hint string) error {
	return &sallyport.Error{Outcome: sallyport.OutcomeUsage, Code: code, Message: message, Hint: hint}
}

// Profile is what a login leaves on disk: where authd is, which session it was,
// and where the gateways are. Nothing in it opens a door without the device key.
type Profile struct {
	Version  int                     `json:"version"`
	Authd    string                  `json:"authd"`
	CA       string                  `json:"ca,omitempty"` // PEM; signs authd's certificate
	Domain   string                  `json:"domain,omitempty"`
	Session  sallyport.SessionID     `json:"session,omitempty"` // empty: logged out
	User     sallyport.UserID        `json:"user,omitempty"`
	Email    string                  `json:"email,omitempty"`
	Name     string                  `json:"name,omitempty"`
	Ends     time.Time               `json:"ends,omitzero"`
	Gateways []sallyport.GatewayInfo `json:"gateways,omitempty"`
	// PostureFile is that of the login: all processes of a profile report the
	// same facts, because each report replaces the one before.
	PostureFile string `json:"posture_file,omitempty"`
}

// Person is how people know who is logged in.
func (p Profile) Person() string {
	if p.Email != "" {
		return p.Email
	}
	return string(p.User)
}

const profileFile = "profile.json"

// loadProfile returns the zero Profile if nobody ever logged in.
func loadProfile(dir *state.Dir) (Profile, error) {
	var p Profile
	err := dir.ReadJSON(profileFile, &p)
	if errors.Is(err, fs.ErrNotExist) {
		return Profile{}, nil
	}
	return p, err
}

func (p Profile) save(dir *state.Dir) error {
	p.Version = 1
	return dir.WriteJSON(profileFile, p)
}

// granted returns p after a login or a renewal.
func (p Profile) granted(s *login.Session) Profile {
	p.Session, p.User, p.Email, p.Name, p.Domain = s.Session, s.User, s.Email, s.Name, s.Domain
	p.Gateways, p.Ends = s.Gateways, s.Ends().UTC().Round(time.Second)
	return p
}

// loggedOut returns p without its session.
func (p Profile) loggedOut() Profile {
	return Profile{Version: p.Version, Authd: p.Authd, CA: p.CA, PostureFile: p.PostureFile}
}

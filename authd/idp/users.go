package idp

import (
	"fmt"
	"net/mail"
	"strings"
	"unicode"

	"sallyport/internal/fault"
)

// User is somebody in the configuration file.
type User struct {
	// ID is the "sub" of this person's tokens and one of the names to log in with;
	// it must never be given to somebody else.
	ID    string `yaml:"id"`
	Name  string `yaml:"name"`
	Email string `yaml:"email"` // the other name to log in with
	// PasswordHash is HashPassword's: argon2id in the PHC string format.
	PasswordHash string   `yaml:"password_hash"`
	Groups       []string `yaml:"groups"`
}

// Validate returns what is wrong with users, by index.
func Validate(users []User) fault.List {
	var faults fault.List
	taken := make(map[string]int)
	for i, u := range users {
		key := func(field string) string { return fmt.Sprintf("[%d].%s", i, field) }
		if !plainText(u.ID, 255) {
			faults.Addf(key("id"), "must be 1 to 255 printable characters")
		}
		if u.Email != "" && !validEmail(u.Email) {
			faults.Addf(key("email"), "%q is no e-mail address", u.Email)
		}
		if _, err := parseHash(u.PasswordHash); err != nil {
			faults.Addf(key("password_hash"), "%v; make one with: sallyport hash-password", err)
		}
		for j, g := range u.Groups {
			if !plainText(g, 256) {
				faults.Addf(fmt.Sprintf("[%d].groups[%d]", i, j), "must be 1 to 256 printable characters")
			}
		}
		for _, name := range u.logins() {
			if first, ok := taken[name]; ok && first != i {
				faults.Addf(key("id"), "logs in as %q, and so does user %d", name, first)
			}
			taken[name] = i
		}
	}
	return faults
}

// logins are the names that this user may type, folded.
func (u User) logins() []string {
	if u.Email == "" {
		return []string{fold(u.ID)}
	}
	return []string{fold(u.ID), fold(u.Email)}
}

// fold makes names comparable as they are typed: case does not matter.
func fold(name string) string { return strings.ToLower(strings.TrimSpace(name)) }

func plainText(s string, max int) bool {
	return s != "" && len(s) <= max && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

func validEmail(s string) bool {
	a, err := mail.ParseAddress(s)
	return err == nil && a.Address == s && plainText(s, 254)
}

// directory is the users as the provider looks them up. It never changes.
type directory struct {
	byLogin map[string]*account
	byID    map[string]*account
	// nobody is verified against for names that do not exist, so that an answer
	// takes as long.
	nobody passwordHash
}

type account struct {
	User
	hash passwordHash
}

func newDirectory(users []User) (*directory, error) {
	if err := Validate(users).Err(); err != nil {
		return nil, err
	}
	d := &directory{byLogin: make(map[string]*account), byID: make(map[string]*account)}
	costs := defaultCosts
	for _, u := range users {
		hash, err := parseHash(u.PasswordHash)
		if err != nil {
			return nil, err
		}
		a := &account{u, hash}
		d.byID[u.ID] = a
		for _, name := range u.logins() {
			d.byLogin[name] = a
		}
		costs = hash.costs
	}
	d.nobody = newHash("", costs)
	return d, nil
}

// authenticate returns the user with that name and password, nil if there is
// none. Either way it computes one hash.
func (d *directory) authenticate(name, password string) *account {
	a, ok := d.byLogin[fold(name)]
	if !ok {
		d.nobody.matches(password)
		return nil
	}
	if !a.hash.matches(password) {
		return nil
	}
	return a
}

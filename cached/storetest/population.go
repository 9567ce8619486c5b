package storetest

import (
	"encoding/base32"
	"encoding/binary"
	"fmt"
	"time"

	"sallyport"
)

// Population is the records of a large site, as authd and policyd write them: ten
// sessions a user, each with a login of its own, from two devices that report their
// posture. The same index always gives the same record.
type Population struct {
	// Sessions is how many there are. Required.
	Sessions int
	// Now is when everybody logged in. Required.
	Now time.Time
	// PerLogin gives every session claims of its own, as some identity providers
	// do, instead of the same ones for all sessions of a person.
	PerLogin bool
}

// Users returns how many there are.
func (p Population) Users() int { return max(p.Sessions/10, 1) }

// Devices returns how many there are.
func (p Population) Devices() int { return 2 * p.Users() }

// Session returns the id of the session i.
func (p Population) Session(i int) sallyport.SessionID {
	return sallyport.SessionID(populationID("s", i))
}

// Login returns the id of the login of the session i.
func (p Population) Login(i int) sallyport.LoginID { return sallyport.LoginID(populationID("l", i)) }

// User returns the id of the user i.
func (p Population) User(i int) sallyport.UserID {
	return sallyport.UserID(fmt.Sprintf("00u%017d", i))
}

// Device returns the id of the device i.
func (p Population) Device(i int) sallyport.DeviceID {
	return sallyport.DeviceID(crockford.EncodeToString(append(scramble("d", i), scramble("e", i)[:16]...)))
}

// UserOf and DeviceOf tell whose the session i is.
func (p Population) UserOf(i int) int { return i % p.Users() }

// DeviceOf returns the index of the device that the session i is on.
func (p Population) DeviceOf(i int) int { return 2*p.UserOf(i) + i/p.Users()%2 }

// Kind returns what writes all records of one kind, one after the other; f's error
// ends it.
func (p Population) Kind(kind sallyport.Kind, f func(sallyport.Op) error) error {
	n := p.Sessions
	var op func(int) sallyport.Op
	switch kind {
	case sallyport.KindUser:
		n, op = p.Users(), p.UserOp
	case sallyport.KindDirectoryUser:
		n, op = p.Users(), p.DirectoryOp
	case sallyport.KindDevice:
		n, op = p.Devices(), p.DeviceOp
	case sallyport.KindPosture:
		n, op = p.Devices(), p.PostureOp
	case sallyport.KindLogin:
		op = p.LoginOp
	case sallyport.KindSession:
		op = p.SessionOp
	default:
		return fmt.Errorf("a population has no %s", kind)
	}
	for i := range n {
		if err := f(op(i)); err != nil {
			return err
		}
	}
	return nil
}

// Kinds are those of a population, in the order in which they come to be.
var Kinds = []sallyport.Kind{
	sallyport.KindUser, sallyport.KindDirectoryUser, sallyport.KindDevice, sallyport.KindPosture,
	sallyport.KindLogin, sallyport.KindSession,
}

const lifetime = 12 * time.Hour

// SessionOp writes the session i.
func (p Population) SessionOp(i int) sallyport.Op {
	claims := p.claims(p.UserOf(i))
	if p.PerLogin {
		claims["uti"] = populationID("", i)
	}
	op := sallyport.Put(sallyport.KindSession, string(p.Session(i)), sallyport.Session{
		ID: p.Session(i), Login: p.Login(i), User: p.User(p.UserOf(i)), Device: p.Device(p.DeviceOf(i)),
		Kind: sallyport.AgentSession, Created: p.at(i), Expires: p.at(i).Add(lifetime), Claims: claims,
		AuthMethods: authMethods, Address: fmt.Sprintf("10.%d.%d.%d", i>>16&255, i>>8&255, i&255),
	})
	op.Expires = p.at(i).Add(lifetime)
	return op
}

// LoginOp writes the login of the session i.
func (p Population) LoginOp(i int) sallyport.Op {
	op := sallyport.Put(sallyport.KindLogin, string(p.Login(i)), sallyport.Login{
		ID: p.Login(i), User: p.User(p.UserOf(i)), Issuer: issuer,
		Created: p.at(i), Expires: p.at(i).Add(lifetime), AuthMethods: authMethods,
	})
	op.Expires = p.at(i).Add(lifetime)
	return op
}

// UserOp writes the user i.
func (p Population) UserOp(i int) sallyport.Op {
	return sallyport.Put(sallyport.KindUser, string(p.User(i)), sallyport.User{
		ID: p.User(i), Issuer: issuer, Email: email(i), EmailVerified: true, Name: name(i), Claims: p.claims(i),
	})
}

// DirectoryOp writes what the directory says of the user i: eight groups, the first
// of which is "staff".
func (p Population) DirectoryOp(i int) sallyport.Op {
	d := sallyport.DirectoryUser{User: p.User(i), Email: email(i), Groups: []sallyport.Group{{ID: "staff"}}}
	for g := range 7 {
		d.Groups = append(d.Groups, sallyport.Group{ID: fmt.Sprintf("team-%d", (i*7+g*131)%2_000)})
	}
	return sallyport.Put(sallyport.KindDirectoryUser, string(p.User(i)), d)
}

// DeviceOp writes the device i.
func (p Population) DeviceOp(i int) sallyport.Op {
	return sallyport.Put(sallyport.KindDevice, string(p.Device(i)), sallyport.Device{
		ID: p.Device(i), PublicKey: append(make([]byte, 80), scramble("k", i)...), Name: fmt.Sprintf("laptop-%d", i), Type: "tpm",
		Users: map[sallyport.UserID]time.Time{p.User(i / 2): p.at(i)},
	})
}

// PostureOp writes the last report of the device i.
func (p Population) PostureOp(i int) sallyport.Op {
	at := p.at(i)
	fact := func(v any) sallyport.Fact { return sallyport.Fact{Value: v, At: at, Source: sallyport.SourceOS} }
	return sallyport.Put(sallyport.KindPosture, string(p.Device(i)), sallyport.Posture{
		Device: p.Device(i), Session: p.Session(i / 2), Sequence: at.UnixMilli(), Received: at,
		Facts: map[string]sallyport.Fact{
			sallyport.FactOS: fact("linux"), sallyport.FactOSVersion: fact("13.1"), sallyport.FactKernel: fact("6.12.48"),
			sallyport.FactAgentVersion: fact("1.0.0"), sallyport.FactDiskEncrypted: fact(true), sallyport.FactFirewall: fact(true),
			sallyport.FactScreenLock: fact(true), sallyport.FactSecureBoot: fact(true), sallyport.FactKeyProtection: fact("tpm"),
		},
	})
}

const issuer = "https://login.corp.example/00000000-0000-4000-8000-000000000000/v2.0"

var authMethods = []string{"pwd", "mfa", "hwk", "urn:corp:acr:phishing-resistant"}

func (p Population) claims(user int) map[string]any {
	return map[string]any{
		"email": email(user), "email_verified": true, "name": name(user), "preferred_username": email(user),
		"given_name": fmt.Sprintf("Ada %d", user), "family_name": "Lovelace", "locale": "en-GB", "zoneinfo": "Europe/London",
		"department": fmt.Sprintf("Department %d", user%300), "oid": populationID("", user), "tid": "00000000-0000-4000-8000-000000000000",
	}
}

func email(user int) string { return fmt.Sprintf("ada.lovelace.%d@corp.example", user) }

func name(user int) string { return fmt.Sprintf("Ada Lovelace %d", user) }

// at spreads the logins over an hour.
func (p Population) at(i int) time.Time {
	return p.Now.Add(-time.Duration(i%3_600) * time.Second).UTC()
}

var crockford = base32.NewEncoding("0123456789ABCDEFGHJKMNPQRSTVWXYZ").WithPadding(base32.NoPadding)

// populationID is an id as sallyport.NewID makes them.
func populationID(prefix string, i int) string {
	return prefix + "-" + crockford.EncodeToString(scramble(prefix, i)[:10])
}

// scramble returns 16 bytes that look random and differ for each i (SplitMix64).
func scramble(prefix string, i int) []byte {
	z := uint64(i)<<8 | uint64(len(prefix))
	for _, c := range []byte(prefix) {
		z ^= uint64(c) << 56
	}
	var b []byte
	for range 2 {
		z += 0x9e3779b97f4a7c15
		x := (z ^ z>>30) * 0xbf58476d1ce4e5b9
		x = (x ^ x>>27) * 0x94d049bb133111eb
		b = binary.LittleEndian.AppendUint64(b, x^x>>31)
	}
	return b
}

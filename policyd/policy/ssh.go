package policy

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"sallyport"

	"go.yaml.in/yaml/v3"
	"golang.org/x/crypto/ssh"
)

const noLogin = "unknown (no SSH login)"

// sshKey is ssh_publickey: the proved key is one of those.
type sshKey struct {
	ofRequest
	keys map[string]bool // by wire format, RFC 4253, section 6.6
}

func parseSSHKey(p *parser, _ string, n *yaml.Node) (condition, bool) {
	keys, ok := p.authorizedKeys(n, "ssh_publickey")
	return leafOf(&sshKey{keys: keys}), ok
}

// authorizedKeys reads one key or a list, each a line of OpenSSH's authorized_keys.
func (p *parser) authorizedKeys(n *yaml.Node, what string) (map[string]bool, bool) {
	if n.Kind == yaml.MappingNode {
		p.fail(n, "%s takes a key or a list of keys; write %[1]s: \"ssh-ed25519 AAAA…\"", what)
		return nil, false
	}
	texts, ok := p.oneOrMore(n, what, p.keyText)
	keys := make(map[string]bool, len(texts))
	for _, t := range texts {
		key, _, options, _, err := ssh.ParseAuthorizedKey([]byte(t.text))
		switch {
		case err != nil:
			p.fail(t.at, "%s is no public key in the format of authorized_keys; write the line of a .pub file", what)
			ok = false
		case len(options) > 0: // they would be ignored, as PPL does
			p.fail(t.at, "%s: options in front of a key have no effect here; write %q", what,
				strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key))))
			ok = false
		default:
			keys[string(key.Marshal())] = true
		}
	}
	return keys, ok
}

// keyText reads one line; a block of YAML ends in a newline.
func (p *parser) keyText(n *yaml.Node, what string) (string, bool) {
	s, ok := p.scalar(n, what)
	text := strings.TrimSpace(s.s)
	switch {
	case !ok:
		return "", false
	case s.kind != 's' || text == "":
		p.fail(n, "%s must be text", what)
		return "", false
	case strings.ContainsAny(text, "\r\n"):
		p.fail(n, "%s: several lines, of which only the first would count; write a list", what)
		return "", false
	}
	return text, true
}

func (c *sshKey) eval(in *Input) Value {
	if in.Request.SSH == nil || len(in.Request.SSH.PublicKey) == 0 {
		return Unknown
	}
	return truth(c.keys[string(in.Request.SSH.PublicKey)])
}

func (c *sshKey) path() string                            { return "ssh_publickey" }
func (c *sshKey) wanted(bool) string                      { return "a key that this rule names" }
func (c *sshKey) found(in *Input) (string, time.Duration) { return keyWords(in), 0 }

func keyWords(in *Input) string {
	switch login := in.Request.SSH; {
	case login == nil:
		return noLogin
	case len(login.PublicKey) == 0:
		return "unknown (no key was proved)"
	default:
		key, err := ssh.ParsePublicKey(login.PublicKey)
		if err != nil {
			return "unknown (a key that cannot be read)"
		}
		return ssh.FingerprintSHA256(key)
	}
}

// sshAuthority is ssh_ca: the proved key is a user certificate of one of the CAs,
// valid now for the account that is asked for.
type sshAuthority struct {
	ofRequest
	authorities map[string]bool
}

func parseSSHAuthority(p *parser, _ string, n *yaml.Node) (condition, bool) {
	keys, ok := p.authorizedKeys(n, "ssh_ca")
	return leafOf(&sshAuthority{authorities: keys}), ok
}

// eval allocates: certificates are parsed, and signatures verified, anew.
func (c *sshAuthority) eval(in *Input) Value {
	v, _ := c.check(in)
	return v
}

// check is stricter than PPL, with unknown, where OpenSSH is: a certificate
// without principals is nobody's, a CA's signature with SHA-1 counts for
// nothing, and source-address binds.
func (c *sshAuthority) check(in *Input) (v Value, found string) {
	login := in.Request.SSH
	switch {
	case login == nil || login.Username == "":
		return Unknown, noLogin
	case len(login.PublicKey) == 0:
		return Unknown, keyWords(in)
	}
	key, err := ssh.ParsePublicKey(login.PublicKey)
	if err != nil {
		return Unknown, "unknown (a key that cannot be read)"
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok || cert.CertType != ssh.UserCert {
		return False, "a key that is no user certificate"
	}
	if !c.authorities[string(cert.SignatureKey.Marshal())] {
		return False, "a certificate of another CA"
	}
	in.watchValidity(cert)
	checker := ssh.CertChecker{
		Clock:                    func() time.Time { return in.Now },
		SupportedCriticalOptions: []string{sourceAddress},
	}
	switch {
	case checker.CheckCert(login.Username, cert) != nil:
		return False, "a certificate that is not valid now for this account"
	case len(cert.ValidPrincipals) == 0:
		return Unknown, "unknown (a certificate without principals)"
	case cert.Signature.Format == ssh.KeyAlgoRSA:
		return Unknown, "unknown (a certificate signed with SHA-1)"
	}
	if list, ok := cert.CriticalOptions[sourceAddress]; ok {
		if !listed(list, peer(in)) {
			return Unknown, "unknown (a certificate for other source addresses)"
		}
	}
	return True, "a valid certificate"
}

// sourceAddress is the critical option of OpenSSH's PROTOCOL.certkeys: a list of
// addresses and CIDRs with commas between.
const sourceAddress = "source-address"

func listed(list string, a netip.Addr) bool {
	for s := range strings.SplitSeq(list, ",") {
		if network, fault := parseNetwork(s); fault == "" && a.IsValid() && network.Contains(a) {
			return true
		}
	}
	return false
}

// watchValidity notes when a certificate becomes valid, or stops being so.
func (in *Input) watchValidity(cert *ssh.Certificate) {
	const century = 100 * 365 * 24 * 60 * 60 // what is further away may be CertTimeInfinity
	now := uint64(max(in.Now.Unix(), 0))
	for _, at := range []uint64{cert.ValidAfter, cert.ValidBefore} {
		if at > now && at-now < century {
			in.lasts(time.Unix(int64(at), 0).Sub(in.Now))
			return
		}
	}
}

func (c *sshAuthority) path() string       { return "ssh_ca" }
func (c *sshAuthority) wanted(bool) string { return "a certificate of a CA that this rule names" }

func (c *sshAuthority) found(in *Input) (string, time.Duration) {
	_, found := c.check(in)
	return found, 0
}

func parseSSHUsername(p *parser, _ string, n *yaml.Node) (condition, bool) {
	return p.requestText(requestText{name: "ssh_username", value: usernameOf}, n, textOperators, p.nameText)
}

func usernameOf(q *sallyport.Request) (string, Value, string) {
	if q.SSH == nil || q.SSH.Username == "" {
		return "", Unknown, noLogin
	}
	return q.SSH.Username, True, ""
}

// sshMatchesEmail is ssh_username_matches_email: the account is called as what
// stands before the @ of the person's e-mail address, with case: accounts have it.
type sshMatchesEmail struct{}

func parseSSHMatchesEmail(p *parser, _ string, n *yaml.Node) (condition, bool) {
	return leafOf(sshMatchesEmail{}), p.onlyTrue(n, "ssh_username_matches_email")
}

func (sshMatchesEmail) eval(in *Input) Value {
	account, _, why := usernameOf(in.Request)
	if why != "" || in.Person == nil {
		return Unknown
	}
	local, domain, ok := strings.Cut(in.Person.Email, "@")
	if !ok || local == "" || strings.Contains(domain, "@") {
		return Unknown // none, or one whose local part is quoted
	}
	return truth(account == local)
}

func (sshMatchesEmail) path() string       { return "ssh_username_matches_email" }
func (sshMatchesEmail) wanted(bool) string { return "the account called as your e-mail address" }

func (c sshMatchesEmail) found(in *Input) (string, time.Duration) {
	account, _, why := usernameOf(in.Request)
	switch {
	case in.Person == nil:
		return noSession, 0
	case why != "":
		return why, 0
	case c.eval(in) == Unknown:
		return "unknown (you have no e-mail address that names an account)", 0
	}
	return valueWords(account), 0
}

func (sshMatchesEmail) note(in *Input, to *Inputs) {
	if in.Person != nil {
		to.Email = &in.Person.Email
	}
}

func (sshMatchesEmail) recalled(from *Inputs) bool { return from.Email != nil }

// sshMatchesClaim is ssh_username_matches_claim: the account is called as the
// claim says, or one of its values. A claim that is not there is an empty list.
type sshMatchesClaim struct{ claim claim }

// parseSSHMatchesClaim reads PPL's form, the claim's name as value, and that of
// claim, the name behind a slash.
func parseSSHMatchesClaim(p *parser, sub string, n *yaml.Node) (condition, bool) {
	const what = "ssh_username_matches_claim"
	if sub != "" {
		v, ok := p.boolean(n, what+"/"+sub)
		if ok && !v {
			p.fail(n, "%s/%s: false says nothing; write %[1]s/%[2]s: true, or put it under not", what, sub)
		}
		return leafOf(&sshMatchesClaim{newClaim(sub)}), ok && v
	}
	name, ok := p.plainText(n, what+" (the name of a claim)")
	return leafOf(&sshMatchesClaim{newClaim(name)}), ok
}

func (c *sshMatchesClaim) eval(in *Input) Value {
	account, _, why := usernameOf(in.Request)
	if why != "" || in.Person == nil {
		return Unknown
	}
	name := scalar{kind: 's', s: account}
	value := c.claim.lookup(in.Person)
	if list, ok := value.([]any); ok {
		return truth(slices.ContainsFunc(list, name.equal))
	}
	return truth(name.equal(value))
}

func (c *sshMatchesClaim) path() string       { return "ssh_username_matches_claim/" + c.claim.name }
func (c *sshMatchesClaim) wanted(bool) string { return "the account called as your claim" }

func (c *sshMatchesClaim) found(in *Input) (string, time.Duration) {
	if account, _, why := usernameOf(in.Request); why != "" && in.Person != nil {
		return why, 0
	} else if in.Person != nil {
		return valueWords(account), 0
	}
	return noSession, 0
}

func (c *sshMatchesClaim) note(in *Input, to *Inputs) { c.claim.note(in, to) }
func (c *sshMatchesClaim) recalled(from *Inputs) bool { return c.claim.recalled(from) }

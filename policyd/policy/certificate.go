package policy

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"regexp"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// shownCertificate is a parsed certificate. An Input keeps the last one, so that
// the criteria of a request, and questions about the same browser, parse it once.
type shownCertificate struct {
	fingerprint [sha256.Size]byte // of all of it
	spki        [sha256.Size]byte // of its public key
	names       map[string][]string
	ok          bool // it could be parsed
}

const (
	sanEmail = "san_email"
	sanDNS   = "san_dns"
	sanURI   = "san_uri"
)

// certificate returns the request's certificate; or the answer to every question
// about it, and that in words. One that does not chain to a CA of the site is
// unknown: anybody can make a certificate with any name in it. PPL looks at it
// all the same and leaves its refusal to a deny rule with
// invalid_client_certificate, which can be turned off.
func (in *Input) certificate() (c *shownCertificate, absent Value, why string) {
	shown := in.Request.Certificate
	switch {
	case shown == nil:
		return nil, Unknown, "unknown (nobody asked for a certificate)"
	case !shown.Presented:
		return nil, False, "no certificate"
	case !shown.Valid:
		return nil, Unknown, "unknown (a certificate that is not valid)"
	}
	// The key is the hash: whoever reuses the Input may reuse the bytes, too.
	if sum := sha256.Sum256(shown.Leaf); in.shown == nil || in.shown.fingerprint != sum {
		in.shown = parseShown(shown.Leaf, sum)
	}
	if !in.shown.ok {
		return nil, Unknown, "unknown (a certificate that cannot be read)"
	}
	return in.shown, True, ""
}

func parseShown(der []byte, sum [sha256.Size]byte) *shownCertificate {
	c := &shownCertificate{fingerprint: sum}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return c
	}
	c.ok = true
	c.spki = sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	c.names = map[string][]string{sanEmail: cert.EmailAddresses, sanDNS: cert.DNSNames}
	for _, u := range cert.URIs {
		c.names[sanURI] = append(c.names[sanURI], u.String())
	}
	return c
}

// parseCertificate reads {fingerprint, spki_hash, san_email, san_dns, san_uri};
// several keys must all hold.
func parseCertificate(p *parser, _ string, n *yaml.Node) (condition, bool) {
	entries, ok := p.mapping(n, "client_certificate", []string{"fingerprint", "spki_hash", sanEmail, sanDNS, sanURI})
	if !ok {
		return condition{}, false
	}
	block := condition{op: and}
	for _, e := range entries {
		var c criterion
		var good bool
		switch what := "client_certificate." + e.key; e.key {
		case "fingerprint":
			c, good = p.certificateHash(e, what, parseFingerprint)
		case "spki_hash":
			c, good = p.certificateHash(e, what, parseSPKIHash)
		default:
			name := &certificateName{kind: e.key}
			name.match.tests, good = p.textTests(e.value, what, textOperators, textOf(p.nameText))
			c = name
		}
		ok = ok && good
		leaf := leafOf(c)
		leaf.at = placeOf(e.at)
		block.of = append(block.of, leaf)
	}
	if len(block.of) == 1 {
		return block.of[0], ok
	}
	return block, ok
}

// certificateHash is fingerprint and spki_hash.
type certificateHash struct {
	ofRequest
	key string
	of  map[[sha256.Size]byte]bool
}

func (p *parser) certificateHash(e entry, what string, read func(string) ([]byte, string)) (*certificateHash, bool) {
	c := &certificateHash{key: e.key, of: make(map[[sha256.Size]byte]bool)}
	if e.value.Kind == yaml.MappingNode {
		p.fail(e.value, "%s takes one value or a list of them, no operators", what)
		return c, false
	}
	texts, ok := p.oneOrMore(e.value, what, p.plainText)
	for _, t := range texts {
		sum, fault := read(t.text)
		if fault != "" {
			p.fail(t.at, "%s %s", what, fault)
			ok = false
			continue
		}
		c.of[[sha256.Size]byte(sum)] = true
	}
	return c, ok
}

var (
	shortFingerprint = regexp.MustCompile(`^[0-9a-f]{64}$`)
	longFingerprint  = regexp.MustCompile(`^[0-9A-F]{2}(:[0-9A-F]{2}){31}$`)
)

// parseFingerprint reads PPL's two forms of a SHA-256.
func parseFingerprint(s string) (sum []byte, fault string) {
	digits := strings.ToLower(strings.ReplaceAll(s, ":", ""))
	switch {
	case shortFingerprint.MatchString(s), longFingerprint.MatchString(s):
		sum, _ = hex.DecodeString(digits) // what the expressions match is hex
		return sum, ""
	case shortFingerprint.MatchString(digits):
		return nil, "mixes two forms; write " + digits
	}
	return nil, "must be a SHA-256: 64 lower-case hex digits, or 32 pairs of upper-case ones with colons between"
}

func parseSPKIHash(s string) (sum []byte, fault string) {
	sum, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil || len(sum) != sha256.Size {
		return nil, "must be the base64 of a SHA-256, 44 characters"
	}
	return sum, ""
}

func (c *certificateHash) sum(of *shownCertificate) [sha256.Size]byte {
	if c.key == "fingerprint" {
		return of.fingerprint
	}
	return of.spki
}

func (c *certificateHash) eval(in *Input) Value {
	shown, absent, why := in.certificate()
	if why != "" {
		return absent
	}
	return truth(c.of[c.sum(shown)])
}

func (c *certificateHash) path() string       { return "client_certificate." + c.key }
func (c *certificateHash) wanted(bool) string { return "one that this rule names" }

func (c *certificateHash) found(in *Input) (string, time.Duration) {
	shown, _, why := in.certificate()
	if why != "" {
		return why, 0
	}
	sum := c.sum(shown)
	if c.key == "fingerprint" {
		return hex.EncodeToString(sum[:]), 0
	}
	return base64.StdEncoding.EncodeToString(sum[:]), 0
}

// certificateName is san_email, san_dns and san_uri: one of the certificate's
// names of the kind satisfies the matcher.
type certificateName struct {
	ofRequest
	kind  string
	match matcher
}

// eval is unknown where each operator is satisfied, but by different names: PPL
// is content with that, although its documentation says "a name".
func (c *certificateName) eval(in *Input) Value {
	shown, absent, why := in.certificate()
	if why != "" {
		return absent
	}
	names := shown.names[c.kind]
	for _, name := range names {
		if c.match.text(name) == True {
			return True
		}
	}
	for i := range c.match.tests {
		some := False
		for _, name := range names {
			some = max(some, c.match.textTest(&c.match.tests[i], name))
		}
		if some == False {
			return False
		}
	}
	return Unknown
}

func (c *certificateName) path() string       { return "client_certificate." + c.kind }
func (c *certificateName) wanted(bool) string { return "one that this rule names" }

func (c *certificateName) found(in *Input) (string, time.Duration) {
	shown, _, why := in.certificate()
	switch {
	case why != "":
		return why, 0
	case len(shown.names[c.kind]) == 0:
		return "none in the certificate", 0
	}
	return valueWords(strings.Join(shown.names[c.kind], ", ")), 0
}

// invalidCertificate is invalid_client_certificate: none was shown, or one that
// does not chain to a CA of the site.
type invalidCertificate struct{ ofRequest }

func parseInvalidCertificate(p *parser, _ string, n *yaml.Node) (condition, bool) {
	return leafOf(invalidCertificate{}), p.onlyTrue(n, "invalid_client_certificate")
}

func (invalidCertificate) eval(in *Input) Value {
	shown := in.Request.Certificate
	if shown == nil {
		return Unknown
	}
	return truth(!shown.Presented || !shown.Valid)
}

func (invalidCertificate) path() string       { return "invalid_client_certificate" }
func (invalidCertificate) wanted(bool) string { return "no valid certificate" }

func (c invalidCertificate) found(in *Input) (string, time.Duration) {
	switch shown := in.Request.Certificate; {
	case shown == nil:
		return "unknown (nobody asked for a certificate)", 0
	case !shown.Presented:
		return "no certificate", 0
	case !shown.Valid:
		return "a certificate that is not valid", 0
	}
	return "a valid certificate", 0
}

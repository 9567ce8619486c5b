package oidcrp

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"mime"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/oauth2"
)

// Limits of what is kept of a person.
const (
	MaxGroups     = 4096
	maxGroupLen   = 256
	maxClaimsSize = 32 << 10 // bytes of JSON
)

// protocolClaims belong to the login, not to the person. Userinfo has no say in
// them.
var protocolClaims = []string{
	"iss", "aud", "azp", "exp", "iat", "nbf", "jti", "nonce", "at_hash", "c_hash", "s_hash",
	"sub", "sid", "amr", "acr", "auth_time", "_claim_names", "_claim_sources",
}

// fetchUserinfo asks the userinfo endpoint (OpenID Connect Core 1.0, section 5.3)
// for the rest of the claims. An answer about somebody else refuses the login,
// and so does none: claims that a policy denies by must not go missing quietly.
func (c *Client) fetchUserinfo(ctx context.Context, p *provider, token *oauth2.Token, sub string) (claims, error) {
	body, contentType, err := get(ctx, c.http, p.userinfo, token.AccessToken)
	if errors.Is(err, errTooLarge) {
		return nil, refuse(CodeBadUserinfo, "", err)
	}
	if err != nil {
		return nil, unreachable("userinfo", err)
	}
	if media, _, err := mime.ParseMediaType(contentType); err != nil || media != "application/json" {
		return nil, refuse(CodeBadUserinfo, "not application/json", nil)
	}
	info, err := parseClaims(body)
	if err != nil {
		return nil, refuse(CodeBadUserinfo, "", err)
	}
	if info.text("sub") != sub {
		return nil, refuse(CodeUserinfoMismatch, "", nil)
	}
	return info, nil
}

// merge adds what c lacks. Where a claim stands elsewhere (aggregated and
// distributed claims, section 5.6.2) the note of it is kept, so that groups that
// are left out do not look like none.
func (c claims) merge(more claims) {
	elsewhere := more["_claim_names"]
	for _, name := range protocolClaims {
		delete(more, name)
	}
	for name, v := range more {
		if _, ok := c[name]; !ok {
			c[name] = v
		}
	}
	names, ok := elsewhere.(map[string]any)
	if !ok {
		return
	}
	if own, ok := c["_claim_names"].(map[string]any); ok {
		maps.Copy(own, names)
	} else {
		c["_claim_names"] = names
	}
}

// identity turns checked claims into a person.
func (c *Client) identity(t claims) (Identity, error) {
	groups, err := c.groups(t)
	if err != nil {
		return Identity{}, err
	}
	id := Identity{
		Issuer:        t.text("iss"),
		Subject:       t.text("sub"),
		Email:         t.text("email"),
		EmailVerified: t["email_verified"] == true || t["email_verified"] == "true", // some send text
		Name:          t.text("name"),
		Groups:        groups,
		AuthMethods:   authMethods(t),
	}
	rest := maps.Clone(t)
	for _, name := range protocolClaims {
		delete(rest, name)
	}
	delete(rest, c.cfg.GroupsClaim)
	size, err := json.Marshal(rest)
	if err != nil || len(size) > maxClaimsSize {
		return Identity{}, refuse(CodeClaimsTooLarge, "", err)
	}
	id.Claims = rest
	return id, nil
}

// groups reads the groups claim: an array of names, or one name where the
// configuration says so. A provider that had too many to send (Entra's overage)
// is refused: no groups would be read as "in none".
func (c *Client) groups(t claims) ([]string, error) {
	value, ok := t[c.cfg.GroupsClaim]
	if !ok || value == nil {
		names, _ := t["_claim_names"].(map[string]any)
		if _, elsewhere := names[c.cfg.GroupsClaim]; elsewhere || t["hasgroups"] == true || t["hasgroups"] == "true" {
			return nil, refuse(CodeGroupsOverage, "the provider left the groups out", nil)
		}
		return nil, nil
	}
	list, ok := value.([]any)
	if text, isText := value.(string); isText && c.cfg.GroupsString {
		list, ok = []any{text}, true
	}
	if !ok {
		return nil, refuse(CodeBadGroups, "not an array of strings", nil)
	}
	if len(list) > MaxGroups {
		return nil, refuse(CodeTooManyGroups, "", nil)
	}
	seen := make(map[string]bool, len(list))
	var groups []string
	for _, v := range list {
		g, ok := v.(string)
		if !ok || !validGroup(g) {
			return nil, refuse(CodeBadGroups, "an entry is no name", nil)
		}
		if !seen[g] {
			seen[g] = true
			groups = append(groups, g)
		}
	}
	return groups, nil
}

func validGroup(g string) bool {
	return g != "" && len(g) <= maxGroupLen && utf8.ValidString(g) &&
		!strings.ContainsFunc(g, unicode.IsControl)
}

func authMethods(t claims) []string {
	var methods []string
	list, _ := t["amr"].([]any)
	for _, v := range list {
		if m, ok := v.(string); ok && m != "" && len(methods) < 16 {
			methods = append(methods, Clip(m))
		}
	}
	if acr := t.text("acr"); acr != "" {
		methods = append(methods, "acr:"+Clip(acr))
	}
	return methods
}

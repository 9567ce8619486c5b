package scenario

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"net/http"
	"net/netip"
	"strings"

	"go.yaml.in/yaml/v3"
	"golang.org/x/crypto/ssh"

	"sallyport"
)

func (r *reader) request(to *Request) func(*yaml.Node) {
	return func(n *yaml.Node) {
		if n = plain(n); absent(n) {
			return
		}
		var s sallyport.SSHRequest
		var m sallyport.MCPRequest
		var c certificate
		r.object(n, "a request", fields{
			"session": text(r, &to.Session),
			"target":  parsed(r, &to.Target, sallyport.ParseTarget),
			"method":  text(r, &to.Method),
			"path":    text(r, &to.Path),
			"headers": r.headers(&to.Headers),
			"ip":      parsed(r, &to.Peer, peer),
			"time":    parsed(r, &to.Time, moment),

			"ssh_username":  text(r, &s.Username),
			"ssh_publickey": parsed(r, &s.PublicKey, sshKey),
			"mcp_method":    text(r, &m.Method),
			"mcp_tool":      text(r, &m.Tool),

			"client_certificate":           parsed(r, &c.leaf, leafOf),
			"client_certificate_presented": parsed(r, &c.presented, said),
			"client_certificate_valid":     parsed(r, &c.valid, said),
		})
		if s.Username != "" || s.PublicKey != nil {
			to.SSH = &s
		}
		if m != (sallyport.MCPRequest{}) {
			m.Method = cmp.Or(m.Method, "tools/call")
			to.MCP = &m
		}
		to.Certificate = c.request()
	}
}

// headers reads names with one value or a list.
func (r *reader) headers(to *map[string][]string) func(*yaml.Node) {
	return func(n *yaml.Node) {
		n = plain(n)
		if absent(n) {
			return
		}
		if n.Kind != yaml.MappingNode {
			r.fail(n, "headers must be an object")
			return
		}
		h := http.Header{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			name, v := n.Content[i].Value, plain(n.Content[i+1])
			if v.Kind != yaml.SequenceNode {
				v = &yaml.Node{Kind: yaml.SequenceNode, Content: []*yaml.Node{v}}
			}
			for _, e := range v.Content {
				if s, ok := r.scalar(e); ok {
					h.Add(name, s)
				}
			}
		}
		*to = h
	}
}

// peer reads an address with or without port, as the gateway would report it.
func peer(s string) (netip.AddrPort, error) {
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()), nil
	}
	addr, err := netip.ParseAddr(strings.Trim(s, "[]"))
	return netip.AddrPortFrom(addr.Unmap(), 0), err
}

// sshKey reads a line of authorized_keys, or base64 of the wire format.
func sshKey(s string) ([]byte, error) {
	if raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(s)); err == nil {
		return raw, nil
	}
	key, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(s))
	if err != nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("must be one line of authorized_keys, or base64 of the key's wire format")
	}
	return key.Marshal(), nil
}

// certificate is what a test says about a client certificate; the pointers are
// nil where it says nothing.
type certificate struct {
	leaf             []byte
	presented, valid *bool
}

func said(s string) (*bool, error) {
	b, err := truth(s)
	return &b, err
}

func leafOf(s string) ([]byte, error) {
	block, _ := pem.Decode([]byte(s))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("must be a certificate in PEM")
	}
	return block.Bytes, nil
}

func (c certificate) request() *sallyport.ClientCertificate {
	if c.leaf == nil && c.presented == nil && c.valid == nil {
		return nil
	}
	out := &sallyport.ClientCertificate{Presented: true, Leaf: c.leaf}
	if c.presented != nil {
		out.Presented = *c.presented
	}
	out.Valid = out.Presented
	if c.valid != nil {
		out.Valid = *c.valid
	}
	return out
}

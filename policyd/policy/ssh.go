package policy

import "go.yaml.in/yaml/v3"

func parseSSHKey(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

func parseSSHAuthority(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

func parseSSHUsername(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

func parseSSHMatchesEmail(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

func parseSSHMatchesClaim(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

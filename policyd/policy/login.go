package policy

import "go.yaml.in/yaml/v3"

func parseSessionAge(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

func parseAuthMethod(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

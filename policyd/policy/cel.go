package policy

import "go.yaml.in/yaml/v3"

func parseCEL(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

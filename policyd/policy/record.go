package policy

import "go.yaml.in/yaml/v3"

func parseRecord(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

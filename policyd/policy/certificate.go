package policy

import "go.yaml.in/yaml/v3"

func parseCertificate(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

func parseInvalidCertificate(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

package policy

import "go.yaml.in/yaml/v3"

func parseHTTPMethod(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

func parseHTTPPath(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

func parsePreflight(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

func parseMCPTool(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

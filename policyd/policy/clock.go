package policy

import "go.yaml.in/yaml/v3"

func parseDate(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

func parseDayOfWeek(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

func parseTimeOfDay(p *parser, _ string, n *yaml.Node) (condition, bool) { return p.notYet(n) }

package config

import (
	"fmt"
	"io"

	"go.yaml.in/yaml/v3"

	"sallyport"
)

// shown is what of a configuration record stands in the file.
type shown struct {
	ExplainGroups bool         `yaml:"explain_groups,omitempty"`
	Policyd       shownPolicyd `yaml:"policyd,omitempty"`
	Routes        []shownRoute `yaml:"routes"`
}

type shownPolicyd struct {
	PostureSources []string `yaml:"posture_sources,omitempty"`
	PostureTTL     string   `yaml:"posture_ttl,omitempty"`
}

type shownRoute struct {
	From    string    `yaml:"from"`
	To      string    `yaml:"to,omitempty"`
	Name    string    `yaml:"name,omitempty"`
	Hidden  bool      `yaml:"hidden,omitempty"`
	Carrier string    `yaml:"carrier,omitempty"`
	Policy  yaml.Node `yaml:"policy"`
}

// WriteRoutes prints routes, policies and what they depend on as the file's YAML.
func WriteRoutes(w io.Writer, c sallyport.Config) error {
	doc := shown{ExplainGroups: c.ExplainGroups, Policyd: shownPolicyd{PostureSources: c.PostureSources}, Routes: []shownRoute{}}
	if c.PostureTTL != 0 {
		doc.Policyd.PostureTTL = c.PostureTTL.String()
	}
	for _, r := range c.Routes {
		route := shownRoute{From: r.From, To: r.To, Name: r.Name, Hidden: r.Hidden, Carrier: r.Carrier}
		var document yaml.Node
		if err := yaml.Unmarshal([]byte(r.Policy), &document); err != nil || len(document.Content) != 1 {
			return fmt.Errorf("policy of %s cannot be read: %w", r.From, err)
		}
		route.Policy = *document.Content[0]
		doc.Routes = append(doc.Routes, route)
	}
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	if err := enc.Encode(doc); err != nil {
		return err
	}
	return enc.Close()
}

package config

import (
	"os"
	"strings"
	"testing"
)

// TestManual: docs/configuration.md names every key that the file may have.
func TestManual(t *testing.T) {
	text, err := os.ReadFile("../../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	keys := 0
	var walk func(path string, node map[string]any)
	walk = func(path string, node map[string]any) {
		if items, ok := node["items"].(map[string]any); ok && path != "authd.users" {
			if _, object := items["properties"]; object {
				walk(path+"[]", items)
				return
			}
		}
		properties, ok := node["properties"].(map[string]any)
		if !ok {
			keys++
			if !strings.Contains(string(text), "`"+path+"`") {
				t.Errorf("docs/configuration.md does not name `%s`", path)
			}
			return
		}
		for name, child := range properties {
			walk(strings.TrimPrefix(path+"."+name, "."), child.(map[string]any))
		}
	}
	walk("", Schema())
	if keys < 50 {
		t.Errorf("the schema has %d keys; the test does not see all of it", keys)
	}
}

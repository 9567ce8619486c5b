package stack

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Several is two of every daemon, each a process with a data_dir of its own that
// `sallyport init --from` filled, and a balancer in front of the two authds. Their
// names are cached-1, cached-2, policyd-1 and so on.
const Several Mode = "several"

// severalOrder is how they find each other's ports.
var severalOrder = []string{"cached-1", "cached-2", "policyd-1", "policyd-2", "gateway-1", "gateway-2", "authd-1", "authd-2"}

// SeveralDaemons are the names of all processes of a deployment Several.
func SeveralDaemons() []string { return slices.Clone(severalOrder) }

// StartSeveral starts a deployment of two of each daemon; cfg.Cached must name a
// PostgreSQL, and cfg.IDP an identity provider. It ends with the test.
func StartSeveral(t testing.TB, cfg Config) *Stack {
	t.Helper()
	dir := t.TempDir()
	s := &Stack{
		T: t, Mode: Several, Dir: dir, File: filepath.Join(dir, "sallyport.yaml"), cfg: cfg,
		ports: map[string]string{}, procs: map[string]*Process{}, ready: map[string]Ready{},
		Balancer: NewBalancer(t),
	}
	t.Cleanup(s.Stop)
	s.write()
	s.Operator("init", "--config", s.File)
	for _, name := range severalOrder {
		s.write() // with the ports of those before it
		s.Operator("init", "--config", s.fileOf(name), "--from", filepath.Join(dir, "data"), "--name", name)
		s.StartDaemon(name)
	}
	s.write()
	s.Balancer.To(s.ports["authd-1"], s.ports["authd-2"])
	s.Operator("apply", "--config", s.File)
	for _, name := range severalOrder {
		s.WaitReady(name)
	}
	return s
}

// kindOf is the daemon that a process runs.
func kindOf(name string) string {
	kind, _, _ := strings.Cut(name, "-")
	return kind
}

func (s *Stack) fileOf(name string) string {
	if s.Mode == Several {
		return filepath.Join(s.Dir, name+".yaml")
	}
	return s.File
}

// writeSeveral writes the operator's file and one for each process.
func (s *Stack) writeSeveral() {
	s.T.Helper()
	s.mu.Lock()
	docs := map[string]any{s.File: s.operatorsDocument()}
	for _, name := range severalOrder {
		docs[s.fileOf(name)] = s.documentOf(name)
	}
	s.mu.Unlock()
	for file, doc := range docs {
		text, err := json.MarshalIndent(doc, "", "  ")
		if err != nil {
			s.T.Fatal(err)
		}
		replaceFile(s.T, file, text)
	}
}

// operatorsDocument is what `sallyport init` and `apply` read.
func (s *Stack) operatorsDocument() map[string]any {
	doc := s.common("data")
	var gateways []any
	for _, name := range []string{"gateway-1", "gateway-2"} {
		if s.ports[name] != "" {
			gateways = append(gateways, map[string]any{"name": name, "url": s.public(name+".localhost", name)})
		}
	}
	if gateways != nil {
		doc["gateways"] = gateways
	}
	doc["authd"] = s.authdOf("authd-1")
	doc["policyd"] = merged(s.cfg.Policyd, nil)
	doc["connect"] = map[string]any{
		"cached":  []string{s.known("cached-1"), s.known("cached-2")},
		"policyd": []string{s.known("policyd-1"), s.known("policyd-2")},
	}
	doc["routes"] = s.cfg.Routes
	doc["explain_groups"] = s.cfg.ExplainGroups
	return doc
}

// documentOf is what one process reads.
func (s *Stack) documentOf(name string) map[string]any {
	doc := s.common(name)
	two := func(kind string) []string { return []string{s.known(kind + "-1"), s.known(kind + "-2")} }
	switch kindOf(name) {
	case "cached":
		doc["cached"] = merged(s.cfg.Cached, map[string]any{"listen": s.listen(name)})
	case "policyd":
		doc["policyd"] = merged(s.cfg.Policyd, map[string]any{"listen": s.listen(name)})
		doc["connect"] = map[string]any{"cached": two("cached")}
	case "gateway":
		doc["gateway"] = merged(s.cfg.Gateway, map[string]any{
			"name": name, "public_url": s.public(name+".localhost", name), "listen": s.listen(name),
		})
		doc["connect"] = map[string]any{"policyd": two("policyd")}
	case "authd":
		doc["authd"] = s.authdOf(name)
		doc["connect"] = map[string]any{"cached": two("cached")}
	}
	return doc
}

func (s *Stack) common(dataDir string) map[string]any {
	level := s.cfg.LogLevel
	if level == "" {
		level = "info"
	}
	return map[string]any{
		"domain": "test.example", "data_dir": dataDir,
		"log": map[string]any{"level": level, "format": "text"},
	}
}

func (s *Stack) authdOf(name string) map[string]any {
	doc := map[string]any{
		"public_url": s.Balancer.URL("auth.localhost"), "listen": s.listen(name), "idp": maps.Clone(s.cfg.IDP),
	}
	if s.cfg.Session != nil {
		doc["session"] = s.cfg.Session
	}
	return doc
}

func replaceFile(t testing.TB, path string, text []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// Again starts a process that was killed, on the ports that it had.
func (s *Stack) Again(name string) {
	s.T.Helper()
	s.StartDaemon(name)
	s.WaitReady(name)
}

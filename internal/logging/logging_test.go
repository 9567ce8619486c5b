package logging_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"sallyport/internal/logging"
)

func TestNewWritesJSON(t *testing.T) {
	var out bytes.Buffer
	log, err := logging.New(&out, "info", "json")
	if err != nil {
		t.Fatal(err)
	}
	log.Debug("not this")
	log.Named("gateway").Info("flow opened", "flow", "f-1", "bytes", 7)

	var line map[string]any
	if err := json.Unmarshal(out.Bytes(), &line); err != nil {
		t.Fatalf("log is not one JSON line: %v\n%s", err, out.String())
	}
	want := map[string]any{"@level": "info", "@message": "flow opened", "@module": "gateway", "flow": "f-1", "bytes": 7.0}
	for k, v := range want {
		if line[k] != v {
			t.Errorf("%s: got %v; want %v", k, line[k], v)
		}
	}
}

func TestNewWritesText(t *testing.T) {
	var out bytes.Buffer
	log, err := logging.New(&out, "", "")
	if err != nil {
		t.Fatal(err)
	}
	log.Warn("retrying", "peer", "10.0.0.1:443")
	got := out.String()
	if !strings.Contains(got, "[WARN]") || !strings.Contains(got, "retrying: peer=10.0.0.1:443") || strings.Count(got, "\n") != 1 {
		t.Errorf("got %q", got)
	}
}

// A stranger's text in a field must neither start a new line nor reach a
// terminal raw.
func TestFieldsCannotForgeLines(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		var out bytes.Buffer
		log, err := logging.New(&out, "info", format)
		if err != nil {
			t.Fatal(err)
		}
		log.Info("refused", "host", "a\x1b[31m\r\n2026-01-01 [ERROR] forged")
		if got := strings.TrimSuffix(out.String(), "\n"); strings.ContainsAny(got, "\x1b\r") || forgedLine(got) {
			t.Errorf("%s: got %q", format, got)
		}
	}
}

// forgedLine reports whether a line of the log starts with what the field held.
func forgedLine(log string) bool {
	for line := range strings.Lines(log) {
		if strings.HasPrefix(line, "2026-01-01 [ERROR]") {
			return true
		}
	}
	return false
}

func TestNewRefuses(t *testing.T) {
	for _, tt := range []struct{ level, format, want string }{
		{"loud", "json", `log level "loud"`},
		{"off", "json", `log level "off"`},
		{"info", "xml", `log format "xml"`},
	} {
		_, err := logging.New(&bytes.Buffer{}, tt.level, tt.format)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("New(%q, %q): got %v; want %q", tt.level, tt.format, err, tt.want)
		}
		if logging.Check(tt.level, tt.format) == nil {
			t.Errorf("Check(%q, %q): got nil", tt.level, tt.format)
		}
	}
	for _, level := range []string{"trace", "DEBUG", "Info", "warn", "error", ""} {
		if err := logging.Check(level, "json"); err != nil {
			t.Errorf("Check(%q): %v", level, err)
		}
	}
}

func TestDiscard(t *testing.T) {
	if log := logging.Discard(); log.IsError() {
		t.Error("Discard would log errors")
	}
}

package posture

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"sallyport"
)

// ParseFile reads the facts of a posture file: a JSON object of scalars
//
//	{"disk_encrypted": true, "os_version": "15.6"}
//
// or one "name: value" a line, with # comments:
//
//	disk_encrypted: true
//	os_version: 15.6
//
// In lines, a known fact gets its own type (os_version is text), another one is
// true or false, a number, or text, which may stand in double quotes. A name that
// comes twice is an error. at is the time that the facts carry.
func ParseFile(text []byte, at time.Time) (map[string]sallyport.Fact, error) {
	parse := parseLines
	if trimmed := bytes.TrimSpace(text); len(trimmed) > 0 && trimmed[0] == '{' {
		parse = parseObject
	}
	facts := map[string]sallyport.Fact{}
	add := func(name string, value any) error {
		if err := checkFact(name, value); err != nil {
			return err
		}
		if _, twice := facts[name]; twice {
			return fmt.Errorf("%s comes twice", name)
		}
		facts[name] = sallyport.Fact{Value: value, At: at, Source: sallyport.SourceFile}
		return nil
	}
	if err := parse(text, add); err != nil {
		return nil, err
	}
	return facts, nil
}

// isBool tells the type of the known facts; what is not in it is text.
var isBool = map[string]bool{
	sallyport.FactOS: false, sallyport.FactOSVersion: false, sallyport.FactKernel: false,
	sallyport.FactAgentVersion: false, sallyport.FactKeyProtection: false,
	sallyport.FactDiskEncrypted: true, sallyport.FactFirewall: true,
	sallyport.FactScreenLock: true, sallyport.FactSecureBoot: true,
}

func checkFact(name string, value any) error {
	if name == "" || len(name) > 64 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789_.") != "" {
		return fmt.Errorf("%.80q is no name of a fact (a to z, 0 to 9, _ and .)", name)
	}
	wantBool, known := isBool[name]
	switch value.(type) {
	case bool:
		if known && !wantBool {
			return fmt.Errorf("%s must be text", name)
		}
	case string, float64:
		if known && wantBool {
			return fmt.Errorf("%s must be true or false", name)
		}
		if _, text := value.(string); known && !text {
			return fmt.Errorf("%s must be text, in quotes", name)
		}
	default:
		return fmt.Errorf("%s must be true, false, a number or text", name)
	}
	return nil
}

// parseObject walks the tokens, because decoding into a map would hide a name
// that comes twice.
func parseObject(text []byte, add func(string, any) error) error {
	d := json.NewDecoder(bytes.NewReader(text))
	if _, err := d.Token(); err != nil {
		return err
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return err
		}
		value, err := d.Token()
		if err != nil {
			return err
		}
		if err := add(name.(string), value); err != nil {
			return err
		}
	}
	if _, err := d.Token(); err != nil {
		return err
	}
	if d.More() {
		return errors.New("something follows the JSON object")
	}
	return nil
}

func parseLines(text []byte, add func(string, any) error) error {
	lines := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		name, rest, ok := strings.Cut(line, ":")
		if !ok {
			return fmt.Errorf("line %d: want name: value", n)
		}
		value, err := scalar(name, strings.TrimSpace(rest))
		if err == nil {
			err = add(strings.TrimSpace(name), value)
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
	}
	return lines.Err()
}

func scalar(name, s string) (any, error) {
	if strings.HasPrefix(s, `"`) {
		return strconv.Unquote(s)
	}
	if wantBool, known := isBool[name]; known && !wantBool {
		return s, nil
	}
	switch s {
	case "true":
		return true, nil
	case "false":
		return false, nil
	case "":
		return nil, errors.New("the value is missing")
	}
	if f, err := strconv.ParseFloat(s, 64); err == nil && strings.Trim(s, "0123456789.-") == "" {
		return f, nil
	}
	return s, nil
}

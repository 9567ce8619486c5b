package policy

import (
	"archive/zip"
	"bytes"
	_ "embed"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"
)

//go:generate cp $GOROOT/lib/time/zoneinfo.zip zoneinfo.zip

// zoneData is the IANA time zone database as Go distributes it. time.LoadLocation
// would take the machine's first, and two machines would decide differently.
//
//go:embed zoneinfo.zip
var zoneData []byte

// zones are the time zones by name; each is read when it is first asked for.
var zones = sync.OnceValues(func() (map[string]func() (*time.Location, error), error) {
	archive, err := zip.NewReader(bytes.NewReader(zoneData), int64(len(zoneData)))
	if err != nil {
		return nil, fmt.Errorf("built-in time zones: %w", err)
	}
	out := make(map[string]func() (*time.Location, error), len(archive.File))
	for _, f := range archive.File {
		if !strings.HasSuffix(f.Name, "/") {
			out[f.Name] = sync.OnceValues(func() (*time.Location, error) { return readZone(f) })
		}
	}
	return out, nil
})

func readZone(f *zip.File) (*time.Location, error) {
	r, err := f.Open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	return time.LoadLocationFromTZData(f.Name, data)
}

// zone reads the name of a time zone. "Local" and "" would be the machine's.
func (p *parser) zone(n *yaml.Node, what string) (*time.Location, bool) {
	name, ok := p.plainText(n, what)
	if !ok {
		return nil, false
	}
	all, err := zones()
	if err != nil {
		p.fail(n, "%v", err)
		return nil, false
	}
	load, known := all[name]
	if !known {
		p.fail(n, "unknown time zone %q; write one like Europe/Berlin or UTC%s", name, suggest(name, slices.Collect(maps.Keys(all))))
		return nil, false
	}
	zone, err := load()
	if err != nil {
		p.fail(n, "time zone %s: %v", name, err)
		return nil, false
	}
	return zone, true
}

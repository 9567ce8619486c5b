package postgres

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"sallyport"
)

// markerSize is the size of the text in the file: one block, so that it is
// written in one piece.
const markerSize = 256

// marker is a file of this machine that says that there is a store, which one it
// is, and how far it is known to have been written: a database that is empty,
// another one, or behind is then never taken for it. Whoever has the store open
// here holds it locked.
type marker struct {
	f           *os.File
	initialised bool // a store was made here

	mu       sync.Mutex
	Store    string `json:"store"`
	Revision uint64 `json:"revision"`
}

// lockMarker opens the lock file and locks it for as long as it is open.
func lockMarker(path string) (*marker, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		return nil, &sallyport.Error{
			Outcome: sallyport.OutcomeInternal,
			Code:    "storage.in_use",
			Message: "another process has the record store open",
			Hint:    "stop the other cached, or give this one a data_dir of its own",
		}
	}
	m := &marker{f: f}
	text, err := io.ReadAll(io.LimitReader(f, markerSize))
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if m.initialised = len(text) > 0; m.initialised && json.Unmarshal(text, m) != nil {
		m.Store, m.Revision = "", 0 // unreadable, but it says that there was a store
	}
	return m, nil
}

// adopt makes the marker that of the store; the next write puts it down.
func (m *marker) adopt(store string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.Store != store {
		m.Store, m.Revision = store, 0
	}
}

// write puts the revision down if it is new, and durably so if sync is set.
// Without it a power failure may lose a later revision, never the marker.
func (m *marker) write(revision uint64, sync bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.initialised && m.Revision == revision && !sync {
		return nil
	}
	m.Revision = revision
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	text = append(text, bytes.Repeat([]byte{' '}, markerSize-1-len(text))...)
	if _, err := m.f.WriteAt(append(text, '\n'), 0); err != nil {
		return fmt.Errorf("write %s: %w", m.f.Name(), err)
	}
	if !sync {
		return nil
	}
	if err := m.f.Sync(); err != nil {
		return fmt.Errorf("write %s: %w", m.f.Name(), err)
	}
	if m.initialised {
		return nil
	}
	m.initialised = true
	return syncDir(filepath.Dir(m.f.Name()))
}

// path is the file's name.
func (m *marker) path() string { return m.f.Name() }

// Close gives the lock back.
func (m *marker) Close() error { return m.f.Close() }

// syncDir makes names in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

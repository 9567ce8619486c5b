// Package marker is the file beside a record store that says that there is one,
// which one it is, and how far it is known to have been written: a store that is
// missing, another one, or an older copy is then never taken for it. Whoever has
// a store open holds its marker locked. It does not know what a store is; the
// engines (cached/sqlite, cached/postgres) say what does not fit.
package marker

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

// size is the size of the text in the file: one block, so that it is
// written in one piece.
const size = 256

// Marker is the lock file: whoever holds its lock has the store, and its text
// says that there is a store.
type Marker struct {
	f           *os.File
	Initialised bool `json:"-"` // a store was made here

	mu       sync.Mutex
	Store    string `json:"store"`
	Revision uint64 `json:"revision"`
}

// Open opens the lock file and locks it for as long as it is open.
func Open(path string) (*Marker, error) {
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
	m := &Marker{f: f}
	text, err := io.ReadAll(io.LimitReader(f, size))
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if m.Initialised = len(text) > 0; m.Initialised && json.Unmarshal(text, m) != nil {
		m.Store, m.Revision = "", 0 // unreadable, but it says that there was a store
	}
	return m, nil
}

// Adopt makes the marker that of the store; the next write puts it down.
func (m *Marker) Adopt(store string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.Store != store {
		m.Store, m.Revision = store, 0
	}
}

// Write puts the revision down if it is new, and durably so if sync is set.
// Without it a power failure may lose a later revision, never the marker.
func (m *Marker) Write(revision uint64, sync bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.Initialised && m.Revision == revision && !sync {
		return nil
	}
	m.Revision = revision
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	text = append(text, bytes.Repeat([]byte{' '}, size-1-len(text))...)
	if _, err := m.f.WriteAt(append(text, '\n'), 0); err != nil {
		return fmt.Errorf("write %s: %w", m.f.Name(), err)
	}
	if !sync {
		return nil
	}
	if err := m.f.Sync(); err != nil {
		return fmt.Errorf("write %s: %w", m.f.Name(), err)
	}
	if m.Initialised {
		return nil
	}
	m.Initialised = true
	return SyncDir(filepath.Dir(m.f.Name()))
}

// Path is the file's name.
func (m *Marker) Path() string { return m.f.Name() }

// Fd is the file's, to ask about the disk that it lies on.
func (m *Marker) Fd() uintptr { return m.f.Fd() }

// Close gives the lock back.
func (m *Marker) Close() error { return m.f.Close() }

// SyncDir makes names in dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

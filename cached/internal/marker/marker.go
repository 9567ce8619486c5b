// Package marker is the file beside a record store that says that there is one,
// which one it is, and how far it is known to have been written: a store that is
// missing, another one, or an older copy is then never taken for it. Whoever has
// a store open here holds its marker locked. It does not know what a store is; the
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
	"sallyport/cached"
)

// size is the size of the marker in the file: one block, so that it is written in
// one piece.
const size = 256

// Marker is the lock file: whoever holds its lock has the store, and its text
// says that there is a store. It is there, whole, before the store is.
type Marker struct {
	f *os.File
	// Making: no store was ever opened here.
	Making bool   `json:"-"`
	synced uint64 // revision that survives the end of the machine's power

	mu       sync.Mutex // guards what follows
	Store    string     `json:"store"` // empty while making, and if the text cannot be read
	Revision uint64     `json:"revision"`
}

// Open opens the lock file and locks it for as long as it is open; another process
// that has it is storage.in_use. Where there is none it makes one, unless fresh,
// which looks for what a store would have left, returns an error; nil: nothing can
// have been left here.
func Open(path string, fresh func() error) (*Marker, error) {
	f, err := open(path)
	if errors.Is(err, os.ErrNotExist) {
		if fresh != nil {
			if err := fresh(); err != nil {
				return nil, err
			}
		}
		if err := create(path); err != nil {
			return nil, err
		}
		f, err = open(path)
	}
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
	if m.Making = bytes.Equal(text, padded(making)); !m.Making && json.Unmarshal(text, m) != nil {
		m.Store, m.Revision = "", 0 // it still says that there was a store, but not which
	}
	return m, nil
}

func open(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
}

// making is what a marker says until the store is there.
const making = `{"making":true}`

// create puts the first marker down whole or not at all, so that an empty one is
// always a damaged one.
func create(path string) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(padded(making))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(tmp, path); err != nil && !errors.Is(err, os.ErrExist) { // another process was quicker
		return err
	}
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// padded returns text in the size of a marker.
func padded(text string) []byte {
	return append(append([]byte(text), bytes.Repeat([]byte{' '}, size-1-len(text))...), '\n')
}

// Adopt makes the marker that of the store; the next write puts it down.
func (m *Marker) Adopt(store string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.Store != store {
		m.Store, m.Revision = store, 0
	}
}

// Write puts the revision down. It follows what is durable already, so the marker is
// never ahead of the store, and survives the end of the process; only Sync makes it
// survive the end of the machine's power, too. Errors wrap cached.ErrBroken, unless
// the disk is full (ENOSPC), as one can be where even writing over a block needs a
// new one.
func (m *Marker) Write(revision uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Revision = revision
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if _, err := m.f.WriteAt(padded(string(text)), 0); err != nil {
		return m.failed(err)
	}
	m.Making = false
	return nil
}

// Sync makes what was written durable, if it is not yet. Its errors are Write's.
func (m *Marker) Sync() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.synced == m.Revision && m.synced != 0 {
		return nil
	}
	if err := m.f.Sync(); err != nil {
		return m.failed(err)
	}
	m.synced = m.Revision
	return nil
}

func (m *Marker) failed(err error) error {
	err = fmt.Errorf("write %s: %w", m.f.Name(), err)
	if errors.Is(err, unix.ENOSPC) {
		return err
	}
	return fmt.Errorf("%w: %w", cached.ErrBroken, err)
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

package sqlite

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

// markerSize is the size of the marker in the file: one block, so that it is
// written in one piece.
const markerSize = 256

// marker is the lock file: whoever holds its lock has the store, and its text
// says that there is a store. It is there, whole, before the store is.
type marker struct {
	f      *os.File
	making bool // no store was ever opened here
	synced uint64

	mu       sync.Mutex // guards what follows
	Store    string     `json:"store"` // empty while making, and if the text cannot be read
	Revision uint64     `json:"revision"`
}

// lockMarker opens the lock file of the store at path and locks it for as long as
// it is open.
func lockMarker(path string) (*marker, error) {
	f, err := openMarker(path + ".lock")
	if errors.Is(err, os.ErrNotExist) {
		if err := neverWritten(path); err != nil {
			return nil, err
		}
		if err := makeMarker(path + ".lock"); err != nil {
			return nil, err
		}
		f, err = openMarker(path + ".lock")
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
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
	if m.making = bytes.Equal(text, markerText(makingText)); !m.making && json.Unmarshal(text, m) != nil {
		m.Store, m.Revision = "", 0 // it still says that there was a store, but not which
	}
	return m, nil
}

func openMarker(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
}

// makingText is what a marker says until the store is there.
const makingText = `{"making":true}`

// makeMarker puts the first marker down whole or not at all, so that an empty one
// is always a damaged one.
func makeMarker(path string) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(markerText(makingText))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(tmp, path); err != nil && !errors.Is(err, os.ErrExist) { // another process was quicker
		return err
	}
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// markerText returns text in the size of a marker.
func markerText(text string) []byte {
	return append(append([]byte(text), bytes.Repeat([]byte{' '}, markerSize-1-len(text))...), '\n')
}

// adopt makes the marker that of the store; the next write puts it down.
func (m *marker) adopt(store string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.Store != store {
		m.Store, m.Revision = store, 0
	}
}

// write puts the revision down. It follows what is durable already, so the marker is
// never ahead of the store, and survives the end of the process; only sync makes
// it survive the end of the machine's power, too.
func (m *marker) write(revision uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Revision = revision
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if _, err := m.f.WriteAt(markerText(string(text)), 0); err != nil {
		return markerFailed(m.f.Name(), err)
	}
	m.making = false
	return nil
}

// sync makes what was written durable, if it is not yet.
func (m *marker) sync() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.synced == m.Revision && m.synced != 0 {
		return nil
	}
	if err := m.f.Sync(); err != nil {
		return markerFailed(m.f.Name(), err)
	}
	m.synced = m.Revision
	return nil
}

// markerFailed says what an error of the marker means for the store. A disk where
// even writing over a block needs a new one can be full; everything else is its
// failure.
func markerFailed(name string, err error) error {
	err = fmt.Errorf("write %s: %w", name, err)
	if errors.Is(err, unix.ENOSPC) {
		return full(err)
	}
	return fmt.Errorf("%w: %w", cached.ErrBroken, err)
}

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

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
	// Next is on the way to take the store's place; nil: none is.
	Next *Next `json:"next,omitempty"`
}

// Next is a store that takes the place of another one.
type Next struct {
	Store    string `json:"store"`
	Revision uint64 `json:"revision"`
	// Aside is what is added to the name of the store before it.
	Aside string `json:"aside"`
}

// Open opens the lock file and locks it for as long as it is open; another process
// that has it is storage.in_use. Where there is none it makes one, unless fresh,
// which looks for what a store would have left, returns an error; nil: nothing can
// have been left here.
func Open(path string, fresh func() error) (*Marker, error) {
	return openOr(path, func() error {
		if fresh != nil {
			if err := fresh(); err != nil {
				return err
			}
		}
		return create(path, making)
	})
}

// Take is Open for somebody who puts the store in order: where the marker is
// missing it makes one that vouches for no store, and others refuse what is there
// until a write says otherwise.
func Take(path string) (*Marker, error) {
	return openOr(path, func() error { return create(path, nothing) })
}

// Revision returns the revision in the marker at path, which may be in use.
func Revision(path string) (uint64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	var m Marker
	if err := json.Unmarshal(text, &m); err != nil {
		return 0, fmt.Errorf("%s is damaged", path)
	}
	if m.Next != nil {
		return max(m.Revision, m.Next.Revision), nil
	}
	return m.Revision, nil
}

// openOr opens and locks the marker, and has it made if there is none.
func openOr(path string, make func() error) (*Marker, error) {
	f, err := open(path)
	if errors.Is(err, os.ErrNotExist) {
		if err := make(); err != nil {
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
		m.Store, m.Revision, m.Next = "", 0, nil // it still says that there was a store, but not which
	}
	return m, nil
}

func open(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
}

const (
	// making is what a marker says until the store is there.
	making = `{"making":true}`
	// nothing is what one says that vouches for no store.
	nothing = `{}`
)

// create puts the first marker down whole or not at all, so that an empty one is
// always a damaged one.
func create(path, text string) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(padded(text))
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

// Fits reports whether a store that is at a revision may be the one that was written
// last.
func (m *Marker) Fits(store string, revision uint64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := m.Next; n != nil && n.Store == store {
		return n.Revision <= revision
	}
	return m.Making || m.Store == store && m.Revision <= revision
}

// Expect puts down, for good, that next takes the store's place from now on.
func (m *Marker) Expect(next Next) error {
	m.mu.Lock()
	m.Next = &next
	m.synced = 0
	revision := m.Revision
	m.mu.Unlock()
	if err := m.Write(revision); err != nil {
		return err
	}
	return m.Sync()
}

// Adopt makes the marker that of the store; the next write puts it down.
func (m *Marker) Adopt(store string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.Store != store {
		m.Store, m.Revision = store, 0
	}
	m.Next, m.synced = nil, 0
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

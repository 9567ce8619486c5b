package sqlite

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"sallyport/cached/internal/marker"
)

const restoredSuffix = ".restored"

// parts are what lies at path beside the marker, by what is added to the name. The
// database is the last to go.
var parts = [...]string{"-wal", "-shm", journalSuffix, ""}

// Replace puts another store in the place of the one at path, of which nothing need
// be there or be sound: an empty one that fill has filled. Until it is complete, and
// if fill fails, nothing has changed; afterwards the old files bear another name,
// aside, which is empty if there were none. Whoever opens the store after a kill at
// any moment finds the old one or the new one. Errors: storage.in_use, and those of
// Open and fill.
func Replace(path string, cfg Config, fill func(*Store) error) (aside string, err error) {
	aside, err = replace(path, cfg, fill)
	if err != nil {
		return aside, fmt.Errorf("replace %s: %w", path, err)
	}
	return aside, nil
}

func replace(path string, cfg Config, fill func(*Store) error) (aside string, err error) {
	m, err := openMarker(path, true)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if err := finishReplacement(path, m, cfg.step); err != nil {
		return "", err
	}
	next, err := build(path, cfg, fill)
	if err != nil {
		return "", errors.Join(err, discard(path))
	}
	next.Aside = ".replaced-" + time.Now().UTC().Format("20060102T150405.000Z")
	if neverWritten(path) != nil {
		aside = path + next.Aside
	}
	cfg.at()
	if err := m.Expect(next); err != nil {
		return "", err
	}
	return aside, finishReplacement(path, m, cfg.step)
}

// build makes the new store beside the old one, in one closed file.
func build(path string, cfg Config, fill func(*Store) error) (next marker.Next, err error) {
	if err := discard(path); err != nil {
		return next, err
	}
	fresh := path + restoredSuffix
	cfg.Restore, cfg.journal = false, -1 // the journal begins when the store is opened in its place
	s, err := Open(fresh, cfg)
	if err != nil {
		return next, err
	}
	cfg.at()
	err = fill(s)
	next = marker.Next{Store: s.marker.Store, Revision: s.revision()}
	if err := errors.Join(err, s.Close()); err != nil {
		return next, err
	}
	cfg.at()
	if there, err := hasText(fresh + "-wal"); err != nil || there {
		return next, errors.Join(fmt.Errorf("%s-wal is still in use", fresh), err)
	}
	for _, part := range []string{"-wal", "-shm", ".lock"} {
		if err := remove(fresh + part); err != nil {
			return next, err
		}
	}
	f, err := os.OpenFile(fresh, os.O_RDWR, 0)
	if err != nil {
		return next, err
	}
	return next, errors.Join(f.Sync(), f.Close(), marker.SyncDir(filepath.Dir(path)))
}

// discard takes away what a replacement that came to nothing has left.
func discard(path string) error {
	for _, part := range []string{"", ".new", ".new-journal", "-wal", "-shm", ".lock", ".lock.new"} {
		if err := remove(path + restoredSuffix + part); err != nil {
			return err
		}
	}
	return nil
}

// finishReplacement carries out what the marker announces. The new file still bears
// its own name until everything else is done.
func finishReplacement(path string, m *marker.Marker, step func()) error {
	next, cfg := m.Next, Config{step: step}
	if next == nil {
		return nil
	}
	dir := filepath.Dir(path)
	if there, err := hasText(path + restoredSuffix); err != nil {
		return err
	} else if there {
		for _, part := range parts {
			cfg.at()
			if err := os.Rename(path+part, path+next.Aside+part); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		if err := marker.SyncDir(dir); err != nil {
			return err
		}
		cfg.at()
		if err := os.Rename(path+restoredSuffix, path); err != nil {
			return err
		}
		if err := marker.SyncDir(dir); err != nil {
			return err
		}
	}
	cfg.at()
	m.Adopt(next.Store)
	return errors.Join(m.Write(next.Revision), m.Sync())
}

// at passes a step.
func (c *Config) at() {
	if c.step != nil {
		c.step()
	}
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

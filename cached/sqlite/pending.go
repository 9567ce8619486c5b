package sqlite

import (
	"io/fs"
	"os"

	"sallyport/cached"
)

// ReadJournal is pending.
func ReadJournal(path string) (*cached.Journal, error) { return nil, fs.ErrNotExist }

// Replace is pending.
func Replace(path string, cfg Config, fill func(*Store) error) (aside string, err error) {
	if old, err := Open(path, cfg); err != nil {
		return "", err
	} else if err := old.Close(); err != nil {
		return "", err
	}
	s, err := Open(path+".restore", cfg)
	if err != nil {
		return "", err
	}
	if err := fill(s); err != nil {
		s.Close()
		return "", err
	}
	if err := s.Close(); err != nil {
		return "", err
	}
	for _, end := range []string{"", ".lock"} {
		os.Rename(path+end, path+".before"+end)
		os.Rename(path+".restore"+end, path+end)
	}
	return path + ".before", nil
}

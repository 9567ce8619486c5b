package state

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/windows"
)

// ownerOf knows nothing here: the access control list of the user's profile
// directory is what keeps others out on Windows.
func ownerOf(fs.FileInfo) (uid int, ok bool) { return 0, false }

func permissions(fs.FileInfo) fs.FileMode { return 0o700 }

func lockFile(f *os.File) error {
	err := windows.LockFileEx(windows.Handle(f.Fd()),
		windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, new(windows.Overlapped))
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) {
		return ErrLocked
	}
	return err
}

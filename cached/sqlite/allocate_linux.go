package sqlite

import (
	"os"

	"golang.org/x/sys/unix"
)

// allocate gives f its first n bytes on the disk, whatever its size.
func allocate(f *os.File, n int64) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, n)
}

// flush makes what was written to f durable, without the times of the file.
func flush(f *os.File) error { return unix.Fdatasync(int(f.Fd())) }

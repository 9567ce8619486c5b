package sqlite_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"sallyport/cached/storetest"
)

func BenchmarkStore(b *testing.B) {
	storetest.Bench(b, func(b *testing.B) storetest.Engine {
		path := filepath.Join(b.TempDir(), "cached.db")
		return storetest.Engine{
			Store: open(b, path), Bars: storetest.SQLiteBars,
			Size: func() (int64, error) { return sizeOf(path, path+"-wal", path+"-shm") },
		}
	})
}

// sizeOf adds up the files that are there.
func sizeOf(paths ...string) (n int64, err error) {
	for _, path := range paths {
		info, err := os.Stat(path)
		switch {
		case err == nil:
			n += info.Size()
		case !errors.Is(err, fs.ErrNotExist):
			return 0, err
		}
	}
	return n, nil
}

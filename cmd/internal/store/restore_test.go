package store_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sallyport/cached"
	"sallyport/cached/sqlite"
	"sallyport/cached/storetest"
)

// BenchmarkScaleBackup measures a backup of many sessions into a file, its verification,
// and its restoring into a new database, where all sessions live on.
func BenchmarkScaleBackup(b *testing.B) {
	count := storetest.Sessions()
	deps := cached.Deps{Store: openSQLite(b), KEK: storetest.KEK()}
	server := storetest.Run(b, deps)
	storetest.Fill(b, server, storetest.Population{Sessions: count, Now: time.Now()})
	f, err := os.Create(filepath.Join(b.TempDir(), "backup"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	took := map[string]time.Duration{}
	timed := func(what string, do func() error) {
		b.Helper()
		began := time.Now()
		if err := do(); err != nil {
			b.Fatal(err)
		}
		took[what] += time.Since(began)
	}
	for i := 0; b.Loop(); i++ {
		var info cached.BackupInfo
		timed("backup", func() error {
			if _, err := f.Seek(0, 0); err != nil {
				return err
			}
			return server.Backup(b.Context(), f)
		})
		timed("verify", func() (err error) {
			info, err = cached.VerifyBackup(f, deps)
			return err
		})
		timed("restore", func() error {
			_, err := sqlite.Replace(filepath.Join(b.TempDir(), fmt.Sprintf("%d.db", i)), sqlite.Config{}, func(s *sqlite.Store) error {
				got, err := cached.Restore(b.Context(), cached.Deps{Store: s, KEK: deps.KEK}, f, cached.RestoreOptions{
					Journal: &cached.Journal{Epoch: info.Head.Epoch},
				})
				if err == nil && got.SessionsKept != count {
					err = fmt.Errorf("%d sessions live on; want %d", got.SessionsKept, count)
				}
				return err
			})
			return err
		})
	}
	for what, d := range took {
		b.ReportMetric(d.Seconds()/float64(b.N), what+"-s")
	}
	if info, err := f.Stat(); err == nil {
		b.ReportMetric(float64(info.Size())/float64(count), "bytes/session")
	}
}

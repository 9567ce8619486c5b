package sqlite_test
import "sallyport/cached/sqlite"
// openAndClose brings a store to today's schema.
func openAndClose(path string) error {
	store, err := sqlite.Open(path, sqlite.Config{})
	if err != nil {
		return err
	}
	return store.Close()
}
func holdLock(path string) error { return nil }
func holdRead(path string) error { return nil }

package postgres_test

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"sallyport/cached"
	"sallyport/cached/postgres"
	"sallyport/cached/postgres/postgrestest"
	"sallyport/cached/storetest"
)

// cluster is started once for all tests, each of which has its own database.
var cluster *postgrestest.Cluster

func TestMain(m *testing.M) {
	if text := os.Getenv(replaceEnv); text != "" {
		if err := replaceAndDie(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	var err error
	if cluster, err = postgrestest.New(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if err := cluster.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func config(t testing.TB, url string) postgres.Config {
	return postgres.Config{URL: url, PasswordFile: cluster.PasswordFile(), Marker: filepath.Join(t.TempDir(), "postgres.marker")}
}

func open(t testing.TB, cfg postgres.Config) *postgres.Store {
	t.Helper()
	s, err := postgres.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

var schemas atomic.Int64

// empty is the URL of a store that is not there yet: a schema, which is made more
// quickly than a database.
func empty() string {
	return fmt.Sprintf("%s&search_path=store%d", cluster.URL("postgres"), schemas.Add(1))
}

// fresh opens a new store.
func fresh(t testing.TB) *postgres.Store {
	t.Helper()
	return open(t, config(t, empty()))
}

func TestStore(t *testing.T) {
	storetest.Store(t, func(t *testing.T) cached.Store { return fresh(t) })
}

func TestRecords(t *testing.T) {
	storetest.Records(t, func(t *testing.T) storetest.API { return storetest.Serve(t, fresh(t)) })
}

func TestShared(t *testing.T) {
	storetest.Shared(t, func(t *testing.T) (a, b cached.Shared) {
		url := empty()
		return open(t, config(t, url)), open(t, config(t, url))
	})
}

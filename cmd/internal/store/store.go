// Package store opens cached with the engine that the configuration names. It is
// apart from package daemons because SQLite needs a C compiler, and only cached
// and the all-in-one shall.
package store

import (
	"context"
	"sync/atomic"

	"sallyport/audit"
	"sallyport/cached"
	"sallyport/cached/postgres"
	"sallyport/cached/sqlite"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
	"sallyport/internal/keyring"
)

// Open opens the records of the process and keeps them going until it ends.
func Open(p *run.Process) (*cached.Server, error) {
	layout, log := p.Config.Layout(), p.Log.Named("cached")
	p.Watch(func(f *config.File) []string { return []string{f.Layout().KEKFile(config.RecordsKey)} })
	key, err := layout.KEK(config.RecordsKey)
	if err != nil {
		return nil, err
	}
	var own atomic.Pointer[cached.Server] // set below: the log is opened before the server
	auditor, err := p.Audit("cached", func(ctx context.Context, h audit.Head) error {
		if s := own.Load(); s != nil {
			return p.KeepHeads("cached", s)(ctx, h)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	engine, err := openEngine(p, key)
	if err != nil {
		return nil, err
	}
	server, err := cached.New(p.Config.Cached, cached.Deps{Store: engine, KEK: key, Audit: auditor, Log: log})
	if err != nil {
		return nil, err
	}
	own.Store(server)
	p.OnReload(func(*config.File) error {
		kek, err := layout.KEK(config.RecordsKey)
		if err != nil {
			return err
		}
		if err := server.SetKEK(p.Context(), kek); err != nil {
			return err
		}
		if journals, ok := engine.(interface{ SetJournalKey(keyring.KEK) error }); ok {
			return journals.SetJournalKey(kek)
		}
		return nil
	})
	p.Go("cached", server.Run)
	return server, nil
}

// openEngine opens the engine and closes it at the end of the process.
func openEngine(p *run.Process, key keyring.KEK) (cached.Store, error) {
	layout, log, cfg := p.Config.Layout(), p.Log.Named("cached"), p.Config.Cached
	if !cfg.OnPostgres() {
		s, err := sqlite.Open(layout.Database(), sqlite.Config{JournalKey: key, Log: log})
		if err != nil {
			return nil, err
		}
		p.AtEnd(s.Close)
		return s, nil
	}
	onDatabase := onPostgres(p.Config)
	onDatabase.Log = log
	s, err := postgres.Open(p.Context(), onDatabase)
	if err != nil {
		return nil, err
	}
	p.AtEnd(s.Close)
	return s, nil
}

// onPostgres says where the store in PostgreSQL is.
func onPostgres(f *config.File) postgres.Config {
	return postgres.Config{
		URL: f.Cached.Store, PasswordFile: f.Cached.StorePasswordFile, Marker: f.Layout().PostgresMarker(),
	}
}

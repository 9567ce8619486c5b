// Package store opens cached with the engine that the configuration names. It is
// apart from package daemons because SQLite needs a C compiler, and only cached
// and the all-in-one shall.
package store

import (
	"context"
	"sync/atomic"

	"sallyport/audit"
	"sallyport/cached"
	"sallyport/cached/sqlite"
	"sallyport/cmd/internal/config"
	"sallyport/cmd/internal/run"
)

// Open opens the records of the process and keeps them going until it ends.
func Open(p *run.Process) (*cached.Server, error) {
	layout, log := p.Config.Layout(), p.Log.Named("cached")
	key, err := layout.KEK(config.RecordsKey)
	if err != nil {
		return nil, err
	}
	var own atomic.Pointer[cached.Server] // set below: the log is opened before the server
	auditor, err := p.Audit("cached", func(ctx context.Context, h audit.Head) error {
		if s := own.Load(); s != nil {
			return run.KeepHeads("cached", s)(ctx, h)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	engine, err := sqlite.Open(layout.Database(), sqlite.Config{Log: log})
	if err != nil {
		return nil, err
	}
	p.AtEnd(engine.Close)
	server, err := cached.New(p.Config.Cached, cached.Deps{Store: engine, KEK: key, Audit: auditor, Log: log})
	if err != nil {
		return nil, err
	}
	own.Store(server)
	p.ReloadOn(layout.KEKFile(config.RecordsKey))
	p.OnReload(func(*config.File) error {
		kek, err := layout.KEK(config.RecordsKey)
		if err != nil {
			return err
		}
		return server.SetKEK(p.Context(), kek)
	})
	p.Go("cached", server.Run)
	return server, nil
}
